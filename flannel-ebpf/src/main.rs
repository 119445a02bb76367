//! The TC and XDP programs of the VXLAN dataplane.
//!
//! ```text
//!   ┌─────────────────────── fast ─────────────────────┐                 ┌─────────────────── fast ───────────────┐
//! pod ─ from_pod ─▶ routes, netfilter ─▶ flannel.<VNI> ─ to_overlay ══▶ from_underlay ─▶ kernel vxlan ─▶ ... to_pod ─▶ pod
//!                                                                      (xdp_decap)
//!                                            ▲ from_overlay  │ handed on
//!                                            └─ kernel vxlan ┘
//! ```
//!
//! A packet is forwarded, or handed on unmodified, or dropped because it must not pass; [`Event`] names each case.
//! What is handed on continues with `TC_ACT_UNSPEC` (the same number as `TCX_NEXT`), so that other programs on the
//! hook still see it.
//!
//! # Layout
//!
//! * [`encap`] — `to_overlay` and `from_overlay`, egress and ingress of `flannel.<VNI>`; `from_pod`
//! * [`decap`] — `from_underlay`, ingress of the links of the underlay, and `xdp_decap`
//! * [`admit`] — which tunnel packets they take
//! * [`routes`] — the kernel's routes: of packets that the leases refuse, and among several next hops
//! * [`flows`] — what may bypass the stack; `to_pod`
//! * [`originals`] — which flow a packet had before the stack
//! * [`excluded`] — which flows never do, because of whom they are of
//! * [`next_hop`] — what passes it by, as the stack would have sent it on
//! * [`leases`] — the maps, asked as the lease table
//! * [`packet`], [`frame`] — the only places that touch packet memory and call helpers on it
//! * [`maps`], [`count`], [`sample`] — what the agent shares with the programs
#![no_std]
#![no_main]

mod admit;
mod count;
mod decap;
mod encap;
mod excluded;
mod flows;
mod frame;
mod leases;
mod maps;
mod next_hop;
mod originals;
mod packet;
mod routes;
mod sample;

use aya_ebpf::{
    bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::trace;
use flannel_common::event::{Event, Outcome};
use network_types::eth::EthHdr;

use crate::{
    frame::Frame,
    maps::CONFIG,
    packet::{Headers as _, Packet},
    sample::sample,
};

/// Egress of `flannel.<VNI>`: encapsulates what the host's stack routed to the overlay.
#[classifier]
pub(crate) fn to_overlay(ctx: TcContext) -> i32 {
    let packet = Packet::new(&ctx);
    let len = packet.len();
    conclude(&ctx, encap::to_overlay(&packet), len)
}

/// Ingress of `flannel.<VNI>`: encapsulates what the kernel's vxlan device hands back.
#[classifier]
pub(crate) fn from_overlay(ctx: TcContext) -> i32 {
    let packet = Packet::new(&ctx);
    let len = packet.len();
    conclude(&ctx, encap::from_overlay(&packet), len)
}

/// Ingress of the links of the underlay: admits or drops tunnel packets, and leaves all others alone.
#[classifier]
pub(crate) fn from_underlay(ctx: TcContext) -> i32 {
    let packet = Packet::new(&ctx);
    let len = packet.len();
    conclude_with(&ctx, decap::from_underlay(&packet), len, CONFIG.load().underlay_header_len)
}

/// Ingress of the host's side of a pod's veth: encapsulates what may bypass the stack.
#[classifier]
pub(crate) fn from_pod(ctx: TcContext) -> i32 {
    let packet = Packet::new(&ctx);
    let len = packet.len();
    conclude(&ctx, encap::from_pod(&packet), len)
}

/// Egress of the external interface, where there is no tunnel: gives packets to peers their MAC.
#[classifier]
pub(crate) fn to_underlay(ctx: TcContext) -> i32 {
    let packet = Packet::new(&ctx);
    let len = packet.len();
    conclude(&ctx, encap::to_underlay(&packet), len)
}

/// Egress of the host's side of a pod's veth: notes what the stack let through.
#[classifier]
pub(crate) fn to_pod(ctx: TcContext) -> i32 {
    let packet = Packet::new(&ctx);
    let len = packet.len();
    conclude(&ctx, flows::to_pod(&packet), len)
}

/// The external interface's driver: takes admitted packets out of the tunnel, before the kernel aggregates.
#[xdp(frags)]
pub(crate) fn xdp_decap(ctx: XdpContext) -> u32 {
    decapsulate(&ctx)
}

/// The same for generic XDP. For a program that takes frames of several buffers the kernel copies most packets, and
/// forgets how long their link-layer header is (`skb_pp_cow_data`; kernel 6.18): TC programs then find none.
#[xdp]
pub(crate) fn xdp_decap_generic(ctx: XdpContext) -> u32 {
    decapsulate(&ctx)
}

#[inline(always)]
fn decapsulate(ctx: &XdpContext) -> u32 {
    let frame = Frame::new(ctx);
    let len = frame.len();
    let Some(event) = decap::xdp_decap(&frame) else {
        return xdp_action::XDP_PASS;
    };
    count::count(event, len);
    match event.outcome() {
        Outcome::Forward | Outcome::Pass => xdp_action::XDP_PASS,
        Outcome::Drop => {
            sample(&frame, event, EthHdr::LEN as u16);
            xdp_action::XDP_DROP
        }
    }
}

/// At a device with Ethernet headers.
#[inline(always)]
fn conclude(ctx: &TcContext, event: Event, len: u32) -> i32 {
    conclude_with(ctx, event, len, EthHdr::LEN as u16)
}

/// The only place where an outcome becomes a TC verdict. The redirect itself was noted by the helper that named the
/// device.
#[inline(always)]
fn conclude_with(ctx: &TcContext, event: Event, len: u32, link_header_len: u16) -> i32 {
    count::count(event, len);
    trace!(ctx, "event {}, {} bytes", event as u32, len);
    match event.outcome() {
        Outcome::Forward => TC_ACT_REDIRECT,
        Outcome::Pass => TC_ACT_UNSPEC,
        Outcome::Drop => {
            sample(&Packet::new(ctx), event, link_header_len);
            TC_ACT_SHOT
        }
    }
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
