//! The lease table in Kubernetes, in flannel's annotations of nodes (flannel: pkg/subnet/kube).
//!
//! A lease is a node's podCIDR, which others assign; what it announces are the node's annotations. The network config is
//! a file. Unlike flannel's, changes are followed by their metadata only, nothing is listed again in steady state, and a
//! node that is deleted and made anew is another one.

mod access;
mod annotations;
mod client;
mod lease;
mod lines;
mod node;
mod nodes;
mod unread;
mod watch;

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use ipnet::Ipv4Net;
use nix::fcntl::OFlag;
use tokio::time::Instant;

use self::{access::Access, annotations::Names, nodes::Nodes};
pub use self::{annotations::InvalidPrefix, node::InvalidPodCidr};
use super::ResyncCause;
use crate::config::{ConfigError, NetworkConfig};

/// As large as a ConfigMap can be.
const MAX_CONFIG: u64 = 1 << 20;

/// How Kubernetes is reached, and which node this host is.
#[derive(Clone, Debug)]
pub struct KubernetesOptions {
    /// `--kube-api-url`.
    pub api_url: Option<String>,
    /// `--kubeconfig-file`.
    pub kubeconfig: Option<PathBuf>,
    /// `--kube-annotation-prefix`, as the operator wrote it.
    pub annotation_prefix: String,
    /// `--net-config-path`.
    pub net_config: PathBuf,
    /// `--set-node-network-unavailable`.
    pub set_node_network_unavailable: bool,
    /// `NODE_NAME`.
    pub node_name: Option<String>,
    /// `POD_NAMESPACE` and `POD_NAME`.
    pub pod: Option<(String, String)>,
}

/// Kubernetes could not be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The annotations' prefix.
    #[error("{0}; check --kube-annotation-prefix")]
    Prefix(#[from] InvalidPrefix),
    /// The API server's URL.
    #[error("--kube-api-url {0:?} is no URL such as https://10.0.0.1:6443")]
    Url(String),
    /// The kubeconfig.
    #[error("{path}: {problem}; check --kubeconfig-file")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Nothing says where the API server is.
    #[error(
        "neither --kubeconfig-file nor --kube-api-url is given, and this is no pod with a service account: {0}; give one of \
         them, or run it in the cluster"
    )]
    NotInCluster(String),
    /// Token or certificates.
    #[error("the credentials for Kubernetes can't be used: {0}; check the kubeconfig, or the service account")]
    Credentials(String),
    /// Nothing says which node this host is. flannel's text, and more.
    #[error("env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME: they say which node this host is")]
    NoNodeName,
    /// The pod is on no node.
    #[error("node name not present in pod spec '{namespace}/{pod}'; set NODE_NAME instead")]
    Unscheduled {
        /// `POD_NAMESPACE`.
        namespace: String,
        /// `POD_NAME`.
        pod: String,
    },
    /// The API server refused, or did not answer.
    #[error("Kubernetes API at {url}: {call}: {cause}")]
    Call {
        /// Verb, resource, subresource and name.
        call: String,
        /// Whom.
        url: String,
        /// What became of the connection, as the reason for a fresh list.
        kind: ResyncCause,
        /// Why not, and what may help.
        cause: String,
    },
    /// There is no such object.
    #[error("Kubernetes API at {url}: {call}: there is none of this name")]
    NotFound {
        /// What was asked.
        call: String,
        /// Whom.
        url: String,
    },
    /// There is no such node.
    #[error("Kubernetes at {url} has no node {name:?}; check NODE_NAME, or wait until the kubelet has registered it")]
    NoNode {
        /// Its name.
        name: String,
        /// Who was asked.
        url: String,
    },
    /// Nobody has given the node a podCIDR yet. flannel's text, and more.
    #[error(
        "node {0:?} pod cidr not assigned: kube-controller-manager does it with --allocate-node-cidrs and --cluster-cidr; \
         waiting for it"
    )]
    NoPodCidr(String),
    /// What it has is no lease.
    #[error("node {name:?}: {source}")]
    PodCidr {
        /// The node.
        name: String,
        /// Why not.
        source: InvalidPodCidr,
    },
    /// Another network's. flannel's text, and more.
    #[error(
        "subnet \"{network}\" specified in the flannel net config doesn't contain \"{subnet}\" PodCIDR of the {name:?} node; \
         Network and kube-controller-manager's --cluster-cidr must agree"
    )]
    OutsideNetwork {
        /// Of the network config.
        network: Ipv4Net,
        /// The podCIDR.
        subnet: Ipv4Net,
        /// The node.
        name: String,
    },
    /// The network configuration can't be read.
    #[error("failed to read net conf: {path}: {source}; check --net-config-path{}", crate::privileges::permission_hint(.source))]
    NoConfig {
        /// Its file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The network configuration can't be used.
    #[error("the network config in {path}: {source}")]
    Config {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ConfigError>,
    },
}

