//! Which packets others' packet rules are looked through for.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use nix::net::if_::if_indextoname;
use tokio::time::timeout;
use tracing::warn;

use super::{Reconciler, restrictions::Observer};
use crate::{
    bypass::{BypassFlag, Kind, Restriction, Scope},
    device::{Changed, PodLink},
    inspection::{
        Pod, Surroundings,
        reader::{Found, Reader},
    },
    lease::LeaseTable,
};

/// For how long the first look at the rule sets may hold up the start.
const FIRST_LOOK: Duration = Duration::from_secs(3);

/// Who looks them through, and what is known of the packets.
#[derive(Default)]
pub(super) struct Inspected {
    pub(super) reader: Reader,
    bridges: BTreeSet<String>,
    pods: BTreeMap<String, Pod>,
    pub(super) peers: Arc<BTreeSet<Ipv4Addr>>,
    /// The bits that packet rules may set in marks.
    pub(super) marks: u32,
}

impl Reconciler<'_> {
    /// Pods are at these places.
    pub(super) fn inspect_for_pods(&mut self, links: &[PodLink]) {
        // One that is gone has no packets.
        let name = |bridge| if_indextoname(bridge).ok()?.into_string().ok();
        let bridges: BTreeSet<u32> = links.iter().filter_map(|link| link.bridge).collect();
        let pod = |link: &PodLink| (link.name.clone(), Pod { index: link.index, is_bridged: link.bridge.is_some() });
        self.bypass.inspected.bridges = bridges.into_iter().filter_map(name).collect();
        self.bypass.inspected.pods = links.iter().map(pod).collect();
        self.inspect();
    }

    /// Peers may be others. Rules about the tunnel packets of a new one are found with the next look.
    pub(super) fn inspect_for_peers(&mut self, table: &LeaseTable) {
        let peers: BTreeSet<_> = table.iter().map(|(_, peer)| peer.public_ip).collect();
        if *self.bypass.inspected.peers != peers {
            self.bypass.inspected.peers = Arc::new(peers);
            self.inspect();
        }
    }

    /// Waits until the rule sets were looked through, before anything bypasses the stack. Where that takes too long, all takes it
    /// until then.
    pub(super) async fn wait_for_inspection(&mut self, table: &LeaseTable) {
        self.restrict_or_say();
        if self.cli.bypass != BypassFlag::Auto {
            return;
        }
        match timeout(FIRST_LOOK, self.bypass.inspected.reader.changed()).await {
            Ok(found) => self.take_found(found, table).await,
            Err(_) => {
                warn!(
                    "reading this host's packet rules takes longer than {FIRST_LOOK:?}; nothing bypasses the stack until then"
                );
                let subject = "packet rules that are not read yet".to_owned();
                let unread = Restriction { kind: Kind::Rule, subject, scope: Scope::Everything };
                self.observed(Observer::Rules, [unread].into());
            }
        }
    }

    /// Takes what the rule sets come to.
    pub(super) async fn take_found(&mut self, found: Found, table: &LeaseTable) {
        let Found { restrictions, marks, concern_tunnel, may_stop } = found;
        self.status.may_stop(may_stop);
        if self.bypass.restrictions.leave_in_tunnel(concern_tunnel) {
            self.restrict_or_say();
        }
        self.observed(Observer::Rules, restrictions.into_iter().collect());
        let has_other_marks = std::mem::replace(&mut self.bypass.inspected.marks, marks) != marks;
        if has_other_marks && self.look_at_routing_rules(table).await {
            self.schedule.comparison = self.schedule.comparison.max(Some(Changed::Way));
        }
    }

    fn inspect(&self) {
        let Inspected { reader, bridges, pods, peers, marks: _ } = &self.bypass.inspected;
        let (places, external) = (&self.bypass.restrictions.places, self.uplink.external.link.name.clone());
        reader.set(Surroundings {
            network: self.target.network.network,
            subnet: self.target.lease.key.subnet,
            overlay: self.target.backend.device_name().to_owned(),
            underlay: places.underlay.iter().map(|link| link.name.clone()).chain([external]).collect(),
            address: self.uplink.external.address,
            port: self.target.backend.port(),
            bridges: bridges.clone(),
            pods: pods.clone(),
            peers: Arc::clone(peers),
        });
    }
}
