//! The hosts of a run, each in a place that another may take after it, with their pods and what befalls them.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{
    datapath::Peers,
    history::History,
    ledger::PodId,
    schedule::{Fault, Kind, PODS},
    timeline::{HostId, Timeline},
    traffic::{SERVICES, Traffic},
};
use crate::{
    lab::{Backend, Host, Lab, Pod, Store, Subnet, address},
    process::Process,
};

/// Short terms, so that a host which sleeps a while loses its lease, and what is held is let go within a round.
const ARGUMENTS: [&str; 2] = ["--subnet-lease-ttl=6", "--lease-guard-grace=5"];
/// A new host gets the next of these addresses; foreign leases are beyond.
const LAST_NUMBER: u8 = 199;
/// As an init system does.
pub(super) const RESTART_AFTER: Duration = Duration::from_secs(1);
/// The kernel may take its time to take a killed process apart.
const END_LIMIT: Duration = Duration::from_secs(30);
/// So much of an agent's log is evidence.
const LOG_LINES: usize = 12;

/// What an agent's process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agent {
    /// It runs.
    Running,
    /// It is stopped by a signal.
    Stopped,
    /// It was ended by a fault, and the fault's end starts another.
    Down,
    /// It ended, and another is started then.
    Ended(Duration),
}

/// A pod that takes part in the traffic.
#[derive(Debug)]
pub(super) struct LivePod {
    /// Among all pods of the run.
    pub(super) id: PodId,
    /// Since when host and bridge know where it is.
    pub(super) since: Option<Duration>,
    number: u32,
    /// Its first packets, to the host, which tell them.
    announcement: Option<Process>,
    pod: Pod,
}

/// Where a host is.
pub(super) struct Place {
    /// [`None`] while nobody is there.
    pub host: Option<Host>,
    /// Among all hosts of the run.
    pub id: HostId,
    /// Its agent.
    pub agent: Agent,
    /// What `subnet.env` said when the pods were made.
    pub subnet: Option<Subnet>,
    /// Its pods.
    pub pods: [Option<LivePod>; PODS],
    /// Its lease was deleted, which ends the agent by design.
    pub may_end: bool,
    /// Since when nothing happens to its agent, to etcd and between the two.
    pub calm_since: Duration,
    /// The address that a pod had which is being replaced.
    pub last_address: Option<Ipv4Addr>,
    /// What was last seen in its maps.
    pub peers: Option<Peers>,
    pods_so_far: u32,
}

/// All of it. Traffic goes first: its sockets hold the pods' namespaces.
pub(super) struct Cluster<'a> {
    /// Between all pods.
    pub traffic: Traffic,
    /// Hosts by place.
    pub places: Vec<Place>,
    /// What etcd said.
    pub history: History,
    /// The store.
    pub store: Store,
    pub(super) backend: Backend,
    /// Whether it is meant to be there.
    pub store_is_up: bool,
    /// When it was last started again.
    pub(super) store_restarted: Option<Duration>,
    /// The faults so far.
    pub timeline: Timeline,
    /// What the faults were, from when to when.
    pub log: Vec<(Duration, Option<Duration>, Fault)>,
    /// The underlay.
    pub lab: &'a Lab,
    start: Instant,
    binary: PathBuf,
    logs: PathBuf,
    next_host: HostId,
    next_number: u8,
    next_pod: PodId,
    logs_so_far: u32,
}

impl Place {
    fn empty() -> Self {
        Self {
            host: None,
            id: 0,
            agent: Agent::Down,
            subnet: None,
            pods: [const { None }; PODS],
            may_end: false,
            calm_since: Duration::ZERO,
            last_address: None,
            peers: None,
            pods_so_far: 0,
        }
    }

    /// The host's name.
    pub(super) fn name(&self) -> &str {
        self.host.as_ref().map_or("nobody", |host| host.name.as_str())
    }

    /// Whether a host is there with its pods.
    pub(super) fn is_up(&self) -> bool {
        self.host.is_some() && self.subnet.is_some() && self.pods.iter().all(Option::is_some)
    }

