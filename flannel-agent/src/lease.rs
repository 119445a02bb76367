//! Leases: the key and value formats in the store, allocation, and the set of peers. Plain functions without I/O
//! (flannel: pkg/lease, pkg/subnet/subnet.go, pkg/subnet/etcd/local_manager.go).

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use flannel_common::packet::Mac;
use ipnet::{Ipv4Net, Ipv6Net};
use rand::{Rng, RngExt as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::NetworkConfig;

/// The last part of a lease's key: `10.5.34.0-24`, in a dual-stack cluster `10.5.34.0-24&fd00:1::-64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeaseKey {
    /// The IPv4 subnet, host bits cleared.
    pub subnet: Ipv4Net,
    /// The IPv6 subnet, which this agent keeps but does not carry.
    pub ipv6_subnet: Option<Ipv6Net>,
}

/// A key under `subnets/` that names no subnet.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("not of the form 10.5.34.0-24 or 10.5.34.0-24&fd00:1::-64")]
pub struct InvalidKey;

impl From<Ipv4Net> for LeaseKey {
    fn from(subnet: Ipv4Net) -> Self {
        Self { subnet, ipv6_subnet: None }
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subnet, ipv6_subnet } = self;
        write!(f, "{}-{}", subnet.network(), subnet.prefix_len())?;
        match ipv6_subnet {
            Some(subnet) => write!(f, "&{}-{}", subnet.network(), subnet.prefix_len()),
            None => Ok(()),
        }
    }
}

impl FromStr for LeaseKey {
    type Err = InvalidKey;

    fn from_str(key: &str) -> Result<Self, InvalidKey> {
        let (ipv4, ipv6) = match key.split_once('&') {
            Some((ipv4, ipv6)) => (ipv4, Some(ipv6)),
            None => (key, None),
        };
        let (address, len) = prefix::<Ipv4Addr>(ipv4)?;
        // flannel's pattern takes lengths of five bits for IPv4 and seven for IPv6, and lower-case digits only.
        let subnet = Ipv4Net::new(address, len).ok().filter(|_| len < 32).ok_or(InvalidKey)?.trunc();
        let ipv6_subnet = match ipv6 {
            None => None,
            Some(ipv6) if ipv6.contains(|c: char| c.is_ascii_uppercase() || c == '.') => return Err(InvalidKey),
            Some(ipv6) => {
                let (address, len) = prefix::<Ipv6Addr>(ipv6)?;
                Some(Ipv6Net::new(address, len).ok().filter(|_| len < 128).ok_or(InvalidKey)?.trunc())
            }
        };
        Ok(Self { subnet, ipv6_subnet })
    }
}

fn prefix<A: FromStr>(text: &str) -> Result<(A, u8), InvalidKey> {
    let (address, len) = text.rsplit_once('-').ok_or(InvalidKey)?;
    if !len.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(InvalidKey);
    }
    Ok((address.parse().map_err(|_| InvalidKey)?, len.parse().map_err(|_| InvalidKey)?))
}

/// The value of a lease's key, in flannel's field order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct LeaseAttributes {
    /// The host's VTEP address.
    #[serde(rename = "PublicIP")]
    pub public_ip: Ipv4Addr,
    /// The host's IPv6 address; always written, null without one.
    #[serde(rename = "PublicIPv6", default)]
    pub public_ipv6: Option<Ipv6Addr>,
    /// The backend that the host speaks.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub backend_type: String,
    /// What its peers need to know for that backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_data: Option<Value>,
    /// The same for IPv6, which this agent keeps but does not use.
    #[serde(rename = "BackendV6Data", default, skip_serializing_if = "Option::is_none")]
    pub backend_v6_data: Option<Value>,
}

/// `BackendData` of the vxlan backend. Nothing may follow `VtepMAC`: flannel's reader counts the quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanData {
    /// The host's VXLAN network identifier.
    #[serde(rename = "VNI")]
    pub vni: u32,
    /// MAC of the host's vxlan device.
    #[serde(rename = "VtepMAC")]
    pub vtep_mac: MacAddress,
}

/// A MAC address as text: `c6:d2:32:6f:8f:44`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub Mac);

