//! The programs and maps in the kernel: the only room that speaks to aya.
//!
//! Everything that must outlive the agent is pinned under `<bpf-pin-dir>/<VNI>/`: TCX links as `<program>-<ifindex>`, and
//! maps under their names in a folder `v<ABI>` for their layout. A new agent adopts maps of equal layout with all their peers, and swaps the program
//! of each link in one step, so that no packet meets a hook without a program.

mod accepted;
mod attach;
mod attached;
mod batch;
mod detach;
mod drops;
mod excluded;
mod features;
mod flows;
mod forget;
#[cfg(feature = "generator")]
pub mod generator;
mod held;
#[cfg_attr(not(feature = "generator"), expect(unreachable_pub, reason = "exported for tests"))]
mod noted;
mod objects;
mod others;
mod peers;
mod pins;
mod pods;
pub mod replica;
mod restrict;
mod runs;
pub mod tables;
#[cfg(feature = "generator")]
pub mod test_run;
mod underlay;
mod ways;
mod xdp;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    path::PathBuf,
};

pub use accepted::pinned_accepted;
pub use attached::{Attachment, AttachmentState, attached_xdp, attachments};
/// Runs a program on a packet of one's own.
pub use aya::programs::{TestRun, TestRunOptions};
use aya::{
    Ebpf, EbpfError, EbpfLoader, include_bytes_aligned,
    maps::{HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray},
    programs::{ProgramError, SchedClassifier},
};
pub use detach::{overlay_devices, remove};
pub use drops::{Dropped, pinned_drops};
pub use features::Features;
use flannel_common::{
    event::Event,
    flow::{Flow, FlowKey},
    maps::{ACCEPTED, CONFIG, COUNTERS, Config, Counter, FLOWS, MAX_SLOTS, PODS},
    packet::Mac,
    vxlan::Vni,
};
pub use flows::{Directions, Flows, pinned_connections, pinned_flows};
pub use forget::{Forgetter, Left};
pub use held::Repaired;
use ipnet::Ipv4Net;
pub use objects::{BpfObject, BpfObjects, pinned_objects};
pub use others::has_programs;
pub use peers::{DesiredPeers, PeerMaps, PinnedSubnets, Unheard};
pub use pins::{PinDirectory, pinned_vnis, require_bpffs};
pub use runs::ProgramRuns;
pub use ways::{PeerWatch, PeerWay, PinnedPeers, Way};
pub use xdp::XdpMode;

use self::{held::Place, restrict::Variant};
use crate::{bypass::Plan, privileges::permission_hint};

/// The programs, as compiled from `flannel-ebpf` by the build script.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/flannel"));

/// The kernel refused something about programs or maps.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The pin directory is not on a BPF file system.
    #[error(
        "{path} is not on a bpf file system; mount one with `mount -t bpf bpf {mount}`, or name one with --bpf-pin-dir"
    )]
    NotBpffs {
        /// The pin directory.
        path: PathBuf,
        /// Where a BPF file system could be mounted.
        mount: PathBuf,
    },
    /// A file operation on the BPF file system failed.
    #[error("{call} {path}: {source}{}", permission_hint(.source))]
    Pin {
        /// What was tried.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The object could not be loaded.
    #[error("load the eBPF programs: {}", chain(.0))]
    Load(#[from] EbpfError),
    /// A program was refused, usually by the verifier.
    #[error("{call} the program {program}: {}", chain(.source))]
    Program {
        /// What was tried.
        call: &'static str,
        /// Which.
        program: &'static str,
        /// Why not.
        source: ProgramError,
    },
    /// A map could not be read or written.
    #[error("{call} the map {map}: {}", chain(.source))]
    Map {
        /// What was tried.
        call: &'static str,
        /// Which.
        map: &'static str,
        /// Why not.
        source: MapError,
    },
    /// The maps of an overlay are those of another version of the agent.
    #[error(
        "the maps of overlay {vni} have layout {found}, and this flannel-agent reads layout {own}: use the flannel-agent that runs \
         there, or restart it with this one"
    )]
    OtherLayout {
        /// Which overlay's.
        vni: Vni,
        /// The layout that they have.
        found: u32,
        /// The layout that is read.
        own: u32,
    },
    /// The object lacks a map or program.
    #[error("the eBPF object has no {0}")]
    Missing(&'static str),
    /// The clock that `HEARD` is in can't be read.
    #[error("read CLOCK_MONOTONIC: {0}")]
    Clock(nix::errno::Errno),
    /// More VTEPs than the map has entries.
    #[error("the map VTEPS is full: {used} of its {capacity} entries are used, and the rest were until a moment ago")]
    Full {
        /// How many are used.
        used: usize,
        /// How many fit.
        capacity: u32,
    },
}

