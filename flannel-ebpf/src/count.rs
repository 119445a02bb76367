//! Counters.

use flannel_common::event::Event;

use crate::maps::COUNTERS;

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
