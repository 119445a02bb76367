//! Whether the agent is alive and ready: for probes over HTTP, and for the service manager.
//!
//! The agent is alive while each of its loops is heard: the loop that follows store and kernel, the one that keeps the
//! lease, the one that watches the table. Each says so as it goes round, and while it waits for something that may take
//! long; what it asks for is bounded in time. So a loop is heard late only where something hangs that should not. That the
//! store is away is none of that: the loops go on asking.

mod http;
mod metrics;
mod notify;

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior, interval};

pub use self::{
    http::{ServeError, serve},
    notify::{keep_watchdog, ready},
};

/// A loop hangs that was not heard for so long. Well above what an answer of etcd or the kernel may take.
pub const LIMIT: Duration = Duration::from_secs(30);
/// How often a loop says that it lives.
pub const PERIOD: Duration = Duration::from_secs(1);

/// What is known of all loops. Clones are of the same.
#[derive(Clone, Debug, Default)]
pub struct Health {
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    loops: Mutex<Loops>,
    is_ready: AtomicBool,
}

#[derive(Debug, Default)]
struct Loops {
    /// How many there ever were.
    begun: u64,
    /// Name and when it was heard last, by number.
    running: BTreeMap<u64, (&'static str, Instant)>,
}

/// A loop that hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silent {
    /// Which.
    pub name: &'static str,
    /// For how long it was not heard.
    pub silence: Duration,
}

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the loop {:?} hangs: it was not heard for {} s", self.name, self.silence.as_secs())
    }
}

impl Health {
    /// A loop begins. It is expected to be heard until the heartbeat is dropped.
    pub fn heartbeat(&self, name: &'static str) -> Heartbeat {
        let mut loops = self.loops();
        loops.begun += 1;
        let number = loops.begun;
        loops.running.insert(number, (name, Instant::now()));
        Heartbeat { health: self.clone(), number }
    }

    /// The loop that was not heard for longest, where that is too long.
    pub fn silent(&self) -> Option<Silent> {
        let now = Instant::now();
        let loops = self.loops();
        let silences = loops.running.values().map(|(name, heard)| Silent { name, silence: now - *heard });
        silences.max_by_key(|silent| silent.silence).filter(|silent| silent.silence > LIMIT)
    }

    /// The datapath is made, and container runtimes are told of the subnet.
    pub fn set_ready(&self) {
        self.state.is_ready.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub fn is_ready(&self) -> bool {
        self.state.is_ready.load(Ordering::Relaxed)
    }

    fn loops(&self) -> MutexGuard<'_, Loops> {
        // Each change of the table is whole, whoever panicked.
        self.state.loops.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One loop's.
#[derive(Debug)]
pub struct Heartbeat {
    health: Health,
    number: u64,
}

impl Heartbeat {
    /// The loop lives.
    pub fn beat(&self) {
        if let Some((_, heard)) = self.health.loops().running.get_mut(&self.number) {
            *heard = Instant::now();
        }
    }

    /// Waits for something that may take as long as it likes. The loop lives meanwhile.
    pub async fn during<T>(&self, wait: impl Future<Output = T>) -> T {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(wait);
        loop {
            tokio::select! {
                result = &mut wait => {
                    self.beat();
                    return result;
                }
                _ = period.tick() => self.beat(),
            }
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        // A loop that panicked is missed.
        if !std::thread::panicking() {
            self.health.loops().running.remove(&self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::{advance, sleep, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_goes_round_or_waits_is_alive() {
        let health = Health::default();
        let heartbeat = health.heartbeat("one");
        let hour = Duration::from_secs(3600);
        assert!(timeout(hour, heartbeat.during(pending::<()>())).await.is_err());
        assert_eq!(health.silent(), None);
        for _ in 0..100 {
            sleep(LIMIT).await;
            assert_eq!(health.silent(), None);
            heartbeat.beat();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_hangs_is_named_until_it_goes_on() {
        let health = Health::default();
        let alive = health.heartbeat("alive");
        let (release, released) = tokio::sync::oneshot::channel::<()>();
        let stuck = health.heartbeat("stuck");
        tokio::spawn(async move {
            // A call that does not return, outside of what may take long.
            let _ended = released.await;
            stuck.during(pending::<()>()).await;
        });
        alive.during(sleep(LIMIT)).await;
        assert_eq!(health.silent(), None);
        alive.during(sleep(Duration::from_secs(5))).await;
        let silent = health.silent().expect("a loop hangs");
        assert_eq!(silent.name, "stuck");
        assert!(silent.silence > LIMIT);
        release.send(()).expect("it waits");
        alive.during(sleep(PERIOD)).await;
        assert_eq!(health.silent(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_ended_is_not_missed_and_one_that_panicked_is() {
        let health = Health::default();
        drop(health.heartbeat("ended"));
        advance(2 * LIMIT).await;
        assert_eq!(health.silent(), None);
        let panicked = health.heartbeat("panicked");
        let task = tokio::spawn(async move {
            panicked.beat();
            std::panic::resume_unwind(Box::new("as a bug would"));
        });
        assert!(task.await.is_err_and(|error| error.is_panic()));
        advance(2 * LIMIT).await;
        assert_eq!(health.silent().map(|silent| silent.name), Some("panicked"));
    }
}