impl DataplaneError {
    fn map(call: &'static str, map: &'static str) -> impl FnOnce(MapError) -> Self {
        move |source| Self::Map { call, map, source }
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The hooks that a program is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `to_overlay`, egress of `flannel.<VNI>`.
    ToOverlay,
    /// `from_overlay`, ingress of `flannel.<VNI>`.
    FromOverlay,
    /// `from_underlay`, ingress of each link that tunnel packets can come in by.
    FromUnderlay,
    /// `from_pod`, ingress of the host's side of each pod's veth.
    FromPod,
    /// `to_pod`, egress of the same.
    ToPod,
    /// `to_underlay`, egress of the external interface, where there is no tunnel.
    ToUnderlay,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::ToOverlay, Self::FromOverlay, Self::FromUnderlay, Self::FromPod, Self::ToPod, Self::ToUnderlay];
    /// Those of which there is one for each pod.
    pub const OF_PODS: [Self; 2] = [Self::FromPod, Self::ToPod];

    /// Whether it is at one link only; others are at as many as there are of their kind.
    const fn has_one_place(self) -> bool {
        match self {
            Self::ToOverlay | Self::FromOverlay | Self::ToUnderlay => true,
            Self::FromUnderlay | Self::FromPod | Self::ToPod => false,
        }
    }

    /// The program's name in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Self::ToOverlay => "to_overlay",
            Self::FromOverlay => "from_overlay",
            Self::FromUnderlay => "from_underlay",
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::ToUnderlay => "to_underlay",
        }
    }
}

/// Sizes of the maps, which depend on the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Slots of `SUBNETS`.
    pub slots: u32,
    /// Entries of `VTEPS` and `VTEP_ADDRESSES`.
    pub vteps: u32,
}

impl Capacity {
    /// What a network needs whose subnets have a length: a slot for each, and twice as many VTEPs, since a changed peer gets
    /// a new entry before the old one is given up.
    pub fn of(network: Ipv4Net, subnet_len: u8) -> Self {
        let bits = u32::from(subnet_len.saturating_sub(network.prefix_len()));
        let slots = 1u32.checked_shl(bits).filter(|slots| *slots <= MAX_SLOTS).unwrap_or(0);
        // At least a thousand for peers outside the grid; at most what a cluster can have (10 MiB).
        Self { slots, vteps: (2 * slots).clamp(1 << 10, 1 << 17) }
    }
}

/// Verbosity of the programs' own log, for debugging. Disabled calls are removed at load by the verifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BpfLogLevel {
    /// None.
    #[default]
    Off,
    /// Each packet's outcome.
    Trace,
}

