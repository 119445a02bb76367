//! Kubernetes as the store: hosts whose leases are the podCIDRs of their nodes, and an API server on their underlay. That is
//! the double, or where `KUBE_APISERVER` (and `KUBE_ETCD`) name programs, the real one; nodes are made here as a kubelet and
//! the controller manager make them.
//!
//! What only the double can do is behind [`on_double`], which says what was not run.
//!
//! * [`lease`] — this host's own: the podCIDR, and what the node announces
//! * [`access`] — who asks, where, and what they may
//! * [`network_config`] — the file
//! * [`faults`] — an API server in trouble
//! * [`peers`] — which nodes are peers, and that none is lost
//! * [`mixed`] — with nodes of flannel's, and from one to the other
//! * [`manifest`] — what `deploy/kubernetes` has a cluster run
//! * [`bad_input`] — one line for each, and nothing half-made

mod access;
mod bad_input;
mod faults;
mod lease;
mod manifest;
mod mixed;
mod network_config;
mod peers;

use std::{fs, path::PathBuf, process::Command};

use serde_json::{Value, json};
use xtask::{
    lab::{ApiServer, Host, User},
    process::Process,
    progress::wait_for,
};

use crate::world::{LeaseStore, SOON, World, agent};

/// What flannel's annotations begin with.
pub const PREFIX: &str = "flannel.alpha.coreos.com/";
/// As flannel's manifest has it (Documentation/kube-flannel.yml), but for the addresses.
pub const NET_CONF: &str = r#"{"Network": "10.5.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}"#;

const NODES: &str = "/api/v1/nodes";
const MERGE: &str = "Content-Type: application/merge-patch+json";

/// What an agent is told of the store. The fields go in this order.
pub struct Kubernetes {
    pub server: ApiServer,
    /// The file of `--net-config-path`, the same for all hosts.
    pub net_conf: PathBuf,
}

impl LeaseStore for Kubernetes {
    /// The host is the node of its name.
    fn start_agent(&self, host: &mut Host, arguments: &[&str]) {
        let mut command = self.agent_command(host);
        command.env("NODE_NAME", &host.name).arg("--kubeconfig-file").arg(self.server.kubeconfig(User::AGENT));
        start(host, command.args(arguments));
    }
}

impl Kubernetes {
    /// The agent on a host, with leases from Kubernetes, and nothing that says where that is and who asks.
    pub fn agent_command(&self, host: &Host) -> Command {
        let mut command = host.agent_command(&agent());
        for variable in ["NODE_NAME", "POD_NAME", "POD_NAMESPACE", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"]
        {
            command.env_remove(variable);
        }
        command.arg("--kube-subnet-mgr").arg("--net-config-path").arg(&self.net_conf);
        command
    }
}

/// Starts a command as a host's agent.
pub fn start(host: &mut Host, command: &mut Command) {
    host.agent = None;
    fs::create_dir_all(host.directory()).unwrap();
    host.agent = Some(Process::start(command, &host.directory().join("agent.log")).unwrap());
}

/// Whether the API server is the double, for what a real one can't be made to do; where not, says that it was not run.
pub fn on_double(what: &str) -> bool {
    let double = ApiServer::is_double();
    if !double {
        println!("not run on a real API server: {what}");
    }
    double
}

/// Hosts, and an API server. Where there are nodes, those of hosts have their names, `node1` and so on.
pub type Cluster = World<Kubernetes>;

impl Cluster {
    /// Hosts without nodes and without agents. The agent's account has flannel's rights.
    pub fn without_nodes(hosts: u8) -> Self {
        let cluster = Self::in_store(hosts, |lab| {
            let server = lab.api_server().unwrap();
            server.allow(User::AGENT, &ApiServer::flannels_rules()).unwrap();
            Kubernetes { server, net_conf: lab.directory().join("net-conf.json") }
        });
        fs::write(&cluster.store.net_conf, NET_CONF).unwrap();
        cluster
    }

    /// Hosts with nodes, `node1` with the podCIDR 10.5.1.0/24 and so on.
    pub fn with_nodes(hosts: u8) -> Self {
        let cluster = Self::without_nodes(hosts);
        for number in 1..=hosts {
            cluster.add_node(&format!("node{number}"), &[&format!("10.5.{number}.0/24")]);
        }
        cluster
    }

    /// The same with a ready agent and a pod on each.
    pub fn with_pods(hosts: u8) -> Self {
        Self::with_nodes(hosts).ready(&[])
    }

    /// Two hosts that talk, and `fault`, after which both follow the nodes. No packet may be lost.
    pub fn with_traffic(fault: impl FnOnce(&mut Self)) {
        let mut cluster = Self::with_pods(2);
        cluster.wait_connected(0, 1);
        (0..2).for_each(|host| cluster.wait_followed(host));
        let traffic = [cluster.traffic(0, 1), cluster.traffic(1, 0)];
        fault(&mut cluster);
        for host in 0..2 {
            cluster.wait_followed(host);
            assert!(cluster.status(host)["running"] == true);
        }
        traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
    }

    /// Waits until a host's agent follows the nodes.
    pub fn wait_followed(&self, host: usize) {
        self.wait_status(host, "to be followed", |status| status["store"]["following"] == true);
    }

    /// Waits until a host's maps have so many peers.
    pub fn wait_peers(&self, host: usize, count: usize) {
        self.wait_status(host, &format!("{count} peers"), |status| status["peers"] == count);
    }

