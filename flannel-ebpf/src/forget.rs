//! Programs that forget flows which have ended, beside those of the packets' way: none of them sees a packet.
//!
//! * `connection_ended` — the filter of the agent's socket of conntrack's events: forgets at once what has ended
//! * `link_gone` — the filter of a socket of rtnetlink's events of links: has the flows into a pod's veth be delivered no more
//! * `forget_again` — the same flows once more, as the agent runs it
//! * `forget_selected` — looks at all flows, as the agent runs it
#![no_std]
#![no_main]

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    helpers::{bpf_for_each_map_elem, bpf_ktime_get_ns},
    macros::{classifier, map, socket_filter},
    maps::{Array, LruHashMap, Queue},
    programs::{SkBuffContext, TcContext},
};
use flannel_common::{
    ended::{self, Bypass, LinkMessage, Message, REST, Selection, Tuple, Unclear, WAKE_INTERVAL, left},
    flow::{Flow, FlowKey},
    maps::{GONE_SLOTS, MAX_FLOWS, gone_slot},
};
use network_types::eth::EthHdr;

/// Pinned: the dataplane's.
#[map]
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(MAX_FLOWS, 0);

/// Pinned: the dataplane's.
#[map]
static GONE: Array<u32> = Array::with_max_entries(GONE_SLOTS, 0);

/// What has ended lately, the oldest first.
#[map]
static ENDED: Queue<Ended> = Queue::with_max_entries(1 << 14, 0);

/// One: for all CPUs.
#[map]
static STATE: Array<State> = Array::with_max_entries(1, 0);

/// Patched at load; constant to the verifier.
#[unsafe(no_mangle)]
static BYPASS: Global<Bypass> = Global::new(Bypass { time: 0, subnet: 0, subnet_mask: 0 });

