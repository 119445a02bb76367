//! Which faults there were and when, and what they explain. Times are from the run's beginning.

use std::time::Duration;

/// Traffic may take so long to come back after a fault of the network.
pub(super) const RECOVERY: Duration = Duration::from_secs(5);
/// A packet that was just on its way when the fault began, or whose sender had to wait for a core after it was numbered.
const EARLY: Duration = Duration::from_millis(500);

/// A host from its coming to its leaving; whoever comes to its place is another.
pub(super) type HostId = u32;

/// Whom a fault of the network meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// One host and everybody else.
    Host(HostId),
    /// Two hosts. Cut one way, the other way fails as well: neighbours are resolved by an exchange.
    Pair(HostId, HostId),
}

impl Extent {
    const fn meets(self, one: HostId, two: HostId) -> bool {
        match self {
            Self::Host(host) => host == one || host == two,
            Self::Pair(a, b) => (a == one && b == two) || (a == two && b == one),
        }
    }
}

/// From when to when; [`None`] while it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interval {
    from: Duration,
    to: Option<Duration>,
}

/// All faults so far that packets can feel.
#[derive(Debug, Default)]
pub(super) struct Timeline {
    network: Vec<(Extent, &'static str, Interval)>,
    away: Vec<(HostId, Interval)>,
}

impl Timeline {
    /// The network fails.
    pub(super) fn network_fails(&mut self, extent: Extent, what: &'static str, at: Duration) {
        self.network.push((extent, what, Interval { from: at, to: None }));
    }

    /// It works again.
    pub(super) fn network_works(&mut self, extent: Extent, at: Duration) {
        let open = self.network.iter_mut().filter(|(of, _, interval)| *of == extent && interval.to.is_none());
        open.for_each(|(_, _, interval)| interval.to = Some(at));
    }

    /// A host's agent does nothing.
    pub(super) fn agent_goes(&mut self, host: HostId, at: Duration) {
        self.away.push((host, Interval { from: at, to: None }));
    }

    /// It works again.
    pub(super) fn agent_comes(&mut self, host: HostId, at: Duration) {
        let open = self.away.iter_mut().filter(|(of, interval)| *of == host && interval.to.is_none());
        open.for_each(|(_, interval)| interval.to = Some(at));
    }

    /// Which fault explains that a packet between two hosts, sent at some time, was lost. What befalls agents and etcd
    /// explains nothing by itself; but where an agent is away while the network fails, healing waits for it.
    pub(super) fn explains(&self, one: HostId, two: HostId, sent: Duration) -> Option<&'static str> {
        self.network.iter().find_map(|(extent, what, interval)| {
            let explains = extent.meets(one, two)
                && sent + EARLY >= interval.from
                && interval.to.is_none_or(|end| sent <= self.healed([one, two], interval.from, end));
            explains.then_some(*what)
        })
    }

    fn healed(&self, hosts: [HostId; 2], from: Duration, end: Duration) -> Duration {
        let mut healed = end + RECOVERY;
        loop {
            let away = self.away.iter().filter(|(host, interval)| {
                let overlaps = interval.from <= healed && interval.to.is_none_or(|to| to >= from);
                hosts.contains(host) && overlaps
            });
            let last = away.map(|(_, interval)| interval.to.map_or(Duration::MAX, |to| to + RECOVERY)).max();
            match last {
                Some(Duration::MAX) => return Duration::MAX,
                Some(last) if last > healed => healed = last,
                _ => return healed,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_cut_explains_losses_of_its_pair_until_shortly_after_it() {
        let mut timeline = Timeline::default();
        timeline.network_fails(Extent::Pair(1, 2), "cut", at(10));
        assert_eq!(timeline.explains(2, 1, at(100)), Some("cut"), "it goes on");
        timeline.network_works(Extent::Pair(1, 2), at(20));
        for (sent, explained) in [(9, false), (10, true), (20, true), (25, true), (26, false)] {
            assert_eq!(timeline.explains(1, 2, at(sent)).is_some(), explained, "sent at {sent}");
        }
        assert_eq!(timeline.explains(1, 3, at(15)), None, "an untouched pair");
    }

    #[test]
    fn an_interface_that_is_down_explains_losses_of_its_host() {
        let mut timeline = Timeline::default();
        timeline.network_fails(Extent::Host(1), "down", at(10));
        assert!(timeline.explains(1, 7, at(11)).is_some() && timeline.explains(7, 1, at(11)).is_some());
        assert_eq!(timeline.explains(2, 3, at(11)), None);
    }

    #[test]
    fn an_agent_that_is_away_explains_nothing_but_late_healing() {
        let mut timeline = Timeline::default();
        timeline.agent_goes(1, at(10));
        assert_eq!(timeline.explains(1, 2, at(12)), None);
        timeline.network_fails(Extent::Host(1), "down", at(12));
        timeline.network_works(Extent::Host(1), at(13));
        assert!(timeline.explains(1, 2, at(40)).is_some(), "nobody is there to heal it");
        timeline.agent_comes(1, at(50));
        assert!(timeline.explains(1, 2, at(55)).is_some());
        assert_eq!(timeline.explains(1, 2, at(56)), None);
        assert_eq!(timeline.explains(3, 2, at(13)), None);
    }
}
