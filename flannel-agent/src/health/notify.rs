//! What the service manager is told (sd_notify(3), sd_watchdog_enabled(3)).

use std::time::Duration;

use sd_notify::{NotifyState, notify, watchdog_enabled};
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use super::Health;

/// Says that the agent is ready, where a service manager waits for it.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// Feeds the service manager's watchdog as long as no loop hangs, where there is one. Returns at once where there is none.
pub async fn keep_watchdog(health: Health) {
    if let Some(limit) = watchdog_enabled().filter(|limit| !limit.is_zero()) {
        feed(&health, limit, || tell(&[NotifyState::Watchdog])).await;
    }
}

/// Twice in the time that the service manager waits, as it asks for.
async fn feed(health: &Health, limit: Duration, tell: impl Fn()) {
    let mut period = interval(limit / 2);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_fed = true;
    loop {
        period.tick().await;
        match health.silent() {
            None => tell(),
            Some(silent) if is_fed => warn!(
                "the loop {:?} was not heard for {} s; the watchdog is not fed",
                silent.name,
                silent.silence.as_secs()
            ),
            Some(_) => {}
        }
        is_fed = health.silent().is_none();
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = notify(state) {
        warn!("tell the service manager {state:?}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::health::LIMIT;

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_only_while_no_loop_hangs() {
        let health = Health::default();
        let heartbeat = health.heartbeat("one");
        let fed = Cell::new(0);
        let feed_for = async |time: Duration| {
            let before = fed.get();
            let feeding = feed(&health, Duration::from_secs(10), || fed.set(fed.get() + 1));
            assert!(timeout(time, feeding).await.is_err());
            fed.get() - before
        };
        let minute = Duration::from_secs(59);
        tokio::select! {
            () = heartbeat.during(sleep(2 * minute)) => unreachable!(),
            fed = feed_for(minute) => assert_eq!(fed, 12),
        }
        sleep(LIMIT + Duration::from_secs(1)).await;
        assert_eq!(feed_for(minute).await, 0);
        heartbeat.beat();
        assert!(feed_for(Duration::from_secs(9)).await > 0);
    }
}
