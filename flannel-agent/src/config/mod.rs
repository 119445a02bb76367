//! The network configuration: the JSON object under `<prefix>/config`, with flannel's rules, defaults and messages
//! (flannel: pkg/subnet/config.go, pkg/backend/vxlan/vxlan.go).

use std::net::Ipv4Addr;

use flannel_common::vxlan::{self, InvalidVni, Vni};
use ipnet::Ipv4Net;
use serde::Deserialize;
use serde_json::{Map, Value};

/// A valid network configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The network that all leases are cut from, host bits cleared.
    pub network: Ipv4Net,
    /// Prefix length of each lease.
    pub subnet_len: u8,
    /// The first subnet to lease.
    pub subnet_min: Ipv4Addr,
    /// The last subnet to lease.
    pub subnet_max: Ipv4Addr,
    /// Whether packet rules are nftables' or iptables', where it is said.
    pub enable_nftables: Option<bool>,
    /// The backend's own settings.
    pub backend: VxlanConfig,
}

/// Settings of the vxlan backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanConfig {
    /// The overlay's VXLAN network identifier.
    pub vni: Vni,
    /// UDP port of the tunnel.
    pub port: u16,
    /// MTU of the underlay to assume instead of the external interface's, in bytes.
    pub mtu: Option<u32>,
    /// Whether the kernel's vxlan device learns addresses; the programs do not depend on it.
    pub learning: bool,
    /// flannel's option to route to peers on the same link without encapsulation.
    pub direct_routing: bool,
}

/// Why a configuration can't be used. Where flannel has a message for the case, it is flannel's.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// A key has a value of another type.
    #[error("{0}")]
    Value(String),
    /// No Network.
    #[error("please define a correct Network parameter in the flannel config")]
    NoNetwork,
    /// Network is no IPv4 prefix.
    #[error("invalid CIDR address: {0}")]
    InvalidCidr(String),
    /// Network is longer than /28.
    #[error("network is too small. Minimum useful network prefix is /28")]
    NetworkTooSmall,
    /// SubnetLen is longer than /30.
    #[error("SubnetLen must be less than /31")]
    SubnetLenTooLong,
    /// Fewer than four subnets.
    #[error("network must be able to accommodate at least four subnets")]
    TooFewSubnets,
    /// SubnetMin or SubnetMax lies elsewhere.
    #[error("{0} is not in the range of the Network")]
    OutOfRange(&'static str),
    /// SubnetMin or SubnetMax is not a subnet's address.
    #[error("{0} is not on a SubnetLen boundary: {1}")]
    OffBoundary(&'static str, Ipv4Addr),
    /// SubnetMin is greater than SubnetMax: flannel accepts this and runs out of subnets.
    #[error("SubnetMin {0} is greater than SubnetMax {1}")]
    EmptyRange(Ipv4Addr, Ipv4Addr),
    /// A backend that is none of ours.
    #[error("unknown backend type: {0} (this agent has vxlan)")]
    UnknownBackend(String),
    /// VNI out of range.
    #[error("Backend: {0}")]
    Vni(#[from] InvalidVni),
    /// Port out of range.
    #[error("Backend: Port {0} is out of range: use 1 to 65535, or 0 for the default {default}", default = vxlan::DEFAULT_PORT)]
    Port(u64),
    /// MTU out of range.
    #[error("Backend: MTU {0} is out of range: use 118 to 65535, or 0 for the external interface's")]
    Mtu(u64),
    /// Something of flannel's that this agent does not have.
    #[error("{0} is not supported by this agent; remove it from the flannel config")]
    Unsupported(&'static str),
}

/// The smallest MTU of an underlay whose overlay still has the 68 bytes that IPv4 requires (RFC 791).
const MIN_MTU: u64 = 68 + vxlan::OVERHEAD as u64;

/// flannel's keys in lower case: Go's JSON decoder compares names without case.
#[derive(Deserialize)]
#[serde(default)]
struct Raw {
    enableipv4: bool,
    enableipv6: bool,
    enablenftables: Option<bool>,
    network: Option<String>,
    subnetlen: u8,
    subnetmin: Option<Ipv4Addr>,
    subnetmax: Option<Ipv4Addr>,
    /// Also where it is null, which is another thing than not there.
    #[serde(deserialize_with = "present")]
    backend: Option<Value>,
}

fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(value).map(Some)
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            enableipv4: true,
            enableipv6: false,
            enablenftables: None,
            network: None,
            subnetlen: 0,
            subnetmin: None,
            subnetmax: None,
            backend: None,
        }
    }
}

