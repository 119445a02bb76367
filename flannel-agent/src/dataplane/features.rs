//! What the kernel has of what the dataplane calls for: tried, not concluded from its version, since distributions add to
//! old kernels and take away from new ones.

use std::fmt;

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    programs::{ProgramError, ProgramType, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions, Xdp},
    sys::{BpfHelper, is_helper_supported},
};
use flannel_common::vxlan;
use serde::{Deserialize, Serialize};

use super::{DataplaneError, attach::lacks_tcx};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/probe"));

/// The flags of `bpf_skb_adjust_room` (include/uapi/linux/bpf.h) that the programs make room for an outer header with:
/// `FIXED_GSO`, `ENCAP_L3_IPV4`, `ENCAP_L4_UDP`, `NO_CSUM_RESET`, `ENCAP_L2_ETH`, and the inner Ethernet header's length.
const ENCAPSULATE: u64 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 14 << 56;
/// `FIXED_GSO`, `NO_CSUM_RESET`, `DECAP_L4_UDP`.
const DECAPSULATE: u64 = 1 << 0 | 1 << 5 | 1 << 10;

/// What the kernel has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Features {
    /// Room for an outer header with an Ethernet header behind it, in packets that are still to be segmented
    /// (`BPF_F_ADJ_ROOM_ENCAP_L2_ETH`, since 5.13). The dataplane can't do without.
    pub encap_ethernet: bool,
    /// `bpf_redirect_neigh` (5.10), for peers whose next hop is not resolved. It can't do without either.
    pub redirect_neighbour: bool,
    /// `bpf_redirect_peer` (5.10), into the pod. It can't do without either.
    pub redirect_peer: bool,
    /// TCX links (6.6). Where there are none, programs are filters of the clsact qdisc.
    pub tcx: bool,
    /// XDP programs on frames of several buffers (5.18). Where they can't be, there is no native XDP.
    pub xdp_frags: bool,
    /// `bpf_skb_adjust_room` that clears what marks an aggregated packet as tunnelled (`BPF_F_ADJ_ROOM_DECAP_L4_UDP`). Where
    /// it does not, pods that route such packets on send them with that mark.
    pub decap_udp: bool,
    /// `bpf_fib_lookup` by a packet's mark (`BPF_FIB_LOOKUP_MARK`, 6.10). Without it, routing rules by mark are not followed.
    pub fib_lookup_mark: bool,
}

impl Features {
    /// Asks the kernel. Nothing is attached, and no packet is sent.
    ///
    /// # Errors
    /// [`DataplaneError`] where it does not let itself be asked.
    pub fn probe() -> Result<Self, DataplaneError> {
        let mut ebpf = EbpfLoader::new().load(OBJECT)?;
        let has = |helper| {
            let answer = is_helper_supported(ProgramType::SchedClassifier, helper);
            answer.map_err(|source| DataplaneError::Program { call: "load", program: "a probe", source })
        };
        let (redirect_neighbour, redirect_peer) =
            (has(BpfHelper::BPF_FUNC_redirect_neigh)?, has(BpfHelper::BPF_FUNC_redirect_peer)?);
        let name = "probe_frags";
        let program = ebpf.program_mut(name).ok_or(DataplaneError::Missing(name))?;
        let frags: &mut Xdp = program.try_into().map_err(failed("use", name))?;
        let xdp_frags = frags.load().is_ok();

        let name = "probe_room";
        let program = ebpf.program_mut(name).ok_or(DataplaneError::Missing(name))?;
        let room: &mut SchedClassifier = program.try_into().map_err(failed("use", name))?;
        room.load().map_err(failed("load", name))?;
        let overhead = i32::from(vxlan::OVERHEAD as i16);
        let mut takes = |len, flags| takes(room, len, flags).map_err(failed("run", name));
        Ok(Self {
            encap_ethernet: takes(overhead, ENCAPSULATE)?,
            redirect_neighbour,
            redirect_peer,
            tcx: has_tcx("lo"),
            xdp_frags,
            decap_udp: takes(-overhead, DECAPSULATE)?,
            fib_lookup_mark: knows_mark(&mut ebpf)?,
        })
    }

    /// Each with its name.
    pub const fn named(&self) -> [(&'static str, bool); 7] {
        [
            ("encap_ethernet", self.encap_ethernet),
            ("redirect_neighbour", self.redirect_neighbour),
            ("redirect_peer", self.redirect_peer),
            ("tcx", self.tcx),
            ("xdp_frags", self.xdp_frags),
            ("decap_udp", self.decap_udp),
            ("fib_lookup_mark", self.fib_lookup_mark),
        ]
    }

    /// The first that the dataplane can't do without, and that is not there.
    pub fn lacking(&self) -> Option<&'static str> {
        // In this order in `named`.
        const NEEDED: usize = 3;
        self.named()[..NEEDED].iter().find(|(_, there)| !there).map(|(name, _)| *name)
    }
}

/// `has a, b; lacks c`.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let those = |wanted: bool| {
            let names: Vec<_> =
                self.named().into_iter().filter(|(_, there)| *there == wanted).map(|(name, _)| name).collect();
            if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
        };
        write!(f, "has {}; lacks {}", those(true), those(false))
    }
}

/// Whether the kernel knows TCX links at this interface's hooks.
pub(super) fn has_tcx(interface: &str) -> bool {
    match SchedClassifier::query_tcx(interface, TcAttachType::Ingress) {
        Ok(_) => true,
        Err(error) => !lacks_tcx(&error),
    }
}

/// Whether `bpf_skb_adjust_room` takes these flags, on an IPv4 packet that is long enough for all of it.
fn takes(program: &mut SchedClassifier, len: i32, flags: u64) -> Result<bool, ProgramError> {
    let mut frame = [0; 192];
    // EtherType, version and header length, total length, protocol: UDP.
    frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    frame[16..18].copy_from_slice(&178_u16.to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 17]);
    // Fields of `struct __sk_buff`.
    const SIZE: usize = 192;
    const PRIORITY: usize = 32;
    const CB: usize = 48;
    let mut context = [0; SIZE];
    context[PRIORITY..PRIORITY + 4].copy_from_slice(&len.to_ne_bytes());
    context[CB..CB + 4].copy_from_slice(&(flags as u32).to_ne_bytes());
    context[CB + 4..CB + 8].copy_from_slice(&((flags >> 32) as u32).to_ne_bytes());
    let options = TestRunOptions { data_in: Some(&frame), ctx_in: Some(&context), ..TestRunOptions::new() };
    Ok(program.test_run(options)?.return_value == 0)
}

/// Whether `bpf_fib_lookup` takes a mark: else it refuses the flag, whatever the packet.
fn knows_mark(ebpf: &mut Ebpf) -> Result<bool, DataplaneError> {
    let name = "probe_mark";
    let program = ebpf.program_mut(name).ok_or(DataplaneError::Missing(name))?;
    let program: &mut SchedClassifier = program.try_into().map_err(failed("use", name))?;
    program.load().map_err(failed("load", name))?;
    let options = TestRunOptions { data_in: Some(&[0; 64]), ..TestRunOptions::new() };
    let answer = program.test_run(options).map_err(failed("run", name))?.return_value;
    Ok(answer as i32 != -nix::libc::EINVAL)
}

fn failed(call: &'static str, program: &'static str) -> impl FnOnce(ProgramError) -> DataplaneError {
    move |source| DataplaneError::Program { call, program, source }
}