/// The loaded dataplane.
pub struct Dataplane {
    ebpf: Ebpf,
    /// The same programs with other constants, as far as they were needed.
    variants: BTreeMap<Variant, Ebpf>,
    /// What takes the stack.
    plan: Plan,
    /// Whose programs are at hooks.
    known: others::Known,
    /// What they are loaded with.
    parameters: Parameters,
    pins: PinDirectory,
    counters: PerCpuArray<MapData, Counter>,
    flows: BpfHashMap<MapData, FlowKey, Flow>,
    pod_macs: BpfHashMap<MapData, u32, Mac>,
    accepted: accepted::Prefixes,
    excluded: excluded::Excluded,
    /// The pinned maps.
    maps: Vec<(&'static str, MapData)>,
    /// What this process has attached.
    held: held::Held,
    /// How much of that it has attached again.
    repaired: u32,
    /// The pods' links that this process attached its programs to.
    pods: BTreeSet<u32>,
    /// The links that tunnel packets can come in by, and the bytes of their link-layer headers.
    underlay: BTreeMap<u32, u16>,
    /// Those of them that this process attached its program to.
    underlay_attached: BTreeSet<u32>,
    forgetter: Forgetter,
    /// The peers in the maps.
    pub peers: PeerMaps,
}

/// What programs are loaded with.
#[derive(Clone, Copy)]
struct Parameters {
    config: Config,
    capacity: Capacity,
    log: BpfLogLevel,
}

impl Parameters {
    /// Loads these programs, with the pinned maps, or makes the maps.
    fn load(&self, pins: &PinDirectory, hooks: &[Hook]) -> Result<Ebpf, DataplaneError> {
        let level: u8 = match self.log {
            BpfLogLevel::Off => 0,
            BpfLogLevel::Trace => aya_log::Level::Trace as u8,
        };
        let mut loader = EbpfLoader::new();
        // The programs read no structures of the kernel's: its types, which the loader has read, are let go before the rest.
        loader.btf(None);
        loader.override_global(CONFIG, &self.config, true).override_global(aya_log::LEVEL, &level, true);
        for map in &pins::layout(self.capacity) {
            loader.map_max_entries(map.name, map.max_entries).map_pin_path(map.name, pins.map(map.name));
        }
        let mut ebpf = loader.load(OBJECT)?;
        if self.log != BpfLogLevel::Off {
            follow_log(&mut ebpf);
        }
        hooks.iter().try_for_each(|hook| loaded(&mut ebpf, *hook).map(drop))?;
        Ok(ebpf)
    }
}

impl Dataplane {
    /// Loads the programs with these constants, and opens the pinned maps or makes them. Nothing is attached yet.
    ///
    /// # Errors
    /// [`DataplaneError`].
    pub fn load(
        pins: PinDirectory,
        config: &Config,
        capacity: Capacity,
        log: BpfLogLevel,
    ) -> Result<Self, DataplaneError> {
        pins.create()?;
        let layout = pins::layout(capacity);
        let predecessor = pins.adopt(&layout)?;
        let parameters = Parameters { config: *config, capacity, log };
        let mut ebpf = parameters.load(&pins, &Hook::ALL)?;
        let peers = PeerMaps::open(&mut ebpf, config, predecessor)?;
        let counters = take_map(&mut ebpf, COUNTERS)?;
        let counters = counters.try_into().map_err(DataplaneError::map("open", COUNTERS))?;
        let flows = take_map(&mut ebpf, FLOWS)?.try_into().map_err(DataplaneError::map("open", FLOWS))?;
        let pod_macs = take_map(&mut ebpf, PODS)?.try_into().map_err(DataplaneError::map("open", PODS))?;
        let accepted = take_map(&mut ebpf, ACCEPTED)?.try_into().map_err(DataplaneError::map("open", ACCEPTED))?;
        let excluded = excluded::Excluded::open(&mut ebpf)?;
        let pinned = |name| pins.open(name);
        let forgetter = Forgetter::load(&pins, config)?;
        let maps = layout.iter().map(|map| Ok((map.name, pinned(map.name)?)));
        let maps = maps.collect::<Result<_, DataplaneError>>()?;
        Ok(Self {
            ebpf,
            variants: BTreeMap::new(),
            plan: Plan::default(),
            known: others::Known::default(),
            parameters,
            pins,
            counters,
            flows,
            pod_macs,
            accepted,
            excluded,
            maps,
            held: held::Held::new(),
            repaired: 0,
            pods: BTreeSet::new(),
            underlay: BTreeMap::new(),
            underlay_attached: BTreeSet::new(),
            forgetter,
            peers,
        })
    }

    /// Attaches a program to a link, or swaps the one that an earlier agent left there, as the plan of
    /// [`restrict`](Self::restrict) has it. The attachment stays when the agent goes.
    ///
    /// # Errors
    /// [`DataplaneError`].
    pub fn attach(&mut self, hook: Hook, interface: &str, ifindex: u32) -> Result<(), DataplaneError> {
        let variant = self.wanted(Place::Tc(hook), ifindex);
        self.load_variant(variant)?;
        let Self { ebpf, variants, pins, held, repaired, .. } = self;
        let program = loaded(variants.get_mut(&variant).unwrap_or(ebpf), hook)?;
        let is_repair = attach::attach(program, hook, variant, pins, held, interface, ifindex)?;
        *repaired += u32::from(is_repair);
        Ok(())
    }