#[derive(Deserialize)]
#[serde(default)]
struct RawBackend {
    r#type: String,
    vni: u32,
    port: u64,
    mtu: u64,
    gbp: bool,
    learning: bool,
    directrouting: bool,
}

impl Default for RawBackend {
    fn default() -> Self {
        Self {
            r#type: String::new(),
            vni: Vni::DEFAULT.get(),
            port: 0,
            mtu: 0,
            gbp: false,
            learning: false,
            directrouting: false,
        }
    }
}

impl NetworkConfig {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let raw: Raw = object(json)?;
        if raw.enableipv6 {
            return Err(ConfigError::Unsupported("EnableIPv6"));
        }
        if !raw.enableipv4 {
            return Err(ConfigError::Unsupported("EnableIPv4 = false"));
        }
        let network = raw.network.ok_or(ConfigError::NoNetwork)?;
        let network: Ipv4Net = network.parse().map_err(|_| ConfigError::InvalidCidr(network))?;
        let network = network.trunc();
        let subnet_len = subnet_len(network.prefix_len(), raw.subnetlen)?;
        let (subnet_min, subnet_max) = subnet_range(network, subnet_len, raw.subnetmin, raw.subnetmax)?;
        Ok(Self {
            network,
            subnet_len,
            subnet_min,
            subnet_max,
            enable_nftables: raw.enablenftables,
            backend: VxlanConfig::from_json(raw.backend)?,
        })
    }
}

impl NetworkConfig {
    /// What another configuration has otherwise, in words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let (a, b) = (&self.backend, &other.backend);
        let mtu = |backend: &VxlanConfig| backend.mtu.map_or("the interface's".to_owned(), |mtu| mtu.to_string());
        let nftables = |value: Option<bool>| value.map_or("not there".to_owned(), |value| value.to_string());
        let rows = [
            ("Network", self.network.to_string(), other.network.to_string()),
            ("SubnetLen", self.subnet_len.to_string(), other.subnet_len.to_string()),
            ("SubnetMin", self.subnet_min.to_string(), other.subnet_min.to_string()),
            ("SubnetMax", self.subnet_max.to_string(), other.subnet_max.to_string()),
            ("EnableNFTables", nftables(self.enable_nftables), nftables(other.enable_nftables)),
            ("VNI", a.vni.to_string(), b.vni.to_string()),
            ("Port", a.port.to_string(), b.port.to_string()),
            ("MTU", mtu(a), mtu(b)),
            ("Learning", a.learning.to_string(), b.learning.to_string()),
            ("DirectRouting", a.direct_routing.to_string(), b.direct_routing.to_string()),
        ];
        let differing = rows.into_iter().filter(|(_, ours, theirs)| ours != theirs);
        differing.map(|(name, ours, theirs)| format!("{name} {theirs}, not {ours}")).collect()
    }
}

