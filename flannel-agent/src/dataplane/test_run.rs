//! The loaded programs on single packets of one's own (BPF_PROG_TEST_RUN), with all that they do to be seen: for tests that
//! compare them with a model.

use aya::{
    maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues},
    programs::{ProgramError, TestRun as _, TestRunOptions},
};
use flannel_common::{
    event::Event,
    flow::{Flow, FlowKey, Original},
    maps::{Counter, FLOWS, GONE, HEARD, Heard, ORIGINALS, PODS, TRAFFIC, Traffic, VTEP_ADDRESSES, gone_slot},
    packet::Mac,
};

pub use super::noted::{After, Packet};
use super::{
    Dataplane, DataplaneError, Forgetter, Hook, PinDirectory, XdpMode,
    noted::{Noted, ROOM},
    peers::absent_is_fine,
};

/// Has a dataplane, whose agent may run, know flows of one's own.
///
/// # Errors
/// [`DataplaneError::Map`].
pub fn insert_pinned_flows(pins: &PinDirectory, flows: impl IntoIterator<Item = Flow>) -> Result<(), DataplaneError> {
    let mut map = super::flows::open(pins)?;
    flows.into_iter().try_for_each(|flow| map.insert(flow.key, flow, 0).map_err(DataplaneError::map("write", FLOWS)))
}

/// A loaded dataplane whose programs are run here.
pub struct TestRuns {
    dataplane: Dataplane,
    noted: Noted,
    heard: Array<MapData, Heard>,
    traffic: PerCpuArray<MapData, Traffic>,
    originals: Array<MapData, Original>,
    gone: Array<MapData, u32>,
    addresses: BpfHashMap<MapData, [u8; 4], u32>,
}

impl TestRuns {
    /// Takes a loaded dataplane.
    ///
    /// # Errors
    /// [`DataplaneError`].
    pub fn new(mut dataplane: Dataplane) -> Result<Self, DataplaneError> {
        let mut programs = Vec::new();
        for hook in Hook::ALL {
            let fd = dataplane.program(hook)?.fd().and_then(|fd| fd.try_clone().map_err(ProgramError::IOError));
            programs.push(fd.map_err(failed("use", hook.program()))?);
        }
        let noted = Noted::load(&programs, false)?;
        let pinned = |name| dataplane.pins.open(name);
        let heard = Map::Array(pinned(HEARD)?).try_into().map_err(DataplaneError::map("open", HEARD))?;
        let traffic = Map::PerCpuArray(pinned(TRAFFIC)?).try_into().map_err(DataplaneError::map("open", TRAFFIC))?;
        let originals = Map::Array(pinned(ORIGINALS)?).try_into().map_err(DataplaneError::map("open", ORIGINALS))?;
        let gone = Map::Array(pinned(GONE)?).try_into().map_err(DataplaneError::map("open", GONE))?;
        let addresses = Map::HashMap(pinned(VTEP_ADDRESSES)?);
        let addresses = addresses.try_into().map_err(DataplaneError::map("open", VTEP_ADDRESSES))?;
        Ok(Self { dataplane, noted, heard, traffic, originals, gone, addresses })
    }

    /// Runs a TC program; its verdict, and what it leaves. The frame goes to `out`.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn verdict(
        &mut self,
        hook: Hook,
        packet: Packet<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(i32, After), DataplaneError> {
        self.noted.verdict(place(hook), packet, out)
    }

