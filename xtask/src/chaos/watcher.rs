//! Looking at hosts, store and traffic, and holding what is seen against the invariants.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::Result;

use super::{
    cluster::{Agent, Cluster, LivePod, Place, RESTART_AFTER},
    datapath::{Peers, surplus_or_missing},
    history::{Subnet, Vtep, subnet_of, vtep_of},
    invariants::{Invariant, Named, differences, never_named, removed, two_owners, was_named},
    ledger::{Lost, PodId},
    report::Report,
    resources::{Life, Sample},
    timeline::HostId,
    traffic::Misdelivery,
};
use crate::lab::PREFIX;

/// What an agent knows may be known here a moment later: the history is told by another watch.
const HISTORY_LAG: Duration = Duration::from_secs(3);
/// `etcdctl` looks at growing intervals whether an etcd that went is back.
const HISTORY_BACK: Duration = Duration::from_secs(15);
/// An agent holds a peer that it heard within 30 s.
const HEARD_WITHIN: Duration = Duration::from_secs(20);
/// What the store has named for so long is nobody's old knowledge any more.
const NAMED_FOR: Duration = Duration::from_secs(20);
/// An agent that nothing has befallen for so long knows whether its lease is its own.
const CALM: Duration = Duration::from_secs(16);
/// A pod's host knows where it is for so long before each packet to it has to arrive: by then flows of the pod that had the
/// address before are forgotten.
const POD_START: Duration = Duration::from_millis(1500);

/// Why hosts are not at rest: what is violated if it stays so, where, and in words.
pub(super) type Unrest = Vec<(Invariant, String, String)>;

/// What was seen and has to be looked at again.
#[derive(Default)]
pub(super) struct Watcher {
    /// Named by a host's maps and not by the store as it is known here, since when.
    unknown: BTreeMap<(HostId, Named), Duration>,
    /// Removed from a host's maps, when, and since when the store had named it.
    vanished: BTreeMap<(HostId, Subnet), (Duration, Duration)>,
    /// Agents' processes by number.
    lives: BTreeMap<u32, Life>,
}

impl Watcher {
    /// Looks at the maps of one place.
    pub(super) fn look_at_maps(&mut self, cluster: &mut Cluster<'_>, place: usize, report: &mut Report) {
        let now = cluster.now();
        let Place { host: Some(host), subnet: Some(_), .. } = &cluster.places[place] else { return };
        let (name, id) = (host.name.clone(), cluster.places[place].id);
        let peers = match Peers::read(host.pin_dir()) {
            Ok(peers) => peers,
            Err(error) => {
                report.violation(now, Invariant::NothingLeftOver, &name, format!("{error:#}"));
                return;
            }
        };
        report.checked(Invariant::OnlyNamed, (peers.by_subnet.len() + peers.addresses.len()) as u64);
        for named in never_named(&peers, &cluster.history.table) {
            self.unknown.entry((id, named)).or_insert(now);
        }
        if let Some(before) = &cluster.places[place].peers {
            report.checked(Invariant::NobodyRemoved, before.by_subnet.len() as u64);
            for (subnet, vtep) in removed(before, &peers) {
                self.look_at_removed(cluster, place, subnet, vtep, report);
            }
        }
        cluster.places[place].peers = Some(peers);
    }

    fn look_at_removed(
        &mut self,
        cluster: &Cluster<'_>,
        place: usize,
        subnet: Subnet,
        vtep: Vtep,
        report: &mut Report,
    ) {
        let now = cluster.now();
        let here = &cluster.places[place];
        let peer = cluster.place_of(vtep.address).filter(|peer| {
            peer.is_up() && peer.subnet.as_ref().is_some_and(|of| of.gateway.to_bits() - 1 == subnet.0.to_bits())
        });
        let heard = peer.and_then(|peer| cluster.traffic.ledger().last_heard(peer.id, here.id));
        if let Some(heard) = heard.filter(|heard| now.saturating_sub(*heard) < HEARD_WITHIN) {
            let ago = (now - heard).as_secs_f64();
            let evidence = format!(
                "{} was removed, {ago:.1} s after a packet of its pods arrived; {}",
                Named::Peer(subnet, vtep),
                cluster.what_was_on(now, now)
            );
            report.violation(now, Invariant::NobodyRemoved, here.name(), evidence);
        } else if let Some((named, since)) = cluster.history.table.now.get(&subnet)
            && named.address == vtep.address
            && now.saturating_sub(*since) > NAMED_FOR
        {
            self.vanished.insert((here.id, subnet), (now, *since));
        }
    }

