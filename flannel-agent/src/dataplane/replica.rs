//! Replicas of attached programs: what a program would do with a packet, found out without doing it.
//!
//! A run of the attached program itself would count, take samples, note flows and forget them, call a silent peer heard, and, where
//! somebody captures on `flannel.<VNI>`, send the copy that is shown there. So what is run is a replica: the same instructions
//! (the kernel's tag, a digest of them, says so) with the same constants, on the same maps where programs only read them, and on maps
//! of its own where they write: `FLOWS`, `ORIGINALS`, `PODS`, `HEARD`, `TRAFFIC`, `COUNTERS` and
//! `DROPS`. Into these goes what the pinned ones have of the packet, right before each run; whatever is counted there is the packet's
//! event.
//!
//! Of the helpers that the programs call only `bpf_clone_redirect` sends anything by itself: redirects are carried out by the
//! hook, and a run has none. It is called for who captures ([`Config::SHOWN`]), so a replica does without that constant.

use std::ptr;

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap as BpfHashMap, MapData, MapError, MapInfo, PerCpuArray},
    programs::{
        ProgramError, ProgramInfo, TestRun as _, TestRunOptions,
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};
use flannel_common::{
    event::Event,
    flow::{Flow, FlowKey, Original},
    maps::{
        ACCEPTED, CONFIG, COUNTERS, Config, Counter, EXCLUDED, EXCLUDED_PORTS, FLOWS, GONE, HEARD, Heard, ORIGINALS,
        PODS, PREFIXES, SUBNETS, VTEP_ADDRESSES, VTEPS,
    },
    packet::Mac,
};
use object::{Object as _, ObjectSymbol as _};

use super::{
    DataplaneError, Hook, OBJECT, PinDirectory, XdpMode,
    attached::filter_of,
    batch, loaded,
    noted::{After, Noted, Packet, ROOM},
    pins, read_counters,
    tables::Tables,
    take_map, xdp,
};
use crate::device::{DeviceError, Netlink};

/// The maps that programs only read; a replica has the pinned ones.
const SHARED: [&str; 8] = [SUBNETS, PREFIXES, VTEPS, VTEP_ADDRESSES, ACCEPTED, GONE, EXCLUDED, EXCLUDED_PORTS];
/// Entries of a replica's `FLOWS`: those of one packet, and what the kernel keeps back for each CPU of an LRU map.
const FLOWS_OF_ONE: u32 = 1 << 12;
/// The section that holds the constants, and so the name of their map.
const CONSTANTS: &str = ".rodata";

/// There is no program to be replicated, or it can't be.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// Nothing is attached there.
    #[error(
        "{program} is not attached to {interface}: a running agent attaches it; `flannel-agent status` says what is missing"
    )]
    NotAttached {
        /// Which.
        program: &'static str,
        /// Where it should be.
        interface: String,
    },
    /// The kernel was not asked what is attached.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The kernel does not tell of the program.
    #[error("look at the program {program} of {interface}: {source}")]
    Program {
        /// Which.
        program: &'static str,
        /// Where it is.
        interface: String,
        /// Why not.
        source: ProgramError,
    },
    /// The kernel does not tell of the program's maps.
    #[error("look at the constants of {program} of {interface}: {source}")]
    Constants {
        /// Which.
        program: &'static str,
        /// Where it is.
        interface: String,
        /// Why not.
        source: MapError,
    },
    /// It was compiled from other sources, or is none of ours.
    #[error(
        "{program} of {interface} is another build's (its tag is {attached:016x}, this command's {own:016x}): run the \
         flannel-agent that attached it"
    )]
    OtherBuild {
        /// Which.
        program: &'static str,
        /// Where it is.
        interface: String,
        /// Its tag.
        attached: u64,
        /// The tag of what this command would run.
        own: u64,
    },
    /// It does not use the pinned maps.
    #[error(
        "{program} of {interface} uses other maps than those that are pinned: it is of another build, or was left behind"
    )]
    OtherMaps {
        /// Which.
        program: &'static str,
        /// Where it is.
        interface: String,
    },
    /// A program or map of the replica's.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// More than one event was counted, or none by a program that counts each packet.
    #[error("{program} counted {counted:?} for one packet")]
    Uncounted {
        /// Which.
        program: &'static str,
        /// What.
        counted: Vec<Event>,
    },
}

