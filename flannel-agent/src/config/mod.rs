//! The network configuration: the JSON object under `<prefix>/config`, with flannel's rules, defaults and messages
//! (flannel: pkg/subnet/config.go, pkg/backend/vxlan/vxlan.go).
//!
//! * `decode` — what Go's decoder takes
//! * `error` — why a configuration can't be used

mod decode;
mod error;

use std::net::Ipv4Addr;

use flannel_common::vxlan::{self, Vni};
use ipnet::Ipv4Net;

pub use self::error::ConfigError;
use self::{decode::Object, error::BACKEND_EXAMPLE};

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
    /// Whether one of these two was given.
    pub has_subnet_range: bool,
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

/// flannel's keys, on all platforms.
const KEYS: [&str; 12] = [
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "Network",
    "IPv6Network",
    "SubnetMin",
    "SubnetMax",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "SubnetLen",
    "IPv6SubnetLen",
    "Backend",
];
/// Those of its backends, on all platforms.
const BACKEND_KEYS: [&str; 24] = [
    "Type",
    "VNI",
    "Port",
    "MTU",
    "GBP",
    "Learning",
    "DirectRouting",
    "Name",
    "MacPrefix",
    "DNSServerList",
    "ListenPort",
    "ListenPortV6",
    "PSK",
    "PersistentKeepaliveInterval",
    "Mode",
    "UDPEncap",
    "ESPProposal",
    "PreStartupCommand",
    "PostStartupCommand",
    "ShutdownCommand",
    "SubnetAddCommand",
    "SubnetRemoveCommand",
    "AccessKeyID",
    "AccessKeySecret",
];

/// kube-controller-manager's length of a node's podCIDR where nothing is said (`--node-cidr-mask-size`).
const ASSIGNED_LEN: u8 = 24;

type Address = Option<Ipv4Addr>;
/// Their length, the first, the last, and whether one of these two was given.
type Subnets = Result<(u8, Ipv4Addr, Ipv4Addr, bool), ConfigError>;

/// The smallest MTU of an underlay whose overlay still has the 68 bytes that IPv4 requires (RFC 791).
const MIN_MTU: u32 = 68 + vxlan::OVERHEAD as u32;

impl NetworkConfig {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        Self::parse_with(json, |network, len, min, max| {
            let subnet_len = subnet_len(network, len)?;
            let (first, last) = subnet_range(network, subnet_len, min, max)?;
            Ok((subnet_len, first, last, min.is_some() || max.is_some()))
        })
    }

    /// The same where others assign the subnets: SubnetLen, SubnetMin and SubnetMax have no effect, and any Network will do,
    /// as with flannel (pkg/subnet/config.go).
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn parse_assigned(json: &str) -> Result<Self, ConfigError> {
        Self::parse_with(json, |_, _, _, _| Ok((ASSIGNED_LEN, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, false)))
    }

    fn parse_with(
        json: &str,
        subnets: impl FnOnce(Ipv4Net, i64, Address, Address) -> Subnets,
    ) -> Result<Self, ConfigError> {
        let object = Object::parse(json, "")?;
        if object.boolean("EnableIPv6")? == Some(true) {
            return Err(ConfigError::Unsupported("EnableIPv6"));
        }
        if object.boolean("EnableIPv4")? == Some(false) {
            return Err(ConfigError::Unsupported("EnableIPv4 = false"));
        }
        let enable_nftables = object.boolean("EnableNFTables")?;
        let network = object.prefix("Network", "10.5.0.0/16")?;
        let len = object.integer("SubnetLen", "24")?.unwrap_or_default();
        let min = object.address("SubnetMin", "10.5.1.0")?;
        let max = object.address("SubnetMax", "10.5.255.0")?;
        let network = network.ok_or_else(|| ConfigError::NoNetwork { hint: misspelt(&object, "Network") })?;
        let (subnet_len, subnet_min, subnet_max, has_subnet_range) = subnets(network, len, min, max)?;
        let backend = object.json("Backend");
        let backend = backend.ok_or_else(|| ConfigError::NoBackend { hint: misspelt(&object, "Backend") })?;
        let backend = VxlanConfig::from_json(backend)?;
        Ok(Self { network, subnet_len, subnet_min, subnet_max, has_subnet_range, enable_nftables, backend })
    }
}

