//! The dataplane as the kernel has it, for `status`: what is attached, what bypasses the stack, and what was dropped.

use std::{collections::HashMap, path::Path, time::Duration};

use flannel_common::vxlan::Vni;
use serde_json::{Value, json};

use super::{
    MOST_NAMED,
    drops::{self, Reason},
    hooks, host_settings, interface_name,
    peers::{self, Peer},
    pinned_peers, pod_settings, refused, unreached,
};
use crate::{
    config::BackendType,
    dataplane::{
        Attachment, AttachmentState, Directions, Flows, Hook, PeerWay, PinDirectory, Way, XdpMode, attached_xdp,
        attachments, pinned_flows,
    },
    device::{Netlink, next_hop::NextHop, vxlan::VxlanDevice},
    evidence::LossKind,
    operator::OperatorError,
    status::Status,
};

/// The kernel's part of an overlay.
pub(super) struct Dataplane {
    attachments: Vec<Attachment>,
    xdp: Option<XdpMode>,
    flows: Flows,
    ways: Vec<PeerWay>,
    /// What the kernel knows of next hops.
    neighbours: HashMap<NextHop, &'static str>,
    /// Those that have dropped something.
    drops: Vec<Reason>,
    /// Which peers are not reached, or do not answer, in words.
    unreached: Vec<String>,
    /// What of known hosts was refused lately, in words.
    refused: Vec<String>,
    /// What of the host's and the pods' settings stops packets, in words.
    stopped: Vec<String>,
}

impl Dataplane {
    pub(super) async fn read(pin_dir: &Path, vni: Vni, status: &Status) -> Result<Self, OperatorError> {
        let pins = PinDirectory::new(pin_dir, vni);
        let flows = pinned_flows(&pins, Duration::from_millis(status.bypass.revalidate_ms))?;
        let (netlink, _events, _connection) = Netlink::open()?;
        let within = netlink.devices_within(status.lease.subnet).await?;
        let pods = netlink.pod_network(status.network, status.lease.subnet, &within).await?;
        let attachments = attachments(&pins, hooks::places(vni, status), &pods.pods, &netlink).await?;
        let xdp = attached_xdp(&pins)?;
        let mut drops = drops::reasons(&pins, 1)?;
        drops.retain(|reason| reason.packets > 0);
        let ways = pinned_peers(&pins, status).read()?;
        // Of thousands of neighbours, where somebody is asked about.
        let neighbours = match status.evidence.silent.is_empty() {
            true => HashMap::new(),
            false => netlink.neighbour_states().await?,
        };
        let unreached = unreached::troubles(status, &ways, &neighbours);
        let refused = refused::troubles(&pins, status.network, &ways)?;
        let of_pods = within.iter().filter_map(|link| interface_name(*link));
        let from_others = match status.backend_type() {
            BackendType::Vxlan => vec![VxlanDevice::name_of(vni)],
            _ => status.underlay_interfaces.clone(),
        };
        let mut interfaces: Vec<_> = of_pods.chain(from_others).collect();
        interfaces.sort_unstable();
        interfaces.dedup();
        let mut stopped = host_settings::troubles(&interfaces);
        if status.evidence.lost.iter().any(|loss| loss.kind == LossKind::Tunnel) {
            let numbers: Vec<_> = ways.iter().map(|peer| peer.ifindex).collect();
            stopped.extend(host_settings::strict_among(&status.underlay_interfaces, &numbers));
        }
        // Where nothing is encapsulated, the underlay's MTU counts.
        let is_all_direct = !ways.is_empty() && ways.iter().all(|peer| peer.way == Way::Direct);
        let mtu = (!is_all_direct).then_some(status.mtu);
        stopped.extend(pod_settings::troubles(&pods, status.lease.subnet, mtu));
        Ok(Self { attachments, xdp, flows, ways, neighbours, drops, unreached, refused, stopped })
    }

    /// What is not as it should be.
    pub(super) fn troubles(&self, status: &Status) -> Vec<String> {
        let missing = self.attachments.iter().filter(|attachment| attachment.state == AttachmentState::Missing);
        let mut troubles: Vec<_> = missing
            .map(|Attachment { hook, interface, .. }| {
                format!("{} is not attached to {interface}; a running agent attaches it again", hook.program())
            })
            .collect();
        let xdp = self.xdp();
        if !status.xdp.mode.is_empty() && status.xdp.mode != xdp {
            troubles.push(format!("XDP is {xdp}, and should be {}", status.xdp.mode));
        }
        troubles.extend_from_slice(&self.unreached);
        troubles.extend_from_slice(&self.refused);
        troubles.extend_from_slice(&self.stopped);
        troubles
    }

