//! `from_underlay` at the links that tunnel packets can come in by.

use std::collections::HashSet;

use super::{Dataplane, DataplaneError, Hook, attach};
use crate::device::Link;

impl Dataplane {
    /// Attaches `from_underlay` to these links, and detaches it from all others. What this process attached already is left to
    /// [`repair`](Self::repair).
    ///
    /// # Errors
    /// [`DataplaneError`] of the last link that failed; the others have the program.
    pub fn attach_underlay(&mut self, links: &[Link]) -> Result<(), DataplaneError> {
        let before =
            std::mem::replace(&mut self.underlay, links.iter().map(|link| (link.index, link.header_len())).collect());
        self.underlay_attached.retain(|index| before.get(index) == self.underlay.get(index));
        // First: a link that came in the place of another has its name.
        let indexes: HashSet<u32> = links.iter().map(|link| link.index).collect();
        attach::release_all_but(Hook::FromUnderlay, &self.pins, &mut self.held, &indexes)?;
        let mut result = Ok(());
        for Link { name, index, .. } in links {
            if !self.underlay_attached.insert(*index) {
                continue;
            }
            if let Err(error) = self.attach(Hook::FromUnderlay, name, *index) {
                self.underlay_attached.remove(index);
                result = Err(error);
            }
        }
        result
    }
}
