//! The keys of a network configuration: flannel's, on all platforms (flannel: pkg/subnet/config.go, pkg/backend).

/// A key, as the documentation has it.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name; letters without case.
    pub name: &'static str,
    /// What holds where it is not given.
    pub default: &'static str,
    /// What it does, and for which backends.
    pub description: &'static str,
}

const fn key(name: &'static str, default: &'static str, description: &'static str) -> Key {
    Key { name, default, description }
}

/// One of flannel's that this agent takes without effect.
const fn ignored(name: &'static str, description: &'static str) -> Key {
    Key { name, default: "", description }
}

/// The names of keys.
pub(super) fn names<const N: usize>(keys: &[Key; N]) -> [&'static str; N] {
    keys.map(|key| key.name)
}

/// Those of the object itself.
pub const KEYS: [Key; 12] = [
    key("EnableIPv4", "true", "`false` is refused: the overlay carries IPv4 only"),
    key("EnableIPv6", "false", "`true` is refused"),
    key(
        "EnableNFTables",
        "nftables where the host has an `nft` that works",
        "`true`: packet rules by nftables, and by iptables only where `nft` fails; `false`: by iptables",
    ),
    key("Network", "required", "The addresses of all pods, as a prefix: `\"10.5.0.0/16\"`"),
    ignored("IPv6Network", "Without effect"),
    key(
        "SubnetMin",
        "the second subnet of the Network",
        "The first subnet to lease; without effect where Kubernetes assigns the subnets",
    ),
    key(
        "SubnetMax",
        "the last subnet of the Network",
        "The last subnet to lease; without effect where Kubernetes assigns the subnets",
    ),
    ignored("IPv6SubnetMin", "Without effect"),
    ignored("IPv6SubnetMax", "Without effect"),
    key(
        "SubnetLen",
        "24; in a Network longer than /22 its length and 2",
        "Prefix length of each lease, up to 30; without effect where Kubernetes assigns the subnets",
    ),
    ignored("IPv6SubnetLen", "Without effect"),
    key("Backend", "`{\"Type\": \"udp\"}`", "How packets get from host to host: an object with the keys below"),
];

/// Those of the object Backend.
pub const BACKEND_KEYS: [Key; 25] = [
    key("Type", "", "`vxlan`, `host-gw`, `udp` or `alloc`, letters without case; required where there is a Backend"),
    key(
        "VNI",
        "1",
        "All backends, 0 to 9999999. With vxlan the VXLAN network identifier; with the others the number that this host knows the network by",
    ),
    key("Port", "8472; udp 8285", "vxlan, udp: UDP port of the tunnel"),
    key("MTU", "the external interface's", "vxlan: MTU of the underlay to assume, 118 to 65535"),
    key("GBP", "false", "vxlan: `true` is refused"),
    key(
        "Learning",
        "false",
        "vxlan: whether the kernel's vxlan device learns addresses; the programs do not depend on it",
    ),
    key("DirectRouting", "false", "vxlan: peers on the same link are sent to without encapsulation"),
    key(
        "KernelRoutes",
        "false",
        "host-gw: a kernel route for each lease, as flannel makes them, instead of one that all share",
    ),
    ignored("Name", "Windows: without effect"),
    ignored("MacPrefix", "Windows: without effect"),
    ignored("DNSServerList", "Windows: without effect"),
    ignored("ListenPort", "wireguard of flannel's: without effect"),
    ignored("ListenPortV6", "wireguard of flannel's: without effect"),
    ignored("PSK", "wireguard and ipsec of flannel's: without effect"),
    ignored("PersistentKeepaliveInterval", "wireguard of flannel's: without effect"),
    ignored("Mode", "wireguard of flannel's: without effect"),
    ignored("UDPEncap", "ipsec of flannel's: without effect"),
    ignored("ESPProposal", "ipsec of flannel's: without effect"),
    ignored("PreStartupCommand", "extension of flannel's: without effect"),
    ignored("PostStartupCommand", "extension of flannel's: without effect"),
    ignored("ShutdownCommand", "extension of flannel's: without effect"),
    ignored("SubnetAddCommand", "extension of flannel's: without effect"),
    ignored("SubnetRemoveCommand", "extension of flannel's: without effect"),
    ignored("AccessKeyID", "A cloud's backend of flannel's: without effect"),
    ignored("AccessKeySecret", "A cloud's backend of flannel's: without effect"),
];

#[cfg(test)]
mod tests {
    use super::{
        super::{BackendConfig, NetworkConfig},
        *,
    };

    fn default_of(keys: &[Key], name: &str) -> &'static str {
        keys.iter().find(|key| key.name == name).expect("a key").default
    }

    #[test]
    fn documented_defaults_hold() {
        let config =
            NetworkConfig::parse(r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#).expect("valid");
        let BackendConfig::Vxlan(vxlan) = &config.backend else { panic!("another backend") };
        let default = |name| default_of(&BACKEND_KEYS, name);
        assert_eq!(default("VNI"), vxlan.vni.to_string());
        assert_eq!(default("Port"), format!("{}; udp {}", vxlan.port, super::super::UDP_PORT));
        assert_eq!(default("Learning"), vxlan.learning.to_string());
        assert_eq!(default("DirectRouting"), vxlan.direct_routing.to_string());
        assert!(default_of(&KEYS, "SubnetLen").starts_with(&config.subnet_len.to_string()));
        assert_eq!(config.subnet_min.to_string(), "10.5.1.0", "the second subnet");
        assert_eq!(default_of(&KEYS, "Backend"), format!("`{}`", super::super::DEFAULT_BACKEND));
    }
}
