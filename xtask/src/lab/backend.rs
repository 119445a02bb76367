//! How a lab's hosts reach each other.

use std::fmt;

use clap::ValueEnum;

/// A backend, as network configs name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// VXLAN
    #[default]
    Vxlan,
    /// VXLAN with DirectRouting: hosts on one link send each other packets as they are
    DirectRouting,
    /// host-gw: packets as they are, pods at the MTU of the interface
    HostGw,
}

impl Backend {
    /// The value of the key Backend.
    pub const fn json(self) -> &'static str {
        match self {
            Self::Vxlan => r#"{"Type": "vxlan"}"#,
            Self::DirectRouting => r#"{"Type": "vxlan", "DirectRouting": true}"#,
            Self::HostGw => r#"{"Type": "host-gw"}"#,
        }
    }

    /// Whether it has a device of its own, with this host's address on the overlay.
    pub const fn has_device(self) -> bool {
        !matches!(self, Self::HostGw)
    }

    /// Whether packets between hosts on one link are encapsulated.
    pub const fn encapsulates(self) -> bool {
        matches!(self, Self::Vxlan)
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Vxlan => "vxlan",
            Self::DirectRouting => "vxlan with DirectRouting",
            Self::HostGw => "host-gw",
        })
    }
}
