//! What can become of a packet. One enum is drop reason, counter index, metric label and documentation row.

/// What a program does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Handled here and sent on.
    Forward,
    /// Left as it was, to the next program and the kernel.
    Pass,
    /// Must not pass.
    Drop,
}

macro_rules! events {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal, $outcome:ident;)+) => {
        /// The outcome of one packet in one program, with its reason. The number is the index into
        /// [`COUNTERS`](crate::maps::COUNTERS).
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Event {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Event {
            /// Every event, in the order of the counters.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// How many there are.
            pub const COUNT: u32 = Self::ALL.len() as u32;

            /// The name in counters, metrics and documentation.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }

            /// What a program does with a packet that this happened to.
            #[inline(always)]
            pub const fn outcome(self) -> Outcome {
                match self { $(Self::$name => Outcome::$outcome,)+ }
            }

            /// One sentence for operators.
            pub const fn description(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+),)+ }
            }
        }
    };
}

events! {
    /// to_overlay: encapsulated and sent to a peer whose next hop's MAC is known.
    Encapsulated = "encapsulated", Forward;
    /// to_overlay: encapsulated and sent to a peer whose next hop the kernel resolves.
    EncapsulatedNeighbour = "encapsulated_neighbour", Forward;
    /// to_overlay: encapsulated; the host changes more of its flow's packets than addresses, ports and TTL, so that all take the stack.
    EncapsulatedChanged = "encapsulated_changed", Forward;
    /// to_overlay: sent without encapsulation to a peer on the same link.
    Direct = "direct", Forward;
    /// to_overlay: left to flannel.VNI, whose queue, filters or programs are to see it; from_overlay encapsulates it.
    EncapQueued = "encap_queued", Pass;
    /// to_overlay: a copy of a packet, for who captures on flannel.VNI; the kernel's vxlan device drops it.
    EncapShown = "encap_shown", Pass;
    /// to_overlay: not an IPv4 packet; the overlay carries nothing else.
    EncapNotIpv4 = "encap_not_ipv4", Pass;
    /// to_overlay: routed by somebody else's route, to a next hop that is none of the agent's; left to the kernel's vxlan device.
    EncapOtherNextHop = "encap_other_next_hop", Pass;
    /// to_overlay: shorter than its headers.
    EncapTruncated = "encap_truncated", Pass;
    /// to_overlay: can't be encapsulated as it is; handed to the kernel's vxlan device, which segments it where that helps, and gives it back to from_overlay.
    EncapHandedOn = "encap_handed_on", Pass;
    /// to_overlay: the outer header could not be written into the room made for it.
    EncapFailed = "encap_failed", Drop;

    /// to_underlay: routed by the stack to a peer on the same link; sent to its MAC.
    Routed = "routed", Pass;
    /// to_underlay: the same, to a peer whose MAC the kernel resolves.
    RoutedNeighbour = "routed_neighbour", Forward;
    /// to_underlay: routed to a peer; the host changes more of its flow's packets than addresses, ports and TTL, so that all take the stack.
    RoutedChanged = "routed_changed", Pass;
    /// to_underlay: neither led there by the route that leases share, nor from a pod through the stack; left as it is.
    RoutedOther = "routed_other", Pass;
    /// to_underlay: by the route that leases share, but no host leases the destination's subnet.
    RoutedNoPeer = "routed_no_peer", Drop;
    /// to_underlay: by the route that leases share, to a peer that is not on the external interface's link.
    RoutedNotOnLink = "routed_not_on_link", Drop;

    /// from_pod: a packet of a flow that the stack let out a moment ago; encapsulated past the stack.
    PodEncapsulated = "pod_encapsulated", Forward;
    /// from_pod: the same, to a peer whose next hop the kernel resolves.
    PodEncapsulatedNeighbour = "pod_encapsulated_neighbour", Forward;
    /// from_pod: a packet of a flow that the stack let out translated a moment ago; translated so, and encapsulated past the stack.
    PodTranslated = "pod_translated", Forward;
    /// from_pod: a packet of a flow that the stack let out a moment ago, unchanged or translated; sent past the stack without encapsulation to a peer on the same link.
    PodDirect = "pod_direct", Forward;
    /// from_pod: a packet of no flow that bypasses the stack now, and that may become one; left to the stack.
    PodViaStack = "pod_via_stack", Pass;
    /// from_pod: a packet that always takes the stack: not TCP or UDP, a fragment, with options, with a mark or a priority, not to the overlay, ...
    PodOther = "pod_other", Pass;
    /// from_pod: the headers could not be written into the room made for them.
    PodEncapFailed = "pod_encap_failed", Drop;
    /// from_pod: a pod's own packet to the tunnel port of a VTEP; only hosts may send these.
    PodTunnel = "pod_tunnel", Drop;

    /// to_pod: a packet of a flow that came in by the overlay and went through the stack, unchanged or translated; noted.
    PodReleased = "pod_released", Pass;
    /// to_pod: came in by the overlay; the host changes more of its flow's packets than addresses, ports and TTL, so that all take the stack.
    PodChanged = "pod_changed", Pass;
    /// to_pod: came in by the overlay; nothing is noted of it: it begins or ends a connection, is not TCP or UDP, or is a copy that a bridge sent to every pod.
    PodReceived = "pod_received", Pass;
    /// to_pod: a packet that did not come in by the overlay: from this host, from another pod of it, or from elsewhere.
    PodNotFromOverlay = "pod_not_from_overlay", Pass;

    /// from_overlay: admitted by from_underlay, for a pod; on to the host's stack.
    Received = "received", Pass;
    /// from_overlay: the same, for an address that is no pod's: this host's own in the overlay, its bridge's, or one behind the host.
    ReceivedByHost = "received_by_host", Pass;
    /// from_overlay: came out of the tunnel past from_underlay: by a link that is none of the underlay's, from a pod, to another address of this host.
    NotAdmitted = "not_admitted", Drop;
    /// from_overlay: handed on by to_overlay, and no host leases the destination's subnet.
    EncapNoPeer = "encap_no_peer", Drop;
    /// from_overlay: handed on by to_overlay, and the underlay has no route to the peer.
    EncapNoRoute = "encap_no_route", Drop;
    /// from_overlay: handed on by to_overlay, and larger than the overlay's MTU and not segmentable.
    EncapTooBig = "encap_too_big", Drop;
    /// from_overlay: handed on by to_overlay, and still a tunnel packet that the kernel has to segment, and can't note a second tunnel on.
    EncapNested = "encap_nested", Drop;
    /// from_overlay: handed on by to_overlay, and the kernel has no room for the outer header.
    EncapNoRoom = "encap_no_room", Drop;

    /// xdp_decap: taken out of the tunnel before the kernel aggregates; from_underlay goes on with it.
    XdpDecapsulated = "xdp_decapsulated", Forward;

    /// from_underlay: not a tunnel packet for this host.
    NotTunnel = "not_tunnel", Pass;
    /// from_underlay: a tunnel packet of another VNI, or without a valid one.
    ForeignVni = "foreign_vni", Pass;
    /// from_underlay: a later fragment of some UDP datagram; the admission of its first fragment decides.
    UnderlayFragment = "underlay_fragment", Pass;
    /// from_underlay: a tunnel packet from a known peer, with addresses that it may use; left to the kernel's vxlan device.
    Admitted = "admitted", Pass;
    /// from_underlay: a tunnel packet that the leases refuse, and that comes from where another's route through flannel.VNI leads; left to the kernel's vxlan device.
    AdmittedByRoute = "admitted_by_route", Pass;
    /// from_underlay: a packet of a flow that the stack let in a moment ago; decapsulated and put into the pod.
    Delivered = "delivered", Forward;
    /// from_underlay: a packet of a flow that the stack let in translated a moment ago; decapsulated, translated so, and put into the pod.
    DeliveredTranslated = "delivered_translated", Forward;
    /// from_underlay: a packet from a known peer, with addresses that it may use, taken out of the tunnel here or by xdp_decap; handed to flannel.VNI as received.
    HandedIn = "handed_in", Forward;
    /// from_underlay: a packet without encapsulation from a known peer on the same link, with an address of its lease, handed to flannel.VNI as received.
    DirectHandedIn = "direct_handed_in", Forward;
    /// from_underlay: the same, where there is no tunnel; on to the host's stack.
    DirectReceived = "direct_received", Pass;
    /// from_underlay: the same, of a flow that the stack let in a moment ago, unchanged or translated; put into the pod.
    DirectDelivered = "direct_delivered", Forward;
    /// from_underlay: a packet without encapsulation from an address of a peer's lease, but from another MAC than that peer's.
    DirectForeignMac = "direct_foreign_mac", Drop;
    /// from_underlay: taken out of the tunnel by xdp_decap, but of a VLAN that is not the interface's own.
    DecapForeignVlan = "decap_foreign_vlan", Drop;
    /// from_underlay: the inner headers could not be written.
    DecapFailed = "decap_failed", Drop;
    /// xdp_decap, from_underlay: a tunnel packet shorter than its headers, or than these say.
    TunnelTruncated = "tunnel_truncated", Drop;
    /// xdp_decap, from_underlay: a tunnel packet with options in its outer IPv4 header; no VTEP sends these.
    OuterOptions = "outer_options", Drop;
    /// xdp_decap, from_underlay: the inner frame does not hold IPv4 (ARP, IPv6, VLAN, ...).
    InnerNotIpv4 = "inner_not_ipv4", Drop;
    /// xdp_decap, from_underlay: the inner frame is for another VTEP's MAC; the sender has an old lease of ours.
    InnerForeignMac = "inner_foreign_mac", Drop;
    /// xdp_decap, from_underlay: an inner address is loopback, link-local, multicast, broadcast or zero.
    InnerNotUnicast = "inner_not_unicast", Drop;
    /// xdp_decap, from_underlay: the inner destination is not in this host's subnet, nor in a prefix of --accept-source.
    ForeignInnerDestination = "foreign_inner_destination", Drop;
    /// xdp_decap, from_underlay: no lease names the outer source as a VTEP.
    UnknownVtep = "unknown_vtep", Drop;
    /// xdp_decap, from_underlay: the inner source is neither in the subnet leased to the VTEP that sent it, nor that VTEP's address, nor in a prefix of --accept-source.
    SpoofedInnerSource = "spoofed_inner_source", Drop;
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_are_indexes_and_labels_are_unique() {
        for (index, event) in Event::ALL.iter().enumerate() {
            assert_eq!(*event as usize, index);
        }
        let labels: HashSet<_> = Event::ALL.iter().map(|event| event.label()).collect();
        assert_eq!(labels.len(), Event::ALL.len());
    }

    #[test]
    fn the_documentation_has_a_row_for_each() {
        let documentation = include_str!("../../flannel-agent/docs/dataplane.md");
        for event in Event::ALL {
            let outcome = format!("{:?}", event.outcome()).to_lowercase();
            let row = format!("| `{}` | {outcome} | {} |", event.label(), event.description().trim());
            assert!(documentation.contains(&row), "flannel-agent/docs/dataplane.md lacks: {row}");
        }
    }
}
