//! The task that looks the rule sets through again where something may have changed.
//!
//! A look costs what a listing costs: two tenths of a second of a CPU with the rules of a thousand services. After one, the task
//! rests three hundred times as long, but where nf_tables tells of a rule that may act on each packet: then it looks at once, and
//! rests longer afterwards, up to ten minutes: two seconds of looking.

use std::{sync::Arc, time::Duration};

use nix::{
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeVal,
    },
    time::{ClockId, clock_gettime},
};
use tokio::{
    sync::watch,
    task::{JoinError, JoinHandle, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{info, warn};

use super::{
    RuleSets, Surroundings, concerns_tunnel,
    events::{Events, Graph, Urgency},
    inspect,
    legacy::Digest,
    stops::may_stop,
};
use crate::{
    bypass::Restriction,
    netfilter::{Lister, Listing, NetfilterError},
    status::MayStop,
};

/// How much longer than a look took it rests: a third of a hundredth.
const REST: u32 = 300;
/// For so long it may have to rest, and still looks at once.
const AHEAD: Duration = Duration::from_secs(600);
/// What changes a rule set often changes more of it at once.
const SETTLE_TIME: Duration = Duration::from_millis(100);
/// How often x_tables is asked whether anything has changed.
const LEGACY_PERIOD: Duration = Duration::from_secs(1);
/// How often is looked where nothing tells of changes, at the most.
const BLIND_PERIOD: Duration = Duration::from_secs(2);
/// How often is looked whatever is told, at the most.
const PERIOD: Duration = Duration::from_secs(60);

/// What the rule sets come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What the overlay's packets meet.
    pub restrictions: Vec<Restriction>,
    /// The bits that the rules may set in the marks of forwarded packets.
    pub marks: u32,
    /// Whether they [concern the tunnel packets that come in](super::concerns_tunnel).
    pub concern_tunnel: bool,
    /// Which of them may stop packets.
    pub may_stop: MayStop,
}

/// What the rule sets come to for the overlay, kept current by a task that ends with this.
pub struct Reader {
    around: watch::Sender<Option<Surroundings>>,
    /// [`None`] until it was looked for the first time.
    found: watch::Receiver<Option<Found>>,
    task: JoinHandle<()>,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// Looks at nothing until it is told for which packets.
    #[must_use]
    pub fn new() -> Self {
        let (around, receiver) = watch::channel(None);
        let (sender, found) = watch::channel(None);
        let task = tokio::spawn(async move {
            let mut inspection = Inspection::default();
            inspection.keep(receiver, sender).await;
        });
        Self { around, found, task }
    }

    /// These are the overlay's packets from now on.
    pub fn set(&self, around: Surroundings) {
        self.around.send_if_modified(|known| {
            let is_new = known.as_ref() != Some(&around);
            if is_new {
                *known = Some(around);
            }
            is_new
        });
    }

    /// Waits until something else was found than before; at first, until it was looked for the first time.
    pub async fn changed(&mut self) -> Found {
        if self.found.changed().await.is_err() {
            // The task ends with the runtime only.
            std::future::pending::<()>().await;
        }
        self.found.borrow_and_update().clone().unwrap_or_default()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Default)]
struct Inspection {
    lister: Lister,
    sets: Arc<RuleSets>,
    graph: Graph,
    legacy: Digest,
    /// What failed last, in words.
    problem: Option<String>,
    budget: Budget,
}

impl Inspection {
    async fn keep(&mut self, mut around: watch::Receiver<Option<Surroundings>>, found: watch::Sender<Option<Found>>) {
        if around.wait_for(Option::is_some).await.is_err() {
            return;
        }
        // Before the first look, so that what changes meanwhile is told.
        let mut events = Events::open().map_err(|error| {
            info!("{error}; the rule sets are looked through every few seconds");
        });
        let mut ask = interval(LEGACY_PERIOD);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due = None;
        loop {
            let known = around.borrow_and_update().clone();
            if let Some(known) = known.filter(|_| self.budget.last.is_some()) {
                let now = self.inspect(known).await;
                found.send_if_modified(|found| {
                    let is_new = *found != now;
                    *found = now.or_else(|| found.take());
                    is_new && found.is_some()
                });
            }
            // Until something may be found otherwise.
            loop {
                let at = self.budget.next(due, events.is_err());
                tokio::select! {
                    changed = around.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    urgency = told(&mut events, &mut self.graph) => note(&mut due, urgency),
                    _ = ask.tick() => {
                        if Digest::read() != self.legacy {
                            note(&mut due, Urgency::Now);
                        }
                    }
                    () = sleep_until(at) => {
                        due = None;
                        if self.look().await {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// What the rule sets come to for these packets.
    async fn inspect(&mut self, around: Surroundings) -> Option<Found> {
        let sets = Arc::clone(&self.sets);
        let look = move || Found {
            restrictions: inspect(&sets, &around),
            marks: sets.marks(),
            concern_tunnel: concerns_tunnel(&sets, &around),
            may_stop: may_stop(&sets, &around),
        };
        let (found, time) = aside(look).await?;
        self.budget.spend(time);
        Some(found)
    }

    /// Reads the rule sets. Whether they may be otherwise than before.
    async fn look(&mut self) -> bool {
        let begun = used();
        let is_first = self.budget.last.is_none();
        // First: what changes while it is read is seen by the next.
        self.legacy = Digest::read();
        let listing = self.lister.read().await;
        let problem = listing.as_ref().err().map(NetfilterError::to_string);
        if let Some(problem) = problem.as_ref().filter(|_| problem != self.problem) {
            warn!("what others' packet rules do to each packet can't be told: {problem}");
        }
        self.problem = problem;
        let mut time = used().saturating_sub(begun);
        let read = match listing {
            Ok(listing) => aside(move || parse(&listing)).await,
            Err(_) => None,
        };
        let is_read = read.is_some();
        if let Some(((sets, graph), parsing)) = read {
            (self.sets, self.graph) = (Arc::new(sets), graph);
            time += parsing;
        }
        self.budget.looked(time);
        is_read || is_first
    }
}

fn parse(listing: &Listing) -> (RuleSets, Graph) {
    let sets = RuleSets::parse(listing);
    let graph = Graph::of(&sets);
    (sets, graph)
}

/// Does something that takes long where it holds nobody up, and for how long it used a CPU.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<(T, Duration)> {
    // Where the kernel does not say, it cost nothing.
    let used = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    let timed = move || {
        let begun = used();
        (work(), used().saturating_sub(begun))
    };
    let failed = |error: &JoinError| warn!("look packet rules through: {error}; keeping what was found before");
    spawn_blocking(timed).await.inspect_err(failed).ok()
}

/// For how long programs that this process has started have used a CPU, as far as they have ended. How long they took by the
/// clock says more of what else the host does.
fn used() -> Duration {
    let time = |time: TimeVal| {
        let micros = u64::try_from(time.tv_usec()).unwrap_or_default();
        Duration::from_secs(u64::try_from(time.tv_sec()).unwrap_or_default()) + Duration::from_micros(micros)
    };
    getrusage(UsageWho::RUSAGE_CHILDREN)
        .map_or(Duration::ZERO, |usage| time(usage.user_time()) + time(usage.system_time()))
}

/// What is due already is so since then.
fn note(due: &mut Option<(Urgency, Instant)>, urgency: Urgency) {
    if due.is_none_or(|(known, _)| known < urgency) {
        *due = Some((urgency, Instant::now()));
    }
}

async fn told(events: &mut Result<Events, ()>, graph: &mut Graph) -> Urgency {
    match events {
        Ok(events) => events.told(graph).await,
        Err(()) => std::future::pending().await,
    }
}

/// How much time may be spent.
#[derive(Default)]
struct Budget {
    /// When all was rested for that was done.
    paid: Option<Instant>,
    /// When it was last looked.
    last: Option<Instant>,
}

impl Budget {
    /// After something that took so long.
    fn spend(&mut self, time: Duration) {
        let now = Instant::now();
        self.paid = Some(self.paid.map_or(now, |paid| paid.max(now)) + time * REST);
    }

    /// After a look that took so long.
    fn looked(&mut self, time: Duration) {
        self.spend(time);
        self.last = Some(Instant::now());
    }

    /// When to look, where something is due since then.
    fn next(&self, due: Option<(Urgency, Instant)>, is_blind: bool) -> Instant {
        let now = Instant::now();
        let (Some(paid), Some(last)) = (self.paid, self.last) else { return now };
        match due {
            Some((Urgency::Now, since)) => {
                let settled = since + SETTLE_TIME;
                paid.checked_sub(AHEAD).map_or(settled, |from| from.max(settled))
            }
            Some((Urgency::Later, since)) => paid.max(since + SETTLE_TIME),
            None if is_blind => paid.max(last + BLIND_PERIOD),
            None => paid.max(last + PERIOD),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_urgent_waits_for_nothing_until_ten_minutes_are_owed() {
        let mut budget = Budget::default();
        let look = Duration::from_millis(200);
        let wait = |budget: &Budget, due: Option<Urgency>| {
            let due = due.map(|urgency| (urgency, Instant::now()));
            budget.next(due, false).saturating_duration_since(Instant::now())
        };
        assert_eq!(wait(&budget, Some(Urgency::Later)), Duration::ZERO);
        budget.looked(look);
        assert_eq!(wait(&budget, Some(Urgency::Later)), look * REST);
        assert_eq!(wait(&budget, Some(Urgency::Now)), SETTLE_TIME);
        (0..10).for_each(|_| budget.looked(look));
        assert_eq!(wait(&budget, Some(Urgency::Now)), look * REST);
        tokio::time::advance(look * REST).await;
        assert_eq!(wait(&budget, Some(Urgency::Now)), SETTLE_TIME);
        assert_eq!(wait(&budget, None), look * REST * 10);
    }
}
