//! What each event means to an operator: the one place that says what usually causes it, where to look, and what mends it.
//! `docs/drops.md` has the same for what is dropped.

mod command;
mod sample;

use flannel_common::event::Event;
use serde::Serialize;

pub use self::command::{Options, print};
pub(super) use self::sample::Known;

/// What there is to say of an event beside its [description](Event::description).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Explanation {
    /// What usually causes it.
    pub(super) cause: &'static str,
    /// The command to look further with.
    pub(super) look: &'static str,
    /// What mends it; empty where nothing is wrong.
    pub(super) mend: &'static str,
}

/// Of what is as it should be.
const ORDINARY: Explanation =
    Explanation { cause: "ordinary traffic: nothing is wrong", look: "flannel-agent trace SRC DST", mend: "" };

/// Of what a host of no overlay, or a broken one, sends.
const MALFORMED: Explanation = Explanation {
    cause: "a sender that is no VTEP of Linux or of this agent, a device on the way that breaks packets, or an attack",
    look: "tcpdump -nevi INTERFACE udp port 8472",
    mend: "find the sender by its outer address and MAC; where it is no host of yours, let the underlay's firewall drop UDP 8472 from \
           it",
};

/// Of the kernel refusing what it should not.
const KERNEL: Explanation = Explanation {
    cause: "the kernel had no memory for the packet, or refused a change of its headers",
    look: "dmesg; grep -i -e memfree -e slab /proc/meminfo",
    mend: "free memory on this host; where it stays, report it with the output of `flannel-agent drops -o json`",
};

