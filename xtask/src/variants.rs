//! Agents that differ from this version's as a later one may, for the tests of upgrades. They are built into a folder of
//! their own, beside the agent, since cargo keeps one program of a name in a folder.

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

/// Builds them beside this version's agent. What is up to date stays as it is.
///
/// # Errors
/// Where cargo fails.
pub fn build() -> Result<()> {
    let folder = workspace().join("target/variants");
    for variant in Variant::ALL {
        let features = ["--features", variant.feature()];
        let target = ["build", "--package", "flannel-agent", "--bin", "flannel-agent", "--target-dir"];
        inherit(cargo().args(target).arg(&folder).args(features))?;
        let (built, agent) = (folder.join("debug/flannel-agent"), variant.agent(&workspace().join("target/debug")));
        // A copy in one step: the one before may be running.
        let copy = agent.with_extension("new");
        fs::copy(&built, &copy).with_context(|| format!("copy {built:?} to {copy:?}"))?;
        fs::rename(&copy, &agent).with_context(|| format!("rename {copy:?} to {agent:?}"))?;
    }
    Ok(())
}
