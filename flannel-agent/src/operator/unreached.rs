//! Peers that nothing reaches, or from which nothing comes, and what an operator can do about it.

use std::{collections::HashMap, fmt::Write as _};

use super::{MOST_NAMED, interface_name};
use crate::{
    dataplane::{PeerWay, Way},
    device::next_hop::NextHop,
    evidence::{LossKind, NarrowPeer, SilentPeer},
    status::{Status, time},
};

/// In words, the silent ones first.
pub(super) fn troubles(status: &Status, ways: &[PeerWay], neighbours: &HashMap<NextHop, &'static str>) -> Vec<String> {
    let silent = status.evidence.silent.iter().map(|peer| {
        let way = ways.iter().find(|way| (way.subnet, way.address) == (peer.subnet, peer.public_ip));
        silent(peer, way, neighbours)
    });
    // Where nobody sends anything to them, the leases of hosts that are gone are no trouble.
    let is_met = status.evidence.lost.iter().any(|loss| loss.kind == LossKind::Unreached);
    let unreached = ways.iter().filter(|_| is_met).filter_map(|way| {
        let PeerWay { subnet, address, .. } = way;
        match way.way {
            Way::NoRoute => Some(format!(
                "nothing is sent to {subnet} by {address}: the underlay has no route to it; see `ip route get {address}`"
            )),
            Way::NotOnLink => Some(format!(
                "nothing is sent to {subnet} by {address}: it is behind a router, which does not know its pods"
            )),
            Way::Encapsulated | Way::Direct => None,
        }
    });
    let narrow = status.evidence.narrow.iter().map(narrow);
    let mut all: Vec<_> = silent.chain(narrow).chain(unreached).collect();
    let more = all.len().saturating_sub(MOST_NAMED);
    all.truncate(MOST_NAMED);
    all.extend((more > 0).then(|| format!("{more} more peers are silent or not reached; see `flannel-agent peers`")));
    all
}

fn silent(peer: &SilentPeer, way: Option<&PeerWay>, neighbours: &HashMap<NextHop, &'static str>) -> String {
    let SilentPeer { subnet, public_ip, since, last_heard, sent } = peer;
    let heard = last_heard.map_or_else(|| "never".to_owned(), |at| format!("{} ago", time(at)));
    let packets = if *sent == 1 { "packet" } else { "packets" };
    let mut text = format!(
        "{subnet} by {public_ip} does not answer: {sent} {packets} sent to it in {}, last heard {heard}",
        time(*since)
    );
    let next_hop = way.filter(|way| !way.next_hop.is_unspecified()).map(|way| {
        let at = NextHop { ifindex: way.ifindex, address: way.next_hop };
        let interface = interface_name(way.ifindex).unwrap_or_else(|| "an interface that is gone".to_owned());
        (way.next_hop, interface, neighbours.get(&at).copied())
    });
    // Writing to a string does not fail.
    let _ = match next_hop {
        // A host that is up answers within a millisecond: one that is being asked when it is looked at does not.
        Some((next_hop, interface, Some("failed" | "incomplete" | "probe"))) => {
            write!(
                text,
                "; its next hop {next_hop} does not answer ARP on {interface}: is that host up, and on that link?"
            )
        }
        Some((next_hop, interface, state)) => write!(
            text,
            "; its next hop {next_hop} on {interface} is {}: is the host up, an agent on it, and the tunnel's UDP port let through?",
            state.unwrap_or("not known yet")
        ),
        None => write!(text, "; see `ip route get {public_ip}`"),
    };
    text
}

fn narrow(NarrowPeer { subnet, public_ip, since, size }: &NarrowPeer) -> String {
    format!(
        "packets of {size} bytes do not reach {subnet} by {public_ip}, and small ones do, for {}: a link on the way carries less than this \
         host's MTU says; `flannel-agent ping {public_ip}` finds how much. Give the route to that host an `mtu`, or all hosts a smaller MTU",
        time(*since)
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::status::now;

    #[test]
    fn what_is_said_of_a_silent_peer_follows_its_next_hop() {
        let way = PeerWay {
            subnet: "10.5.2.0/24".parse().unwrap(),
            address: [192, 0, 2, 2].into(),
            way: Way::Encapsulated,
            next_hop: [192, 0, 2, 1].into(),
            smaller_mtu: None,
            vtep_mac: [2, 0, 0, 0, 0, 2],
            ifindex: u32::MAX,
            heard: Some(Duration::from_secs(1)),
            traffic: None,
        };
        let now = now();
        let peer =
            SilentPeer { subnet: way.subnet, public_ip: way.address, since: now, last_heard: Some(now), sent: 312 };
        let at = NextHop { ifindex: u32::MAX, address: way.next_hop };
        let said = silent(&peer, Some(&way), &[(at, "failed")].into());
        assert!(said.contains("312 packets sent") && said.contains("does not answer ARP"), "{said}");
        let said =
            silent(&SilentPeer { sent: 1, last_heard: None, ..peer.clone() }, Some(&way), &[(at, "stale")].into());
        assert!(said.contains(" 1 packet sent") && said.contains("heard never") && said.contains("is stale"), "{said}");
        assert!(silent(&peer, None, &HashMap::new()).contains("ip route get 192.0.2.2"));
    }
}
