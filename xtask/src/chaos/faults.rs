//! Beginning and ending faults, with plain commands from outside: signals, links set down, and frames that the underlay's
//! bridge does not forward, so that nothing on a host is another than it would be.

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::{
    cluster::{Agent, Cluster, foreign_address},
    schedule::{Fault, Kind},
    timeline::Extent,
};
use crate::lab::{Backend, PREFIX, address};

/// What became of a fault's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was done.
    Done,
    /// What it needs is not there just now.
    LeftOut,
}

impl Cluster<'_> {
    /// Begins a fault of something that is there.
    ///
    /// # Errors
    /// Where a command fails that should not.
    pub(super) fn begin(&mut self, fault: Fault) -> Result<Outcome> {
        let now = self.now();
        let Fault { kind, place, other, .. } = fault;
        self.disturb(&fault);
        match kind {
            Kind::AgentKilled => self.kill_agent(place)?,
            Kind::AgentStopped | Kind::LeaseOutslept => {
                self.signal_agent(place, Signal::SIGSTOP)?;
                self.places[place].agent = Agent::Stopped;
                self.timeline.agent_goes(self.places[place].id, now);
            }
            Kind::EtcdKilled | Kind::EtcdAway => {
                self.store_is_up = false;
                self.store.kill()?;
            }
            Kind::EtcdRestarted => {
                self.store_is_up = false;
                self.store.stop();
            }
            Kind::EtcdCut | Kind::EtcdCutOneWay => self.cut_from_etcd("-A", &fault)?,
            Kind::HostsCut | Kind::HostsCutOneWay => {
                self.timeline.network_fails(self.extent(&fault), kind.name(), now);
                self.cut_hosts("-A", &fault)?;
            }
            Kind::InterfaceDown => {
                self.timeline.network_fails(self.extent(&fault), kind.name(), now);
                self.host(place)?.netns.ip("link set eth0 down")?;
            }
            Kind::CarrierLost => {
                self.timeline.network_fails(self.extent(&fault), kind.name(), now);
                self.lab.underlay.ip(&format!("link set {} down", self.port(place)?))?;
            }
            Kind::PodReplaced | Kind::PodMoved => {
                let address = self.remove_pod(place, other)?;
                // Kept by its end.
                self.places[place].last_address = address.filter(|_| kind == Kind::PodReplaced);
            }
            Kind::HostReplaced => self.leave(place)?,
            Kind::ForeignLease => {
                let (key, value) = foreign_lease(self.backend, place, 1);
                self.store.put(&key, &value)?;
            }
            Kind::Compaction => {
                // No further than the history was read: it has to stay whole.
                let revision = self.history.revision.to_string();
                if let Err(error) = self.store.etcdctl(&["compact", &revision]) {
                    println!("left out: {fault}: {error:#}");
                    return Ok(Outcome::LeftOut);
                }
            }
            Kind::LeaseDeleted => {
                let subnet = self.places[place].subnet.as_ref().context("it has no subnet")?;
                let network = std::net::Ipv4Addr::from_bits(subnet.gateway.to_bits() - 1);
                let key = format!("{PREFIX}/subnets/{network}-{}", subnet.len);
                self.places[place].may_end = true;
                self.store.etcdctl(&["del", &key])?;
            }
        }
        self.log.push((now, None, fault));
        Ok(Outcome::Done)
    }

    /// Ends a fault that was begun.
    ///
    /// # Errors
    /// Where a command fails that should not.
    pub(super) fn end(&mut self, fault: Fault) -> Result<()> {
        let Fault { kind, place, other, .. } = fault;
        self.disturb(&fault);
        match kind {
            Kind::AgentKilled => self.start_agent(place)?,
            Kind::AgentStopped | Kind::LeaseOutslept if self.places[place].agent != Agent::Stopped => {}
            Kind::AgentStopped | Kind::LeaseOutslept => {
                self.signal_agent(place, Signal::SIGCONT)?;
                self.places[place].agent = Agent::Running;
                self.timeline.agent_comes(self.places[place].id, self.now());
            }
            Kind::EtcdKilled | Kind::EtcdAway | Kind::EtcdRestarted => {
                self.save_store_log();
                self.store.resume()?;
                self.store_is_up = true;
                self.store_restarted = Some(self.now());
            }
            Kind::EtcdCut | Kind::EtcdCutOneWay => self.cut_from_etcd("-D", &fault)?,
            Kind::HostsCut | Kind::HostsCutOneWay => {
                self.cut_hosts("-D", &fault)?;
                self.timeline.network_works(self.extent(&fault), self.now());
            }
            Kind::InterfaceDown => {
                let netns = &self.host(place)?.netns;
                netns.ip("link set eth0 up")?;
                // As a network daemon puts back what went with the link.
                netns.ip(&format!("route replace default via {}", address(254)))?;
                self.timeline.network_works(self.extent(&fault), self.now());
            }
            Kind::CarrierLost => {
                self.lab.underlay.ip(&format!("link set {} up", self.port(place)?))?;
                self.timeline.network_works(self.extent(&fault), self.now());
            }
            Kind::PodReplaced | Kind::PodMoved => {
                let address = self.places[place].last_address.take();
                // A host that got another subnet meanwhile has made all its pods anew.
                if self.places[place].pods[other].is_none() {
                    self.add_pod(place, other, address)?;
                }
            }
            Kind::HostReplaced => self.come(place)?,
            Kind::ForeignLease => {
                let (key, value) = foreign_lease(self.backend, place, 2);
                self.store.put(&key, &value)?;
                self.store.etcdctl(&["del", &key])?;
            }
            // The agent ends by itself, and is started when it has.
            Kind::Compaction | Kind::LeaseDeleted => {}
        }
        let now = self.now();
        let open = self.log.iter_mut().rev().find(|(_, end, logged)| end.is_none() && *logged == fault);
        if let Some((_, end, _)) = open {
            *end = Some(now);
        }
        Ok(())
    }

    /// Whether what a fault befalls is there: a host in its place, an agent that runs, an etcd that can be asked.
    pub(super) fn is_there(&self, fault: &Fault) -> bool {
        let Fault { kind, place, other, .. } = *fault;
        let is_etcds = matches!(kind, Kind::EtcdKilled | Kind::EtcdRestarted | Kind::EtcdAway);
        let asks_etcd = matches!(kind, Kind::Compaction | Kind::ForeignLease | Kind::LeaseDeleted);
        if (is_etcds || asks_etcd) && !self.store_is_up {
            return false;
        }
        let here = &self.places[if is_etcds || asks_etcd && kind != Kind::LeaseDeleted { 0 } else { place }];
        match kind {
            Kind::AgentKilled | Kind::AgentStopped | Kind::LeaseOutslept => here.agent == Agent::Running,
            Kind::LeaseDeleted => here.agent == Agent::Running && here.is_up(),
            Kind::HostReplaced | Kind::PodReplaced | Kind::PodMoved => here.is_up(),
            Kind::HostsCut | Kind::HostsCutOneWay => here.host.is_some() && self.places[other].host.is_some(),
            Kind::EtcdCut | Kind::EtcdCutOneWay | Kind::InterfaceDown | Kind::CarrierLost => here.host.is_some(),
            Kind::EtcdKilled | Kind::EtcdRestarted | Kind::EtcdAway | Kind::Compaction | Kind::ForeignLease => true,
        }
    }

    fn extent(&self, fault: &Fault) -> Extent {
        let id = |place: usize| self.places[place].id;
        match fault.kind {
            Kind::HostsCut | Kind::HostsCutOneWay => Extent::Pair(id(fault.place), id(fault.other)),
            _ => Extent::Host(id(fault.place)),
        }
    }

    fn host(&self, place: usize) -> Result<&crate::lab::Host> {
        self.places[place].host.as_ref().context("nobody is there")
    }

    /// The bridge's port to a host.
    fn port(&self, place: usize) -> Result<&str> {
        Ok(&self.host(place)?.port().1)
    }

    fn signal_agent(&self, place: usize, signal: Signal) -> Result<()> {
        self.host(place)?.agent.as_ref().context("it has no agent")?.signal(signal)
    }

    /// `-A` cuts, `-D` mends.
    fn cut_hosts(&self, action: &str, fault: &Fault) -> Result<()> {
        let (one, two) = (self.port(fault.place)?, self.port(fault.other)?);
        self.drop_frames(action, &format!("FORWARD -i {one} -o {two}"))?;
        if fault.kind == Kind::HostsCut {
            self.drop_frames(action, &format!("FORWARD -i {two} -o {one}"))?;
        }
        Ok(())
    }

    fn cut_from_etcd(&self, action: &str, fault: &Fault) -> Result<()> {
        let port = self.port(fault.place)?;
        let ways = [format!("INPUT -i {port}"), format!("OUTPUT -o {port}")];
        let all = fault.kind == Kind::EtcdCut;
        let cut = ways.iter().enumerate().filter(|(way, _)| all || *way == fault.other % 2);
        cut.into_iter().try_for_each(|(_, frames)| self.drop_frames(action, frames))
    }

    fn drop_frames(&self, action: &str, frames: &str) -> Result<()> {
        self.lab.underlay.exec(&format!("ebtables {action} {frames} -j DROP")).map(drop)
    }
}

/// Key and value of a lease of a host that is not there; every other one does not fit the grid of subnets.
fn foreign_lease(backend: Backend, number: usize, version: u8) -> (String, String) {
    let suffix = if number.is_multiple_of(2) { "0-24" } else { "64-26" };
    let key = format!("{PREFIX}/subnets/10.5.{}.{suffix}", 200 + number);
    let of_backend = if backend.has_device() {
        let mac = format!("0a:00:00:00:{number:02x}:{version:02x}");
        format!(r#""BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}"#)
    } else {
        r#""BackendType":"host-gw""#.to_owned()
    };
    let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null,{of_backend}}}"#, foreign_address(number));
    (key, value)
}
