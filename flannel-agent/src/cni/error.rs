//! The error result, and its codes (CNI SPEC.md, "Error").

use std::{io, path::PathBuf, time::Duration};

use serde_json::{Value, json};

use super::{VERSIONS, subnet_file::SubnetFileError};

/// Why a command was not served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The network's `cniVersion` is none that is known.
    #[error("incompatible CNI versions")]
    Version {
        /// What it is.
        given: String,
    },
    /// The network's `cniVersion` has no such command.
    #[error("config version does not allow {command}")]
    CommandOfLaterVersion {
        /// Which.
        command: &'static str,
        /// What it is.
        given: String,
    },
    /// The delegate may not be given this.
    #[error("'delegate' dictionary must not have '{key}' field, it'll be set by flannel")]
    DelegateField {
        /// The key.
        key: &'static str,
        /// What it has.
        value: Value,
    },
    /// The runtime names a namespace that is not there.
    #[error("the network namespace {0} of CNI_NETNS does not exist")]
    NetnsGone(PathBuf),
    /// Nothing is known of the attachment.
    #[error("container {container_id} has no interface {ifname} of this plugin")]
    NotAttached {
        /// The container.
        container_id: String,
        /// The interface.
        ifname: String,
    },
    /// Variables that the command needs are not set.
    #[error("required env variables [{}] missing", .0.join(","))]
    MissingVariables(Vec<&'static str>),
    /// A variable has a value that can't be.
    #[error("{name}: {reason}")]
    Variable {
        /// Its name.
        name: &'static str,
        /// What it has.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The interface that is to be made is there.
    #[error("CNI_IFNAME: {ifname} already exists in {}", netns.display())]
    InterfaceExists {
        /// The interface.
        ifname: String,
        /// The namespace.
        netns: PathBuf,
    },
    /// A file, a directory or a process.
    #[error("{call} {subject}: {source}")]
    Io {
        /// The failed call.
        call: &'static str,
        /// What it was on.
        subject: String,
        /// Why it failed.
        source: io::Error,
    },
    /// What is kept of an attachment can't be written.
    #[error("keep the delegate's configuration: {0}")]
    Keep(#[from] crate::atomic_file::WriteError),
    /// The delegate is not there.
    #[error("failed to find plugin \"{plugin}\" in path [{}]", display(path))]
    DelegateMissing {
        /// Its name.
        plugin: String,
        /// Where it was looked for.
        path: Vec<PathBuf>,
    },
    /// Standard input is no network configuration.
    #[error("failed to load netconf: {0}")]
    Decode(#[from] serde_json::Error),
    /// `subnet.env`.
    #[error("failed to load flannel 'subnet.env' file: {0}. Check the flannel pod log for this node.")]
    SubnetFile(#[from] SubnetFileError),
    /// The network configuration can't be used.
    #[error("{0}")]
    Network(String),
    /// The delegate took too long, and was ended.
    #[error("the plugin {plugin} did not end within {limit:?}")]
    DelegateHangs {
        /// Its name.
        plugin: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// STATUS: no container can be attached.
    #[error("no container can be attached: {0}")]
    NotReady(String),
    /// STATUS: those that are attached suffer as well.
    #[error("no container can be attached, and those that are may be cut off: {0}")]
    LimitedConnectivity(String),
    /// The delegate failed without an error result.
    #[error("the plugin {plugin} failed without saying why: {status}")]
    DelegateSilent {
        /// Its name.
        plugin: String,
        /// How it ended.
        status: String,
    },
    /// CHECK: the host's subnet is another one than when the container was attached.
    #[error("the container's subnet {container} is no longer this host's, which is {host}: it can't be reached")]
    SubnetMoved {
        /// When it was attached.
        container: String,
        /// Now.
        host: String,
    },
    /// The delegate's error result, handed on as it is.
    #[error("the plugin {plugin} failed: {}", String::from_utf8_lossy(result))]
    Delegate {
        /// Its name.
        plugin: String,
        /// What it printed.
        result: Vec<u8>,
    },
}

impl Error {
    /// Its number: below 100 the specification's, from 100 this plugin's.
    pub const fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::CommandOfLaterVersion { .. } => 1,
            Self::DelegateField { .. } => 2,
            Self::NetnsGone(_) | Self::NotAttached { .. } => 3,
            Self::MissingVariables(_) | Self::Variable { .. } | Self::InterfaceExists { .. } => 4,
            Self::Io { .. } | Self::Keep(_) | Self::DelegateMissing { .. } => 5,
            Self::Decode(_) | Self::SubnetFile(SubnetFileError::Content { .. } | SubnetFileError::Missing { .. }) => 6,
            Self::Network(_) => 7,
            Self::SubnetFile(SubnetFileError::Open { .. }) | Self::DelegateHangs { .. } => 11,
            Self::NotReady(_) => 50,
            Self::LimitedConnectivity(_) => 51,
            Self::DelegateSilent { .. } | Self::Delegate { .. } => 100,
            Self::SubnetMoved { .. } => 101,
        }
    }

    /// What more there is to say: the values, and what to do.
    fn details(&self) -> String {
        match self {
            Self::Version { given } => format!("config is {given:?}, plugin supports {VERSIONS:?}"),
            Self::CommandOfLaterVersion { given, .. } => format!("config is {given:?}"),
            Self::DelegateField { key, value } => format!("delegate.{key} is {value}; remove it"),
            Self::Variable { value, .. } => format!("it is {value:?}"),
            Self::InterfaceExists { .. } => "DEL comes before the next ADD of one interface".to_owned(),
            Self::Keep(_) => "check dataDir in the network configuration, and that it can be written".to_owned(),
            Self::DelegateMissing { .. } => {
                "install it there (Debian: containernetworking-plugins has it in /usr/lib/cni), or add its directory to \
                 the plugin directories of the runtime"
                    .to_owned()
            }
            Self::SubnetFile(_) => {
                "flannel-agent writes it once this host has a lease; see flannel-agent status".to_owned()
            }
            Self::LimitedConnectivity(_) => "see flannel-agent status".to_owned(),
            Self::SubnetMoved { .. } => "the container has to be made anew".to_owned(),
            Self::NetnsGone(_)
            | Self::NotAttached { .. }
            | Self::MissingVariables(_)
            | Self::Io { .. }
            | Self::Decode(_)
            | Self::Network(_)
            | Self::DelegateHangs { .. }
            | Self::NotReady(_)
            | Self::DelegateSilent { .. }
            | Self::Delegate { .. } => String::new(),
        }
    }

    /// What goes to standard output.
    pub fn to_result(&self, version: &str) -> Vec<u8> {
        if let Self::Delegate { result, .. } = self {
            return result.clone();
        }
        let mut result = json!({ "cniVersion": version, "code": self.code(), "msg": self.to_string() });
        let details = self.details();
        if !details.is_empty() {
            result["details"] = details.into();
        }
        result.to_string().into_bytes()
    }
}

fn display(path: &[PathBuf]) -> String {
    path.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" ")
}
