//! flannel with Calico's policy, which is known as Canal: pods that are routed to, each by a veth of its own, and the rules of
//! its agent Felix (projectcalico/calico: cni-plugin/pkg/dataplane/linux, felix/rules/endpoints.go, static.go and policy.go;
//! with nftables felix/nftables). Its own marks are those of its default mask.

use std::net::Ipv4Addr;

use xtask::lab::{Host, Netns, Pod, Subnet, services::ServiceRules};

use super::{Enforcer, assert_holds_as_with_flannel, filled};

/// The host's side of a pod's veth.
pub const VETH: &str = "cali0123456789a";

/// Makes a pod as Calico's plugin does: a whole prefix of its own, an address that no host has as its gateway, for which the
/// host answers, and a route.
fn add_routed_pod(host: &mut Host, subnet: &Subnet) {
    let address = Ipv4Addr::from_bits(subnet.gateway.to_bits() + 1);
    let netns = Netns::create(&format!("{}-pod1", host.netns.name())).unwrap();
    let at_host = &host.netns;
    let (mtu, name) = (subnet.mtu, netns.name());
    let link = format!("link add {VETH} address ee:ee:ee:ee:ee:ee mtu {mtu} type veth peer name eth0 netns {name}");
    at_host.ip(&link).unwrap();
    for setting in ["proxy_arp=1", "rp_filter=1", "route_localnet=1", "forwarding=1"] {
        at_host.exec(&format!("sysctl -qw net.ipv4.conf.{VETH}.{setting}")).unwrap();
    }
    at_host.exec(&format!("sysctl -qw net.ipv4.neigh.{VETH}.proxy_delay=0")).unwrap();
    at_host.ip(&format!("link set {VETH} up")).unwrap();
    at_host.ip(&format!("route add {address}/32 dev {VETH} scope link")).unwrap();
    netns.ip("link set lo up").unwrap();
    netns.ip(&format!("address add {address}/32 dev eth0")).unwrap();
    netns.ip(&format!("link set eth0 mtu {mtu} up")).unwrap();
    netns.ip("route add 169.254.1.1 dev eth0 scope link").unwrap();
    netns.ip("route add default via 169.254.1.1 dev eth0").unwrap();
    host.pods.push(Pod { netns, address });
}

struct Iptables;

impl Enforcer for Iptables {
    const KEEPS_ESTABLISHED: bool = true;

    fn add_pod(host: &mut Host, subnet: &Subnet) {
        add_routed_pod(host, subnet);
    }

    fn install(host: &Host, pod: &Pod) -> Self {
        host.netns.feed("iptables-restore --noflush", &filled(include_str!("calico.rules"), pod, &[])).unwrap();
        Self.allow(host, pod, None);
        Self
    }

    fn allow(&self, host: &Host, pod: &Pod, ports: Option<&[u16]>) {
        let text = match ports {
            None => filled(include_str!("calico-open.rules"), pod, &[]),
            Some(ports) => filled(include_str!("calico-policy.rules"), pod, ports),
        };
        host.netns.feed("iptables-restore --noflush", &text).unwrap();
    }
}

/// `NFTablesMode: Enabled`.
struct Nftables;

impl Enforcer for Nftables {
    const KEEPS_ESTABLISHED: bool = true;
    const RULES: ServiceRules = ServiceRules::Nftables;

    fn add_pod(host: &mut Host, subnet: &Subnet) {
        add_routed_pod(host, subnet);
    }

    fn install(host: &Host, pod: &Pod) -> Self {
        host.netns.feed("nft -f -", &filled(include_str!("calico.nft"), pod, &[])).unwrap();
        Self.allow(host, pod, None);
        Self
    }

    fn allow(&self, host: &Host, pod: &Pod, ports: Option<&[u16]>) {
        let text = match ports {
            None => filled(include_str!("calico-open.nft"), pod, &[]),
            Some(ports) => filled(include_str!("calico-policy.nft"), pod, ports),
        };
        host.netns.feed("nft -f -", &text).unwrap();
    }
}

#[test]
fn calicos_policy_holds_among_routed_pods() {
    assert_holds_as_with_flannel::<Iptables>();
}

#[test]
fn calicos_policy_holds_by_nftables() {
    assert_holds_as_with_flannel::<Nftables>();
}
