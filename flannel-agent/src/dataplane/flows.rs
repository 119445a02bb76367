//! The flows that bypass the stack, as they are pinned.

use std::time::Duration;

use aya::maps::{HashMap as BpfHashMap, Map, MapData};
use flannel_common::{
    flow::{Flow, FlowKey},
    maps::FLOWS,
};
use nix::{
    libc::IPPROTO_TCP,
    time::{ClockId, clock_gettime},
};
use serde::Serialize;

use super::{DataplaneError, PinDirectory};

/// How many flows bypass the stack. Each direction counts by itself: a translated flow has another name in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flows {
    /// Of those that nothing changes.
    pub plain: Directions,
    /// Of those that netfilter translates.
    pub translated: Directions,
}

/// Flows by direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Directions {
    /// From pods to the overlay.
    pub egress: usize,
    /// From the overlay to pods.
    pub ingress: usize,
}

impl Flows {
    fn of(&mut self, before: &FlowKey, after: &FlowKey) -> &mut Directions {
        if before == after { &mut self.plain } else { &mut self.translated }
    }
}

/// The flows that the stack let a packet of out within `bypass_time`, by a dataplane whose agent may be gone.
///
/// # Errors
/// [`DataplaneError::Map`] where there is none.
pub fn pinned_flows(pins: &PinDirectory, bypass_time: Duration) -> Result<Flows, DataplaneError> {
    let map = open(pins)?;
    let now: Duration = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(DataplaneError::Clock)?.into();
    let is_fresh = |released| released > 0 && now.saturating_sub(Duration::from_nanos(released)) < bypass_time;
    let mut flows = Flows::default();
    for entry in map.iter() {
        let (key, Flow { egress, ingress, .. }) = entry.map_err(DataplaneError::map("read", FLOWS))?;
        if is_fresh(egress.released) {
            flows.of(&key, &egress.sent_as).egress += 1;
        }
        if is_fresh(ingress.released) {
            flows.of(&key, &ingress.received_as).ingress += 1;
        }
    }
    Ok(flows)
}

/// How many TCP connections have bypassed the stack, or may have; some of them may have ended.
///
/// # Errors
/// [`DataplaneError::Map`] where there is no dataplane.
pub fn pinned_connections(pins: &PinDirectory) -> Result<usize, DataplaneError> {
    let mut connections = 0;
    for entry in open(pins)?.iter() {
        let (key, _) = entry.map_err(DataplaneError::map("read", FLOWS))?;
        connections += usize::from(key.protocol == IPPROTO_TCP as u32);
    }
    Ok(connections)
}

pub(super) fn open(pins: &PinDirectory) -> Result<BpfHashMap<MapData, FlowKey, Flow>, DataplaneError> {
    let map = pins.open(FLOWS)?;
    Map::LruHashMap(map).try_into().map_err(DataplaneError::map("open", FLOWS))
}
