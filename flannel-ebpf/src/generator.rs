//! Not part of the dataplane: sends one frame as fast as the kernel runs this, for `cargo xtask bench receive`.
#![no_std]
#![no_main]

use aya_ebpf::{Global, bindings::xdp_action, helpers::bpf_redirect, macros::xdp, programs::XdpContext};
use flannel_common::generator::Generated;

const WORDS: usize = Generated::LEN / 4;

/// A [`Generated`], patched at load. By words, since a whole one does not fit on the stack twice.
#[unsafe(no_mangle)]
static GENERATED: [Global<u32>; 1 + WORDS] = [const { Global::new(0) }; 1 + WORDS];

/// Run on live frames (`BPF_F_TEST_XDP_LIVE_FRAMES`): the kernel uses their pages again, and receivers change what is in them,
/// so all of it is written each time.
#[xdp]
pub(crate) fn generate(ctx: XdpContext) -> u32 {
    let start = ctx.data();
    if start + Generated::LEN > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    let [ifindex, frame @ ..] = &GENERATED;
    for (index, word) in frame.iter().enumerate() {
        // SAFETY: the bounds were compared with data_end, which the verifier checks again.
        unsafe { (start as *mut u32).add(index).write(word.load()) };
    }
    // SAFETY: no memory involved.
    unsafe { bpf_redirect(ifindex.load(), 0) as u32 }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier would not accept an endless loop.
    loop {}
}
