//! Memory and file descriptors of the agents, over their lives.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// Shorter lives say nothing about growth.
const SHORTEST_LIFE: Duration = Duration::from_secs(120);
/// What a fresh process takes until it has seen everything once.
const WARM_UP: Duration = Duration::from_secs(30);
/// By so much the last quarter's mean of resident memory may exceed the first's, in KiB, ...
pub(super) const MEMORY_BOUND: u64 = 2048;
/// ... and as a fraction.
pub(super) const MEMORY_FRACTION: f64 = 0.1;
/// The same of file descriptors.
pub(super) const DESCRIPTOR_BOUND: f64 = 3.0;

/// What a process has at a time.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// From the run's beginning.
    pub at: Duration,
    /// Resident memory, in KiB.
    pub memory: u64,
    /// Open file descriptors.
    pub descriptors: u64,
}

impl Sample {
    /// Of a process now.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn of(pid: u32, at: Duration) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let memory = memory.trim().trim_end_matches(" kB").parse()?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        Ok(Self { at, memory, descriptors })
    }
}

/// The life of an agent's process.
#[derive(Clone, Debug)]
pub struct Life {
    /// Its host.
    pub host: String,
    /// Its process.
    pub pid: u32,
    /// In order.
    pub samples: Vec<Sample>,
}

/// How one of its numbers went.
#[derive(Clone, Copy, Debug)]
struct Course {
    start: f64,
    end: f64,
    max: f64,
    first_quarter: f64,
    last_quarter: f64,
    per_hour: f64,
}

impl Life {
    /// How long it is known for.
    pub fn lasted(&self) -> Duration {
        self.samples.last().zip(self.samples.first()).map_or(Duration::ZERO, |(last, first)| last.at - first.at)
    }

    /// What grew; [`None`] where nothing did, or where it was too short to say.
    pub fn growth(&self) -> Option<String> {
        if self.lasted() < SHORTEST_LIFE {
            return None;
        }
        let memory = self.course(|sample| sample.memory)?;
        let descriptors = self.course(|sample| sample.descriptors)?;
        let bound = (MEMORY_BOUND as f64).max(memory.first_quarter * MEMORY_FRACTION);
        let grew = memory.last_quarter > memory.first_quarter + bound
            || descriptors.last_quarter > descriptors.first_quarter + DESCRIPTOR_BOUND;
        grew.then(|| self.to_string())
    }

    /// After the warm-up.
    fn course(&self, number: impl Fn(&Sample) -> u64) -> Option<Course> {
        let begin = self.samples.first()?.at + WARM_UP;
        let points: Vec<(f64, f64)> = self
            .samples
            .iter()
            .filter(|sample| sample.at >= begin)
            .map(|sample| (sample.at.as_secs_f64(), number(sample) as f64))
            .collect();
        let quarter = points.len().div_ceil(4);
        let mean = |points: &[(f64, f64)]| points.iter().map(|(_, y)| y).sum::<f64>() / points.len() as f64;
        let (mean_x, mean_y) = (points.iter().map(|(x, _)| x).sum::<f64>() / points.len() as f64, mean(&points));
        let covariance: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
        let variance: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
        Some(Course {
            start: points.first()?.1,
            end: points.last()?.1,
            max: points.iter().map(|(_, y)| *y).fold(0.0, f64::max),
            first_quarter: mean(&points[..quarter]),
            last_quarter: mean(&points[points.len() - quarter..]),
            per_hour: if variance > 0.0 { covariance / variance * 3600.0 } else { 0.0 },
        })
    }

    /// For programs.
    pub fn to_json(&self) -> Value {
        let course = |course: Option<Course>| {
            course.map(|Course { start, end, max, first_quarter, last_quarter, per_hour }| {
                json!({ "start": start, "end": end, "max": max, "firstQuarter": first_quarter,
                        "lastQuarter": last_quarter, "perHour": per_hour })
            })
        };
        json!({
            "host": self.host, "pid": self.pid, "seconds": self.lasted().as_secs(),
            "memoryKiB": course(self.course(|sample| sample.memory)),
            "descriptors": course(self.course(|sample| sample.descriptors)),
        })
    }
}

impl std::fmt::Display for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { host, pid, .. } = self;
        write!(f, "{host} (process {pid}), {:.0} s", self.lasted().as_secs_f64())?;
        for (name, course) in
            [("KiB", self.course(|sample| sample.memory)), ("descriptors", self.course(|sample| sample.descriptors))]
        {
            if let Some(Course { start, end, max, per_hour, .. }) = course {
                write!(f, "; {start:.0} to {end:.0} {name}, most {max:.0}, {per_hour:+.1} an hour")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(seconds: u64, memory: impl Fn(u64) -> u64, descriptors: impl Fn(u64) -> u64) -> Life {
        let samples = (0..seconds).step_by(2).map(|second| Sample {
            at: Duration::from_secs(second),
            memory: memory(second),
            descriptors: descriptors(second),
        });
        Life { host: "node1".to_owned(), pid: 1, samples: samples.collect() }
    }

    #[test]
    fn growth_is_noticed() {
        let flat = |_| 15_000;
        assert_eq!(life(600, flat, |_| 30).growth(), None);
        assert!(life(600, |second| 15_000 + second * 10, |_| 30).growth().unwrap().contains("+36000.0 an hour"));
        assert!(life(600, flat, |second| 30 + second / 60).growth().unwrap().contains("descriptors"));
        assert_eq!(life(600, |second| if second < 20 { 5_000 } else { 15_000 }, |_| 30).growth(), None, "warm-up");
        assert_eq!(life(600, flat, |second| 30 + second % 4).growth(), None, "connections come and go");
        assert_eq!(life(60, |second| 15_000 + second * 100, |_| 30).growth(), None, "too short to say");
    }

    #[test]
    fn a_process_is_read() {
        let sample = Sample::of(std::process::id(), Duration::ZERO).unwrap();
        assert!(sample.memory > 100 && sample.descriptors >= 3, "{sample:?}");
    }
}
