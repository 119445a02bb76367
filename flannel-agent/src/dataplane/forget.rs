//! Forgetting flows that have ended, by programs of its own (`flannel-ebpf`'s `forget`).

use std::{
    collections::BTreeSet,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, MapData},
    programs::{ProgramError, SchedClassifier, SocketFilter, TestRun as _, TestRunOptions},
};
use flannel_common::{
    ended::{BYPASS, Bypass, Selection, left},
    maps::{Config, FLOWS, GONE, GONE_SLOTS, MAX_FLOWS, gone_slot},
};
use tracing::warn;

use super::{DataplaneError, PinDirectory, take_map};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/forget"));

const ENDED: &str = "connection_ended";
const LINK_GONE: &str = "link_gone";
const AGAIN: &str = "forget_again";
const SELECTED: &str = "forget_selected";

const ETHERNET_HEADER_LEN: usize = 14;

const EVERYTHING: Selection = Selection { everything: 1, veths: [0; Selection::VETHS], forgotten: 0 };

/// Forgets flows that have ended. Clones are the same.
#[derive(Clone)]
pub struct Forgetter(Arc<Mutex<Programs>>);

struct Programs {
    ebpf: Ebpf,
    /// The socket of conntrack's events.
    socket: Option<OwnedFd>,
    /// The socket of rtnetlink's events of links.
    links: Option<OwnedFd>,
    /// Which links are gone.
    gone: Array<MapData, u32>,
    /// The pods' links.
    pods: BTreeSet<u32>,
}

/// What there is to be forgotten once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// Something, when [`REST`](flannel_common::ended::REST) is over.
    Later,
    /// Something, at once.
    More,
}

impl Forgetter {
    /// Loads the programs for the flows that are pinned there.
    pub(super) fn load(pins: &PinDirectory, config: &Config) -> Result<Self, DataplaneError> {
        let Config { bypass_time: time, subnet, subnet_mask, .. } = *config;
        let bypass = Bypass { time, subnet, subnet_mask };
        let mut loader = EbpfLoader::new();
        loader.btf(None).override_global(BYPASS, &bypass, true);
        loader.map_max_entries(FLOWS, MAX_FLOWS).map_pin_path(FLOWS, pins.map(FLOWS));
        loader.map_max_entries(GONE, GONE_SLOTS).map_pin_path(GONE, pins.map(GONE));
        let mut ebpf = loader.load(OBJECT)?;
        for name in [ENDED, LINK_GONE] {
            filter(&mut ebpf, name)?.load().map_err(failed("load", name))?;
        }
        for name in [AGAIN, SELECTED] {
            classifier(&mut ebpf, name)?.load().map_err(failed("load", name))?;
        }
        let gone = take_map(&mut ebpf, GONE)?.try_into().map_err(DataplaneError::map("open", GONE))?;
        let programs = Programs { ebpf, socket: None, links: None, gone, pods: BTreeSet::new() };
        Ok(Self(Arc::new(Mutex::new(programs))))
    }

    /// Has the clones of the one before forget these flows.
    pub(super) fn succeed(&mut self, before: &Self) {
        {
            let (mut new, mut old) = (self.lock(), before.lock());
            let listening = old.socket.take().map_or(Ok(()), |socket| new.listen(socket));
            if let Err(error) = listening {
                warn!("{error}; listening anew");
            }
            let watching = old.links.take().map_or(Ok(()), |socket| new.watch_links(socket));
            if let Err(error) = watching {
                warn!("{error}; flows of pods that go leave the bypass some milliseconds later");
            }
            new.pods = std::mem::take(&mut old.pods);
            std::mem::swap(&mut *new, &mut *old);
        }
        self.0 = Arc::clone(&before.0);
    }

    /// Whether there is a socket that has the program.
    pub fn is_listening(&self) -> bool {
        self.lock().socket.is_some()
    }

    /// Has every message of conntrack's events that comes to this socket forget the flows of its connection. Some of them go
    /// on to who reads the socket: what they tell of has to be forgotten [`again`](Self::again).
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn listen(&self, socket: OwnedFd) -> Result<(), DataplaneError> {
        self.lock().listen(socket)
    }

