//! Packets that were refused and may be a host's of the overlay, and what the operator can do about it.
//!
//! That is what a host with a lease sends with inner addresses that it may not use, and what a stranger sends from pods that another host
//! leases: it may be that host by another address. What else strangers send is counted and listed as all that is dropped, and no trouble: that
//! it is refused is as it should be.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use flannel_common::event::Event;
use ipnet::Ipv4Net;

use super::{OperatorError, decode::decode, drops::age};
use crate::{
    dataplane::{PeerWay, PinDirectory, pinned_accepted, pinned_counters, pinned_drops},
    lease::MacAddress,
};

/// What is older may be over.
const RECENT: Duration = Duration::from_secs(300);
/// Lines of one reason, whatever is sent.
const MOST_LINES: usize = 4;

/// Who sent with an inner address that he may not use, and when he did so last.
type Refused = BTreeMap<(Ipv4Addr, Ipv4Addr), Duration>;

/// In words, latest first.
pub(super) fn troubles(pins: &PinDirectory, network: Ipv4Net, peers: &[PeerWay]) -> Result<Vec<String>, OperatorError> {
    let accepted = pinned_accepted(pins)?;
    let counters = pinned_counters(pins)?;
    let mut troubles = Vec::new();
    let packets =
        |event| counters.iter().find(|(counted, _)| *counted == event).map_or(0, |(_, counter)| counter.packets);
    for (event, samples) in pinned_drops(pins)? {
        if event == Event::DirectForeignMac {
            let recent = samples.iter().filter(|sample| sample.ago < RECENT).collect::<Vec<_>>();
            let senders = recent.iter().filter_map(|sample| Some((sender_on_link(&sample.frame)?, sample.ago)));
            troubles.extend(foreign_macs(senders, packets(event)));
        }
        if event == Event::UnknownVtep {
            let recent = samples.iter().filter(|sample| sample.ago < RECENT);
            let sources = recent.filter_map(|sample| {
                let decoded = decode(event, &sample.frame, sample.link_header_len);
                match (decoded.outer.source, decoded.inner?.source) {
                    (Some(IpAddr::V4(sender)), Some(IpAddr::V4(source))) => Some((sender, source, sample.ago)),
                    _ => None,
                }
            });
            troubles.extend(strangers(sources, peers, packets(event)));
        }
        if !matches!(event, Event::SpoofedInnerSource | Event::ForeignInnerDestination) {
            continue;
        }
        let mut refused = Refused::new();
        for sample in samples.iter().filter(|sample| sample.ago < RECENT) {
            let decoded = decode(event, &sample.frame, sample.link_header_len);
            let inner = decoded.inner.as_ref();
            let address = match event {
                Event::SpoofedInnerSource => inner.and_then(|inner| inner.source),
                _ => inner.and_then(|inner| inner.destination),
            };
            let (Some(IpAddr::V4(sender)), Some(IpAddr::V4(address))) = (decoded.outer.source, address) else {
                continue;
            };
            // The agent may have been told of it since.
            if network.contains(&address) || !accepted.iter().any(|prefix| prefix.contains(&address)) {
                let ago = refused.entry((sender, address)).or_insert(sample.ago);
                *ago = sample.ago.min(*ago);
            }
        }
        troubles.extend(lines(event, packets(event), &refused, network));
    }
    Ok(troubles)
}

/// A line for each stranger that sends from a subnet which a host leases; latest first.
fn strangers(
    sources: impl Iterator<Item = (Ipv4Addr, Ipv4Addr, Duration)>,
    peers: &[PeerWay],
    packets: u64,
) -> Vec<String> {
    let mut latest: BTreeMap<(Ipv4Addr, Ipv4Net, Ipv4Addr), Duration> = BTreeMap::new();
    for (sender, source, ago) in sources {
        if let Some(peer) = peers.iter().find(|peer| peer.subnet.contains(&source)) {
            let last = latest.entry((sender, peer.subnet, peer.address)).or_insert(ago);
            *last = ago.min(*last);
        }
    }
    let mut latest: Vec<_> = latest.into_iter().collect();
    latest.sort_unstable_by_key(|(_, ago)| *ago);
    let line = |((sender, subnet, address), ago): ((Ipv4Addr, Ipv4Net, Ipv4Addr), Duration)| {
        format!(
            "packets from {sender}, which no lease has as a VTEP address, come from pods of {subnet}, which the host with {address} leases; \
             they are refused, last {} ago ({}, {packets} in all): if they are not forged, that host sends from another address than it \
             publishes (see its --iface and --public-ip), or two hosts have one lease (duplicate --public-ip?)",
            age(ago),
            Event::UnknownVtep.label(),
        )
    };
    latest.into_iter().take(MOST_LINES).map(line).collect()
}

/// MAC and IPv4 source of a frame.
fn sender_on_link(frame: &[u8]) -> Option<(MacAddress, Ipv4Addr)> {
    const MAC: usize = 6;
    const SOURCE: usize = 14 + 12;
    let mac = MacAddress(*frame.get(MAC..)?.first_chunk()?);
    Some((mac, Ipv4Addr::from(*frame.get(SOURCE..)?.first_chunk::<4>()?)))
}

