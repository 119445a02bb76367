//! What the runtime asks: variables, and the network configuration on standard input (CNI SPEC.md, "Parameters").

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{LATEST, VERSIONS, error::Error};

/// flannel's defaults.
const SUBNET_FILE: &str = "/run/flannel/subnet.env";
const DATA_DIR: &str = "/var/lib/cni/flannel";
/// A network without a version has the first.
const FIRST: &str = "0.1.0";
/// Of an interface's name, in bytes (Linux: IFNAMSIZ, with its end).
const IFNAMSIZ: usize = 16;
/// Where GC finds what is to stay; the second name is one that the specification once had by mistake.
const VALID_ATTACHMENTS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];

/// The capability of plugins that are told a pod's annotations, as containerd (internal/cri/server/sandbox_run.go) and CRI-O
/// (ocicni) know it.
const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// A pod's word on the bypass.
const ANNOTATION: &str = "flannel.alpha.coreos.com/bypass";

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Which versions are known.
    Version,
    /// All else, which concerns a network.
    Operation(Operation),
}

/// What is asked for in a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// Whether it is attached as it should be.
    Check,
    /// Whether containers can be attached.
    Status,
    /// Detach all but some.
    Gc,
}

/// A container's interface.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Attachment {
    /// The runtime's name of the container.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The name of the interface in the container.
    pub ifname: String,
}

/// The network configuration, as far as this plugin reads it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The network's name.
    #[serde(default)]
    pub name: String,
    /// The specification that it is written by.
    #[serde(default)]
    pub cni_version: String,
    /// Where the agent says what this host's subnet is.
    #[serde(default = "subnet_file")]
    pub subnet_file: PathBuf,
    /// Where the delegates' configurations are kept.
    #[serde(default = "data_dir")]
    pub data_dir: PathBuf,
    /// What the delegate is to be told besides.
    pub delegate: Option<Map<String, Value>>,
    /// What the address management is to be told besides.
    pub ipam: Option<Map<String, Value>>,
    /// What the runtime says of this container, such as port mappings.
    pub runtime_config: Option<Map<String, Value>>,
    /// `off`: what the container sends and receives is left to the host's stack. `auto`: it is not, which is the default.
    pub bypass: Option<String>,
    /// The result of ADD.
    pub prev_result: Option<Value>,
    /// For GC: what is to stay. [`None`] where it does not say.
    #[serde(skip)]
    pub valid_attachments: Option<Vec<Attachment>>,
}

/// A request that was found to be in order.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is asked for.
    pub operation: Operation,
    /// Of which interface; ADD, DEL and CHECK have one.
    pub attachment: Option<Attachment>,
    /// The container's network namespace; ADD and CHECK have one.
    pub netns: Option<PathBuf>,
    /// Where plugins are.
    pub path: Vec<PathBuf>,
    /// In which network.
    pub network: Network,
}

fn subnet_file() -> PathBuf {
    SUBNET_FILE.into()
}

fn data_dir() -> PathBuf {
    DATA_DIR.into()
}

impl Network {
    /// Whether the container's packets are to be left to the host's stack: by the pod's annotation, by what else the runtime
    /// says of this container, or by the network's configuration; who says something comes first in this order.
    ///
    /// # Errors
    /// [`Error::Network`] where one of them says something else than `off` or `auto`.
    pub fn takes_stack(&self) -> Result<bool, Error> {
        let of_runtime = |key: &str| self.runtime_config.as_ref()?.get(key);
        let annotation = of_runtime(POD_ANNOTATIONS).and_then(|annotations| annotations.get(ANNOTATION)?.as_str());
        let of_container = of_runtime("bypass").and_then(Value::as_str);
        let settings = [
            (annotation, "the pod's annotation flannel.alpha.coreos.com/bypass"),
            (of_container, "runtimeConfig.bypass"),
            (self.bypass.as_deref(), "bypass"),
        ];
        let mut said = None;
        for (value, whose) in settings {
            let takes_stack = match value {
                None => continue,
                Some("off") => true,
                Some("auto") => false,
                Some(other) => {
                    return Err(Error::Network(format!("{whose} is {other:?}, and can be \"off\" or \"auto\"")));
                }
            };
            said.get_or_insert(takes_stack);
        }
        Ok(said.unwrap_or_default())
    }
}

impl Command {
    /// From `CNI_COMMAND`.
    ///
    /// # Errors
    /// [`Error::Variable`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        Ok(Self::Operation(match text {
            "VERSION" => return Ok(Self::Version),
            "ADD" => Operation::Add,
            "DEL" => Operation::Del,
            "CHECK" => Operation::Check,
            "STATUS" => Operation::Status,
            "GC" => Operation::Gc,
            _ => {
                return Err(Error::Variable {
                    name: "CNI_COMMAND",
                    value: text.to_owned(),
                    reason: "unknown CNI_COMMAND",
                });
            }
        }))
    }
}

