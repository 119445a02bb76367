//! Which packets take the stack, whatever was noted of their flows.

use nix::net::if_::if_indextoname;

use super::{Dataplane, DataplaneError, Hook};
use crate::bypass::Plan;

impl Dataplane {
    /// Has what the plan names take the stack, and nothing else. The pods' programs are swapped in place.
    ///
    /// # Errors
    /// [`DataplaneError`] of the last link that failed; the others are as they should be.
    pub fn restrict(&mut self, plan: &Plan) -> Result<(), DataplaneError> {
        let before = std::mem::replace(&mut self.plan, plan.clone());
        let is_changed = |index: &&u32| before.restricts(**index) != plan.restricts(**index);
        let changed: Vec<u32> = self.pods.keys().filter(is_changed).copied().collect();
        let mut result = Ok(());
        for index in changed {
            // A veth that is gone took its programs with it.
            let Ok(name) = if_indextoname(index) else { continue };
            let attached = Hook::OF_PODS.iter().try_for_each(|hook| self.attach(*hook, &name.to_string_lossy(), index));
            result = attached.and(result);
        }
        result
    }
}
