//! What agents of a lab keep their leases in, whichever it is: a real etcd, or a Kubernetes API server.

use std::{fmt, fs, net::Ipv4Addr, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{ApiServer, Host, Lab, PREFIX, Store, User};

/// What flannel's annotations begin with by default.
const ANNOTATIONS: &str = "flannel.alpha.coreos.com/";

/// Which of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum StoreKind {
    /// etcd
    #[default]
    Etcd,
    /// The nodes of a Kubernetes API server: the double, or the one that the variable KUBE_APISERVER names
    Kubernetes,
}

impl StoreKind {
    /// Starts one on the underlay of a lab, with a network config.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn start(self, lab: &Lab, config: &str) -> Result<Box<dyn LeaseStore>> {
        Ok(match self {
            Self::Etcd => {
                let store = lab.store()?;
                store.put(&format!("{PREFIX}/config"), config)?;
                Box::new(store)
            }
            Self::Kubernetes => Box::new(Kubernetes::start(lab, config)?),
        })
    }
}

impl fmt::Display for StoreKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Etcd => "etcd",
            Self::Kubernetes => "a Kubernetes API server",
        })
    }
}

/// A store that agents keep their leases in.
pub trait LeaseStore {
    /// What it is, and its URL.
    fn place(&self) -> String;

    /// A command that shows what is in it, to be run on the underlay.
    fn shown_by(&self) -> String;

    /// Lets a host take part, where the store does not leave that to the agent.
    ///
    /// # Errors
    /// Where the store refuses.
    fn admit(&self, host: &Host) -> Result<()>;

    /// Tells the agent of a host where its lease is to be kept.
    fn configure(&self, host: &Host, agent: &mut Command);

    /// The leases that flannel finds there, with a VTEP each; in the order of their names.
    ///
    /// # Errors
    /// Where the store does not answer.
    fn leases(&self) -> Result<Vec<Lease>>;
}

/// A lease as it is in a store.
#[derive(Clone, Debug)]
pub struct Lease {
    /// Where it is: a key, or a node and what that has.
    pub name: String,
    /// What it announces, as it is there.
    pub text: String,
    /// The address of the subnet.
    pub subnet: Ipv4Addr,
    /// The host's VTEP address.
    pub public_ip: Ipv4Addr,
    /// MAC of its vxlan device.
    pub vtep_mac: String,
}

impl LeaseStore for Store {
    fn place(&self) -> String {
        format!("etcd at {}", self.endpoint())
    }

    fn shown_by(&self) -> String {
        format!("etcdctl --endpoints {} get --prefix {PREFIX}", self.endpoint())
    }

    fn admit(&self, _host: &Host) -> Result<()> {
        Ok(())
    }

    fn configure(&self, _host: &Host, agent: &mut Command) {
        agent.args(["--etcd-endpoints", self.endpoint()]);
    }

    fn leases(&self) -> Result<Vec<Lease>> {
        let read = |(name, text): (String, String)| {
            // "/coreos.com/network/subnets/10.5.1.0-24", or with "&fd00:...-64" behind it
            let subnet = name.rsplit('/').next()?.split('-').next()?.parse().ok()?;
            let value: Value = serde_json::from_str(&text).ok()?;
            Lease::new(name, text, subnet, &value["PublicIP"], &value["BackendData"])
        };
        Ok(self.list(&format!("{PREFIX}/subnets/"))?.into_iter().filter_map(read).collect())
    }
}

/// An API server, and what its cluster gives to agents: a right to the nodes, a file with the network config, a podCIDR
/// for each.
#[derive(Debug)]
pub struct Kubernetes {
    /// The server.
    pub server: ApiServer,
    net_config: PathBuf,
}

impl Kubernetes {
    fn start(lab: &Lab, config: &str) -> Result<Self> {
        Self::with(lab.api_server()?, lab.directory().join("net-conf.json"), config)
    }

    /// On a server that is there, with the file for the network config.
    ///
    /// # Errors
    /// Where the server refuses, or the file can't be written.
    pub fn with(server: ApiServer, net_config: PathBuf, config: &str) -> Result<Self> {
        server.allow(User::AGENT, &ApiServer::flannels_rules())?;
        fs::write(&net_config, config).with_context(|| format!("write {net_config:?}"))?;
        Ok(Self { server, net_config })
    }
}

impl LeaseStore for Kubernetes {
    fn place(&self) -> String {
        let what =
            if ApiServer::is_double() { "a double of the Kubernetes API server" } else { "a Kubernetes API server" };
        format!("{what} at {}", self.server.endpoint())
    }

    fn shown_by(&self) -> String {
        format!("kubectl --kubeconfig {} get nodes -o yaml", self.server.kubeconfig(User::ADMIN).display())
    }

    /// As its kubelet and the controller manager do: the node with a podCIDR.
    fn admit(&self, host: &Host) -> Result<()> {
        let [.., number] = host.address.octets();
        self.server.add_node(&host.name, &format!("10.5.{number}.0/24"))
    }

    fn configure(&self, host: &Host, agent: &mut Command) {
        agent.arg("--kube-subnet-mgr").arg("--kubeconfig-file").arg(self.server.kubeconfig(User::AGENT));
        agent.arg("--net-config-path").arg(&self.net_config).env("NODE_NAME", &host.name);
    }

    fn leases(&self) -> Result<Vec<Lease>> {
        let (code, body) = self.server.request(User::ADMIN, "GET", "/api/v1/nodes", &[], "")?;
        anyhow::ensure!(code == 200, "list nodes: {code}: {body}");
        let nodes: Value = serde_json::from_str(&body)?;
        let read = |node: &Value| {
            let mut annotations = node["metadata"]["annotations"].as_object()?.clone();
            annotations.retain(|name, _| name.starts_with(ANNOTATIONS));
            let value = |suffix: &str| annotations.get(&format!("{ANNOTATIONS}{suffix}"));
            let public_ip = value("kube-subnet-manager").and(value("public-ip"))?;
            let data: Value = serde_json::from_str(value("backend-data")?.as_str()?).ok()?;
            let (node, pod_cidr) = (node["metadata"]["name"].as_str()?, node["spec"]["podCIDR"].as_str()?);
            let subnet = pod_cidr.split('/').next()?.parse().ok()?;
            let text = serde_json::to_string(&annotations).ok()?;
            Lease::new(format!("node {node}, podCIDR {pod_cidr}"), text, subnet, public_ip, &data)
        };
        Ok(nodes["items"].as_array().context("no list of nodes")?.iter().filter_map(read).collect())
    }
}

impl Lease {
    fn new(name: String, text: String, subnet: Ipv4Addr, public_ip: &Value, data: &Value) -> Option<Self> {
        let public_ip = public_ip.as_str()?.parse().ok()?;
        let vtep_mac = data["VtepMAC"].as_str()?.to_owned();
        Some(Self { name, text, subnet, public_ip, vtep_mac })
    }
}