/// Of an event.
pub(super) const fn explanation(event: Event) -> Explanation {
    match event {
        Event::EncapFailed | Event::PodEncapFailed | Event::DecapFailed => KERNEL,
        Event::RoutedNoPeer | Event::EncapNoPeer => Explanation {
            cause: "the destination is in a subnet of the Network that no host leases: its host has gone, or a pod or a service still \
                    names an old address",
            look: "flannel-agent peers",
            mend: "start the agent of the host that should lease it, or make whoever sends use the new address",
        },
        Event::RoutedNotOnLink => Explanation {
            cause: "host-gw reaches hosts on the same link only, and the peer is behind a router",
            look: "flannel-agent peers; ip route get VTEP",
            mend: "put the hosts on one link, or use the backend vxlan (with DirectRouting for those on the link)",
        },
        Event::PodTunnel => Explanation {
            cause: "a pod sends VXLAN packets to a host itself: it runs an overlay of its own on the same port, or tries to forge \
                    packets of others",
            look: "flannel-agent drops; ip link show VETH",
            mend: "have the overlay inside the pods use another UDP port; else look at the pod",
        },
        Event::NotAdmitted => Explanation {
            cause: "a tunnel packet came in by an interface where nobody checks senders: not one of the underlay's, or to another \
                    address of this host than its VTEP address",
            look: "flannel-agent status; ip route get SENDER",
            mend: "name the interface that other hosts reach this one by with --iface, and the address with --public-ip",
        },
        Event::DirectForeignMac => Explanation {
            cause: "a host sends from several MACs on this link (bonding modes 5 and 6, two NICs), or somebody forges a pod's address",
            look: "ip neighbour show; flannel-agent drops",
            mend: "use vxlan without DirectRouting, or a bonding mode with one MAC; else find the forger by his MAC",
        },
        Event::DecapForeignVlan => Explanation {
            cause: "a tunnel packet came with the tag of a VLAN that has an interface of its own, and XDP took it out of the tunnel",
            look: "ip -d link show type vlan; flannel-agent status",
            mend: "name the VLAN's interface with --iface where the hosts talk there, or set --xdp=off",
        },
        Event::TunnelTruncated | Event::OuterOptions => MALFORMED,
        Event::InnerNotIpv4 => Explanation {
            cause: "a host sends something else than IPv4 into the overlay: ARP or IPv6 of a bridge that has a vxlan device as a port, or \
                    a VXLAN of somebody else's with the same VNI and port",
            look: "tcpdump -nevi INTERFACE udp port 8472",
            mend: "take the vxlan device out of the bridge there, or give the other VXLAN a VNI or a port of its own",
        },
        Event::InnerForeignMac => Explanation {
            cause: "the sender has an old lease of this host: it sends to the MAC that flannel.VNI had before",
            look: "flannel-agent status here (vtepMac), flannel-agent peers on the sender",
            mend: "nothing, where it ends within seconds; else see why the sender does not follow the store (status there)",
        },
        Event::InnerNotUnicast => Explanation {
            cause: "a broadcast, multicast, loopback or link-local packet in the tunnel; the overlay carries unicast only",
            look: "flannel-agent drops",
            mend: "have the program use unicast; this overlay, as flannel's, carries nothing else",
        },
        Event::ForeignInnerDestination => Explanation {
            cause: "the sender goes by an old lease of this host, or this host routes for what is behind it without saying so",
            look: "flannel-agent status; flannel-agent peers on the sender",
            mend: "for what is behind this host: --accept-source with its prefix; else see why the sender does not follow the store",
        },
        Event::UnknownVtep => Explanation {
            cause: "a host sends from another address than its lease says (another --iface, NAT between the hosts), its lease is gone, or it is \
                    none of the cluster's",
            look: "flannel-agent explain unknown_vtep; flannel-agent peers; ip -br address on the sender",
            mend: "have the sender's agent publish the address that it sends from (--iface, --public-ip), or give it a lease by starting its \
                   agent; for a stranger, the underlay's firewall",
        },
        Event::SpoofedInnerSource => Explanation {
            cause: "a host sends for others: it routes what is behind it without saying so, masquerading is off for what leaves its pods' bridge, \
                    two hosts use one subnet, or a pod forges its address",
            look: "flannel-agent explain spoofed_inner_source; ip route get SOURCE on the sender",
            mend: "for what is behind the sender: --accept-source with its prefix on every host; two hosts with one subnet: give one \
                   another lease; else find the pod",
        },
        Event::EncapNoRoute => Explanation {
            cause: "the underlay has no route to the host that leases the destination, or one that refuses",
            look: "flannel-agent peers; ip route get VTEP",
            mend: "bring the underlay's route back",
        },
        Event::EncapTooBig => Explanation {
            cause: "a packet is larger than the overlay's MTU and may not be fragmented: a pod or bridge has a larger MTU than the overlay",
            look: "flannel-agent status; ip link show VETH",
            mend: "give pods the MTU of subnet.env (FLANNEL_MTU)",
        },
        Event::EncapHandedOn => Explanation {
            cause: "a packet of a tunnel of a pod's own is segmented, and then encapsulated; or it is dropped a moment later, as encap_no_peer, \
                    encap_no_route, encap_too_big or encap_no_room",
            look: "flannel-agent counters; flannel-agent drops",
            mend: "",
        },
        Event::EncapNotIpv4 => Explanation {
            cause: "the kernel's own IPv6 packets on flannel.VNI (router solicitation, MLD): nothing is wrong",
            look: "tcpdump -nevi flannel.VNI ip6",
            mend: "",
        },
        Event::EncapOtherNextHop => Explanation {
            cause: "a route of somebody else's leads through flannel.VNI",
            look: "ip route show dev flannel.VNI",
            mend: "where nobody wants it, remove that route",
        },
        Event::EncapNoRoom | Event::EncapNested | Event::EncapTruncated => KERNEL,
        Event::ForeignVni => Explanation {
            cause: "another VXLAN uses the same UDP port",
            look: "ip -d link show type vxlan",
            mend: "nothing, where it is known; else give it a port of its own",
        },
        Event::PodChanged | Event::EncapsulatedChanged | Event::RoutedChanged => Explanation {
            cause: "a packet rule of the host changes TOS, TTL or payload of each packet of a flow, so that it can't bypass the stack",
            look: "nft list ruleset; iptables-save -t mangle",
            mend: "nothing is wrong; for more speed, remove the rule",
        },
        Event::AdmittedByRoute => Explanation {
            cause: "a route through flannel.VNI of another daemon or of the operator's lets in what the leases refuse",
            look: "ip route show dev flannel.VNI",
            mend: "where nobody wants it, remove that route",
        },
        Event::Encapsulated
        | Event::EncapsulatedNeighbour
        | Event::Direct
        | Event::EncapQueued
        | Event::EncapShown
        | Event::Routed
        | Event::RoutedNeighbour
        | Event::RoutedOther
        | Event::PodEncapsulated
        | Event::PodEncapsulatedNeighbour
        | Event::PodTranslated
        | Event::PodDirect
        | Event::PodViaStack
        | Event::PodOther
        | Event::PodReleased
        | Event::PodReceived
        | Event::PodNotFromOverlay
        | Event::Received
        | Event::ReceivedByHost
        | Event::XdpDecapsulated
        | Event::NotTunnel
        | Event::UnderlayFragment
        | Event::Admitted
        | Event::Delivered
        | Event::DeliveredTranslated
        | Event::HandedIn
        | Event::DirectHandedIn
        | Event::DirectReceived
        | Event::DirectDelivered => ORDINARY,
    }
}

#[cfg(test)]
mod tests {
    use flannel_common::event::Outcome;

    use super::*;

    #[test]
    fn what_is_dropped_has_a_mend_and_a_row_in_the_documentation() {
        let page = include_str!("../../docs/drops.md");
        for event in Event::ALL.iter().filter(|event| event.outcome() == Outcome::Drop) {
            let Explanation { cause, look, mend } = explanation(*event);
            assert!(!mend.is_empty(), "{}", event.label());
            let row = format!("| `{}` | {cause} | `{look}` | {mend} |", event.label());
            assert!(page.contains(&row), "docs/drops.md lacks: {row}");
        }
    }
}
