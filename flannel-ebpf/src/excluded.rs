//! Flows that take the stack because of whom they are of: a rule of the host's has to see each of their packets.

use aya_ebpf::maps::lpm_trie::Key;
use flannel_common::{flow::FlowKey, maps::excluded_port};
use network_types::ip::IpProto;

use crate::maps::{EXCLUDED, EXCLUDED_PORTS};

/// Whether a flow is excluded under the name before the stack, or the one after it. Not inlined: it is out of the way of what
/// bypasses the stack, and the verifier need go through it but once.
#[inline(never)]
pub(crate) fn is_excluded(before: &FlowKey, after: &FlowKey) -> bool {
    is_of_excluded(before) || after != before && is_of_excluded(after)
}

#[inline(always)]
fn is_of_excluded(key: &FlowKey) -> bool {
    let is_udp = key.protocol == IpProto::Udp as u32;
    has_address(key.local)
        || has_address(key.remote)
        || has_port(is_udp, key.local_port)
        || has_port(is_udp, key.remote_port)
}

#[inline(always)]
fn has_address(address: [u8; 4]) -> bool {
    EXCLUDED.get(Key::new(32, address)).is_some()
}

#[inline(always)]
fn has_port(is_udp: bool, port: [u8; 2]) -> bool {
    let (word, bit) = excluded_port(is_udp, u16::from_be_bytes(port));
    EXCLUDED_PORTS.get(word).is_some_and(|bits| bits & bit != 0)
}
