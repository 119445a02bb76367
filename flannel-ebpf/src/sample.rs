//! Samples of what is dropped.

use core::{hint::black_box, ptr};

use flannel_common::{drops::FRAME_LEN, event::Event};

use crate::{flows, maps::DROPS, packet::Headers};

/// Keeps the beginning of a packet that is dropped, unless there were many lately. Not inlined: it is out of the way of
/// what passes.
#[inline(never)]
pub(crate) fn sample(packet: &impl Headers, event: Event, link_header_len: u16) {
    let Some(drops) = DROPS.get_ptr_mut(event as u32) else { return };
    // SAFETY: the map's value for this CPU. Programs on a CPU do not preempt each other at the same hook; of a sample that
    // two of them write at once the agent may see parts of each.
    let drops = unsafe { &mut *drops };
    let now = flows::now();
    let Some((place, number)) = drops.next(now) else { return };
    let Some(sample) = drops.samples.get_mut(place) else { return };
    let len = packet.len();
    // From 1 to the size of the frame, by a mask that the compiler does not see through: Linux 6.1 learns no least value from
    // a comparison with zero. An empty packet is asked for more than it has, and nothing is kept.
    let last = black_box(len.min(FRAME_LEN as u32).wrapping_sub(1)) & (FRAME_LEN as u32 - 1);
    let kept = last + 1;
    // SAFETY: a field of a value that is borrowed, as below. Volatile, so that all of it is written in this order.
    unsafe { ptr::write_volatile(&raw mut sample.tail, number) };
    let kept = if packet.copy_to(&mut sample.frame, kept).is_ok() { kept as u16 } else { 0 };
    // SAFETY: as above.
    unsafe {
        ptr::write_volatile(&raw mut sample.ifindex, packet.device());
        ptr::write_volatile(&raw mut sample.time, now);
        ptr::write_volatile(&raw mut sample.len, len);
        ptr::write_volatile(&raw mut sample.link_header_len, link_header_len);
        ptr::write_volatile(&raw mut sample.kept, kept);
        ptr::write_volatile(&raw mut sample.head, number);
    }
}
