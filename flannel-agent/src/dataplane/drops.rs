//! Samples of what the programs dropped, as they are pinned.

use std::time::Duration;

use aya::maps::{Map, MapData, PerCpuArray};
use flannel_common::{
    drops::{Drops, Sample},
    event::{Event, Outcome},
    maps::DROPS,
};
use nix::time::{ClockId, clock_gettime};

use super::{DataplaneError, PinDirectory};

/// A packet that was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Its number among the samples of its reason: each has its own as long as the map is there, and those of one CPU grow.
    pub number: u64,
    /// How long ago.
    pub ago: Duration,
    /// The number of the interface that it was at.
    pub ifindex: u32,
    /// Bytes of it, from the link-layer header on.
    pub len: u32,
    /// Bytes of its link-layer header.
    pub link_header_len: usize,
    /// Its first bytes.
    pub frame: Vec<u8>,
}

/// The latest packets that were dropped for each reason, latest first, by a dataplane whose agent may be gone.
///
/// # Errors
/// [`DataplaneError::Map`] where there is none.
pub fn pinned_drops(pins: &PinDirectory) -> Result<Vec<(Event, Vec<Dropped>)>, DataplaneError> {
    let map = pins.open(DROPS)?;
    let map = Map::PerCpuArray(map).try_into().map_err(DataplaneError::map("open", DROPS))?;
    read(&map)
}

fn read(map: &PerCpuArray<MapData, Drops>) -> Result<Vec<(Event, Vec<Dropped>)>, DataplaneError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(DataplaneError::Clock)?.into();
    let reasons = Event::ALL.iter().filter(|event| event.outcome() == Outcome::Drop);
    reasons
        .map(|event| {
            let values = map.get(&(*event as u32), 0).map_err(DataplaneError::map("read", DROPS))?;
            let cpus = values.len() as u64;
            let of_cpus = (0..).zip(values.iter());
            let samples = of_cpus.flat_map(|(cpu, drops)| drops.samples.iter().map(move |sample| (cpu, sample)));
            let mut dropped: Vec<_> =
                samples.filter_map(|(cpu, sample)| Dropped::new(sample, cpu, cpus, now)).collect();
            dropped.sort_by_key(|dropped| dropped.ago);
            Ok((*event, dropped))
        })
        .collect()
}

impl Dropped {
    fn new(sample: &Sample, cpu: u64, cpus: u64, now: Duration) -> Option<Self> {
        Some(Self {
            // Numbers of a CPU begin with 1.
            number: u64::from(sample.head.saturating_sub(1)) * cpus + cpu + 1,
            frame: sample.frame()?.to_vec(),
            // The program's clock is behind by up to a tick, never ahead.
            ago: now.saturating_sub(Duration::from_nanos(sample.time)),
            ifindex: sample.ifindex,
            len: sample.len,
            link_header_len: sample.link_header_len.into(),
        })
    }
}
