//! Not part of the dataplane: what the agent finds out with whether the kernel has what the dataplane calls for. Some of it
//! is refused only when a packet comes.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{bpf_adj_room_mode, xdp_action},
    helpers::bpf_skb_adjust_room,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

/// Calls `bpf_skb_adjust_room` and returns what that does. The length is in the context's `priority`, the flags' halves in
/// its `cb`.
#[classifier]
pub(crate) fn probe_room(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context is valid for the program's run, and TC programs may read these fields.
    let (len, [low, high, ..]) = unsafe { ((*skb).priority as i32, (*skb).cb) };
    let flags = u64::from(low) | u64::from(high) << 32;
    // SAFETY: the context is valid.
    unsafe { bpf_skb_adjust_room(skb, len, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, flags) as i32 }
}

/// Loads only where XDP programs can take frames of several buffers.
#[xdp(frags)]
pub(crate) fn probe_frags(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier would not accept an endless loop.
    loop {}
}

/// The kernel gives helpers such as `bpf_skb_adjust_room` to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
