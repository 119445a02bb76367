//! The maps and constants. Sizes are set by the agent at load; see [`flannel_common::maps`] for what they hold.

use aya_ebpf::{
    Global,
    bindings::bpf_redir_neigh,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray},
};
use flannel_common::{
    drops::Drops,
    event::Event,
    flow::{Flow, FlowKey, Original, SourcePorts},
    maps::{
        Config, Counter, EXCLUDED_WORDS, GONE_SLOTS, Heard, MAX_ACCEPTED, MAX_EXCLUDED, MAX_FLOWS, MAX_PODS,
        MAX_PREFIXES, Traffic, Vtep,
    },
    packet::Mac,
};

use crate::routes::Lookup;

#[map]
pub(crate) static SUBNETS: Array<u32> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static PREFIXES: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(MAX_PREFIXES, 0);

#[map]
pub(crate) static VTEPS: Array<Vtep> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static VTEP_ADDRESSES: HashMap<[u8; 4], u32> = HashMap::with_max_entries(1, 0);

#[map]
pub(crate) static ACCEPTED: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(MAX_ACCEPTED, 0);

#[map]
pub(crate) static HEARD: Array<Heard> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub(crate) static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(MAX_FLOWS, 0);

#[map]
pub(crate) static ORIGINALS: Array<Original> = Array::with_max_entries(Original::COUNT, 0);

#[map]
pub(crate) static PODS: LruHashMap<u32, Mac> = LruHashMap::with_max_entries(MAX_PODS, 0);

#[map]
pub(crate) static GONE: Array<u32> = Array::with_max_entries(GONE_SLOTS, 0);

#[map]
pub(crate) static EXCLUDED: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(MAX_EXCLUDED, 0);

#[map]
pub(crate) static EXCLUDED_PORTS: Array<u64> = Array::with_max_entries(EXCLUDED_WORDS, 0);

#[map]
pub(crate) static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(Event::COUNT, 0);

#[map]
pub(crate) static DROPS: PerCpuArray<Drops> = PerCpuArray::with_max_entries(Event::COUNT, 0);

/// What the kernel is asked for a route with, on each CPU. Not pinned: it holds nothing between two packets.
#[map]
pub(crate) static LOOKUP: PerCpuArray<Lookup> = PerCpuArray::with_max_entries(1, 0);

/// What it answered about a tunnel packet that is to be sent, likewise.
#[map]
pub(crate) static CHOSEN: PerCpuArray<bpf_redir_neigh> = PerCpuArray::with_max_entries(1, 0);

/// Where what is to be known of a flow is put together, on each CPU: it would take a fifth of a program's stack. Not pinned.
#[map]
pub(crate) static NOTED: PerCpuArray<Flow> = PerCpuArray::with_max_entries(1, 0);

/// Patched at load; constant to the verifier.
#[unsafe(no_mangle)]
pub(crate) static CONFIG: Global<Config> = Global::new(UNSET);

/// As the constants are before.
pub(crate) const UNSET: Config = Config {
    bypass_time: 0,
    network: 0,
    slot_shift: 0,
    slots: 0,
    subnet: 0,
    subnet_mask: 0,
    vtep_address: 0,
    vni: 0,
    mtu: 0,
    underlay_header_len: 0,
    underlay_mac: [0; 6],
    port: 0,
    vtep_mac: [0; 6],
    source_ports: SourcePorts { min: 0, max: 0 },
    flags: 0,
};