    /// Looks again at what the history may explain by now.
    pub(super) fn look_again(&mut self, cluster: &Cluster<'_>, report: &mut Report) {
        let now = cluster.now();
        let table = &cluster.history.table;
        let name_of = |id: HostId| {
            let place = cluster.places.iter().find(|place| place.id == id);
            place.map_or_else(|| format!("host {id}"), |place| place.name().to_owned())
        };
        self.unknown.retain(|(_, named), _| !was_named(*named, table));
        let is_whole = cluster.store_is_up
            && cluster.store_restarted.is_none_or(|restarted| now.saturating_sub(restarted) > HISTORY_BACK);
        let is_due = |since: &Duration| is_whole && now.saturating_sub(*since) > HISTORY_LAG;
        for ((id, named), _) in self.unknown.extract_if(.., |_, since| is_due(since)) {
            let evidence = format!("the maps have {named}; {}", cluster.what_was_on(now, now));
            report.violation(now, Invariant::OnlyNamed, &name_of(id), evidence);
        }
        let due = self.vanished.extract_if(.., |_, (seen, _)| is_due(seen));
        for ((id, subnet), (seen, since)) in due {
            if table.now.get(&subnet).is_some_and(|(_, named_since)| *named_since == since) {
                let evidence = format!("{subnet:?} was removed, which the store has named all the time");
                report.violation(seen, Invariant::NobodyRemoved, &name_of(id), evidence);
            }
        }
    }

    /// Looks at who claims which subnet. At rest each agent knows; else only one that nothing has befallen for a while.
    pub(super) fn look_at_claims(&self, cluster: &Cluster<'_>, at_rest: bool, report: &mut Report) {
        let now = cluster.now();
        let sure = cluster.places.iter().filter(|place| {
            let is_calm = cluster.store_is_up && now.saturating_sub(place.calm_since) > CALM;
            place.agent == Agent::Running && (at_rest || is_calm)
        });
        let held = sure.filter(|place| place.status()["lease"]["state"] == "held");
        let claims: Vec<(String, Subnet)> = held
            .filter_map(|place| {
                let subnet = place.host.as_ref()?.subnet().ok()?;
                Some((place.name().to_owned(), ((subnet.gateway.to_bits() - 1).into(), subnet.len)))
            })
            .collect();
        report.checked(Invariant::OneOwner, claims.len() as u64);
        if let Some((one, two, subnet)) = two_owners(&claims) {
            report.violation(now, Invariant::OneOwner, one, format!("{two} has {subnet:?} too"));
        }
    }

    /// Takes in what etcd said.
    pub(super) fn look_at_history(&self, cluster: &mut Cluster<'_>, report: &mut Report) -> Result<()> {
        let now = cluster.now();
        for stolen in cluster.history.read(now)? {
            report.violation(now, Invariant::OneOwner, "etcd", format!("{stolen:?}"));
        }
        Ok(())
    }

