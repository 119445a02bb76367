//! Trying again what may heal: exponential back-off with jitter.

use std::{fmt::Display, time::Duration};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tracing::warn;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3);

fn policy() -> ExponentialBuilder {
    ExponentialBuilder::default().with_min_delay(FIRST).with_max_delay(LONGEST).with_jitter().without_max_times()
}

/// The delays of a loop that starts something again and again.
pub struct BackOff {
    delays: ExponentialBackoff,
    /// What was said last, so that each reason is said once.
    said: String,
}

impl Default for BackOff {
    fn default() -> Self {
        Self { delays: policy().build(), said: String::new() }
    }
}

impl BackOff {
    /// How long to wait before the next attempt.
    pub fn delay(&mut self) -> Duration {
        self.delays.next().unwrap_or(LONGEST)
    }

    /// An attempt succeeded: the next failure waits as the first.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Says why an attempt failed, and waits.
    pub async fn wait(&mut self, error: &impl Display) {
        let reason = error.to_string();
        if reason != self.said {
            warn!("{reason}; trying again");
            self.said = reason;
        }
        tokio::time::sleep(self.delay()).await;
    }
}

/// Calls `attempt` until it succeeds or fails in a way that `is_final`, saying each new reason once. Whoever else is to know has each
/// failure that is waited out in `on_wait`.
///
/// # Errors
/// The final error.
pub async fn until_ok<T, E: Display>(
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
    is_final: impl Fn(&E) -> bool,
    mut on_wait: impl FnMut(&E),
) -> Result<T, E> {
    let mut back_off = BackOff::default();
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => {
                on_wait(&error);
                back_off.wait(&error).await;
            }
        }
    }
}
