//! Agents that differ from this version's as a later one may, for the tests of upgrades.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::process::{cargo, inherit, workspace};

/// How a later version may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Other programs with the same maps.
    Programs,
    /// Other programs with maps of another layout.
    Layout,
}

impl Variant {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Programs, Self::Layout];

    /// The feature of `flannel-agent` that makes it.
    const fn feature(self) -> &'static str {
        match self {
            Self::Programs => "next-programs",
            Self::Layout => "next-layout",
        }
    }

    /// Where its agent is, in the folder in which this version's is.
    pub fn agent(self, folder: &Path) -> PathBuf {
        folder.join(format!("flannel-agent-{}", self.feature()))
    }
}

/// Builds them in the place of this version's agent, as cargo keeps one program of a name in a folder, and moves them beside
/// it. That one has to be built again afterwards, for which cargo has all parts.
///
/// # Errors
/// Where cargo fails.
pub fn build() -> Result<()> {
    let folder = workspace().join("target/debug");
    for variant in Variant::ALL {
        let target = ["build", "--package", "flannel-agent", "--bin", "flannel-agent", "--features", variant.feature()];
        inherit(cargo().args(target))?;
        let (built, agent) = (folder.join("flannel-agent"), variant.agent(&folder));
        // A copy in one step: the one before may be running.
        let copy = agent.with_extension("new");
        fs::copy(&built, &copy).with_context(|| format!("copy {built:?} to {copy:?}"))?;
        fs::rename(&copy, &agent).with_context(|| format!("rename {copy:?} to {agent:?}"))?;
    }
    Ok(())
}
