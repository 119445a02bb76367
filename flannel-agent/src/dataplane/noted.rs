//! Runs of TC programs on single packets (BPF_PROG_TEST_RUN), which may carry a note, as between two programs on a packet's way
//! through the stack. The kernel lets a run neither set nor read `tc_index`; a program in front of the one that is run does both.

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{MapData, MapError, ProgramArray},
    programs::{ProgramError, ProgramFd, SchedClassifier, TestRun as _, TestRunOptions},
};
use flannel_common::noted;

use super::{DataplaneError, take_map};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/noted"));
const PROGRAM: &str = "noted";
const PROGRAMS: &str = "PROGRAMS";

/// `struct __sk_buff` (include/uapi/linux/bpf.h): its size, and where in it there is what is set here.
const SKB_LEN: usize = 192;
const MARK: usize = 8;
const PRIORITY: usize = 32;
const IFINDEX: usize = 40;
const CB: usize = 48;
const GSO_SIZE: usize = 176;

/// A program may make a packet larger by as much.
pub(super) const ROOM: usize = 256;

/// What a TC program is run on.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// From the Ethernet header on.
    pub frame: &'a [u8],
    /// The device that it is at.
    pub ifindex: u32,
    /// Bytes in each segment; 0 where it is not to be segmented.
    pub gso_size: u32,
    /// `tc_index`.
    pub note: u16,
    /// `mark`.
    pub mark: u32,
    /// `priority`.
    pub priority: u32,
}

/// What a TC program leaves beside the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct After {
    /// `tc_index`, where it was asked for.
    pub note: u16,
    /// Whom the packet is for (`pkt_type`), likewise.
    pub packet_type: u8,
    /// `mark`.
    pub mark: u32,
    /// `priority`.
    pub priority: u32,
}

/// The program in front of those that are run.
pub(super) struct Noted {
    ebpf: Ebpf,
    /// Which these are; they stay in it as long as it lives.
    _programs: ProgramArray<MapData>,
    /// Whether packets have the hash of their flow, as on their way through the stack.
    has_hash: bool,
}

impl Noted {
    /// In front of these programs, which are known by their places.
    ///
    /// # Errors
    /// [`DataplaneError`].
    pub(super) fn load<'a>(
        programs: impl IntoIterator<Item = &'a ProgramFd>,
        has_hash: bool,
    ) -> Result<Self, DataplaneError> {
        let mut ebpf = EbpfLoader::new().load(OBJECT)?;
        let mut places: ProgramArray<MapData> =
            take_map(&mut ebpf, PROGRAMS)?.try_into().map_err(DataplaneError::map("open", PROGRAMS))?;
        program(&mut ebpf)?.load().map_err(failed("load"))?;
        for (place, fd) in (0..).zip(programs) {
            let fd = fd.try_clone().map_err(|source| DataplaneError::Map {
                call: "write",
                map: PROGRAMS,
                source: MapError::IoError(source),
            })?;
            places.set(place, &fd, 0).map_err(DataplaneError::map("write", PROGRAMS))?;
        }
        Ok(Self { ebpf, _programs: places, has_hash })
    }

    /// Runs the program of a place; its verdict, and what it leaves. The frame goes to `out`.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub(super) fn verdict(
        &mut self,
        place: u32,
        packet: Packet<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(i32, After), DataplaneError> {
        let mut context = self.context(place, packet);
        let verdict = self.run(packet, 1, &mut context, out)?;
        Ok((verdict as i32, After::of(&context)))
    }

    /// Runs the program of a place; all that the packet has afterwards. The frame goes to `out`.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub(super) fn note(&mut self, place: u32, packet: Packet<'_>, out: &mut Vec<u8>) -> Result<After, DataplaneError> {
        let mut context = self.context(place, packet);
        self.run(packet, 2, &mut context, out)?;
        Ok(After::of(&context))
    }

    fn run(
        &mut self,
        packet: Packet<'_>,
        repeat: u32,
        context: &mut [u8; SKB_LEN],
        out: &mut Vec<u8>,
    ) -> Result<u32, DataplaneError> {
        out.resize(packet.frame.len() + ROOM, 0);
        let before = *context;
        let options = TestRunOptions {
            data_in: Some(packet.frame),
            data_out: Some(out),
            ctx_in: Some(&before),
            ctx_out: Some(context),
            repeat,
            ..TestRunOptions::new()
        };
        let result = program(&mut self.ebpf)?.test_run(options).map_err(failed("run"))?;
        out.truncate(result.data_size_out as usize);
        Ok(result.return_value)
    }

    fn context(&self, place: u32, packet: Packet<'_>) -> [u8; SKB_LEN] {
        let mut context = [0; SKB_LEN];
        for (at, value) in [
            (IFINDEX, packet.ifindex),
            (GSO_SIZE, packet.gso_size),
            (MARK, packet.mark),
            (PRIORITY, packet.priority),
            (CB + 4 * noted::PROGRAM, place),
            (CB + 4 * noted::NOTE, u32::from(packet.note)),
            (CB + 4 * noted::HAS_HASH, u32::from(self.has_hash)),
        ] {
            context[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        context
    }
}

impl After {
    fn of(context: &[u8; SKB_LEN]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([context[at], context[at + 1], context[at + 2], context[at + 3]]);
        Self {
            note: word(CB + 4 * noted::NOTE) as u16,
            packet_type: word(CB + 4 * noted::PACKET_TYPE) as u8,
            mark: word(MARK),
            priority: word(PRIORITY),
        }
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, DataplaneError> {
    let program = ebpf.program_mut(PROGRAM).ok_or(DataplaneError::Missing(PROGRAM))?;
    program.try_into().map_err(failed("use"))
}

fn failed(call: &'static str) -> impl FnOnce(ProgramError) -> DataplaneError {
    move |source| DataplaneError::Program { call, program: PROGRAM, source }
}