impl KubernetesError {
    /// Whether trying again can't help.
    pub const fn is_final(&self) -> bool {
        self.is_misconfiguration()
    }

    /// Whether Kubernetes did not answer, or lacks what this host's lease is made of: what was known before still counts
    /// then.
    pub const fn is_away(&self) -> bool {
        matches!(
            self,
            Self::Call { .. }
                | Self::NotFound { .. }
                | Self::NoNode { .. }
                | Self::NoPodCidr(_)
                | Self::NoConfig { .. }
                | Self::Config { .. }
        )
    }

    /// Whether a flag, a file or the node's podCIDR is to blame.
    pub const fn is_misconfiguration(&self) -> bool {
        matches!(
            self,
            Self::Prefix(_)
                | Self::Url(_)
                | Self::Kubeconfig { .. }
                | Self::NotInCluster(_)
                | Self::Credentials(_)
                | Self::NoNodeName
                | Self::PodCidr { .. }
                | Self::OutsideNetwork { .. }
        )
    }

    const fn resync_cause(&self) -> ResyncCause {
        match self {
            Self::Call { kind, .. } => *kind,
            _ => ResyncCause::Connection,
        }
    }
}

/// The nodes. Connects when it has to, and anew after a failure.
#[derive(Clone)]
pub struct Kubernetes {
    options: KubernetesOptions,
    names: Names,
    access: Access,
    url: String,
    identity: String,
    client: Option<kube::Client>,
    /// This host's, once it is known.
    node_name: Option<String>,
    /// When annotations were written last.
    written: Option<Instant>,
    /// How long after that they are written again.
    write_period: Duration,
    /// Whether the node says that packets of its pods can flow.
    is_complete: bool,
    /// The network config as it was told of last.
    seen_config: Option<Vec<u8>>,
    /// The nodes as they were last listed and nobody follows them yet, and their version. All clones have the same.
    listed: Arc<Mutex<Option<(Nodes, String)>>>,
}

impl Kubernetes {
    /// Checks what this host says; asks nothing of the API server yet.
    ///
    /// # Errors
    /// Those for which [`KubernetesError::is_final`].
    pub fn new(options: KubernetesOptions) -> Result<Self, KubernetesError> {
        let names = Names::new(&options.annotation_prefix)?;
        if options.node_name.is_none() && options.pod.is_none() {
            return Err(KubernetesError::NoNodeName);
        }
        let (access, url) = Access::find(&options)?;
        let identity = format!("{url} {}", names.prefix());
        let node_name = options.node_name.clone();
        Ok(Self {
            options,
            names,
            access,
            url,
            identity,
            client: None,
            node_name,
            written: None,
            write_period: lease::WRITE_PERIOD,
            is_complete: false,
            seen_config: None,
            listed: Arc::default(),
        })
    }

    /// A name for cluster and annotations.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The API server's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where the network config is.
    pub fn config_place(&self) -> String {
        self.options.net_config.display().to_string()
    }

    /// Makes the next call on a fresh connection.
    pub fn disconnect(&mut self) {
        self.client = None;
    }

    /// Reads and checks the network config.
    ///
    /// # Errors
    /// [`KubernetesError::NoConfig`] or [`KubernetesError::Config`].
    pub fn network_config(&mut self) -> Result<(NetworkConfig, Vec<u8>), KubernetesError> {
        let value = self.read_config()?;
        let config = self.parse_config(&value)?;
        self.seen_config = Some(value.clone());
        Ok((config, value))
    }

    fn read_config(&self) -> Result<Vec<u8>, KubernetesError> {
        let path = &self.options.net_config;
        read_file(path).map_err(|source| KubernetesError::NoConfig { path: path.clone(), source })
    }

    /// Checks the network config. Which subnets there are is not its business here, as with flannel.
    ///
    /// # Errors
    /// [`KubernetesError::Config`].
    pub fn parse_config(&self, value: &[u8]) -> Result<NetworkConfig, KubernetesError> {
        NetworkConfig::parse_assigned(&String::from_utf8_lossy(value)).map_err(|source| KubernetesError::Config {
            path: self.options.net_config.clone(),
            source: Box::new(source),
        })
    }
}

/// Of a ConfigMap, it is a symbolic link. What is no file might never end, and its opening wait for somebody.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    match file.metadata()?.file_type() {
        kind if kind.is_file() => {}
        kind if kind.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        _ => return Err(io::Error::other("it is no file")),
    }
    let mut content = Vec::new();
    file.by_ref().take(MAX_CONFIG + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_CONFIG {
        return Err(io::Error::other(format!("it has more than {MAX_CONFIG} bytes")));
    }
    Ok(content)
}
