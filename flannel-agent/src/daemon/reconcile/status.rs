//! What is told of the datapath.

use std::{net::Ipv4Addr, time::Duration};

use tracing::{info, warn};

use crate::{
    backend::Backend,
    bypass::{BypassFlag, Restriction},
    dataplane::Features,
    device::{Link, external::External},
    repair::{DriftStatus, Repair},
    status::{BypassStatus, EndsStatus, MayStop, RoutesStatus, RulesStatus, Status, TunnelStatus, XdpStatus, now},
    xdp::Choice,
};

/// The datapath's part of this host's status.
pub(super) struct DatapathStatus {
    external_interface: String,
    underlay_interfaces: Vec<String>,
    public_ip: Ipv4Addr,
    mtu: u32,
    features: Features,
    bypass: BypassStatus,
    xdp: XdpStatus,
    routes: RoutesStatus,
    rules: RulesStatus,
    may_stop: MayStop,
    tunnel: Option<TunnelStatus>,
    drift: DriftStatus,
    /// Whether it is another than it was when it was told last.
    pub(super) is_due: bool,
}

impl DatapathStatus {
    pub(super) fn new(features: Features, external: &External, backend: &Backend) -> Self {
        Self {
            external_interface: external.link.name.clone(),
            underlay_interfaces: Vec::new(),
            public_ip: external.public_ip,
            mtu: backend.mtu(),
            features,
            bypass: BypassStatus::default(),
            xdp: XdpStatus::default(),
            routes: RoutesStatus::default(),
            rules: RulesStatus::default(),
            may_stop: MayStop::default(),
            tunnel: None,
            drift: DriftStatus::default(),
            is_due: true,
        }
    }

    pub(super) const fn features(&self) -> Features {
        self.features
    }

    /// Puts it into this host's status.
    pub(super) fn tell(&mut self, status: &mut Status) {
        self.is_due = false;
        status.external_interface.clone_from(&self.external_interface);
        status.underlay_interfaces.clone_from(&self.underlay_interfaces);
        (status.public_ip, status.mtu, status.features) = (self.public_ip, self.mtu, self.features);
        status.bypass.clone_from(&self.bypass);
        status.xdp.clone_from(&self.xdp);
        status.routes.clone_from(&self.routes);
        status.rules.clone_from(&self.rules);
        status.may_stop.clone_from(&self.may_stop);
        status.tunnel.clone_from(&self.tunnel);
        status.drift.clone_from(&self.drift);
    }

    pub(super) fn xdp(&mut self, choice: &Choice) {
        let xdp = XdpStatus { mode: choice.label().to_owned(), reason: choice.reason.clone() };
        self.is_due |= self.xdp != xdp;
        self.xdp = xdp;
    }

    pub(super) fn bypass(&mut self, flag: BypassFlag, time: Duration, conntrack_liberal: Option<bool>) {
        let bypass = &mut self.bypass;
        let before = (bypass.flag, bypass.revalidate_ms, bypass.conntrack_liberal);
        let now = (flag, time.as_millis() as u64, conntrack_liberal);
        self.is_due |= before != now;
        (bypass.flag, bypass.revalidate_ms, bypass.conntrack_liberal) = now;
    }

    /// What has to see each packet.
    pub(super) fn restrictions<'a>(&mut self, all: impl Iterator<Item = &'a Restriction>) {
        self.bypass.restrictions = all.cloned().collect();
        self.is_due = true;
    }

    pub(super) fn ends(&mut self, ends: EndsStatus) {
        self.is_due |= self.bypass.ends != ends;
        self.bypass.ends = ends;
    }

    /// Somebody else changed something, and it is as it should be again.
    pub(super) fn repaired(&mut self, repair: Repair, what: &str) {
        warn!("repaired ({}): {what}", repair.label());
        self.drift.repaired.entry(repair.label().to_owned()).or_default().again(now(), what);
        self.is_due = true;
    }

    /// How it stands with something that only others can repair; said when it changes.
    pub(super) fn waiting(&mut self, about: &str, problem: Option<String>) {
        let waiting = &mut self.drift.waiting;
        if waiting.get(about) == problem.as_ref() {
            return;
        }
        self.is_due = true;
        match problem {
            Some(problem) => {
                warn!("{problem}");
                waiting.insert(about.to_owned(), problem);
            }
            None => {
                info!("the {about} is well again");
                waiting.remove(about);
            }
        }
    }

    /// The external interface is another one, or has another address or MTU.
    pub(super) fn external(&mut self, external: &External, backend: &Backend) {
        self.external_interface.clone_from(&external.link.name);
        (self.public_ip, self.mtu) = (external.public_ip, backend.mtu());
        self.is_due = true;
    }

    /// The links that tunnel packets are taken from.
    pub(super) fn underlay(&mut self, links: &[Link]) {
        let names: Vec<_> = links.iter().map(|link| link.name.clone()).collect();
        self.is_due |= self.underlay_interfaces != names;
        self.underlay_interfaces = names;
    }

    pub(super) fn routes(&mut self, routes: RoutesStatus) {
        self.is_due |= self.routes != routes;
        self.routes = routes;
    }

    pub(super) fn rules(&mut self, rules: RulesStatus) {
        self.is_due |= self.rules != rules;
        self.rules = rules;
    }

    /// Which of others' packet rules may stop packets.
    pub(super) fn may_stop(&mut self, may_stop: MayStop) {
        self.is_due |= self.may_stop != may_stop;
        self.may_stop = may_stop;
    }

    pub(super) fn tunnel(&mut self, tunnel: TunnelStatus) {
        self.is_due |= self.tunnel.as_ref() != Some(&tunnel);
        self.tunnel = Some(tunnel);
    }
}