impl Operation {
    /// Its value of `CNI_COMMAND`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
        }
    }

    /// The first version of the specification that has it.
    const fn since(self) -> &'static str {
        match self {
            Self::Add | Self::Del => FIRST,
            Self::Check => "0.4.0",
            Self::Status | Self::Gc => "1.1.0",
        }
    }

    const fn variables(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
            Self::Status | Self::Gc => &["CNI_PATH"],
        }
    }
}

impl Attachment {
    /// Both become parts of a file's name, and the kernel has rules for the second.
    ///
    /// # Errors
    /// [`Error::Variable`].
    pub fn validate(&self) -> Result<(), Error> {
        let Self { container_id, ifname } = self;
        let refuse = |name, value: &str, reason| Err(Error::Variable { name, value: value.to_owned(), reason });
        if !is_identifier(container_id) {
            return refuse("CNI_CONTAINERID", container_id, "invalid characters in containerID");
        }
        let reason = if ifname.len() >= IFNAMSIZ {
            "interface name is too long"
        } else if ifname == "." || ifname == ".." {
            "interface name is . or .."
        } else if ifname.is_empty() || ifname.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
        {
            "interface name contains / or : or whitespace characters"
        } else {
            return Ok(());
        };
        refuse("CNI_IFNAME", ifname, reason)
    }
}

impl Request {
    /// Checks variables and configuration in the order of the reference implementation (cni: pkg/skel/skel.go).
    ///
    /// # Errors
    /// Those of codes 1, 4, 6 and 7.
    pub fn parse(operation: Operation, variable: impl Fn(&str) -> Option<String>, input: &[u8]) -> Result<Self, Error> {
        let missing: Vec<_> = operation.variables().iter().copied().filter(|name| variable(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(Error::MissingVariables(missing));
        }
        let network = Network::parse(input)?;
        let given = VERSIONS.iter().position(|version| *version == network.version());
        let since = VERSIONS.iter().position(|version| *version == operation.since());
        match given {
            None => return Err(Error::Version { given: network.version().to_owned() }),
            Some(_) if given < since => {
                let given = network.version().to_owned();
                return Err(Error::CommandOfLaterVersion { command: operation.name(), given });
            }
            Some(_) => {}
        }
        if network.name.is_empty() {
            return Err(Error::Network("missing network name".to_owned()));
        }
        if !is_identifier(&network.name) {
            return Err(Error::Network(format!("invalid characters found in network name {:?}", network.name)));
        }
        let attachment = match operation {
            Operation::Add | Operation::Del | Operation::Check => {
                let of = |name| variable(name).unwrap_or_default();
                let attachment = Attachment { container_id: of("CNI_CONTAINERID"), ifname: of("CNI_IFNAME") };
                attachment.validate()?;
                Some(attachment)
            }
            Operation::Status | Operation::Gc => None,
        };
        let path = variable("CNI_PATH").unwrap_or_default();
        let path = std::env::split_paths(&path).filter(|path| !path.as_os_str().is_empty()).collect();
        Ok(Self { operation, attachment, netns: variable("CNI_NETNS").map(PathBuf::from), path, network })
    }
}

impl Network {
    /// From JSON.
    ///
    /// # Errors
    /// [`Error::Decode`].
    pub fn parse(input: &[u8]) -> Result<Self, Error> {
        let value: Value = serde_json::from_slice(input)?;
        let valid = VALID_ATTACHMENTS.iter().find_map(|key| value.get(key)).cloned();
        let mut network: Self = serde_json::from_value(value)?;
        // The reference implementation writes an empty list as null.
        network.valid_attachments =
            valid.map(serde_json::from_value::<Option<Vec<Attachment>>>).transpose()?.map(Option::unwrap_or_default);
        Ok(network)
    }

