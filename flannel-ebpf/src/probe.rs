//! Not part of the dataplane: what the agent finds out with whether the kernel has what the dataplane calls for. Some of it
//! is refused only when a packet comes.
#![no_std]
#![no_main]

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{bpf_adj_room_mode, bpf_fib_lookup, xdp_action},
    helpers::{bpf_skb_adjust_room, generated::bpf_fib_lookup as look_up},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

/// `AF_INET`.
const AF_INET: u8 = 2;

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

/// Asks for a route by a mark of 0, and returns what `bpf_fib_lookup` does.
#[classifier]
pub(crate) fn probe_mark(ctx: TcContext) -> i32 {
    const WITH_MARK: u32 = 1 << 5;
    let mut params = MaybeUninit::<[u64; size_of::<bpf_fib_lookup>() / 8]>::uninit();
    for word in 0..size_of::<bpf_fib_lookup>() / 8 {
        // SAFETY: within the value, and aligned. Volatile: `memset` is a loop that the kernel refuses to some agents.
        unsafe { params.as_mut_ptr().cast::<u64>().add(word).write_volatile(0) };
    }
    let params = params.as_mut_ptr().cast::<bpf_fib_lookup>();
    // SAFETY: a field of the value, which is all zeros.
    unsafe { (&raw mut (*params).family).write(AF_INET) };
    // SAFETY: context and parameters are valid for the call, with the size given.
    unsafe { look_up(ctx.skb.skb.cast(), params, size_of::<bpf_fib_lookup>() as i32, WITH_MARK) as i32 }
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