    /// Has every message of rtnetlink's about a link that comes to this socket keep flows into links that are gone off the bypass.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn watch_links(&self, socket: OwnedFd) -> Result<(), DataplaneError> {
        self.lock().watch_links(socket)
    }

    /// Forgets once more what ended: a packet that conntrack had let through by then may have been noted since.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn again(&self) -> Result<Left, DataplaneError> {
        let mut programs = self.lock();
        let found = programs.run(AGAIN, &Selection::default())?;
        if found & left::UNCLEAR != 0 {
            programs.run(SELECTED, &EVERYTHING)?;
        }
        Ok(match found & !left::UNCLEAR {
            left::NOTHING => Left::Nothing,
            left::YOUNG => Left::Later,
            _ => Left::More,
        })
    }

    /// Forgets every flow. The next packets of those that live take the stack, and are noted again.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn everything(&self) -> Result<u32, DataplaneError> {
        self.lock().run(SELECTED, &EVERYTHING)
    }

    /// Links are gone. Forgets the flows into those that were pods': their addresses may be others' at once. Those of which
    /// nothing came in yet do not say whose they are, and go as well; the next packet of one that lives is noted again. How
    /// many these were.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn links_are_gone(&self, links: &[u32]) -> Result<u32, DataplaneError> {
        let mut programs = self.lock();
        let gone: Vec<u32> = links.iter().filter(|link| programs.pods.remove(link)).copied().collect();
        programs.forget(&gone)
    }

    /// The pods' links are these from now on. Forgets the flows into some that were.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn set_pods(&self, links: impl IntoIterator<Item = u32>, gone: &[u32]) -> Result<u32, DataplaneError> {
        let mut programs = self.lock();
        let links: BTreeSet<u32> = links.into_iter().collect();
        let before = std::mem::replace(&mut programs.pods, links.clone());
        programs.note_there(links.difference(&before))?;
        programs.forget(gone)
    }

    /// Forgets the flows into veths that are still there.
    pub(super) fn forget_veths(&self, veths: &[u32]) -> Result<u32, DataplaneError> {
        self.lock().forget(veths)
    }

    fn lock(&self) -> MutexGuard<'_, Programs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Programs {
    /// In the place of a program that did so before.
    fn listen(&mut self, socket: OwnedFd) -> Result<(), DataplaneError> {
        filter(&mut self.ebpf, ENDED)?.attach(&socket).map_err(failed("attach", ENDED))?;
        self.socket = Some(socket);
        Ok(())
    }

    fn watch_links(&mut self, socket: OwnedFd) -> Result<(), DataplaneError> {
        filter(&mut self.ebpf, LINK_GONE)?.attach(&socket).map_err(failed("attach", LINK_GONE))?;
        self.links = Some(socket);
        Ok(())
    }

    /// Links are there, also where one has the number of one that is gone, as who makes it may choose.
    fn note_there<'a>(&mut self, links: impl IntoIterator<Item = &'a u32>) -> Result<(), DataplaneError> {
        for link in links {
            let slot = gone_slot(*link);
            if self.gone.get(&slot, 0).map_err(DataplaneError::map("read", GONE))? == *link {
                self.gone.set(slot, 0, 0).map_err(DataplaneError::map("write", GONE))?;
            }
        }
        Ok(())
    }

    fn forget(&mut self, veths: &[u32]) -> Result<u32, DataplaneError> {
        let mut forgotten = 0;
        for some in veths.chunks(Selection::VETHS) {
            let mut selection = Selection::default();
            selection.veths[..some.len()].copy_from_slice(some);
            forgotten += self.run(SELECTED, &selection)?;
        }
        Ok(forgotten)
    }

    fn run(&mut self, name: &'static str, selection: &Selection) -> Result<u32, DataplaneError> {
        let mut packet = vec![0; ETHERNET_HEADER_LEN];
        packet.extend(selection.everything.to_ne_bytes());
        packet.extend(selection.veths.iter().flat_map(|veth| veth.to_ne_bytes()));
        packet.extend(selection.forgotten.to_ne_bytes());
        let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::new() };
        Ok(classifier(&mut self.ebpf, name)?.test_run(options).map_err(failed("run", name))?.return_value)
    }
}

fn filter<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SocketFilter, DataplaneError> {
    let program = ebpf.program_mut(name).ok_or(DataplaneError::Missing(name))?;
    program.try_into().map_err(failed("use", name))
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, DataplaneError> {
    let program = ebpf.program_mut(name).ok_or(DataplaneError::Missing(name))?;
    program.try_into().map_err(failed("use", name))
}

fn failed(call: &'static str, program: &'static str) -> impl FnOnce(ProgramError) -> DataplaneError {
    move |source| DataplaneError::Program { call, program, source }
}
