//! The network configuration's Backend: which backend it is, and what it has settings for. A backend that is added has a
//! variant in each of the enumerations here, and a module in [`backend`](crate::backend).

use std::fmt;

use flannel_common::vxlan::{self, Vni};

use super::{ConfigError, decode::Object, error::BACKEND_EXAMPLE};

/// The smallest MTU of an underlay whose overlay still has the 68 bytes that IPv4 requires (RFC 791).
const MIN_MTU: u32 = 68 + vxlan::OVERHEAD as u32;

/// The udp backend's port, where none is given.
pub const UDP_PORT: u16 = 8285;

/// A backend that this agent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendType {
    /// Packets in UDP, as the kernel's vxlan device sends them.
    Vxlan,
    /// Packets as they are, to hosts on the same link.
    HostGw,
    /// Packets in UDP, by the agent itself.
    Udp,
    /// None: a lease and `subnet.env`.
    Alloc,
}

impl BackendType {
    /// Each of them.
    pub const ALL: [Self; 4] = [Self::Vxlan, Self::HostGw, Self::Udp, Self::Alloc];

    /// Its `Type` in network configs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Udp => "udp",
            Self::Alloc => "alloc",
        }
    }

    /// All labels, for people.
    pub(super) fn labels() -> String {
        Self::ALL.map(Self::label).join(", ")
    }
}

impl fmt::Display for BackendType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// A backend and its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendConfig {
    /// The vxlan backend.
    Vxlan(VxlanConfig),
    /// The host-gw backend.
    HostGw(HostGwConfig),
    /// The udp backend.
    Udp(UdpConfig),
    /// The alloc backend.
    Alloc(AllocConfig),
}

/// Settings of the udp backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpConfig {
    /// As [`HostGwConfig::vni`].
    pub vni: Vni,
    /// UDP port of the tunnel.
    pub port: u16,
}

/// Settings of the alloc backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocConfig {
    /// As [`HostGwConfig::vni`].
    pub vni: Vni,
}

/// Settings of the host-gw backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostGwConfig {
    /// The number that this host knows the network by, where it has several: nobody else is told.
    pub vni: Vni,
    /// Whether there is a route of the kernel's for each lease, as flannel makes them, in the place of one that all share.
    pub kernel_routes: bool,
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

impl BackendConfig {
    /// Reads the value of the key Backend.
    pub(super) fn parse(json: &str) -> Result<Self, ConfigError> {
        // As flannel, which looks for the type first.
        let object = match json {
            "null" => Object::parse("{}", "Backend."),
            json => Object::parse(json, "Backend."),
        };
        let object = object.map_err(|_| ConfigError::Backend(format!("{json} (expected {BACKEND_EXAMPLE})")))?;
        let kind = object.string("Type", "vxlan").map_err(|error| ConfigError::Backend(error.to_string()))?;
        let kind = kind.unwrap_or_default();
        match BackendType::ALL.into_iter().find(|known| known.label() == kind.to_lowercase()) {
            Some(BackendType::Vxlan) => Ok(Self::Vxlan(VxlanConfig::from_object(&object)?)),
            Some(BackendType::HostGw) => {
                let kernel_routes = object.boolean("KernelRoutes")?.unwrap_or_default();
                Ok(Self::HostGw(HostGwConfig { vni: number(&object)?, kernel_routes }))
            }
            Some(BackendType::Udp) => {
                Ok(Self::Udp(UdpConfig { vni: number(&object)?, port: port(&object, UDP_PORT)? }))
            }
            Some(BackendType::Alloc) => Ok(Self::Alloc(AllocConfig { vni: number(&object)? })),
            None => Err(ConfigError::UnknownBackend(kind)),
        }
    }

    /// Which it is.
    pub const fn kind(&self) -> BackendType {
        match self {
            Self::Vxlan(_) => BackendType::Vxlan,
            Self::HostGw(_) => BackendType::HostGw,
            Self::Udp(_) => BackendType::Udp,
            Self::Alloc(_) => BackendType::Alloc,
        }
    }

    /// The number that this host knows the overlay by: its files, locks and pins are under it.
    pub const fn vni(&self) -> Vni {
        match self {
            Self::Vxlan(vxlan) => vxlan.vni,
            Self::HostGw(host_gw) => host_gw.vni,
            Self::Udp(udp) => udp.vni,
            Self::Alloc(alloc) => alloc.vni,
        }
    }

    /// The settings beside those of another configuration, by their keys.
    pub(super) fn beside(&self, other: &Self) -> Vec<(&'static str, String, String)> {
        match (self, other) {
            (Self::Vxlan(ours), Self::Vxlan(theirs)) => {
                let settings = ours.settings().into_iter().zip(theirs.settings());
                settings.map(|((key, ours), (_, theirs))| (key, ours, theirs)).collect()
            }
            (Self::HostGw(ours), Self::HostGw(theirs)) => vec![
                ("VNI", ours.vni.to_string(), theirs.vni.to_string()),
                ("KernelRoutes", ours.kernel_routes.to_string(), theirs.kernel_routes.to_string()),
            ],
            (Self::Udp(ours), Self::Udp(theirs)) => vec![
                ("VNI", ours.vni.to_string(), theirs.vni.to_string()),
                ("Port", ours.port.to_string(), theirs.port.to_string()),
            ],
            (Self::Alloc(ours), Self::Alloc(theirs)) => vec![("VNI", ours.vni.to_string(), theirs.vni.to_string())],
            (ours, theirs) => vec![("Type", ours.kind().to_string(), theirs.kind().to_string())],
        }
    }
}

fn in_range(key: &'static str, value: i64, expected: &str) -> ConfigError {
    ConfigError::Range { key, value, expected: expected.to_owned() }
}

/// The number that tells the networks of a host apart: the VNI, where there is VXLAN.
fn number(object: &Object<'_>) -> Result<Vni, ConfigError> {
    let vni = object.integer("VNI", "1")?.unwrap_or_else(|| Vni::DEFAULT.get().into());
    let checked = u32::try_from(vni).ok().and_then(|vni| Vni::new_checked(vni).ok());
    checked.ok_or_else(|| in_range("Backend.VNI", vni, "0 to 9999999"))
}

/// The UDP port of a tunnel. 0 asks for the default, as where there is none.
fn port(object: &Object<'_>, default: u16) -> Result<u16, ConfigError> {
    let port = object.integer("Port", &default.to_string())?.unwrap_or_default();
    match u16::try_from(port) {
        Ok(0) => Ok(default),
        Ok(port) => Ok(port),
        Err(_) => Err(in_range("Backend.Port", port, &format!("1 to 65535, or 0 for the default {default}"))),
    }
}

impl VxlanConfig {
    fn from_object(object: &Object<'_>) -> Result<Self, ConfigError> {
        if object.boolean("GBP")? == Some(true) {
            return Err(ConfigError::Unsupported("Backend GBP"));
        }
        let mtu = object.integer("MTU", "1450")?.unwrap_or_default();
        Ok(Self {
            vni: number(object)?,
            port: port(object, vxlan::DEFAULT_PORT)?,
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

    /// Each setting by its key, in words.
    fn settings(&self) -> [(&'static str, String); 5] {
        [
            ("VNI", self.vni.to_string()),
            ("Port", self.port.to_string()),
            ("MTU", self.mtu.map_or("the interface's".to_owned(), |mtu| mtu.to_string())),
            ("Learning", self.learning.to_string()),
            ("DirectRouting", self.direct_routing.to_string()),
        ]
    }
}
