//! What is going on, on the terminal.

use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;

/// Does something that takes a while, with a spinner where there is a terminal, and says how long it took.
///
/// # Errors
/// The action's.
pub fn step<T>(what: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(100));
    let start = Instant::now();
    let result = action();
    spinner.finish_and_clear();
    let mark = if result.is_ok() { "✓" } else { "✗" };
    println!("{mark} {what} ({:.1} s)", start.elapsed().as_secs_f64());
    result
}

/// A heading between parts of the output.
pub fn heading(text: &str) {
    println!("\n── {text} ──");
}

/// What limits are multiplied by where the machine is slow: the variable `LAB_PATIENCE`, 1 without.
pub fn patience() -> u32 {
    std::env::var("LAB_PATIENCE").ok().and_then(|factor| factor.parse().ok()).filter(|factor| *factor > 0).unwrap_or(1)
}

/// How long [`wait_for`] rests between two looks.
const SHORTEST_REST: Duration = Duration::from_millis(2);
const LONGEST_REST: Duration = Duration::from_millis(100);

/// Waits until `condition` holds. Between two looks it rests as long as a look takes, so that one that starts programs leaves the
/// CPUs to those who are waited for.
///
/// # Errors
/// After `limit` (times [`patience`]), naming what was waited for.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<Duration> {
    let (start, limit) = (Instant::now(), limit * patience());
    loop {
        let look = Instant::now();
        if condition() {
            return Ok(start.elapsed());
        }
        anyhow::ensure!(start.elapsed() < limit, "waited {limit:?} in vain for {what}");
        std::thread::sleep(look.elapsed().clamp(SHORTEST_REST, LONGEST_REST));
    }
}