    /// With each hook of the pods, or with their number.
    pub(super) fn rows(&self, has_pods: bool) -> Vec<[String; 2]> {
        let words = |attachment: &Attachment| {
            let state = match &attachment.state {
                AttachmentState::Attached => "attached".to_owned(),
                AttachmentState::Missing => "MISSING".to_owned(),
                AttachmentState::Unknown(reason) => format!("unknown: {reason}"),
            };
            format!("{} at {}: {state}", attachment.hook.program(), attachment.interface)
        };
        let is_summed_up = |attachment: &&Attachment| {
            !has_pods
                && Hook::OF_PODS.contains(&attachment.hook)
                && matches!(attachment.state, AttachmentState::Attached)
        };
        let each = self.attachments.iter().filter(|attachment| !is_summed_up(attachment));
        let mut rows: Vec<_> = each.map(|attachment| ["hook".to_owned(), words(attachment)]).collect();
        for hook in Hook::OF_PODS {
            let of_pods = self.attachments.iter().filter(is_summed_up).filter(|attachment| attachment.hook == hook);
            let whose = match of_pods.count() {
                0 => continue,
                1 => "the veth of 1 pod".to_owned(),
                count => format!("the veths of {count} pods"),
            };
            rows.push(["hook".to_owned(), format!("{} at {whose}: attached", hook.program())]);
        }
        let words = |Directions { egress, ingress }| format!("{egress} from pods, {ingress} to pods");
        let Flows { plain, translated } = self.flows;
        rows.push(["flows".to_owned(), format!("{}; translated: {}", words(plain), words(translated))]);
        if !self.ways.is_empty() {
            let ways = [Way::Direct, Way::Encapsulated, Way::NoRoute, Way::NotOnLink]
                .map(|way| (way, self.peers_by(way).count()));
            let ways: Vec<_> = ways.iter().filter(|(_, count)| *count > 0).collect();
            let words: Vec<_> = ways.iter().map(|(way, count)| format!("{count} {}", way.label())).collect();
            rows.push(["reached".to_owned(), words.join(", ")]);
        }
        rows.extend(self.smaller_paths());
        rows.extend(self.drops.iter().map(|reason| {
            let last = reason.samples.first().map(|sample| {
                format!(", last {} ago: {}", drops::age(Duration::from_millis(sample.age_ms)), sample.summary)
            });
            let count = format!("{} {}{}", reason.packets, reason.reason, last.unwrap_or_default());
            ["dropped".to_owned(), count]
        }));
        rows
    }

    /// Peers to whom not all packets of the overlay's MTU fit.
    fn smaller_paths(&self) -> Option<[String; 2]> {
        let smaller = |peer: &PeerWay| Some(format!("{} by {}: {}", peer.subnet, peer.address, peer.smaller_mtu?));
        let mut named: Vec<_> = self.ways.iter().filter_map(smaller).collect();
        let more = named.len().saturating_sub(MOST_NAMED);
        named.truncate(MOST_NAMED);
        if more > 0 {
            named.push(format!("and {more} more"));
        }
        (!named.is_empty()).then(|| ["smaller MTU".to_owned(), named.join(", ")])
    }

    pub(super) fn json(&self) -> Value {
        let hooks = self.attachments.iter().map(|Attachment { hook, interface, state }| {
            let (state, problem) = match state {
                AttachmentState::Attached => ("attached", None),
                AttachmentState::Missing => ("missing", None),
                AttachmentState::Unknown(reason) => ("unknown", Some(reason)),
            };
            json!({ "program": hook.program(), "interface": interface, "state": state, "problem": problem })
        });
        json!({
            "hooks": hooks.collect::<Vec<_>>(),
            "xdp": self.xdp(),
            "flows": self.flows,
            "peers": self.ways,
            "drops": self.drops,
        })
    }

    /// Those that have dropped something, each with its latest packet.
    pub(super) fn drops(&self) -> &[Reason] {
        &self.drops
    }

    /// The peers in the maps, those with trouble first.
    pub(super) fn peers(&self, status: &Status) -> Vec<Peer> {
        peers::judged(&self.ways, status, &self.neighbours)
    }

    fn peers_by(&self, way: Way) -> impl Iterator<Item = &PeerWay> {
        self.ways.iter().filter(move |peer| peer.way == way)
    }

    const fn xdp(&self) -> &'static str {
        match self.xdp {
            Some(mode) => mode.label(),
            None => "off",
        }
    }
}