/// A program where it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// At a TC hook.
    Tc(Hook),
    /// In the driver, or before the stack.
    Xdp(XdpMode),
}

impl Program {
    /// The program's name in the object.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tc(hook) => hook.program(),
            Self::Xdp(mode) => mode.program(),
        }
    }

    /// The pinned link at a device.
    fn pin(self, pins: &PinDirectory, ifindex: u32) -> std::path::PathBuf {
        match self {
            Self::Tc(hook) => pins.link(hook.program(), ifindex),
            Self::Xdp(mode) => pins.link(&xdp::pin_name(mode), ifindex),
        }
    }
}

/// An attached program.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Which.
    pub program: Program,
    /// The name of the interface.
    pub interface: String,
    /// Its number.
    pub ifindex: u32,
    /// The kernel's number of the program.
    pub id: u32,
    /// What it was loaded with.
    pub config: Config,
    tag: u64,
}

impl Attached {
    /// The program that is attached to an interface. By its number, which the kernel tells only who has CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub async fn find(
        pins: &PinDirectory,
        tables: &Tables,
        program: Program,
        interface: &str,
        ifindex: u32,
        netlink: &Netlink,
    ) -> Result<Self, ReplicaError> {
        let name = program.name();
        let refused = |source| ReplicaError::Program { program: name, interface: interface.to_owned(), source };
        let constants = |source| ReplicaError::Constants { program: name, interface: interface.to_owned(), source };
        let link = PinnedLink::from_pin(program.pin(pins, ifindex)).and_then(|link| FdLink::from(link).info());
        let id = match (link, program) {
            (Ok(link), _) => Some(link.program_id()),
            (Err(_), Program::Tc(hook)) => filter_of(pins, hook, ifindex, netlink).await?,
            (Err(_), Program::Xdp(_)) => None,
        };
        let id = id.ok_or_else(|| ReplicaError::NotAttached { program: name, interface: interface.to_owned() })?;
        let info = program_info(id).map_err(refused)?;
        let mut config = None;
        let mut has_pinned = false;
        for map in info.map_ids().map_err(refused)?.unwrap_or_default() {
            has_pinned |= map == tables.counters_id;
            let map = MapInfo::from_id(map).map_err(constants)?;
            if map.name_as_str() == Some(CONSTANTS) {
                let map = MapData::from_id(map.id()).map_err(constants)?;
                let bytes = batch::read_value(&map, 0).map_err(|error| constants(error.into()))?;
                config = constants_in(&bytes);
            }
        }
        match config {
            Some(config) if has_pinned => {
                Ok(Self { program, interface: interface.to_owned(), ifindex, id, config, tag: info.tag() })
            }
            _ => Err(ReplicaError::OtherMaps { program: name, interface: interface.to_owned() }),
        }
    }
}

/// The interfaces that a program's links are pinned for, by their numbers.
///
/// # Errors
/// [`DataplaneError::Pin`].
pub fn pinned_places(pins: &PinDirectory, program: Program) -> Result<Vec<u32>, DataplaneError> {
    let name = match program {
        Program::Tc(hook) => hook.program().to_owned(),
        Program::Xdp(mode) => xdp::pin_name(mode),
    };
    let number = |pin: std::path::PathBuf| pin.file_name()?.to_str()?.rsplit('-').next()?.parse().ok();
    let mut places: Vec<u32> = pins.links(&name)?.into_iter().filter_map(number).collect();
    places.sort_unstable();
    Ok(places)
}

fn program_info(id: u32) -> Result<ProgramInfo, ProgramError> {
    for info in loaded_programs() {
        let info = info?;
        if info.id() == id {
            return Ok(info);
        }
    }
    Err(ProgramError::IOError(std::io::ErrorKind::NotFound.into()))
}

/// Where the constants are in their section, as this build's object has it.
fn constants_in(section: &[u8]) -> Option<Config> {
    let object = object::File::parse(OBJECT).ok()?;
    let symbol = object.symbols().find(|symbol| symbol.name() == Ok(CONFIG))?;
    let bytes = section.get(usize::try_from(symbol.address()).ok()?..)?.get(..size_of::<Config>())?;
    // SAFETY: as many bytes as it has, any of which are a value of it ([`aya::Pod`]).
    Some(unsafe { ptr::read_unaligned(bytes.as_ptr().cast::<Config>()) })
}

