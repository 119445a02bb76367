//! Leases: the key and value formats in the store (here, and for each backend in `backend`), which subnet a host gets (`allocation`), and the peers that
//! follow from what the store says (`table`). Plain functions without I/O
//! (flannel: pkg/lease, pkg/subnet/subnet.go, pkg/subnet/etcd/local_manager.go).

mod allocation;
mod backend;
mod burst;
mod table;

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use flannel_common::{packet::Mac, vxlan::Vni};
use ipnet::{Ipv4Net, Ipv6Net};
use rand::{Rng, RngExt as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::{
    allocation::{allocate, is_allocatable},
    backend::BackendAttributes,
    table::{Credibility, Hold, HoldReason, LeaseTable, OwnDeletion, PeerChange},
};

/// The last part of a lease's key: `10.5.34.0-24`, in a dual-stack cluster `10.5.34.0-24&fd00:1::-64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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

impl From<LeaseKey> for String {
    fn from(key: LeaseKey) -> Self {
        key.to_string()
    }
}

impl TryFrom<String> for LeaseKey {
    type Error = InvalidKey;

    fn try_from(key: String) -> Result<Self, InvalidKey> {
        key.parse()
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
                .ok_or_else(|| InvalidLease::mac(&text))?;
        }
        let mac = Self(mac);
        if octets.next().is_none() && mac.is_unicast() { Ok(mac) } else { Err(InvalidLease::mac(&text)) }
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
    /// A host in another overlay.
    #[error("its VNI is {theirs}, not {ours}")]
    Vni {
        /// What it says.
        theirs: u32,
        /// What this overlay's is.
        ours: Vni,
    },
    /// A host with another backend.
    #[error("its backend is {theirs:?}, not {ours}")]
    Backend {
        /// What it says.
        theirs: String,
        /// This network's.
        ours: &'static str,
    },
}

impl InvalidLease {
    fn mac(text: &str) -> Self {
        Self::Mac(beginning(text))
    }
}

/// What is told of a text that may be of any length.
pub fn beginning(text: &str) -> String {
    text.chars().take(64).collect()
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

    /// The attributes of a host whose peers need to know no more than its backend.
    pub fn without_data(public_ip: Ipv4Addr, backend: &str) -> Self {
        let backend_type = backend.to_owned();
        Self { public_ip, public_ipv6: None, backend_type, backend_data: None, backend_v6_data: None }
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

    /// The MAC that they announce, where they are a vxlan host's.
    pub fn announced_mac(&self) -> Option<MacAddress> {
        self.vxlan_data().ok().map(|data| data.vtep_mac)
    }

    /// What a peer needs to know of a vxlan host.
    ///
    /// # Errors
    /// [`InvalidLease`] for a host with another backend, or with data that says no VTEP.
    pub fn vxlan_data(&self) -> Result<VxlanData, InvalidLease> {
        if self.backend_type != "vxlan" {
            return Err(InvalidLease::Backend { theirs: beginning(&self.backend_type), ours: "vxlan" });
        }
        Ok(VxlanData::deserialize(self.backend_data.as_ref().unwrap_or(&Value::Null))?)
    }
}

/// A host to encapsulate to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Peer {
    /// Its VTEP address.
    pub public_ip: Ipv4Addr,
    /// MAC of its vxlan device.
    pub vtep_mac: MacAddress,
}

#[cfg(test)]
mod tests {
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
}