    /// Runs a TC program; all that the packet has afterwards. The frame goes to `out`.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn note(&mut self, hook: Hook, packet: Packet<'_>, out: &mut Vec<u8>) -> Result<After, DataplaneError> {
        self.noted.note(place(hook), packet, out)
    }

    /// Runs `xdp_decap`; its verdict. The frame goes to `out`, behind the metadata where the program left some.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn xdp(&mut self, mode: XdpMode, frame: &[u8], out: &mut Vec<u8>) -> Result<u32, DataplaneError> {
        out.resize(frame.len() + ROOM, 0);
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(out), ..TestRunOptions::new() };
        let program = self.dataplane.xdp_program(mode)?;
        let result = program.test_run(options).map_err(failed("run", "xdp_decap"))?;
        out.truncate(result.data_size_out as usize);
        Ok(result.return_value)
    }

    /// What was counted under an event, on all CPUs.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn counter(&self, event: Event) -> Result<Counter, DataplaneError> {
        super::read_counter(&self.dataplane.counters, event)
    }

    /// What was counted, under any event.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn counters(&self) -> Result<Vec<(Event, Counter)>, DataplaneError> {
        self.dataplane.counters()
    }

    /// What is known of a flow.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn flow(&self, key: &FlowKey) -> Result<Option<Flow>, DataplaneError> {
        match self.dataplane.flows.get(key, 0) {
            Ok(flow) => Ok(Some(flow)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(DataplaneError::map("read", FLOWS)(error)),
        }
    }

    /// Has the programs know a flow.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn insert_flow(&mut self, flow: &Flow) -> Result<(), DataplaneError> {
        self.dataplane.insert_flow(flow)
    }

    /// Has the programs forget a flow, if they know it.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn forget_flow(&mut self, key: &FlowKey) -> Result<(), DataplaneError> {
        absent_is_fine(self.dataplane.flows.remove(key)).map_err(DataplaneError::map("write", FLOWS))
    }

    /// Forgets flows that have ended.
    pub fn forgetter(&self) -> Forgetter {
        self.dataplane.forgetter()
    }

    /// Every flow that is known.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn flows(&self) -> Result<Vec<FlowKey>, DataplaneError> {
        self.dataplane.flows.keys().collect::<Result<_, _>>().map_err(DataplaneError::map("read", FLOWS))
    }

    /// What is left for packets that come out of the stack, at an [`Original::index`].
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn original(&self, index: u32) -> Result<Original, DataplaneError> {
        self.originals.get(&index, 0).map_err(DataplaneError::map("read", ORIGINALS))
    }

    /// Leaves something there.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn set_original(&mut self, index: u32, original: Original) -> Result<(), DataplaneError> {
        self.originals.set(index, original, 0).map_err(DataplaneError::map("write", ORIGINALS))
    }

    /// The MAC that the pod at a veth is known to send from.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn pod(&self, veth: u32) -> Result<Option<Mac>, DataplaneError> {
        match self.dataplane.pod_macs.get(&veth, 0) {
            Ok(mac) => Ok(Some(mac)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(DataplaneError::map("read", PODS)(error)),
        }
    }

    /// Has the programs know the MAC that the pod at a veth sends from, or none.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn set_pod(&mut self, veth: u32, mac: Option<Mac>) -> Result<(), DataplaneError> {
        let written = match mac {
            Some(mac) => self.dataplane.pod_macs.insert(veth, mac, 0),
            None => absent_is_fine(self.dataplane.pod_macs.remove(&veth)),
        };
        written.map_err(DataplaneError::map("write", PODS))
    }

    /// Has the programs know that a link is gone, or there.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn set_gone(&mut self, link: u32, is_gone: bool) -> Result<(), DataplaneError> {
        let value = if is_gone { link } else { 0 };
        self.gone.set(gone_slot(link), value, 0).map_err(DataplaneError::map("write", GONE))
    }

    /// The id of the VTEP with this address (wire order).
    ///
    /// # Errors
    /// [`DataplaneError::Map`] where it has none.
    pub fn id_of(&self, address: [u8; 4]) -> Result<u32, DataplaneError> {
        self.addresses.get(&address, 0).map_err(DataplaneError::map("read", VTEP_ADDRESSES))
    }

    /// When packets of a VTEP were admitted.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn heard(&self, id: u32) -> Result<Heard, DataplaneError> {
        self.heard.get(&id, 0).map_err(DataplaneError::map("read", HEARD))
    }

    /// Has them be admitted then.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn set_heard(&mut self, id: u32, heard: Heard) -> Result<(), DataplaneError> {
        self.heard.set(id, heard, 0).map_err(DataplaneError::map("write", HEARD))
    }

    /// What was counted for a VTEP since this was last called.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn take_traffic(&mut self, id: u32) -> Result<Traffic, DataplaneError> {
        let counted = self.traffic.get(&id, 0).map_err(DataplaneError::map("read", TRAFFIC))?;
        let sum = counted.iter().copied().sum();
        if sum != Traffic::default() {
            let nothing = PerCpuValues::try_from(vec![Traffic::default(); counted.len()]);
            let nothing = nothing.map_err(|source| DataplaneError::map("write", TRAFFIC)(source.into()))?;
            self.traffic.set(id, nothing, 0).map_err(DataplaneError::map("write", TRAFFIC))?;
        }
        Ok(sum)
    }
}

/// Where a hook's program is among those that are run.
fn place(hook: Hook) -> u32 {
    (0..).zip(Hook::ALL).find(|(_, other)| *other == hook).map_or(0, |(place, _)| place)
}

fn failed(call: &'static str, program: &'static str) -> impl FnOnce(ProgramError) -> DataplaneError {
    move |source| DataplaneError::Program { call, program, source }
}
