//! Programs of the pods' links.

use std::collections::{HashMap, HashSet};

use aya::maps::MapError;
use flannel_common::{maps::PODS, packet::Mac};

use super::{Dataplane, DataplaneError, Hook, attach};
use crate::device::PodLink;

impl Dataplane {
    /// Whether this process has its programs on all of these.
    pub fn knows_pods(&self, links: &[PodLink]) -> bool {
        links.iter().all(|link| self.pods.contains(&link.index))
    }

    /// Notes which MACs those pods send from that are new to this process. What the programs have seen themselves stays.
    ///
    /// # Errors
    /// [`DataplaneError::Map`].
    pub fn note_pods(&mut self, links: &[PodLink], macs: &HashMap<u32, Mac>) -> Result<(), DataplaneError> {
        const BPF_NOEXIST: u64 = 1;
        let new = links.iter().map(|link| link.index).filter(|index| !self.pods.contains(index));
        for (index, mac) in new.filter_map(|index| Some((index, macs.get(&index)?))) {
            match self.pod_macs.insert(index, mac, BPF_NOEXIST) {
                Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::AlreadyExists => {}
                result => result.map_err(DataplaneError::map("write", PODS))?,
            }
        }
        Ok(())
    }

    /// Attaches the pods' programs to these links, and detaches them from all others. What this process attached already is
    /// left to [`repair`](Self::repair).
    ///
    /// # Errors
    /// [`DataplaneError`] of the last link that failed; the others have their programs.
    pub fn attach_pods(&mut self, links: &[PodLink]) -> Result<(), DataplaneError> {
        let mut result = Ok(());
        let indexes: HashSet<u32> = links.iter().map(|link| link.index).collect();
        let gone: Vec<u32> = self.pods.iter().filter(|ifindex| !indexes.contains(ifindex)).copied().collect();
        for PodLink { name, index, .. } in links {
            if !self.pods.insert(*index) {
                continue;
            }
            if let Err(error) = Hook::OF_PODS.iter().try_for_each(|hook| self.attach(*hook, name, *index)) {
                self.pods.remove(index);
                result = Err(error);
            }
        }
        for hook in Hook::OF_PODS {
            attach::release_all_but(hook, &self.pins, &mut self.held, &indexes)?;
        }
        self.pods.retain(|ifindex| !gone.contains(ifindex));
        // Also where that was heard of: what a packet on its way noted is forgotten now.
        self.forgetter.set_pods(indexes, &gone)?;
        result
    }
}
