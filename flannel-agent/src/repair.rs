//! What somebody else changed on this host, and the agent made right again.

/// What was repaired. One row of `status` each, with a count and the last time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// `flannel.<VNI>` was gone or another device, and was made anew, with all that hangs on it.
    Device,
    /// `flannel.<VNI>` was down, or had another MTU, MAC or tunnel endpoint.
    DeviceSettings,
    /// `flannel.<VNI>` lacked this host's address on the overlay, or had another within the Network.
    DeviceAddress,
    /// A route into the overlay was gone or another.
    Route,
    /// The neighbour of such a route's next hop was gone or another.
    Neighbour,
    /// The forwarding entry of that neighbour was gone or another.
    ForwardingEntry,
    /// A program was detached from its hook.
    Program,
    /// A pin of a map or a link was gone.
    Pin,
    /// An entry of a map was gone or another.
    MapEntry,
    /// The external interface is another one, or has another address, MTU or MAC: programs, device, `subnet.env` and lease
    /// follow.
    ExternalInterface,
    /// A next hop of the underlay has another MAC.
    NextHop,
    /// `subnet.env` was gone, or lacked what a runtime needs.
    SubnetEnv,
    /// `net.ipv4.ip_forward` was off.
    IpForward,
    /// conntrack was strict about windows.
    Conntrack,
}

impl Repair {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Device,
        Self::DeviceSettings,
        Self::DeviceAddress,
        Self::Route,
        Self::Neighbour,
        Self::ForwardingEntry,
        Self::Program,
        Self::Pin,
        Self::MapEntry,
        Self::ExternalInterface,
        Self::NextHop,
        Self::SubnetEnv,
        Self::IpForward,
        Self::Conntrack,
    ];

    /// Its name in the log, in `status` and in the metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::DeviceSettings => "device_settings",
            Self::DeviceAddress => "device_address",
            Self::Route => "route",
            Self::Neighbour => "neighbour",
            Self::ForwardingEntry => "forwarding_entry",
            Self::Program => "program",
            Self::Pin => "pin",
            Self::MapEntry => "map_entry",
            Self::ExternalInterface => "external_interface",
            Self::NextHop => "next_hop",
            Self::SubnetEnv => "subnet_env",
            Self::IpForward => "ip_forward",
            Self::Conntrack => "conntrack",
        }
    }
}