    /// What the agent wrote of itself.
    pub(super) fn status(&self) -> Value {
        let path = self.host.as_ref().map(|host| host.run_dir().join("flannel.1.status.json"));
        let text = path.and_then(|path| fs::read(path).ok()).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// The last that the agent said.
    pub(super) fn last_words(&self) -> String {
        let log = self.host.as_ref().and_then(|host| host.agent.as_ref()).map(|agent| agent.log()).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n    ")
    }
}

impl<'a> Cluster<'a> {
    /// Hosts with agents on an underlay whose store has a network config. They are not ready yet.
    ///
    /// # Errors
    /// Where one can't be made.
    pub(super) fn new(
        lab: &'a Lab,
        store: Store,
        backend: Backend,
        hosts: usize,
        binary: PathBuf,
        logs: PathBuf,
        start: Instant,
    ) -> Result<Self> {
        fs::create_dir_all(&logs).with_context(|| format!("create {logs:?}"))?;
        let mut cluster = Self {
            traffic: Traffic::start(start),
            places: (0..hosts).map(|_| Place::empty()).collect(),
            history: History::watch(&lab.underlay, &store, &logs)?,
            store,
            backend,
            store_is_up: true,
            store_restarted: None,
            timeline: Timeline::default(),
            log: Vec::new(),
            lab,
            start,
            binary,
            logs,
            next_host: 1,
            next_number: 1,
            next_pod: 1,
            logs_so_far: 0,
        };
        for place in 0..hosts {
            cluster.come(place)?;
        }
        Ok(cluster)
    }

    /// From the run's beginning.
    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// A new host comes to a place.
    pub(super) fn come(&mut self, place: usize) -> Result<()> {
        let number = self.next_number;
        self.next_number = if number == LAST_NUMBER { 1 } else { number + 1 };
        let name = format!("node{number}");
        // One of that number may have been here a long time ago.
        let _none = fs::remove_dir_all(self.lab.directory().join(&name));
        let host = self.lab.host(&name, number)?;
        host.netns.feed("nft -f -", SERVICES)?;
        self.places[place] = Place { host: Some(host), id: self.next_host, ..Place::empty() };
        self.next_host += 1;
        self.start_agent(place)
    }

    /// The host of a place leaves with all that it has, without a word.
    pub(super) fn leave(&mut self, place: usize) -> Result<()> {
        for pod in 0..PODS {
            self.remove_pod(place, pod)?;
        }
        self.kill_agent(place)?;
        self.save_log(place);
        if let Some(host) = self.places[place].host.take() {
            let pins = host.pin_dir().to_owned();
            drop(host);
            // They would keep what a host that is switched off does not keep.
            fs::remove_dir_all(&pins).with_context(|| format!("remove {pins:?}"))?;
        }
        self.places[place].subnet = None;
        Ok(())
    }

    /// Starts the agent of a place.
    pub(super) fn start_agent(&mut self, place: usize) -> Result<()> {
        self.save_log(place);
        let now = self.now();
        let Self { places, store, timeline, binary, .. } = self;
        let place = &mut places[place];
        let host = place.host.as_mut().context("nobody is there")?;
        host.start_agent(binary, store, &ARGUMENTS)?;
        place.agent = Agent::Running;
        place.calm_since = now;
        timeline.agent_comes(place.id, now);
        Ok(())
    }

    /// Ends the agent of a place as a crash would.
    pub(super) fn kill_agent(&mut self, place: usize) -> Result<()> {
        let now = self.now();
        let place = &mut self.places[place];
        self.timeline.agent_goes(place.id, now);
        place.agent = Agent::Down;
        let Some(agent) = place.host.as_mut().and_then(|host| host.agent.as_mut()) else { return Ok(()) };
        if agent.status()?.is_none() {
            agent.signal(nix::sys::signal::Signal::SIGKILL)?;
            agent.wait(END_LIMIT)?;
        }
        Ok(())
    }

    /// Keeps what the agent of a place said.
    pub(super) fn save_log(&mut self, place: usize) {
        let Some(host) = &self.places[place].host else { return };
        if let Some(agent) = &host.agent {
            let file = self.logs.join(format!("{}-agent-{:04}.log", host.name, self.logs_so_far));
            self.logs_so_far += 1;
            if let Err(error) = fs::write(&file, agent.log()) {
                eprintln!("write {file:?}: {error}");
            }
        }
    }

    /// Keeps what etcd said.
    pub(super) fn save_store_log(&mut self) {
        let file = self.logs.join(format!("etcd-{:04}.log", self.logs_so_far));
        self.logs_so_far += 1;
        // There is none before the first start.
        let _none = fs::copy(self.lab.directory().join("etcd.log"), file);
    }