impl MacAddress {
    /// A random locally administered unicast address, as flannel's pkg/mac makes it.
    pub fn random(rng: &mut impl Rng) -> Self {
        let mut mac: Mac = rng.random();
        mac[0] = (mac[0] & 0xfe) | 0x02;
        Self(mac)
    }

    /// Whether a device can have it.
    pub const fn is_unicast(self) -> bool {
        let Self([a, b, c, d, e, f]) = self;
        a & 1 == 0 && a | b | c | d | e | f != 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([a, b, c, d, e, g]) = self;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = InvalidLease;

    fn try_from(text: String) -> Result<Self, InvalidLease> {
        let mut mac = Mac::default();
        let mut octets = text.split(':');
        for octet in &mut mac {
            let digits = octets.next().filter(|digits| digits.len() == 2);
            *octet = digits
                .and_then(|digits| u8::from_str_radix(digits, 16).ok())
                .ok_or_else(|| InvalidLease::Mac(text.clone()))?;
        }
        let mac = Self(mac);
        if octets.next().is_none() && mac.is_unicast() { Ok(mac) } else { Err(InvalidLease::Mac(text)) }
    }
}

/// Why an entry in the store is not a lease that can be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidLease {
    /// The value is not a lease's JSON object.
    #[error("the value is not a lease: {0}")]
    Value(#[from] serde_json::Error),
    /// A MAC that no device can have.
    #[error("{0:?} is not a unicast MAC address")]
    Mac(String),
    /// An address that no host can have.
    #[error("its PublicIP {0} is no host's")]
    PublicIp(Ipv4Addr),
    /// A host with another backend.
    #[error("its backend is {0:?}, not vxlan")]
    Backend(String),
}

impl LeaseAttributes {
    /// The attributes of a vxlan host.
    pub fn vxlan(public_ip: Ipv4Addr, vni: u32, vtep_mac: MacAddress) -> Self {
        let data = serde_json::json!({ "VNI": vni, "VtepMAC": vtep_mac.to_string() });
        Self {
            public_ip,
            public_ipv6: None,
            backend_type: "vxlan".to_owned(),
            backend_data: Some(data),
            backend_v6_data: None,
        }
    }

    /// The value of the key, in flannel's bytes.
    pub fn to_json(&self) -> String {
        serde_json::to_value(self).unwrap_or_default().to_string()
    }

    /// Reads a value.
    ///
    /// # Errors
    /// [`InvalidLease::Value`].
    pub fn from_json(value: &[u8]) -> Result<Self, InvalidLease> {
        Ok(serde_json::from_slice(value)?)
    }

    /// What a peer needs to know of a vxlan host.
    ///
    /// # Errors
    /// [`InvalidLease`] for a host with another backend, or with data that says no VTEP.
    pub fn vxlan_data(&self) -> Result<VxlanData, InvalidLease> {
        if self.backend_type != "vxlan" {
            return Err(InvalidLease::Backend(self.backend_type.clone()));
        }
        Ok(VxlanData::deserialize(self.backend_data.as_ref().unwrap_or(&Value::Null))?)
    }
}

/// A host to encapsulate to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its VTEP address.
    pub public_ip: Ipv4Addr,
    /// MAC of its vxlan device.
    pub vtep_mac: MacAddress,
}

/// The peers by the subnet that they lease; our own lease is not among them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers(BTreeMap<Ipv4Net, Peer>);

/// One change to the peers. It is a change of attributes, so that a host with a new address or MAC is a change also
/// when its subnet stayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerChange {
    /// A subnet is leased by this host now.
    Set(Ipv4Net, Peer),
    /// A subnet is leased by nobody.
    Remove(Ipv4Net),
}

impl Peers {
    /// The changes from this set to `snapshot`, which it becomes.
    pub fn replace(&mut self, snapshot: BTreeMap<Ipv4Net, Peer>) -> Vec<PeerChange> {
        let Self(current) = self;
        let removed = current.keys().filter(|subnet| !snapshot.contains_key(subnet)).copied().map(PeerChange::Remove);
        let set = snapshot
            .iter()
            .filter(|(subnet, peer)| current.get(subnet) != Some(peer))
            .map(|(subnet, peer)| PeerChange::Set(*subnet, *peer));
        let changes = removed.chain(set).collect();
        *current = snapshot;
        changes
    }

