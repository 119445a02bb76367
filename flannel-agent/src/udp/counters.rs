//! What became of each packet, counted.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! events {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal;)+) => {
        /// What became of a packet in the tunnel of the udp backend. One enum is reason, counter, label and documentation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Event {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Event {
            /// Every event, in the order of the counters.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The name in counters, metrics and documentation.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }

            /// One sentence for operators.
            pub const fn description(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+),)+ }
            }
        }
    };
}

events! {
    /// A packet sent to the host that leases its destination.
    Sent = "udp_sent";
    /// A packet from a peer, given to this host's stack.
    Received = "udp_received";
    /// Not sent: not an IPv4 packet; the tunnel carries nothing else.
    SendNotIpv4 = "udp_send_not_ipv4";
    /// Not sent: no host leases the destination's subnet; the sender was told, as far as the limit for that allows.
    SendNoPeer = "udp_send_no_peer";
    /// Not sent: its TTL has run out; the sender was told, as far as the limit for that allows.
    SendTtlExceeded = "udp_send_ttl_exceeded";
    /// Not sent: the kernel left it to be segmented in a way that is none of those agreed on.
    SendNotSegmentable = "udp_send_not_segmentable";
    /// Not sent: the kernel refused the datagram (no route to the peer, a packet rule, ...).
    SendFailed = "udp_send_failed";
    /// Not received: shorter than its headers, or than these say.
    Truncated = "udp_truncated";
    /// Not received: not an IPv4 packet.
    NotIpv4 = "udp_not_ipv4";
    /// Not received: an inner address is loopback, link-local, multicast, broadcast or zero.
    NotUnicast = "udp_not_unicast";
    /// Not received: no lease names the sender as its host.
    UnknownPeer = "udp_unknown_peer";
    /// Not received: the inner source is neither in the subnet leased to the sender, nor the sender's address, nor in a
    /// prefix of --accept-source.
    SpoofedInnerSource = "udp_spoofed_inner_source";
    /// Not received: the inner destination is not in this host's subnet, nor in a prefix of --accept-source.
    ForeignInnerDestination = "udp_foreign_inner_destination";
    /// Not received: its TTL has run out; the sender was told, as far as the limit for that allows.
    TtlExceeded = "udp_ttl_exceeded";
    /// Not received: this host's kernel refused it.
    DeliveryFailed = "udp_delivery_failed";
}

/// The counters of one thread. Others read them.
#[derive(Debug)]
pub(super) struct Counters([AtomicU64; Event::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; Event::ALL.len()])
    }
}

impl Counters {
    pub(super) fn add(&self, event: Event, packets: u64) {
        self.0[event as usize].fetch_add(packets, Ordering::Relaxed);
    }

    pub(super) fn get(&self, event: Event) -> u64 {
        self.0[event as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_event_has_a_counter_and_a_name_of_its_own() {
        let counters = Counters::default();
        for (number, event) in Event::ALL.iter().enumerate() {
            counters.add(*event, number as u64);
        }
        assert!(Event::ALL.iter().enumerate().all(|(number, event)| counters.get(*event) == number as u64));
        let labels: HashSet<_> = Event::ALL.iter().map(|event| event.label()).collect();
        assert_eq!(labels.len(), Event::ALL.len());
    }
}
