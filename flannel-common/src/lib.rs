//! The bytes that the eBPF programs, the agent and the wire agree on. Everything here is pure and `no_std`, so that
//! the same code runs in the kernel, in the agent and in tests on the host.
//!
//! # Layout
//!
//! * [`admission`] — which tunnel packets a host takes
//! * [`vxlan`] — the VXLAN network identifier and header constants (RFC 7348)
//! * [`packet`] — the outer header of an encapsulated packet, as a template and its completion; inner addresses
//! * [`checksum`] — the Internet checksum (RFC 1071)
//! * [`flow`] — what identifies a flow, and what is remembered of one; its UDP source port
//! * [`ended`] — connections that conntrack has given up
//! * [`generator`] — what the benchmarks' frame generator sends
//! * [`noted`] — how tests put notes on packets
//! * [`maps`] — names, keys, values and sizes of the BPF maps, and the programs' constants
//! * [`drops`] — samples of dropped packets, and how many there may be
//! * [`event`] — what can become of a packet: drop reason, counter, metric label and documentation in one enum
//! * `model` (with the feature) — what the programs must make of a packet, said a second time
#![cfg_attr(not(any(test, feature = "model")), no_std)]

pub mod admission;
pub mod checksum;
pub mod drops;
pub mod ended;
pub mod event;
pub mod flow;
pub mod generator;
pub mod maps;
#[cfg(feature = "model")]
pub mod model;
pub mod noted;
pub mod packet;
pub mod vxlan;
