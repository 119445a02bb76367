//! What the kernel has of an overlay.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    time::Duration,
};

use flannel_common::{
    event::{Event, Outcome},
    vxlan::Vni,
};

use super::{Collected, Metric, Source};
use crate::{
    backend::has_datapath,
    dataplane::{AttachmentState, Directions, Flows, PinDirectory, pinned_counters, pinned_flows},
    device::Netlink,
    operator::{
        hooks,
        peers::{self, Count, Peer, State},
    },
    status::{Status, now},
};

/// As labels.
const FROM_PODS: &str = "from_pods";
const TO_PODS: &str = "to_pods";

/// The overlay, and how the kernel is asked.
pub(super) struct Reading<'a> {
    pub(super) pin_dir: &'a Path,
    pub(super) vni: Vni,
    pub(super) status: &'a Status,
    /// [`None`] where it can't be.
    pub(super) netlink: Option<&'a Netlink>,
    pub(super) is_per_peer: bool,
}

/// The programs' counters.
pub(super) fn counters(collected: &mut Collected, pin_dir: &Path, vni: Vni) {
    let counters = pinned_counters(&PinDirectory::new(pin_dir, vni));
    let Some(counters) = collected.read(Source::Counters, counters) else { return };
    let vni = vni.to_string();
    let mut bypassed = BTreeMap::from([(FROM_PODS, 0), (TO_PODS, 0)]);
    for (event, counter) in counters {
        let outcome = match event.outcome() {
            Outcome::Forward => "forward",
            Outcome::Pass => "pass",
            Outcome::Drop => "drop",
        };
        let labels = [vni.as_str(), event.label(), outcome];
        collected.exposition.add(Metric::Packets, &labels, counter.packets);
        collected.exposition.add(Metric::Bytes, &labels, counter.bytes);
        if let Some(direction) = bypassing(event) {
            *bypassed.entry(direction).or_default() += counter.packets;
        }
    }
    for (direction, packets) in bypassed {
        collected.exposition.add(Metric::BypassPackets, &[&vni, direction], packets);
    }
}

/// Which way a packet went past the host's stack.
const fn bypassing(event: Event) -> Option<&'static str> {
    match event {
        Event::PodEncapsulated | Event::PodEncapsulatedNeighbour | Event::PodTranslated | Event::PodDirect => {
            Some(FROM_PODS)
        }
        Event::Delivered | Event::DeliveredTranslated | Event::DirectDelivered => Some(TO_PODS),
        _ => None,
    }
}

impl Reading<'_> {
    pub(super) async fn tell(self, collected: &mut Collected) {
        if !has_datapath(self.status.backend_type()) {
            return;
        }
        counters(collected, self.pin_dir, self.vni);
        let pins = PinDirectory::new(self.pin_dir, self.vni);
        let bypass_time = Duration::from_millis(self.status.bypass.revalidate_ms);
        if let Some(flows) = collected.read(Source::Flows, pinned_flows(&pins, bypass_time)) {
            self.flows(collected, flows);
        }
        let neighbours = match self.netlink {
            Some(netlink) => collected.read(Source::Neighbours, netlink.neighbour_states().await),
            None => None,
        };
        let neighbours = neighbours.unwrap_or_else(HashMap::new);
        if let Some(peers) = collected.read(Source::Peers, peers::peers(&pins, self.status, &neighbours)) {
            self.peers(collected, peers);
        }
        if let Some(netlink) = self.netlink {
            self.hooks(collected, &pins, netlink).await;
        }
    }

    fn flows(&self, collected: &mut Collected, Flows { plain, translated }: Flows) {
        let vni = self.vni.to_string();
        for (kind, Directions { egress, ingress }) in [("plain", plain), ("translated", translated)] {
            collected.exposition.add(Metric::Flows, &[&vni, FROM_PODS, kind], egress);
            collected.exposition.add(Metric::Flows, &[&vni, TO_PODS, kind], ingress);
        }
    }

    fn peers(&self, collected: &mut Collected, mut peers: Vec<Peer>) {
        let (vni, now) = (self.vni.to_string(), now());
        for state in State::ALL {
            let number = peers.iter().filter(|peer| peer.state == state).count();
            collected.exposition.add(Metric::PeersByState, &[&vni, &label(state)], number);
        }
        let heard = |peer: &Peer| Some(now.saturating_sub(peer.last_heard_ms? / 1000));
        let never_heard = peers.iter().filter(|peer| peer.last_heard_ms.is_none()).count();
        collected.exposition.add(Metric::PeersNeverHeard, &[&vni], never_heard);
        if let Some(oldest) = peers.iter().filter_map(heard).min() {
            collected.exposition.add(Metric::PeersOldestHeard, &[&vni], oldest);
        }
        if !self.is_per_peer {
            return;
        }
        // By what stays, not by how they are.
        peers.sort_by_key(|peer| peer.subnet);
        for peer in &peers {
            let (subnet, vtep) = (peer.subnet.to_string(), peer.address.to_string());
            let of = [vni.as_str(), &subnet, &vtep];
            collected.exposition.add(Metric::PeerState, &[&vni, &subnet, &vtep, &label(peer.state)], true);
            if let Some(heard) = heard(peer) {
                collected.exposition.add(Metric::PeerLastHeard, &of, heard);
            }
            for (direction, count) in [("sent", peer.sent), ("received", peer.received)] {
                let Some(Count { packets, bytes }) = count else { continue };
                let labels = [of[0], of[1], of[2], direction];
                collected.exposition.add(Metric::PeerPackets, &labels, packets);
                collected.exposition.add(Metric::PeerBytes, &labels, bytes);
            }
        }
    }

    async fn hooks(&self, collected: &mut Collected, pins: &PinDirectory, netlink: &Netlink) {
        let attachments = hooks::of(pins, self.vni, self.status, netlink).await;
        let Some(attachments) = collected.read(Source::Hooks, attachments) else { return };
        let mut numbers = BTreeMap::<_, [usize; 3]>::new();
        for attachment in &attachments {
            let [attached, missing, unknown] = numbers.entry(attachment.hook.program()).or_default();
            match &attachment.state {
                AttachmentState::Attached => *attached += 1,
                AttachmentState::Missing => *missing += 1,
                AttachmentState::Unknown(_) => *unknown += 1,
            }
        }
        let vni = self.vni.to_string();
        for (program, of_state) in numbers {
            for (state, number) in ["attached", "missing", "unknown"].into_iter().zip(of_state) {
                collected.exposition.add(Metric::Hooks, &[&vni, program, state], number);
            }
        }
    }
}

fn label(state: State) -> String {
    state.label().replace(' ', "_")
}