    /// Looks whether pods that have just come are known to their hosts.
    pub(super) fn look_at_announcements(&mut self) {
        let now = self.start.elapsed();
        for pod in self.places.iter_mut().flat_map(|place| &mut place.pods).flatten() {
            if pod.announcement.as_ref().is_some_and(|announcement| announcement.log().contains(" bytes from ")) {
                pod.announcement = None;
                pod.since = Some(now);
                let _kept = fs::remove_file(self.lab.directory().join(format!("announcement-{}.log", pod.id)));
            }
        }
    }

    /// Makes a pod of a place; with the address, or with the next one.
    pub(super) fn add_pod(&mut self, place: usize, pod: usize, address: Option<Ipv4Addr>) -> Result<()> {
        let id = self.next_pod;
        self.next_pod += 1;
        let Place { host, subnet, pods, pods_so_far, id: host_id, .. } = &mut self.places[place];
        let (host, subnet) = host.as_ref().zip(subnet.as_ref()).context("nobody is there")?;
        *pods_so_far += 1;
        let number = *pods_so_far;
        let address = address.unwrap_or_else(|| Ipv4Addr::from_bits(subnet.gateway.to_bits() + 1 + number % 250));
        let made = host.make_pod(subnet, number, address)?;
        self.traffic.add(id, *host_id, &made)?;
        let mut announcement = made.netns.command("ping");
        announcement.args(["-i", "0.2", &subnet.gateway.to_string()]);
        let log = self.lab.directory().join(format!("announcement-{id}.log"));
        let announcement = Some(Process::start(&mut announcement, &log)?);
        pods[pod] = Some(LivePod { id, since: None, number, announcement, pod: made });
        Ok(())
    }

    /// Deletes a pod of a place, and says which address it had.
    pub(super) fn remove_pod(&mut self, place: usize, pod: usize) -> Result<Option<Ipv4Addr>> {
        let place = &mut self.places[place];
        let Some(LivePod { id, number, pod, .. }) = place.pods[pod].take() else { return Ok(None) };
        self.traffic.remove(id);
        let host = place.host.as_ref().context("nobody is there")?;
        host.netns.ip(&format!("link delete pod{number}"))?;
        Ok(Some(pod.address))
    }

    /// Makes the pods of a host that has got a subnet, and again of one that has got another. Says whether that was so.
    pub(super) fn follow_subnet(&mut self, place: usize) -> Result<bool> {
        let Some(host) = &self.places[place].host else { return Ok(false) };
        let Ok(subnet) = host.subnet() else { return Ok(false) };
        let before = self.places[place].subnet.replace(subnet.clone());
        if before.as_ref() == Some(&subnet) {
            return Ok(false);
        }
        if before.is_some() {
            for pod in 0..PODS {
                self.remove_pod(place, pod)?;
            }
            self.places[place].host.as_ref().context("nobody is there")?.netns.ip("link delete cni0")?;
        }
        self.places[place].host.as_ref().context("nobody is there")?.add_bridge(&subnet)?;
        for pod in 0..PODS {
            self.add_pod(place, pod, None)?;
        }
        Ok(before.is_some())
    }

    /// Which place a host on the underlay is in.
    pub(super) fn place_of(&self, address: Ipv4Addr) -> Option<&Place> {
        self.places.iter().find(|place| place.host.as_ref().is_some_and(|host| host.address == address))
    }

    /// Something happens to the agent of a place, or to etcd: then to all.
    pub(super) fn disturb(&mut self, fault: &Fault) {
        let now = self.now();
        let of_etcd = matches!(fault.kind, Kind::EtcdKilled | Kind::EtcdRestarted | Kind::EtcdAway);
        for (index, place) in self.places.iter_mut().enumerate() {
            if of_etcd || index == fault.place {
                place.calm_since = now;
            }
        }
    }

    /// What was going on at a time, and shortly before.
    pub(super) fn what_was_on(&self, from: Duration, to: Duration) -> String {
        const BEFORE: Duration = Duration::from_secs(8);
        let on = self.log.iter().filter(|(begin, end, _)| *begin <= to && end.is_none_or(|end| end + BEFORE >= from));
        let words = on.map(|(begin, end, fault)| {
            let end = end.map_or("now".to_owned(), |end| format!("{:.3}", end.as_secs_f64()));
            format!("{:.3} to {end} {}", begin.as_secs_f64(), fault.to_string().get(11..).unwrap_or_default())
        });
        words.collect::<Vec<_>>().join("; ")
    }
}

/// The address of a foreign lease's host, which is not there.
pub(super) fn foreign_address(number: usize) -> Ipv4Addr {
    address(LAST_NUMBER + 1 + number as u8)
}
