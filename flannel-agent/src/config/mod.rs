//! The network configuration: the JSON object under `<prefix>/config`, with flannel's rules, defaults and messages
//! (flannel: pkg/subnet/config.go, pkg/backend/vxlan/vxlan.go).
//!
//! * `backend` — the settings of the backends
//! * `decode` — what Go's decoder takes
//! * `error` — why a configuration can't be used
//! * `keys` — each key, as the documentation has it

mod backend;
mod decode;
mod error;
mod keys;

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

pub use self::{
    backend::{AllocConfig, BackendConfig, BackendType, HostGwConfig, UDP_PORT, UdpConfig, VxlanConfig},
    error::ConfigError,
    keys::{BACKEND_KEYS, KEYS, Key},
};
use self::{decode::Object, keys::names};

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
    /// The backend, with its own settings.
    pub backend: BackendConfig,
}

/// What a configuration without one has (pkg/subnet/config.go); flannel's documentation says vxlan.
const DEFAULT_BACKEND: &str = r#"{"Type": "udp"}"#;
/// kube-controller-manager's length of a node's podCIDR where nothing is said (`--node-cidr-mask-size`).
const ASSIGNED_LEN: u8 = 24;

type Address = Option<Ipv4Addr>;
/// Their length, the first, the last, and whether one of these two was given.
type Subnets = Result<(u8, Ipv4Addr, Ipv4Addr, bool), ConfigError>;

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
        let backend = BackendConfig::parse(object.json("Backend").unwrap_or(DEFAULT_BACKEND))?;
        Ok(Self { network, subnet_len, subnet_min, subnet_max, has_subnet_range, enable_nftables, backend })
    }
}

/// What is to be said of a configuration's keys that are none of flannel's, which have no effect, as with flannel; and where it has
/// no Backend. Nothing of one that is no object.
pub fn unknown_keys(json: &str) -> Vec<String> {
    let Ok(object) = Object::parse(json, "") else { return Vec::new() };
    let backend = object.json("Backend").and_then(|json| Object::parse(json, "Backend.").ok());
    let own = object.unknown(&names(&KEYS)).into_iter().map(|key| ("", key));
    let backends = backend.map(|backend| backend.unknown(&names(&BACKEND_KEYS))).unwrap_or_default();
    let unknown = own.chain(backends.into_iter().map(|key| ("Backend.", key))).map(|(path, (key, meant))| {
        let meant = meant.map(|meant| format!(" (did you mean {path}{meant}?)")).unwrap_or_default();
        format!("the key {path}{key} is none of flannel's{meant} and has no effect")
    });
    let missing = object.json("Backend").is_none().then(|| {
        "there is no Backend, and flannel's default is udp, in user space: vxlan is faster where it can be had"
            .to_owned()
    });
    unknown.chain(missing).collect()
}

/// A key that is none and may have been meant for this one.
fn misspelt(object: &Object<'_>, key: &str) -> String {
    let unknown = object.unknown(&names(&KEYS));
    let alike = unknown.iter().find(|(_, meant)| *meant == Some(key));
    alike.map(|(name, _)| format!("; it has {name:?}, did you mean {key:?}?")).unwrap_or_default()
}

impl NetworkConfig {
    /// What another configuration has otherwise, in words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let nftables = |value: Option<bool>| value.map_or("not there".to_owned(), |value| value.to_string());
        let rows = [
            ("Network", self.network.to_string(), other.network.to_string()),
            ("SubnetLen", self.subnet_len.to_string(), other.subnet_len.to_string()),
            ("SubnetMin", self.subnet_min.to_string(), other.subnet_min.to_string()),
            ("SubnetMax", self.subnet_max.to_string(), other.subnet_max.to_string()),
            ("EnableNFTables", nftables(self.enable_nftables), nftables(other.enable_nftables)),
        ];
        let rows = rows.into_iter().chain(self.backend.beside(&other.backend));
        let differing = rows.filter(|(_, ours, theirs)| ours != theirs);
        differing.map(|(name, ours, theirs)| format!("{name} {theirs}, not {ours}")).collect()
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