/// What the pinned maps may have of a packet.
#[derive(Clone, Debug, Default)]
pub struct Concerned {
    /// Its flow, as the local pod sees it.
    pub flow: Option<FlowKey>,
    /// The VTEPs that have to do with it, by their numbers.
    pub vteps: Vec<u32>,
    /// The host's side of the veth of the pod that it is from or to.
    pub veth: Option<u32>,
    /// What an earlier program on its way left of it, and where.
    pub original: Option<(u32, Original)>,
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// What was counted; [`None`] where XDP leaves a packet as it is.
    pub event: Option<Event>,
    /// The number that the program returned: of `TC_ACT_*` or `enum xdp_action`.
    pub verdict: i32,
    /// The packet, from the Ethernet header on.
    pub frame: Vec<u8>,
    /// `tc_index`, by which programs of this host know it later on.
    pub note: u16,
    /// What the program left for the other side of the stack, and where.
    pub original: Option<(u32, Original)>,
}

/// A program that is like one that is attached, and leaves nothing behind.
pub struct Replica {
    attached: Attached,
    ebpf: Ebpf,
    noted: Option<Noted>,
    counters: PerCpuArray<MapData, Counter>,
    flows: BpfHashMap<MapData, FlowKey, Flow>,
    pods: BpfHashMap<MapData, u32, Mac>,
    heard: Array<MapData, Heard>,
    originals: Array<MapData, Original>,
}

impl Replica {
    /// Loads it.
    ///
    /// # Errors
    /// [`ReplicaError::OtherBuild`], [`ReplicaError::Dataplane`].
    pub fn load(pins: &PinDirectory, tables: &Tables, attached: Attached) -> Result<Self, ReplicaError> {
        let config = Config { flags: attached.config.flags & !Config::SHOWN, ..attached.config };
        let mut loader = EbpfLoader::new();
        loader.btf(None).override_global(CONFIG, &config, true);
        for map in &pins::layout(tables.capacity) {
            loader.map_max_entries(map.name, if map.name == FLOWS { FLOWS_OF_ONE } else { map.max_entries });
            if SHARED.contains(&map.name) {
                loader.map_pin_path(map.name, pins.map(map.name));
            }
        }
        let mut ebpf = loader.load(OBJECT).map_err(DataplaneError::Load)?;
        let failed = |call| {
            let program = attached.program.name();
            move |source| DataplaneError::Program { call, program, source }
        };
        let (own, noted) = match attached.program {
            Program::Tc(hook) => {
                let program = loaded(&mut ebpf, hook)?;
                let fd = program.fd().map_err(failed("use"))?;
                let noted = Noted::load([fd], true)?;
                (program.info().map_err(failed("look at"))?.tag(), Some(noted))
            }
            Program::Xdp(mode) => {
                let program = xdp::loaded(&mut ebpf, mode)?;
                (program.info().map_err(failed("look at"))?.tag(), None)
            }
        };
        if own != attached.tag {
            let (program, interface) = (attached.program.name(), attached.interface);
            return Err(ReplicaError::OtherBuild { program, interface, attached: attached.tag, own });
        }
        let map = DataplaneError::map;
        Ok(Self {
            counters: take_map(&mut ebpf, COUNTERS)?.try_into().map_err(map("open", COUNTERS))?,
            flows: take_map(&mut ebpf, FLOWS)?.try_into().map_err(map("open", FLOWS))?,
            pods: take_map(&mut ebpf, PODS)?.try_into().map_err(map("open", PODS))?,
            heard: take_map(&mut ebpf, HEARD)?.try_into().map_err(map("open", HEARD))?,
            originals: take_map(&mut ebpf, ORIGINALS)?.try_into().map_err(map("open", ORIGINALS))?,
            attached,
            ebpf,
            noted,
        })
    }