    /// Looks at packets that were lost, came too late, or to the wrong pod.
    pub(super) fn look_at_traffic(&self, cluster: &Cluster<'_>, report: &mut Report) {
        let now = cluster.now();
        for misdelivery in cluster.traffic.take_misdeliveries() {
            let Misdelivery { at, by, stamp } = misdelivery;
            let evidence = format!("{stamp:?} reached it; {}", cluster.what_was_on(at, at));
            report.violation(at, Invariant::RightPod, &format!("pod {by}"), evidence);
        }
        let (lost, pauses) = {
            let mut ledger = cluster.traffic.ledger();
            (ledger.take_lost(now), ledger.take_pauses())
        };
        let mut unexplained: BTreeMap<(HostId, HostId), Vec<Lost>> = BTreeMap::new();
        for lost in lost {
            match cluster.timeline.explains(lost.from.1, lost.to.1, lost.sent) {
                Some(what) => *report.lost.entry(what).or_default() += 1,
                None => unexplained.entry((lost.from.1, lost.to.1)).or_default().push(lost),
            }
        }
        for ((from, to), lost) in unexplained {
            *report.lost.entry("without a fault of the network").or_default() += lost.len() as u64;
            let sent = || lost.iter().map(|lost| lost.sent);
            let (first, last) = (sent().min().unwrap_or_default(), sent().max().unwrap_or_default());
            let numbers: Vec<_> = lost.iter().take(8).map(|lost| (lost.from.0, lost.to.0, lost.number)).collect();
            let evidence = format!(
                "{} packets from host {from} to host {to}, sent from {:.3} to {:.3} s: (pod, pod, number) {numbers:?}; {}",
                lost.len(),
                first.as_secs_f64(),
                last.as_secs_f64(),
                cluster.what_was_on(first, last)
            );
            let name = cluster.places.iter().find(|place| place.id == to).map_or("", Place::name);
            report.violation(first, Invariant::NoLoss, name, evidence);
        }
        for pause in pauses {
            let (one, two) = pause.hosts;
            let explained = cluster.timeline.explains(one, two, pause.from + pause.lasted / 2).is_some();
            let longest = &mut report.longest_pause[usize::from(!explained)];
            *longest = pause.lasted.max(*longest);
        }
    }

    /// Connects pods whose hosts know each other.
    pub(super) fn connect(&self, cluster: &mut Cluster<'_>) {
        cluster.look_at_announcements();
        let strangers = strangers(cluster);
        // The maps were seen a moment ago. A lease that was deleted since takes out a host that has not sent yet.
        let involved: BTreeSet<_> = strangers.iter().flat_map(|(hosts, _)| *hosts).collect();
        let read = |place: usize| Some((place, Peers::read(cluster.places[place].host.as_ref()?.pin_dir()).ok()?));
        let peers: BTreeMap<_, _> = involved.into_iter().filter_map(read).collect();
        let now = cluster.now();
        let mut ledger = cluster.traffic.ledger();
        for ([one, two], (from, to)) in strangers {
            let knows = |here, there: usize| knows(peers.get(&here), &cluster.places[there]);
            if knows(one, two) && knows(two, one) {
                ledger.connect(from, to, now);
            }
        }
    }

    /// Looks at agents that ended, and starts them as an init system does.
    pub(super) fn look_at_agents(&mut self, cluster: &mut Cluster<'_>, report: &mut Report) -> Result<()> {
        let now = cluster.now();
        for index in 0..cluster.places.len() {
            let place = &mut cluster.places[index];
            report.checked(Invariant::AgentsLive, 1);
            match place.agent {
                Agent::Running | Agent::Stopped => {
                    let Some(agent) = place.host.as_mut().and_then(|host| host.agent.as_mut()) else { continue };
                    let Some(status) = agent.status()? else { continue };
                    if place.may_end && status.success() {
                        place.may_end = false;
                    } else {
                        let evidence = format!("the agent ended: {status}\n    {}", place.last_words());
                        report.violation(now, Invariant::AgentsLive, place.name(), evidence);
                    }
                    place.agent = Agent::Ended(now + RESTART_AFTER);
                    cluster.timeline.agent_goes(place.id, now);
                }
                Agent::Ended(until) if until <= now => cluster.start_agent(index)?,
                Agent::Ended(_) | Agent::Down => {}
            }
        }
        Ok(())
    }

    /// Measures the agents.
    pub(super) fn measure(&mut self, cluster: &Cluster<'_>) {
        let now = cluster.now();
        for place in cluster.places.iter().filter(|place| place.agent == Agent::Running) {
            let Some(pid) = place.host.as_ref().and_then(|host| host.agent.as_ref()).map(|agent| agent.id()) else {
                continue;
            };
            // It may be gone by now, which is seen elsewhere.
            let Ok(sample) = Sample::of(pid, now) else { continue };
            let life = || Life { host: place.name().to_owned(), pid, samples: Vec::new() };
            self.lives.entry(pid).or_insert_with(life).samples.push(sample);
        }
    }