    /// Takes in one change. [`None`] where it changes nothing.
    pub fn apply(&mut self, change: PeerChange) -> Option<PeerChange> {
        let Self(current) = self;
        let effective = match &change {
            PeerChange::Set(subnet, peer) => current.insert(*subnet, *peer) != Some(*peer),
            PeerChange::Remove(subnet) => current.remove(subnet).is_some(),
        };
        effective.then_some(change)
    }

    /// All peers, ordered by subnet.
    pub fn iter(&self) -> btree_map::Iter<'_, Ipv4Net, Peer> {
        self.0.iter()
    }

    /// How many subnets are leased by others.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nobody else holds a lease.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Whether a subnet could have been allocated under this configuration.
pub fn is_allocatable(config: &NetworkConfig, subnet: Ipv4Net) -> bool {
    subnet.prefix_len() == config.subnet_len
        && (config.subnet_min..=config.subnet_max).contains(&subnet.network())
        && config.network.contains(&subnet)
}

/// How many free subnets a choice is made from, as in flannel: enough that hosts starting at once rarely collide.
const CANDIDATES: usize = 100;

/// Chooses a free subnet at random among the first hundred. [`None`] where all are taken.
pub fn allocate(
    config: &NetworkConfig,
    taken: impl IntoIterator<Item = Ipv4Net>,
    rng: &mut impl Rng,
) -> Option<Ipv4Net> {
    let size = 1u64 << (32 - config.subnet_len);
    // Leases as long as ours or longer block one subnet each, shorter ones a range.
    let (blocks, ranges): (Vec<_>, Vec<_>) =
        taken.into_iter().partition(|lease| lease.prefix_len() >= config.subnet_len);
    let blocked: BTreeSet<u64> = blocks.iter().map(|lease| u64::from(lease.network().to_bits()) / size).collect();
    let is_free = |slot: u64| {
        let address = Ipv4Addr::from_bits((slot * size) as u32);
        !blocked.contains(&slot) && !ranges.iter().any(|lease| lease.contains(&address))
    };
    let first = u64::from(config.subnet_min.to_bits()) / size;
    let last = u64::from(config.subnet_max.to_bits()) / size;
    let candidates: Vec<_> = (first..=last).filter(|slot| is_free(*slot)).take(CANDIDATES).collect();
    let slot = match candidates.len() {
        0 => return None,
        count => candidates[rng.random_range(0..count)],
    };
    Ipv4Net::new(Ipv4Addr::from_bits((slot * size) as u32), config.subnet_len).ok()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use rand::{SeedableRng as _, rngs::SmallRng};

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().expect("CIDR")
    }

    #[test]
    fn keys_round_trip() {
        for key in ["10.5.34.0-24", "10.5.34.0-24&fd00:1::-64", "0.0.0.0-0", "10.5.34.4-30"] {
            assert_eq!(key.parse::<LeaseKey>().expect(key).to_string(), key);
        }
        assert_eq!("10.5.34.7-24".parse::<LeaseKey>().expect("masked").subnet, net("10.5.34.0/24"));
    }

    #[test]
    fn keys_that_flannel_refuses() {
        for key in [
            "",
            "10.5.34.0",
            "10.5.34.0-",
            "10.5.34.0-32",
            "10.5.34.0-24x",
            "10.5.34.0-+24",
            "10.5.34-24",
            "10.5.34.256-24",
            "10.5.34.0-24&",
            "10.5.34.0-24&FD00::-64",
            "10.5.34.0-24&fd00::-128",
            "config",
        ] {
            assert_eq!(key.parse::<LeaseKey>(), Err(InvalidKey), "{key:?}");
        }
    }

    const VALUE: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;

    #[test]
    fn a_value_is_flannels_to_the_byte() {
        let mac = MacAddress([0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x44]);
        assert_eq!(LeaseAttributes::vxlan([192, 168, 64, 3].into(), 1, mac).to_json(), VALUE);
        let read = LeaseAttributes::from_json(VALUE.as_bytes()).expect("valid");
        assert_eq!(read.to_json(), VALUE);
        assert_eq!(read.vxlan_data().expect("vxlan"), VxlanData { vni: 1, vtep_mac: mac });
    }

    #[test]
    fn other_hosts_values_are_kept_whole() {
        for value in [
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":"fd00:50::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}}"#,
        ] {
            assert_eq!(LeaseAttributes::from_json(value.as_bytes()).expect("valid").to_json(), value);
        }
    }

    #[test]
    fn values_that_name_no_vtep() {
        for (value, reason) in [
            (r#"{"PublicIP":"1.2.3.4"}"#, r#"its backend is "", not vxlan"#),
            (r#"{"PublicIP":"1.2.3.4","BackendType":"host-gw"}"#, r#"its backend is "host-gw", not vxlan"#),
            (
                r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}}"#,
                r#""ff:ff:ff:ff:ff:ff" is not a unicast MAC address"#,
            ),
        ] {
            let error = LeaseAttributes::from_json(value.as_bytes()).and_then(|lease| lease.vxlan_data());
            let error = error.expect_err(value).to_string();
            assert!(error.contains(reason), "{error}");
        }
        for value in ["", "x", "{}", r#"{"PublicIP":"1.2.3"}"#, r#"{"PublicIP":7}"#, "\u{fffd}"] {
            assert!(LeaseAttributes::from_json(value.as_bytes()).is_err(), "{value}");
        }
    }

    fn config(network: &str, len: u8) -> NetworkConfig {
        NetworkConfig::parse(&format!(
            r#"{{"Network": "{network}", "SubnetLen": {len}, "Backend": {{"Type": "vxlan"}}}}"#
        ))
        .expect("valid")
    }

    prop_compose! {
        fn any_net()(bits: u32, len in 8u8..=30) -> Ipv4Net {
            // Within 10.0.0.0/12, where the allocations are.
            let address = 0x0a00_0000 | (bits & 0x000f_ffff);
            Ipv4Net::new(address.into(), len).expect("length").trunc()
        }
    }

    proptest! {
        #[test]
        fn allocation_finds_a_free_subnet_if_there_is_any(
            network_len in 16u8..=24, extra in 2u8..=6, taken in vec(any_net(), 0..40), seed: u64,
        ) {
            let config = config(&format!("10.0.0.0/{network_len}"), (network_len + extra).min(30));
            let free = |subnet: &Ipv4Net| !taken.iter().any(|t| t.contains(subnet) || subnet.contains(t));
            let any_free = config.network.subnets(config.subnet_len).expect("lengths")
                .any(|subnet| is_allocatable(&config, subnet) && free(&subnet));
            match allocate(&config, taken.clone(), &mut SmallRng::seed_from_u64(seed)) {
                Some(subnet) => prop_assert!(is_allocatable(&config, subnet) && free(&subnet)),
                None => prop_assert!(!any_free),
            }
        }

        #[test]
        fn events_end_where_the_snapshot_does(
            events in vec((0u8..8, proptest::option::of(0u8..3)), 0..40), start in vec((0u8..8, 0u8..3), 0..8),
        ) {
            let subnet = |n: u8| net(&format!("10.5.{n}.0/24"));
            let peer = |n: u8| Peer { public_ip: [192, 168, 0, n].into(), vtep_mac: MacAddress([2, 0, 0, 0, 0, n]) };
            let start: BTreeMap<_, _> = start.into_iter().map(|(s, p)| (subnet(s), peer(p))).collect();
            let mut by_event = Peers::default();
            by_event.replace(start.clone());
            let mut last = start.clone();
            for (s, p) in events {
                let change = match p {
                    Some(p) => { last.insert(subnet(s), peer(p)); PeerChange::Set(subnet(s), peer(p)) }
                    None => { last.remove(&subnet(s)); PeerChange::Remove(subnet(s)) }
                };
                by_event.apply(change);
            }
            // The changes that a resync reports, applied to the start, give the same set.
            let mut by_snapshot = Peers::default();
            by_snapshot.replace(start.clone());
            let mut by_changes = by_snapshot.clone();
            for change in by_snapshot.replace(last) {
                prop_assert!(by_changes.apply(change).is_some());
            }
            prop_assert_eq!(&by_event, &by_snapshot);
            prop_assert_eq!(&by_changes, &by_snapshot);
        }
    }
}
