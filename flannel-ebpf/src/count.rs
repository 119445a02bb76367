//! Counters.

use flannel_common::{
    event::Event,
    maps::{Counter, Traffic},
};

use crate::maps::{COUNTERS, TRAFFIC};

/// Counts a packet of `len` bytes under `event`.
#[inline(always)]
pub(crate) fn count(event: Event, len: u32) {
    // Every program counts, so a version that counts in another way has no program in common with this one.
    let len = if cfg!(feature = "next-programs") { core::hint::black_box(len) } else { len };
    if let Some(counter) = COUNTERS.get_ptr_mut(event as u32) {
        // SAFETY: the map's value for this CPU; programs on a CPU do not preempt each other at the same hook, and an
        // increment lost to an interrupt at another hook is only a count.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(len);
    }
}

/// Counts a packet to the VTEP with a number, of `len` bytes of IPv4.
#[inline(always)]
pub(crate) fn count_sent(id: u32, len: u32) {
    // SAFETY: of an entry.
    count_traffic(id, len, |traffic| unsafe { &raw mut (*traffic).sent });
}

/// Counts a packet from it, likewise.
#[inline(always)]
pub(crate) fn count_received(id: u32, len: u32) {
    // SAFETY: of an entry.
    count_traffic(id, len, |traffic| unsafe { &raw mut (*traffic).received });
}

#[inline(always)]
fn count_traffic(id: u32, len: u32, which: impl FnOnce(*mut Traffic) -> *mut Counter) {
    // Peers beyond the map's end are not counted.
    if let Some(traffic) = TRAFFIC.get_ptr_mut(id) {
        // SAFETY: as in `count`.
        let counter = unsafe { &mut *which(traffic) };
        counter.packets += 1;
        counter.bytes += u64::from(len);
    }
}
