//! The kernel's routes, asked where they know more than the maps: about packets that the leases refuse, since another may serve
//! this host by now; and by which of several next hops a tunnel packet leaves.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, bpf_redir_neigh},
    helpers::generated::bpf_fib_lookup as look_up,
};
use flannel_common::{
    admission::{self, Refused, Way},
    maps::Config,
};

use crate::{
    leases::{overlay_device, owner_of},
    maps::{CHOSEN, CONFIG, LOOKUP},
};

/// `AF_INET`.
const AF_INET: u8 = 2;
/// `IPPROTO_UDP`.
const UDP: u8 = 17;
/// The number of `lo` in every namespace (`LOOPBACK_IFINDEX`): what a host sends itself comes in by it.
const LOOPBACK: u32 = 1;
/// `BPF_FIB_LOOKUP_MARK`, since Linux 6.10: the mark is in the place of the answer's MACs.
const WITH_MARK: u32 = 1 << 5;
/// `EINVAL`: the kernel does not know a flag.
const EINVAL: i64 = 22;
/// `ENODEV`: no device has the number that was asked with.
const ENODEV: i64 = 19;

/// What the kernel is asked for a route with, and the packet that it is asked about where the leases refuse that.
#[repr(C)]
pub(crate) struct Lookup {
    params: bpf_fib_lookup,
    refused: Refused,
}

/// As [`admission::is_routed`]; `frame` has in its octets, as in memory, the inner frame's destination, whether that is ours,
/// and whether the inner destination is. Not inlined: it is out of the way of what passes. Beside the stack of `from_underlay`
/// it may have 32 octets of its own (of 512; before Linux 6.8 each function's stack counts in steps of 32): constants are read
/// where they are needed, and what is known of the packet waits beside what the kernel is asked.
#[inline(never)]
pub(crate) fn is_routed(context: *mut c_void, outer_source: u32, source: u32, destination: u32, frame: u64) -> bool {
    let [a, b, c, d, e, f, is_to_vtep, is_to_pod] = frame.to_ne_bytes();
    let mac = [a, b, c, d, e, f];
    let refused = Refused { outer_source, source, mac, is_to_vtep: is_to_vtep != 0, is_to_pod: is_to_pod != 0 };
    let Some(lookup) = LOOKUP.get_ptr_mut(0) else { return false };
    // SAFETY: the map's value for this CPU. Programs on a CPU do not preempt each other at the same hook, nor XDP and TC.
    let lookup = unsafe { &mut *lookup };
    lookup.refused = refused;
    let way = way_back(context, &mut lookup.params, source, destination);
    admission::is_routed(owner_of, &lookup.refused, &way)
}

/// The way back to the source of a packet that comes out of `flannel.<VNI>`, as for the kernel's own source validation
/// (`__fib_validate_source`).
#[inline(always)]
fn way_back(context: *mut c_void, params: &mut bpf_fib_lookup, source: u32, destination: u32) -> Way {
    let overlay = overlay_device();
    // No agent has noted it yet.
    if overlay == 0 {
        return Way::Other;
    }
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

/// Has the kernel choose the way of a tunnel packet as for its own vxlan device (`udp_tunnel_dst_lookup`): by rules, and among
/// several next hops by the flow's hash, the weights and who is alive (`fib_select_path`). `destination` is the peer's VTEP
/// address, host order, `source_port` the outer one. The device's number; 0 where there is no way. The next hop is in [`CHOSEN`].
/// Before Linux 6.10 the mark counts for nothing.
///
/// Not inlined: it is out of the way of what needs no choice. Beside the stack of `from_pod` it may have 32 octets.
#[inline(never)]
pub(crate) fn choose(context: *mut c_void, destination: u32, source_port: u16, mark: u32) -> u32 {
    let Some(lookup) = LOOKUP.get_ptr_mut(0) else { return 0 };
    // SAFETY: the map's value for this CPU, as in `is_routed`.
    let params = unsafe { &mut (*lookup).params };
    let config = (&raw const CONFIG).cast::<Config>();
    // SAFETY: the constants are a `Config`. Volatile, as in `Global::load`: they are patched at load.
    let (source, port) =
        unsafe { ((&raw const (*config).vtep_address).read_volatile(), (&raw const (*config).port).read_volatile()) };
    params.family = AF_INET;
    params.l4_protocol = UDP;
    (params.sport, params.dport) = (source_port.to_be(), port.to_be());
    params.__bindgen_anon_1.tot_len = 1;
    params.ifindex = LOOPBACK;
    params.__bindgen_anon_2.tos = 0;
    params.__bindgen_anon_3.ipv4_src = source.to_be();
    params.__bindgen_anon_4.ipv4_dst = destination.to_be();
    let [a, b, c, d] = mark.to_ne_bytes();
    (params.smac, params.dmac) = ([a, b, c, d, 0, 0], [0; 6]);
    let params = &raw mut *params;
    // SAFETY: context and parameters are valid for the call, with the size given.
    let mut result = unsafe { look_up(context, params, size_of::<bpf_fib_lookup>() as i32, WITH_MARK) };
    if result == -EINVAL {
        // Nothing was written. SAFETY: as above.
        result = unsafe { look_up(context, params, size_of::<bpf_fib_lookup>() as i32, 0) };
    }
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) && result != i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
        return 0;
    }
    let Some(chosen) = CHOSEN.get_ptr_mut(0) else { return 0 };
    // SAFETY: the maps' values for this CPU. Any octets of the union are valid; of an IPv4 address the first word is all that
    // is read.
    let device = unsafe {
        (*chosen).nh_family = (*params).family.into();
        // One by one: the compiler's `memcpy` subtracts pointers, which the kernel refuses to some agents.
        let [a, b, c, d] = (*params).__bindgen_anon_4.ipv6_dst;
        let next_hop = (&raw mut (*chosen).__bindgen_anon_1.ipv6_nh).cast::<u32>();
        next_hop.write_volatile(a);
        next_hop.add(1).write_volatile(b);
        next_hop.add(2).write_volatile(c);
        next_hop.add(3).write_volatile(d);
        (*params).ifindex
    };
    if device == overlay_device() { 0 } else { device }
}

/// What [`choose`] left.
#[inline(always)]
pub(crate) fn chosen() -> Option<*mut bpf_redir_neigh> {
    CHOSEN.get_ptr_mut(0)
}