    /// Runs it on a packet at the interface of the attached one, which carries a note.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub fn run(
        &mut self,
        tables: &Tables,
        frame: &[u8],
        note: u16,
        concerned: &Concerned,
    ) -> Result<Ran, ReplicaError> {
        let ifindex = self.attached.ifindex;
        let packet = Packet { frame, ifindex, gso_size: 0, note, mark: 0, priority: 0 };
        let mut out = Vec::new();
        self.take_over(tables, concerned)?;
        let before = read_counters(&self.counters)?;
        let verdict = match (&mut self.noted, self.attached.program) {
            (Some(noted), _) => noted.verdict(0, packet, &mut out)?.0,
            (None, Program::Xdp(mode)) => run_xdp(&mut self.ebpf, mode, frame, &mut out)?,
            (None, Program::Tc(hook)) => return Err(DataplaneError::Missing(hook.program()).into()),
        };
        let counted = read_counters(&self.counters)?.into_iter().zip(before);
        let counted =
            counted.flat_map(|((event, after), (_, before))| (before.packets..after.packets).map(move |_| event));
        let counted: Vec<_> = counted.collect();
        let event = match (counted.as_slice(), self.attached.program) {
            ([event], _) => Some(*event),
            ([], Program::Xdp(_)) => None,
            _ => return Err(ReplicaError::Uncounted { program: self.attached.program.name(), counted }),
        };
        // The note is seen by a second program behind it, which has a verdict of its own.
        let note = match &mut self.noted {
            None => 0,
            Some(_) => {
                self.take_over(tables, concerned)?;
                let noted = self.noted.as_mut().ok_or(DataplaneError::Missing("noted"))?;
                let After { note, .. } = noted.note(0, packet, &mut Vec::new())?;
                note
            }
        };
        let original = self.original_of(concerned)?;
        Ok(Ran { event, verdict, frame: out, note, original })
    }

    /// Gives it what the pinned maps have of a packet, and takes away what it noted before.
    fn take_over(&mut self, tables: &Tables, concerned: &Concerned) -> Result<(), DataplaneError> {
        let write = DataplaneError::map;
        if let Some(key) = concerned.flow {
            match tables.flow(&key)? {
                Some(flow) => self.flows.insert(key, flow, 0).map_err(write("write", FLOWS))?,
                None => super::peers::absent_is_fine(self.flows.remove(&key)).map_err(write("write", FLOWS))?,
            }
        }
        for id in &concerned.vteps {
            let heard = tables.heard(*id)?.unwrap_or_default();
            self.heard.set(*id, heard, 0).map_err(write("write", HEARD))?;
        }
        if let Some(veth) = concerned.veth
            && let Some(mac) = tables.pod(veth)?
        {
            self.pods.insert(veth, mac, 0).map_err(write("write", PODS))?;
        }
        if let Some((index, original)) = concerned.original {
            self.originals.set(index, original, 0).map_err(write("write", ORIGINALS))?;
        }
        Ok(())
    }

    fn original_of(&self, concerned: &Concerned) -> Result<Option<(u32, Original)>, DataplaneError> {
        let Some(key) = concerned.flow else { return Ok(None) };
        let tag = key.tag(self.attached.config.vni);
        for index in [Original::index(tag, true), Original::index(tag, false)] {
            let original = self.originals.get(&index, 0).map_err(DataplaneError::map("read", ORIGINALS))?;
            if original != Original::default() {
                return Ok(Some((index, original)));
            }
        }
        Ok(None)
    }
}

fn run_xdp(ebpf: &mut Ebpf, mode: XdpMode, frame: &[u8], out: &mut Vec<u8>) -> Result<i32, DataplaneError> {
    out.resize(frame.len() + ROOM, 0);
    let options = TestRunOptions { data_in: Some(frame), data_out: Some(out), ..TestRunOptions::new() };
    let result = xdp::loaded(ebpf, mode)?.test_run(options);
    let result = result.map_err(|source| DataplaneError::Program { call: "run", program: mode.program(), source })?;
    out.truncate(result.data_size_out as usize);
    Ok(result.return_value as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constants_are_found_where_the_object_has_them() {
        let object = object::File::parse(OBJECT).unwrap();
        let symbol = object.symbols().find(|symbol| symbol.name() == Ok(CONFIG)).unwrap();
        let at = symbol.address() as usize;
        let mut section = vec![0; at + size_of::<Config>()];
        section[at..at + 8].copy_from_slice(&7u64.to_ne_bytes());
        assert_eq!(constants_in(&section).unwrap().bypass_time, 7);
        assert_eq!(constants_in(&section[..at + 63]), None);
        assert_eq!(symbol.size() as usize, size_of::<Config>());
    }
}