    /// The version that it is written by.
    pub fn version(&self) -> &str {
        if self.cni_version.is_empty() { FIRST } else { &self.cni_version }
    }
}

/// As the specification has it for containers and networks.
fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// The version of a reply to an input that may be anything: the input's where it is known.
pub fn version_for_reply(input: &[u8]) -> &'static str {
    let value: Value = serde_json::from_slice(input).unwrap_or_default();
    let given = value.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
    VERSIONS.into_iter().find(|version| *version == given).unwrap_or(LATEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(operation: Operation, id: &str, ifname: &str, input: &str) -> Result<Request, Error> {
        let variable = |name: &str| {
            Some(match name {
                "CNI_CONTAINERID" => id.to_owned(),
                "CNI_IFNAME" => ifname.to_owned(),
                "CNI_NETNS" => "/run/netns/x".to_owned(),
                "CNI_PATH" => "/a::/b".to_owned(),
                _ => return None,
            })
        };
        Request::parse(operation, variable, input.as_bytes())
    }

    #[test]
    fn flannels_defaults() {
        let request = request(Operation::Add, "c1", "eth0", r#"{"name":"cbr0","type":"flannel"}"#).expect("valid");
        assert_eq!(request.network.subnet_file.to_str(), Some("/run/flannel/subnet.env"));
        assert_eq!(request.network.data_dir.to_str(), Some("/var/lib/cni/flannel"));
        assert_eq!(request.network.version(), "0.1.0");
        assert_eq!(request.path, [PathBuf::from("/a"), PathBuf::from("/b")]);
    }

    #[test]
    fn names_that_are_none() {
        let conf = r#"{"name":"cbr0"}"#;
        for (id, ifname) in [
            ("../x", "eth0"),
            ("", "eth0"),
            ("-x", "eth0"),
            ("a/b", "eth0"),
            ("a:b", "eth0"),
            ("c1", ".."),
            ("c1", "a/b"),
            ("c1", "a:b"),
            ("c1", "a b"),
            ("c1", ""),
            ("c1", "abcdefghijklmnop"),
        ] {
            assert_eq!(request(Operation::Del, id, ifname, conf).expect_err("refused").code(), 4, "{id} {ifname}");
        }
        assert!(request(Operation::Del, "c_1.a-B", "abcdefghijklmno", conf).is_ok());
    }

    #[test]
    fn commands_and_their_versions() {
        for (operation, version, code) in [
            (Operation::Add, "0.3.1", None),
            (Operation::Add, "1.1.0", None),
            (Operation::Add, "1.2.0", Some(1)),
            (Operation::Check, "0.3.1", Some(1)),
            (Operation::Check, "0.4.0", None),
            (Operation::Gc, "1.0.0", Some(1)),
            (Operation::Status, "1.1.0", None),
        ] {
            let conf = format!(r#"{{"name":"cbr0","cniVersion":"{version}"}}"#);
            let result = request(operation, "c1", "eth0", &conf);
            assert_eq!(result.err().map(|error| error.code()), code, "{operation:?} {version}");
        }
    }

    #[test]
    fn who_is_left_to_the_stack() {
        let takes_stack = |text: &str| {
            let network = Network::parse(format!(r#"{{"name":"n"{text}}}"#).as_bytes()).expect("valid");
            network.takes_stack().map_err(|error| (error.code(), error.to_string()))
        };
        let annotated =
            |value: &str| format!(r#","runtimeConfig":{{"{POD_ANNOTATIONS}":{{"a/b":"c","{ANNOTATION}":"{value}"}}}}"#);
        let told = |value: &str| format!(r#","runtimeConfig":{{"bypass":"{value}"}}"#);
        let network = |value: &str| format!(r#","bypass":"{value}""#);
        for (text, expected) in [
            (String::new(), false),
            (annotated("off"), true),
            (told("off"), true),
            (network("off"), true),
            (network("auto"), false),
            (network("off") + &annotated("auto"), false),
            (network("off") + &told("auto"), false),
            (network("auto") + &annotated("off"), true),
            (format!(r#","bypass":"off","runtimeConfig":{{"{POD_ANNOTATIONS}":{{"a/b":"auto"}}}}"#), true),
            (format!(r#","runtimeConfig":{{"{POD_ANNOTATIONS}":null}}"#), false),
        ] {
            assert_eq!(takes_stack(&text), Ok(expected), "{text}");
        }
        for (text, whose) in [
            (annotated("of"), "the pod's annotation flannel.alpha.coreos.com/bypass is \"of\""),
            (told("on"), "runtimeConfig.bypass is \"on\""),
            (network(""), "bypass is \"\""),
            (network("no") + &annotated("off"), "bypass is \"no\""),
        ] {
            let (code, message) = takes_stack(&text).expect_err("refused");
            assert!(code == 7 && message.contains(whose), "{text}: {code} {message}");
        }
    }

    #[test]
    fn what_is_to_stay() {
        let valid =
            |text: &str| Network::parse(format!(r#"{{"name":"n"{text}}}"#).as_bytes()).map(|n| n.valid_attachments);
        let one = r#"[{"containerID":"a","ifname":"eth0"}]"#;
        let attachment = Attachment { container_id: "a".to_owned(), ifname: "eth0".to_owned() };
        for key in VALID_ATTACHMENTS {
            assert_eq!(valid(&format!(r#","{key}":{one}"#)).expect("valid"), Some(vec![attachment.clone()]));
            assert_eq!(valid(&format!(r#","{key}":null"#)).expect("valid"), Some(Vec::new()));
        }
        assert_eq!(valid("").expect("valid"), None);
        assert_eq!(valid(r#","cni.dev/valid-attachments":7"#).expect_err("refused").code(), 6);
    }
}
