//! The kernel's routes, asked about packets that the leases refuse: where another serves this host by now, these know more.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup},
    helpers::generated::bpf_fib_lookup as look_up,
};
use flannel_common::admission::{self, Refused, Way};

use crate::{
    leases::{overlay_device, owner_of},
    maps::LOOKUP,
};

/// `AF_INET`.
const AF_INET: u8 = 2;
/// `ENODEV`: no device has the number that was asked with.
const ENODEV: i64 = 19;

/// As [`admission::is_routed`]; `frame` has in its octets, as in memory, the inner frame's destination, whether that is ours,
/// and whether the inner destination is. Not inlined: it is out of the way of what passes. Beside the stack of `from_underlay`
/// it may have 96 octets of its own (of 512, in steps of 32): constants are read where they are needed, and what the kernel is
/// asked is in a map.
#[inline(never)]
pub(crate) fn is_routed(context: *mut c_void, outer_source: u32, source: u32, destination: u32, frame: u64) -> bool {
    let [a, b, c, d, e, f, is_to_vtep, is_to_pod] = frame.to_ne_bytes();
    let mac = [a, b, c, d, e, f];
    let refused = Refused { outer_source, source, mac, is_to_vtep: is_to_vtep != 0, is_to_pod: is_to_pod != 0 };
    let way = way_back(context, source, destination);
    admission::is_routed(owner_of, &refused, &way)
}

/// The way back to the source of a packet that comes out of `flannel.<VNI>`, as for the kernel's own source validation
/// (`__fib_validate_source`).
#[inline(always)]
fn way_back(context: *mut c_void, source: u32, destination: u32) -> Way {
    let overlay = overlay_device();
    // No agent has noted it yet.
    if overlay == 0 {
        return Way::Other;
    }
    let Some(lookup) = LOOKUP.get_ptr_mut(0) else { return Way::Other };
    // SAFETY: the map's value for this CPU. Programs on a CPU do not preempt each other at the same hook, nor XDP and TC.
    let params = unsafe { &mut *lookup };
    // All that is read, whatever the lookup before left there.
    params.family = AF_INET;
    params.l4_protocol = 0;
    (params.sport, params.dport) = (0, 0);
    // Of one octet: with none, TC programs are told that their packet is too long for the device (`bpf_skb_fib_lookup`).
    params.__bindgen_anon_1.tot_len = 1;
    params.ifindex = overlay;
    params.__bindgen_anon_2.tos = 0;
    params.__bindgen_anon_3.ipv4_src = destination.to_be();
    params.__bindgen_anon_4.ipv4_dst = source.to_be();
    // SAFETY: context and parameters are valid for the call, with the size given.
    let result = unsafe { look_up(context, params, size_of::<bpf_fib_lookup>() as i32, 0) };
    if result == -ENODEV {
        return Way::NoDevice;
    }
    // Every other result, `BPF_FIB_LKUP_RET_NO_NEIGH` among them, is no way. The kernel puts the device's number in the place
    // of the one that was asked with, and the next hop in that of the destination (`bpf_ipv4_fib_lookup`). Older kernels also
    // take a neighbour that is not resolved, without a MAC.
    let is_of_overlay = params.ifindex == overlay && params.family == AF_INET && params.dmac != [0; 6];
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) || !is_of_overlay {
        return Way::Other;
    }
    // SAFETY: the member that was written; any octets are valid.
    let next_hop = unsafe { params.__bindgen_anon_4.ipv4_dst };
    Way::Overlay { next_hop: u32::from_be(next_hop), next_hop_mac: params.dmac, device_mac: params.smac }
}
