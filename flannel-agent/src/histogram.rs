//! How often something took how long.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The upper bounds of the buckets, in seconds; what takes longer is in one more.
const BOUNDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Durations, counted in buckets. It says its bounds itself, since a later version may have others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Histogram {
    /// In seconds.
    bounds: Vec<f64>,
    /// How many are in each bucket and in none before; one more than bounds.
    counts: Vec<u64>,
    /// In seconds.
    sum: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { bounds: BOUNDS.to_vec(), counts: vec![0; BOUNDS.len() + 1], sum: 0.0 }
    }
}

impl Histogram {
    /// Something took so long.
    pub fn observe(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(self.bounds.len());
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += seconds;
    }

    /// For each upper bound, [`None`] for the infinite one, how many took no longer.
    pub fn cumulated(&self) -> impl Iterator<Item = (Option<f64>, u64)> {
        let bounds = self.bounds.iter().copied().map(Some).chain([None]);
        let counts = self.counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        });
        bounds.zip(counts)
    }

    /// How long all took, in seconds.
    pub const fn sum(&self) -> f64 {
        self.sum
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_in_the_first_bucket_that_it_fits_and_in_all_above() {
        let mut histogram = Histogram::default();
        for milliseconds in [1, 2, 3, 60_000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let cumulated: Vec<_> = histogram.cumulated().collect();
        assert_eq!(cumulated[..3], [(Some(0.001), 1), (Some(0.0025), 2), (Some(0.005), 3)]);
        assert_eq!(cumulated.last(), Some(&(None, 4)));
        assert_eq!(histogram.count(), 4);
        assert!((histogram.sum() - 60.006).abs() < 1e-9);
    }
}