#[repr(C)]
#[derive(Clone, Copy)]
struct Ended {
    at: u64,
    key: FlowKey,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct State {
    /// When the agent was last told.
    told: u64,
    /// Not 0: any flow may have ended.
    unclear: u64,
}

/// Run by the kernel in the moment in which conntrack gives a connection up. Few messages go on to the agent, whole (another
/// socket may have the same one): those that have it forget once more.
#[socket_filter]
pub(crate) fn connection_ended(ctx: SkBuffContext) -> i64 {
    const NONE: i64 = 0;
    const WHOLE: i64 = u32::MAX as i64;
    let Some(state) = STATE.get_ptr_mut(0) else { return WHOLE };
    let is_to_be_told = match forget_connection(&ctx) {
        Ok(was_fresh) => was_fresh,
        Err(Unclear) => {
            // SAFETY: a map value lives as long as the program; one aligned store.
            unsafe { (&raw mut (*state).unclear).write_volatile(1) };
            true
        }
    };
    if !is_to_be_told {
        return NONE;
    }
    // After the flow is in the queue: who finds that empty later than this is told.
    let now = now();
    // SAFETY: as above. Two CPUs may both tell.
    unsafe {
        let told = (&raw const (*state).told).read_volatile();
        if now.wrapping_sub(told) < WAKE_INTERVAL {
            return NONE;
        }
        (&raw mut (*state).told).write_volatile(now);
    }
    WHOLE
}

/// Run by the kernel in the moment in which it tells of a change of links. Nobody reads the socket.
#[socket_filter]
pub(crate) fn link_gone(ctx: SkBuffContext) -> i64 {
    const NONE: i64 = 0;
    if let Some(link) = ctx.load(0).ok().and_then(|message: LinkMessage| message.gone())
        && let Some(gone) = GONE.get_ptr_mut(gone_slot(link))
    {
        // SAFETY: a map value lives as long as the program; one aligned store.
        unsafe { gone.write_volatile(link) };
    }
    NONE
}

/// Whether there was something to be forgotten.
#[inline(always)]
fn forget_connection(ctx: &SkBuffContext) -> Result<bool, Unclear> {
    let message: Message = ctx.load(0).map_err(|_| Unclear)?;
    let Some(original) = message.original()? else { return Ok(false) };
    let reply: Tuple = ctx.load(message.reply_offset()).map_err(|_| Unclear)?;
    let (bypass, now) = (BYPASS.load(), now());
    // Each by itself: without CAP_PERFMON no loop may walk the stack.
    let [original, back, reply, answered] = ended::flows(original, ended::reply(&reply)?);
    let mut was_fresh = end(original, &bypass, now)?;
    was_fresh |= end(back, &bypass, now)?;
    was_fresh |= end(reply, &bypass, now)?;
    was_fresh |= end(answered, &bypass, now)?;
    Ok(was_fresh)
}

#[inline(always)]
fn end(key: Option<FlowKey>, bypass: &Bypass, now: u64) -> Result<bool, Unclear> {
    let Some(key) = key.filter(|key| bypass.is_local(key)) else { return Ok(false) };
    let was_fresh = forget_fresh(&key, bypass, now);
    if was_fresh {
        ENDED.push(Ended { at: now, key }, 0).map_err(|_| Unclear)?;
    }
    Ok(was_fresh)
}

/// Forgets what has ended [`REST`] ago. What it finds is one of [`left`].
#[classifier]
pub(crate) fn forget_again(_ctx: TcContext) -> i32 {
    /// What a run takes at most.
    const BATCH: u32 = 512;
    let unclear = STATE.get_ptr_mut(0).map_or(0, |state| {
        // SAFETY: a map value lives as long as the program.
        unsafe {
            let state = &raw mut (*state).unclear;
            let unclear = state.read_volatile();
            state.write_volatile(0);
            if unclear == 0 { 0 } else { left::UNCLEAR }
        }
    });
    let (bypass, now, mut found) = (BYPASS.load(), now(), left::MORE);
    for _ in 0..BATCH {
        let Ok(Some(Ended { at, .. })) = ENDED.peek() else {
            found = left::NOTHING;
            break;
        };
        // What ended after this began is younger still.
        if (now.wrapping_sub(at) as i64) < REST as i64 {
            found = left::YOUNG;
            break;
        }
        if let Ok(Some(Ended { key, .. })) = ENDED.pop() {
            let _was_fresh = forget_fresh(&key, &bypass, now);
        }
    }
    (found | unclear) as i32
}

/// Looks at all flows, and forgets those of the [`Selection`] in its packet. How many these were.
#[classifier]
pub(crate) fn forget_selected(ctx: TcContext) -> i32 {
    let Ok(mut selection) = ctx.load::<Selection>(EthHdr::LEN) else { return 0 };
    // SAFETY: the function has the form that the kernel calls, and the context lives as long as this call.
    unsafe {
        bpf_for_each_map_elem(
            (&raw const FLOWS).cast_mut().cast(),
            look as *mut c_void,
            ptr::from_mut(&mut selection).cast(),
            0,
        )
    };
    selection.forgotten as i32
}

/// Called by the kernel for each flow.
unsafe extern "C" fn look(_map: *mut c_void, key: *const FlowKey, flow: *const Flow, selection: *mut Selection) -> u64 {
    const GO_ON: u64 = 0;
    // SAFETY: the kernel gives an entry's key and value, and the context of `forget_selected`.
    unsafe {
        let veth = (&raw const (*flow).ingress.veth).read_volatile();
        let selection = &mut *selection;
        if selection.everything != 0 || veth == 0 || selection.veths.contains(&veth) {
            forget(&*key);
            selection.forgotten += 1;
        }
    }
    GO_ON
}

/// Forgets a flow that may bypass the stack now, and whether it did. Most connections end long after their last packet: what
/// is known of them is too old to be used, and removing it would cost more than all the rest.
#[inline(always)]
fn forget_fresh(key: &FlowKey, bypass: &Bypass, now: u64) -> bool {
    let Some(flow) = FLOWS.get_ptr(key) else { return false };
    // SAFETY: a map value lives as long as the program. Where the kernel gives it to another flow meanwhile, that one is new
    // and looks fresh.
    let (egress, ingress) = unsafe {
        ((&raw const (*flow).egress.released).read_volatile(), (&raw const (*flow).ingress.released).read_volatile())
    };
    let is_fresh = bypass.may_be_fresh(egress, now) || bypass.may_be_fresh(ingress, now);
    if is_fresh {
        forget(key);
    }
    is_fresh
}

#[inline(always)]
fn forget(key: &FlowKey) {
    // There may be nothing.
    let _absent = FLOWS.remove(key);
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: takes nothing and returns a number.
    unsafe { bpf_ktime_get_ns() }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier would not accept an endless loop.
    loop {}
}

/// As the other programs'.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