    /// Judges what was measured.
    pub(super) fn judge_lives(&mut self, now: Duration, report: &mut Report) {
        report.lives = std::mem::take(&mut self.lives).into_values().collect();
        report.checked(Invariant::Flat, report.lives.len() as u64);
        let growths: Vec<_> =
            report.lives.iter().filter_map(|life| Some((life.host.clone(), life.growth()?))).collect();
        for (host, growth) in growths {
            report.violation(now, Invariant::Flat, &host, growth);
        }
    }

    /// Whether all hosts are at rest, and why not.
    pub(super) fn unrest(&mut self, cluster: &mut Cluster<'_>, report: &mut Report) -> Result<Unrest> {
        let mut unrest = Unrest::new();
        let leases = cluster.store.list(&format!("{PREFIX}/subnets/"))?;
        let store: BTreeMap<Subnet, Vtep> =
            leases.iter().filter_map(|(key, value)| Some((subnet_of(key)?, vtep_of(value.as_bytes())?))).collect();
        let mut most_held = 0;
        for index in 0..cluster.places.len() {
            self.look_at_maps(cluster, index, report);
            let place = &cluster.places[index];
            let mut add = |invariant, text: String| unrest.push((invariant, place.name().to_owned(), text));
            let (Some(host), true) = (&place.host, place.is_up()) else {
                add(Invariant::MapsEqualStore, format!("it has no subnet yet\n    {}", place.last_words()));
                continue;
            };
            let status = place.status();
            if status["store"]["following"] != true || status["lease"]["state"] != "held" {
                let text = format!("its agent says {} and {}", status["store"], status["lease"]);
                add(Invariant::MapsEqualStore, text);
            }
            let held: BTreeSet<Subnet> = status["held"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|held| subnet_of(&held["subnet"].as_str()?.replace('/', "-")))
                .collect();
            most_held = most_held.max(held.len());
            let Some(peers) = &place.peers else { continue };
            report.checked(Invariant::MapsEqualStore, 1);
            let differences = differences(peers, &store, host.address, &held);
            if !differences.is_empty() {
                add(Invariant::MapsEqualStore, differences.join("; "));
            }
            report.checked(Invariant::NothingLeftOver, 1);
            if let Some(wrong) = surplus_or_missing(host, cluster.backend)? {
                add(Invariant::NothingLeftOver, wrong);
            }
        }
        if unrest.is_empty() {
            report.most_held = report.most_held.max(most_held);
            self.look_at_claims(cluster, true, report);
        }
        Ok(unrest)
    }
}

/// Whether a host's maps lead to the host of a place.
fn knows(peers: Option<&Peers>, place: &Place) -> bool {
    let subnet = place.subnet.as_ref().map(|of| ((of.gateway.to_bits() - 1).into(), of.len));
    let known = peers.zip(subnet).and_then(|(peers, subnet)| peers.by_subnet.get(&subnet));
    known.zip(place.host.as_ref()).is_some_and(|(vtep, host)| vtep.address == host.address)
}

/// The pods that are not connected though their hosts knew each other when their maps were last seen, with these hosts'
/// places.
fn strangers(cluster: &Cluster<'_>) -> Vec<([usize; 2], (PodId, PodId))> {
    let now = cluster.now();
    let ledger = cluster.traffic.ledger();
    let ready = |place: &Place| {
        let is_old = |pod: &&LivePod| pod.since.is_some_and(|since| now.saturating_sub(since) > POD_START);
        let old = place.pods.iter().flatten().filter(is_old);
        old.map(|pod| pod.id).collect::<Vec<_>>()
    };
    let mut strangers = Vec::new();
    for (one, here) in cluster.places.iter().enumerate() {
        for (two, there) in cluster.places.iter().enumerate().filter(|(two, _)| *two != one) {
            let stays = !here.may_end && !there.may_end;
            if !stays || !knows(here.peers.as_ref(), there) || !knows(there.peers.as_ref(), here) {
                continue;
            }
            let pairs = ready(here).into_iter().flat_map(|from| ready(there).into_iter().map(move |to| (from, to)));
            let unconnected = pairs.filter(|(from, to)| !ledger.is_connected(*from, *to));
            strangers.extend(unconnected.map(|pods| ([one, two], pods)));
        }
    }
    strangers
}
