//! `subnet.env`, and what somebody else did to it.

use std::path::PathBuf;

use flannel_common::vxlan::Vni;

use super::status::DatapathStatus;
use crate::{
    cli::Cli,
    daemon::DaemonError,
    ownership::Written,
    repair::Repair,
    subnet_env::{State, SubnetEnv},
};

/// What it is called where it can't be repaired.
const SUBNET_ENV: &str = "subnet.env";

/// The file.
pub(super) struct SubnetFile {
    path: PathBuf,
    run_dir: PathBuf,
    vni: Vni,
    /// It lacked something when it was last looked at.
    was_incomplete: bool,
}

impl SubnetFile {
    /// That of an overlay.
    pub(super) fn new(cli: &Cli, vni: Vni) -> Self {
        Self { path: cli.subnet_file(), run_dir: cli.run_dir.clone(), vni, was_incomplete: false }
    }

    pub(super) fn write(&self, wanted: &SubnetEnv) -> Result<(), DaemonError> {
        wanted.write(&self.path)?;
        Ok(Written::remember(&self.run_dir, self.vni, &self.path)?)
    }

    /// What is wrong with it that is to be made right by [writing it again](Self::restore).
    pub(super) fn damage(&mut self, wanted: &SubnetEnv, status: &mut DatapathStatus) -> Option<&'static str> {
        let state = wanted.state(&self.path);
        let was_incomplete = std::mem::replace(&mut self.was_incomplete, state == State::Incomplete);
        match state {
            State::Gone => Some("was gone"),
            // Not at once: somebody may be writing it.
            State::Incomplete => was_incomplete.then_some("lacked what a runtime needs"),
            State::AsItShould => {
                status.waiting(SUBNET_ENV, None);
                None
            }
            // Another daemon serves this host's pods now, or an administrator means it. Two that correct each other would
            // never end.
            State::OfAnother(subnet) => {
                let text = format!(
                    "{} names {subnet}, which somebody else wrote, and not this host's {}; remove it to have it written again",
                    self.path.display(),
                    wanted.subnet
                );
                status.waiting(SUBNET_ENV, Some(text));
                None
            }
        }
    }

    /// Writes it again.
    pub(super) fn restore(&mut self, wanted: &SubnetEnv, damage: &str, status: &mut DatapathStatus) {
        match self.write(wanted) {
            Ok(()) => {
                self.was_incomplete = false;
                status.waiting(SUBNET_ENV, None);
                status.repaired(Repair::SubnetEnv, &format!("{} {damage}", self.path.display()));
            }
            Err(error) => status.waiting(SUBNET_ENV, Some(error.to_string())),
        }
    }
}