    /// Detaches what is attached besides these hooks and those of pods: another backend's; from an interface, where only some of
    /// them are wanted, also where it is a filter of an agent before this one.
    ///
    /// # Errors
    /// [`DataplaneError::Pin`].
    pub fn detach_all_but(
        &mut self,
        hooks: &[Hook],
        interface: &str,
        wanted_there: &[Hook],
    ) -> Result<(), DataplaneError> {
        let is_unwanted = |hook: &Hook| !hooks.contains(hook) && !Hook::OF_PODS.contains(hook);
        for hook in Hook::ALL.into_iter().filter(is_unwanted) {
            attach::release_all_but(hook, &self.pins, &mut self.held, &HashSet::new())?;
            // By its side alone a filter does not say which hook's it is.
            if !wanted_there.iter().any(|wanted| wanted.attach_type() == hook.attach_type()) {
                attach::detach_filter(hook, interface, self.pins.vni());
            }
        }
        Ok(())
    }

    /// Forgets flows that have ended, also when others are loaded in the place of these programs
    /// ([`succeed`](Self::succeed)).
    pub fn forgetter(&self) -> Forgetter {
        self.forgetter.clone()
    }

    /// Removes what agents with another map layout left, once all programs are attached.
    ///
    /// # Errors
    /// [`DataplaneError::Pin`].
    pub fn discard_other_versions(&self) -> Result<(), DataplaneError> {
        self.pins.discard_other_versions()
    }

    /// A program, to run it on a packet of one's own.
    ///
    /// # Errors
    /// [`DataplaneError::Missing`].
    pub fn program(&mut self, hook: Hook) -> Result<&mut SchedClassifier, DataplaneError> {
        program(&mut self.ebpf, hook)
    }

    /// Has the programs know a flow, for packets of one's own.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn insert_flow(&mut self, flow: &Flow) -> Result<(), DataplaneError> {
        self.flows.insert(flow.key, flow, 0).map_err(DataplaneError::map("write", FLOWS))
    }

    /// The sums of all CPUs' counters.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn counters(&self) -> Result<Vec<(Event, Counter)>, DataplaneError> {
        read_counters(&self.counters)
    }
}

/// The counters of a dataplane whose agent may be gone.
///
/// # Errors
/// [`DataplaneError::Map`] where there is none.
pub fn pinned_counters(pins: &PinDirectory) -> Result<Vec<(Event, Counter)>, DataplaneError> {
    let map = pins.open(COUNTERS)?;
    let counters = batch::read_sums(&map, 0, Event::COUNT);
    let counters: Vec<Counter> = counters.map_err(|source| DataplaneError::map("read", COUNTERS)(source.into()))?;
    Ok(Event::ALL.iter().copied().zip(counters).collect())
}

fn read_counters(map: &PerCpuArray<MapData, Counter>) -> Result<Vec<(Event, Counter)>, DataplaneError> {
    Event::ALL.iter().map(|event| Ok((*event, read_counter(map, *event)?))).collect()
}

fn read_counter(map: &PerCpuArray<MapData, Counter>, event: Event) -> Result<Counter, DataplaneError> {
    let values = map.get(&(event as u32), 0).map_err(DataplaneError::map("read", COUNTERS))?;
    Ok(values.iter().copied().sum())
}

fn program(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier, DataplaneError> {
    let program = ebpf.program_mut(hook.program()).ok_or(DataplaneError::Missing(hook.program()))?;
    program.try_into().map_err(|source| DataplaneError::Program { call: "use", program: hook.program(), source })
}

/// The same, known to the kernel.
fn loaded(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier, DataplaneError> {
    let program = program(ebpf, hook)?;
    match program.load() {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(program),
        Err(source) => Err(DataplaneError::Program { call: "load", program: hook.program(), source }),
    }
}

fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, DataplaneError> {
    ebpf.take_map(name).ok_or(DataplaneError::Missing(name))
}

/// Hands the programs' log records to ours as they come.
fn follow_log(ebpf: &mut Ebpf) {
    let logger = match aya_log::EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!("the programs' log can't be read: {error}");
            return;
        }
    };
    tokio::spawn(async move {
        // SAFETY: the logger owns its ring buffer's descriptor, which stays the same and open while it lives.
        let registered = unsafe { tokio::io::unix::AsyncFd::register(logger) };
        let Ok(mut logger) = registered else { return };
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
}