/// A line for each MAC, with one of the addresses that it sent from; latest first.
fn foreign_macs(senders: impl Iterator<Item = ((MacAddress, Ipv4Addr), Duration)>, packets: u64) -> Vec<String> {
    let mut latest: BTreeMap<MacAddress, (Duration, Ipv4Addr)> = BTreeMap::new();
    for ((mac, address), ago) in senders {
        let last = latest.entry(mac).or_insert((ago, address));
        *last = (*last).min((ago, address));
    }
    let mut latest: Vec<_> = latest.into_iter().map(|(mac, (ago, address))| (ago, address, mac)).collect();
    latest.sort_unstable();
    let line = |(ago, address, mac): (Duration, Ipv4Addr, MacAddress)| {
        format!(
            "packets from {address} come without a tunnel from the MAC {mac}, which is not that of the host that leases it, last {} ago \
             ({}, {packets} in all): if they are not forged, that host sends from several MACs on this link (bonding modes 5 and 6, two \
             NICs): use vxlan without DirectRouting",
            age(ago),
            Event::DirectForeignMac.label(),
        )
    };
    latest.into_iter().take(MOST_LINES).map(line).collect()
}

fn lines(event: Event, packets: u64, refused: &Refused, network: Ipv4Net) -> Vec<String> {
    let mut latest: Vec<_> = refused.iter().collect();
    latest.sort_by_key(|(_, ago)| **ago);
    let mut lines: Vec<String> = latest
        .iter()
        .take(MOST_LINES)
        .map(|((sender, address), ago)| {
            let (role, advice) = advice(event, *address, network);
            let last = age(**ago);
            format!(
                "packets from {sender} with the inner {role} {address} are refused, last {last} ago ({}, {packets} in all): {advice}",
                event.label(),
            )
        })
        .collect();
    if latest.len() > MOST_LINES {
        let more = latest.len() - MOST_LINES;
        lines.push(format!(
            "{more} more such pairs of host and address; `flannel-agent drops` lists the latest packets"
        ));
    }
    lines
}

/// What the address is to the packet, and what to do.
fn advice(event: Event, address: Ipv4Addr, network: Ipv4Net) -> (&'static str, String) {
    let is_source = event == Event::SpoofedInnerSource;
    let role = if is_source { "source" } else { "destination" };
    let advice = match (is_source, network.contains(&address)) {
        (true, true) => {
            "no lease of that host's covers this address of the Network; if it is not forged, look at `ip addr` \
                         and `ip route` of the host that has it"
                .to_owned()
        }
        (false, true) => {
            "this host does not lease it; that host may go by an old lease of this one, and learns of the new \
                          one from the store"
                .to_owned()
        }
        (true, false) => format!(
            "if that host routes for it, start the agent with --accept-source {address}/32, or a prefix around it"
        ),
        (false, false) => format!(
            "if this host routes to it, start the agent with --accept-source {address}/32, or a prefix around it"
        ),
    };
    (role, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_foreign_mac_has_a_line() {
        let mut frame = [0; 34];
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 7]);
        frame[26..30].copy_from_slice(&[10, 5, 2, 9]);
        let sender = sender_on_link(&frame).unwrap();
        assert_eq!(sender_on_link(&frame[..29]), None);
        let other = (MacAddress([2, 0, 0, 0, 0, 1]), sender.1);
        let seconds = Duration::from_secs;
        let senders = [(sender, seconds(9)), (other, seconds(5)), (sender, seconds(3))];
        let lines = foreign_macs(senders.into_iter(), 12);
        let expected = "packets from 10.5.2.9 come without a tunnel from the MAC 02:00:00:00:00:07, which is not that of the host \
                        that leases it, last 3.0 s ago (direct_foreign_mac, 12 in all)";
        assert!(lines.len() == 2 && lines[0].starts_with(expected), "{lines:?}");
    }

    #[test]
    fn a_flood_of_addresses_is_a_few_lines_and_a_count() {
        let network = "10.5.0.0/16".parse().unwrap();
        let sender = Ipv4Addr::new(192, 168, 64, 2);
        let refused: Refused =
            (0..40u8).map(|n| ((sender, Ipv4Addr::new(172, 16, 0, n)), Duration::from_secs(n.into()))).collect();
        let lines = lines(Event::SpoofedInnerSource, 12, &refused, network);
        assert_eq!(lines.len(), MOST_LINES + 1);
        assert_eq!(
            lines[0],
            "packets from 192.168.64.2 with the inner source 172.16.0.0 are refused, last 0.0 s ago (spoofed_inner_source, 12 in \
             all): if that host routes for it, start the agent with --accept-source 172.16.0.0/32, or a prefix around it"
        );
        assert!(lines[MOST_LINES].starts_with("36 more"), "{lines:#?}");
    }

    #[test]
    fn no_flag_is_named_that_would_not_help() {
        let network = "10.5.0.0/16".parse().unwrap();
        for event in [Event::SpoofedInnerSource, Event::ForeignInnerDestination] {
            let within = advice(event, Ipv4Addr::new(10, 5, 3, 2), network).1;
            assert!(!within.contains("--accept-source"), "{within}");
            let outside = advice(event, Ipv4Addr::new(10, 6, 3, 2), network).1;
            assert!(outside.contains("--accept-source 10.6.3.2/32"), "{outside}");
        }
    }
}