    /// Waits until a host has announced itself, and returns its VTEP's MAC.
    pub fn wait_announced(&self, host: usize) -> String {
        let name = &self.hosts[host].name;
        let mut mac = None;
        let waited = wait_for("an announcement", SOON, || {
            let data = self.annotation(name, "backend-data").unwrap_or_default();
            let data: Value = serde_json::from_str(&data).unwrap_or_default();
            mac = data["VtepMAC"].as_str().map(str::to_owned);
            mac.is_some()
        });
        waited.unwrap();
        mac.unwrap_or_default()
    }

    /// Waits until an annotation of flannel's is so.
    pub fn wait_annotation(&self, name: &str, suffix: &str, value: &str) {
        let waited = wait_for(suffix, SOON, || self.annotation(name, suffix).as_deref() == Some(value));
        assert!(waited.is_ok(), "{suffix} is not {value:?}: {}", self.node(name)["metadata"]["annotations"]);
    }

    /// Makes a node as a kubelet and the controller manager leave it; without podCIDRs, as before the latter saw it.
    pub fn add_node(&self, name: &str, pod_cidrs: &[&str]) {
        self.store.server.post(NODES, &node(name, pod_cidrs)).unwrap();
    }

    /// Makes the node of a host of flannel's, with the podCIDR 10.5.x.0/24 and the address 192.168.64.x. There is no such
    /// host.
    pub fn add_peer(&self, octet: u8) {
        let name = format!("peer{octet}");
        self.add_node(&name, &[&format!("10.5.{octet}.0/24")]);
        self.announce(&name, &format!("192.168.64.{octet}"), &format!("0a:00:00:00:00:{octet:02x}"));
    }

    /// Writes a node's annotations as flannel's daemon does.
    pub fn announce(&self, name: &str, address: &str, mac: &str) {
        self.annotate(
            name,
            &[
                ("kube-subnet-manager", Some("true")),
                ("backend-type", Some("vxlan")),
                ("backend-data", Some(&format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#))),
                ("public-ip", Some(address)),
            ],
        );
    }

    /// Sets flannel's annotations of a node, or removes them, as an administrator.
    pub fn annotate(&self, name: &str, annotations: &[(&str, Option<&str>)]) {
        let annotations = annotations.iter().map(|(suffix, value)| (format!("{PREFIX}{suffix}"), json!(value)));
        let annotations: serde_json::Map<_, _> = annotations.collect();
        self.patch_node(name, &json!({ "metadata": { "annotations": annotations } }));
    }

    /// Changes a node by a merge patch, as an administrator.
    pub fn patch_node(&self, name: &str, patch: &Value) {
        let path = format!("{NODES}/{name}");
        let (code, answer) =
            self.store.server.request(User::ADMIN, "PATCH", &path, &[MERGE], &patch.to_string()).unwrap();
        assert_eq!(code, 200, "{answer}");
    }

    /// Deletes a node, as an administrator or a cloud's controller does.
    pub fn delete_node(&self, name: &str) {
        let path = format!("{NODES}/{name}");
        let (code, answer) = self.store.server.request(User::ADMIN, "DELETE", &path, &[], "").unwrap();
        assert_eq!(code, 200, "{answer}");
    }

    /// A node, whole.
    pub fn node(&self, name: &str) -> Value {
        let path = format!("{NODES}/{name}");
        let (code, answer) = self.store.server.request(User::ADMIN, "GET", &path, &[], "").unwrap();
        assert_eq!(code, 200, "{answer}");
        serde_json::from_str(&answer).unwrap()
    }

    /// One of flannel's annotations of a node.
    pub fn annotation(&self, name: &str, suffix: &str) -> Option<String> {
        self.node(name)["metadata"]["annotations"][format!("{PREFIX}{suffix}")].as_str().map(str::to_owned)
    }

    /// Has the double fail as it is told; who asks is the agents' account.
    pub fn fault(&self, mut fault: Value) {
        fault["user"] = json!(User::AGENT.name());
        self.order("faults", &fault);
    }

    /// Asks the double for something.
    pub fn order(&self, path: &str, body: &Value) {
        self.store.server.double("POST", path, body).unwrap();
    }

    /// How often agents did something, of the double: `list nodes`, say.
    pub fn count(&self, what: &str) -> i64 {
        self.store.server.counter(User::AGENT, what).unwrap()
    }
}

/// A whole node.
pub fn node(name: &str, pod_cidrs: &[&str]) -> Value {
    let condition = |kind: &str, status: &str, reason: &str| json!({"type": kind, "status": status, "reason": reason, "message": reason});
    let resources = json!({"cpu": "8", "memory": "32386352Ki", "ephemeral-storage": "101430960Ki", "pods": "110"});
    let mut node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
            },
            "annotations": {
                "node.alpha.kubernetes.io/ttl": "0",
                "volumes.kubernetes.io/controller-managed-attach-detach": "true",
            },
        },
        "spec": {"providerID": format!("lab://{name}")},
        "status": {
            "capacity": resources, "allocatable": resources,
            "conditions": [
                condition("NetworkUnavailable", "True", "NoRouteCreated"),
                condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
                condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
                condition("PIDPressure", "False", "KubeletHasSufficientPID"),
                condition("Ready", "True", "KubeletReady"),
            ],
            "addresses": [{"type": "Hostname", "address": name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "images": (0..20).map(|number| json!({
                "names": [format!("registry.example/service-{number:02}:v1.{number}.0")], "sizeBytes": 80_000_000,
            })).collect::<Vec<_>>(),
        },
    });
    if let Some(first) = pod_cidrs.first() {
        node["spec"]["podCIDR"] = json!(first);
        node["spec"]["podCIDRs"] = json!(pod_cidrs);
    }
    node
}