impl VxlanConfig {
    fn from_json(backend: Option<Value>) -> Result<Self, ConfigError> {
        let RawBackend { r#type, vni, port, mtu, gbp, learning, directrouting } = match backend {
            // flannel's default backend is the user-space one.
            None => return Err(ConfigError::UnknownBackend("udp".to_owned())),
            Some(Value::Null) => RawBackend::default(),
            Some(Value::Object(map)) => from_map(map, "Backend: ")?,
            Some(other) => {
                return Err(ConfigError::Value(format!("error decoding Backend property of config: {other}")));
            }
        };
        if r#type.to_lowercase() != "vxlan" {
            return Err(ConfigError::UnknownBackend(r#type));
        }
        if gbp {
            return Err(ConfigError::Unsupported("Backend GBP"));
        }
        Ok(Self {
            vni: Vni::new_checked(vni)?,
            port: match port {
                0 => vxlan::DEFAULT_PORT,
                port => u16::try_from(port).map_err(|_| ConfigError::Port(port))?,
            },
            mtu: match mtu {
                0 => None,
                MIN_MTU..=65535 => Some(mtu as u32),
                _ => return Err(ConfigError::Mtu(mtu)),
            },
            learning,
            direct_routing: directrouting,
        })
    }
}

fn subnet_len(network_len: u8, requested: u8) -> Result<u8, ConfigError> {
    match requested {
        0 if network_len > 28 => Err(ConfigError::NetworkTooSmall),
        0 if network_len <= 22 => Ok(24),
        0 => Ok(network_len + 2),
        31.. => Err(ConfigError::SubnetLenTooLong),
        len if len < network_len.saturating_add(2) => Err(ConfigError::TooFewSubnets),
        len => Ok(len),
    }
}

fn subnet_range(
    network: Ipv4Net,
    subnet_len: u8,
    min: Option<Ipv4Addr>,
    max: Option<Ipv4Addr>,
) -> Result<(Ipv4Addr, Ipv4Addr), ConfigError> {
    let size = 1u32 << (32 - subnet_len);
    let check = |name, address: Ipv4Addr| match () {
        () if !network.contains(&address) => Err(ConfigError::OutOfRange(name)),
        () if !address.to_bits().is_multiple_of(size) => Err(ConfigError::OffBoundary(name, address)),
        () => Ok(address),
    };
    let min = match min {
        Some(min) => check("SubnetMin", min)?,
        None => Ipv4Addr::from_bits(network.network().to_bits() + size),
    };
    let max = match max {
        Some(max) => check("SubnetMax", max)?,
        None => Ipv4Addr::from_bits(network.broadcast().to_bits() - (size - 1)),
    };
    if min > max { Err(ConfigError::EmptyRange(min, max)) } else { Ok((min, max)) }
}

fn object<T: serde::de::DeserializeOwned>(json: &str) -> Result<T, ConfigError> {
    match serde_json::from_str(json) {
        Ok(Value::Object(map)) => from_map(map, ""),
        Ok(other) => Err(ConfigError::Json(format!("found {other}"))),
        Err(error) => Err(ConfigError::Json(error.to_string())),
    }
}

/// As Go decodes: names without case, of several spellings of one name the last counts, null leaves the default.
fn from_map<T: serde::de::DeserializeOwned>(map: Map<String, Value>, context: &str) -> Result<T, ConfigError> {
    let lower: Map<_, _> = map
        .into_iter()
        .map(|(key, value)| (key.to_lowercase(), value))
        .filter(|(key, value)| key == "backend" || !value.is_null())
        .collect();
    serde_json::from_value(Value::Object(lower)).map_err(|error| ConfigError::Value(format!("{context}{error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fields: &str) -> Result<NetworkConfig, ConfigError> {
        NetworkConfig::parse(&format!(r#"{{{fields}, "Backend": {{"Type": "vxlan"}}}}"#))
    }

    fn backend(json: &str) -> Result<VxlanConfig, ConfigError> {
        NetworkConfig::parse(&format!(r#"{{"Network": "10.5.0.0/16", "Backend": {json}}}"#)).map(|c| c.backend)
    }

    fn range(fields: &str) -> (u8, String, String) {
        let config = parse(fields).expect("valid");
        (config.subnet_len, config.subnet_min.to_string(), config.subnet_max.to_string())
    }

    #[test]
    fn flannels_defaults() {
        let cases = [
            (r#""Network": "10.1.0.0/16""#, 24, "10.1.1.0", "10.1.255.0"),
            (r#""Network": "10.1.0.0/22""#, 24, "10.1.1.0", "10.1.3.0"),
            (r#""Network": "10.1.0.0/23""#, 25, "10.1.0.128", "10.1.1.128"),
            (r#""Network": "10.1.0.0/28""#, 30, "10.1.0.4", "10.1.0.12"),
            (r#""Network": "10.1.7.9/16", "SubnetLen": 18"#, 18, "10.1.64.0", "10.1.192.0"),
        ];
        for (fields, len, min, max) in cases {
            assert_eq!(range(fields), (len, min.to_owned(), max.to_owned()), "{fields}");
        }
        assert_eq!(
            backend(r#"{"Type": "vxlan"}"#),
            Ok(VxlanConfig { vni: Vni::DEFAULT, port: 8472, mtu: None, learning: false, direct_routing: false })
        );
    }

    #[test]
    fn names_have_no_case_and_the_last_counts() {
        let config = NetworkConfig::parse(
            r#"{"NETWORK": "10.1.0.0/16", "network": "10.2.0.0/16", "Unknown": 1, "subnetLEN": 25, "enableNFTables": true,
                "backend": {"TYPE": "VXLAN", "vni": 7, "port": 4789, "mtu": 9000}}"#,
        )
        .expect("valid");
        assert_eq!(config.network.to_string(), "10.2.0.0/16");
        assert_eq!((config.subnet_len, config.enable_nftables), (25, Some(true)));
        assert_eq!((config.backend.vni.get(), config.backend.port, config.backend.mtu), (7, 4789, Some(9000)));
    }

    #[test]
    fn flannels_errors() {
        let cases = [
            (r#""SubnetLen": 24"#, "please define a correct Network parameter in the flannel config"),
            (r#""Network": "10.1.0.0""#, "invalid CIDR address: 10.1.0.0"),
            (r#""Network": "fc00::/48""#, "invalid CIDR address: fc00::/48"),
            (r#""Network": "10.1.0.0/29""#, "network is too small. Minimum useful network prefix is /28"),
            (r#""Network": "10.1.0.0/16", "SubnetLen": 31"#, "SubnetLen must be less than /31"),
            (
                r#""Network": "10.1.0.0/16", "SubnetLen": 17"#,
                "network must be able to accommodate at least four subnets",
            ),
            (r#""Network": "10.1.0.0/16", "SubnetMin": "10.2.0.0""#, "SubnetMin is not in the range of the Network"),
            (
                r#""Network": "10.1.0.0/16", "SubnetMax": "10.1.3.7""#,
                "SubnetMax is not on a SubnetLen boundary: 10.1.3.7",
            ),
            (
                r#""Network": "10.1.0.0/16", "SubnetMin": "10.1.9.0", "SubnetMax": "10.1.3.0""#,
                "SubnetMin 10.1.9.0 is greater than SubnetMax 10.1.3.0",
            ),
            (
                r#""Network": "10.1.0.0/16", "EnableIPv6": true"#,
                "EnableIPv6 is not supported by this agent; remove it from the flannel config",
            ),
        ];
        for (fields, message) in cases {
            assert_eq!(parse(fields).expect_err(fields).to_string(), message);
        }
    }

    #[test]
    fn backend_errors() {
        let cases = [
            (r#"{"Type": "host-gw"}"#, "unknown backend type: host-gw (this agent has vxlan)"),
            (r#"{}"#, "unknown backend type:  (this agent has vxlan)"),
            (r#"null"#, "unknown backend type:  (this agent has vxlan)"),
            (r#""vxlan""#, r#"error decoding Backend property of config: "vxlan""#),
            (r#"{"Type": "vxlan", "VNI": 10000000}"#, "Backend: VNI 10000000 is out of range: use 0 to 9999999"),
            (
                r#"{"Type": "vxlan", "Port": 65536}"#,
                "Backend: Port 65536 is out of range: use 1 to 65535, or 0 for the default 8472",
            ),
            (
                r#"{"Type": "vxlan", "MTU": 117}"#,
                "Backend: MTU 117 is out of range: use 118 to 65535, or 0 for the external interface's",
            ),
            (
                r#"{"Type": "vxlan", "GBP": true}"#,
                "Backend GBP is not supported by this agent; remove it from the flannel config",
            ),
        ];
        for (json, message) in cases {
            assert_eq!(backend(json).expect_err(json).to_string(), message);
        }
        let error = backend(r#"{"Type": "vxlan", "VNI": -1}"#).expect_err("negative").to_string();
        assert!(error.starts_with("Backend: invalid value"), "{error}");
    }

    #[test]
    fn a_missing_backend_is_flannels_udp() {
        let error = NetworkConfig::parse(r#"{"Network": "10.1.0.0/16"}"#).expect_err("no backend");
        assert_eq!(error, ConfigError::UnknownBackend("udp".to_owned()));
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        for json in ["", "[]", "7", "{", "null", "\"x\"", "{\"Network\": 7}"] {
            assert!(NetworkConfig::parse(json).is_err(), "{json}");
        }
    }
}
