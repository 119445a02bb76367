//! Not part of the dataplane: lets `flannel-agent trace` and tests run a program on a packet that carries a note. BPF_PROG_TEST_RUN can neither set nor
//! show `tc_index`, but `cb`, and repeats a run on the same packet.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::TC_ACT_SHOT,
    helpers::bpf_get_hash_recalc,
    macros::{classifier, map},
    maps::ProgramArray,
    programs::TcContext,
};
use flannel_common::noted;

/// The programs that are run, by numbers of the caller's.
#[map]
static PROGRAMS: ProgramArray = ProgramArray::with_max_entries(noted::PROGRAMS, 0);

/// The first time it puts the note on the packet and goes on to the program; the second time it takes the note off.
#[classifier]
pub(crate) fn noted(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for the program's run, and TC programs may write these fields.
    let skb = unsafe { &mut *ctx.skb.skb };
    if skb.cb[noted::IS_OVER] != 0 {
        skb.cb[noted::NOTE] = skb.tc_index;
        skb.cb[noted::PACKET_TYPE] = skb.pkt_type;
        return TC_ACT_SHOT;
    }
    skb.cb[noted::IS_OVER] = 1;
    if skb.cb[noted::HAS_HASH] != 0 {
        // SAFETY: the context is valid. The packet keeps its hash.
        unsafe { bpf_get_hash_recalc(ctx.skb.skb) };
    }
    skb.tc_index = skb.cb[noted::NOTE];
    let program = skb.cb[noted::PROGRAM];
    // SAFETY: the programs in the map are of the same type. Where there is none, this goes on.
    unsafe { PROGRAMS.tail_call(&ctx, program) };
    TC_ACT_SHOT
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier would not accept an endless loop.
    loop {}
}