/// What is to be said of a configuration's keys that are none of flannel's, which have no effect, as with flannel. Nothing of
/// one that is no object.
pub fn unknown_keys(json: &str) -> Vec<String> {
    let Ok(object) = Object::parse(json, "") else { return Vec::new() };
    let backend = object.json("Backend").and_then(|json| Object::parse(json, "Backend.").ok());
    let own = object.unknown(&KEYS).into_iter().map(|key| ("", key));
    let backends = backend.map(|backend| backend.unknown(&BACKEND_KEYS)).unwrap_or_default();
    own.chain(backends.into_iter().map(|key| ("Backend.", key)))
        .map(|(path, (key, meant))| {
            let meant = meant.map(|meant| format!(" (did you mean {path}{meant}?)")).unwrap_or_default();
            format!("the key {path}{key} is none of flannel's{meant} and has no effect")
        })
        .collect()
}

/// A key that is none and may have been meant for this one.
fn misspelt(object: &Object<'_>, key: &str) -> String {
    let unknown = object.unknown(&KEYS);
    let alike = unknown.iter().find(|(_, meant)| *meant == Some(key));
    alike.map(|(name, _)| format!("; it has {name:?}, did you mean {key:?}?")).unwrap_or_default()
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
    fn from_json(json: &str) -> Result<Self, ConfigError> {
        // As flannel, which looks for the type first.
        let object = match json {
            "null" => Object::parse("{}", "Backend."),
            json => Object::parse(json, "Backend."),
        };
        let object = object.map_err(|_| ConfigError::Backend(format!("{json} (expected {BACKEND_EXAMPLE})")))?;
        let kind = object.string("Type", "vxlan").map_err(|error| ConfigError::Backend(error.to_string()))?;
        let kind = kind.unwrap_or_default();
        if kind.to_lowercase() != "vxlan" {
            return Err(ConfigError::UnknownBackend(kind));
        }
        if object.boolean("GBP")? == Some(true) {
            return Err(ConfigError::Unsupported("Backend GBP"));
        }
        let in_range =
            |key, value: i64, expected: &str| ConfigError::Range { key, value, expected: expected.to_owned() };
        let vni = object.integer("VNI", "1")?.unwrap_or_else(|| Vni::DEFAULT.get().into());
        let checked = u32::try_from(vni).ok().and_then(|vni| Vni::new_checked(vni).ok());
        let port = object.integer("Port", "8472")?.unwrap_or_default();
        let mtu = object.integer("MTU", "1450")?.unwrap_or_default();
        Ok(Self {
            vni: checked.ok_or_else(|| in_range("Backend.VNI", vni, "0 to 9999999"))?,
            port: match u16::try_from(port) {
                Ok(0) => vxlan::DEFAULT_PORT,
                Ok(port) => port,
                Err(_) => {
                    let expected = format!("1 to 65535, or 0 for the default {}", vxlan::DEFAULT_PORT);
                    return Err(in_range("Backend.Port", port, &expected));
                }
            },
            mtu: match u32::try_from(mtu) {
                Ok(0) => None,
                Ok(mtu @ MIN_MTU..=65535) => Some(mtu),
                _ => {
                    let expected = format!("{MIN_MTU} to 65535, or 0 for the external interface's");
                    return Err(in_range("Backend.MTU", mtu, &expected));
                }
            },
            learning: object.boolean("Learning")?.unwrap_or_default(),
            direct_routing: object.boolean("DirectRouting")?.unwrap_or_default(),
        })
    }
}

/// flannel's length of subnets. 0 asks for the default.
fn subnet_len(network: Ipv4Net, requested: i64) -> Result<u8, ConfigError> {
    let network_len = network.prefix_len();
    match requested {
        0 if network_len > 28 => Err(ConfigError::NetworkTooSmall(network)),
        0 if network_len <= 22 => Ok(24),
        0 => Ok(network_len + 2),
        31.. => Err(ConfigError::SubnetLenTooLong(requested)),
        ..0 => Err(ConfigError::Range {
            key: "SubnetLen",
            value: requested,
            expected: format!("{} to 30, or 0 for flannel's default", network_len.saturating_add(2)),
        }),
        len => match u8::try_from(len) {
            Ok(len) if len >= network_len.saturating_add(2) => Ok(len),
            _ => Err(ConfigError::TooFewSubnets { len: requested, network }),
        },
    }
}

fn subnet_range(
    network: Ipv4Net,
    subnet_len: u8,
    min: Option<Ipv4Addr>,
    max: Option<Ipv4Addr>,
) -> Result<(Ipv4Addr, Ipv4Addr), ConfigError> {
    let size = 1u32 << (32 - subnet_len);
    let check = |key, address: Ipv4Addr| {
        if !network.contains(&address) {
            return Err(ConfigError::OutOfRange { key, address, network });
        }
        let subnet = Ipv4Addr::from_bits(address.to_bits() & !(size - 1));
        if subnet != address {
            return Err(ConfigError::OffBoundary { key, address, len: subnet_len, subnet });
        }
        Ok(address)
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

#[cfg(test)]
mod tests;
