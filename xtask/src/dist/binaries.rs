//! The release build. Compilers are run by way of a wrapper that takes the machine's paths out of what they make: of both
//! compilers, as the build script starts another cargo for the eBPF programs, which takes no flags but this variable.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::size;
use crate::{
    process::{cargo, inherit, output, workspace},
    setup,
};

/// What each program may have, in bytes. The agent has twice that at the compiler's default level; `opt-level = "s"` and
/// `panic = "abort"` have not been measured.
const FLOORS: [(&str, u64); 2] = [("flannel-agent", 12 << 20), ("flannel", 3 << 19)];

/// Builds the programs and returns their folder.
pub(super) fn build() -> Result<PathBuf> {
    setup::ensure()?;
    let target = target()?;
    let mut command = cargo();
    command.args(["build", "--profile", "dist", "--package", "flannel-agent", "--target", &target]);
    command.env("RUSTC_WRAPPER", wrapper()?).env("CARGO_INCREMENTAL", "0");
    if let Ok(commit) = output(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(workspace())) {
        command.env("FLANNEL_AGENT_COMMIT", commit.trim());
    }
    inherit(&mut command)?;
    Ok(workspace().join("target").join(target).join("dist"))
}

/// Prints the sizes of the programs, and which is too large; fails where one names a path of this machine.
pub(super) fn check(folder: &Path) -> Result<()> {
    for (name, floor) in FLOORS {
        let path = folder.join(name);
        let bytes = fs::read(&path).with_context(|| format!("read {path:?}"))?;
        let len = bytes.len() as u64;
        println!("  {} {name}, of {} that it may have", size(len), size(floor).trim());
        if len > floor {
            println!("  {name} is {} too large", size(len - floor).trim());
        }
        for machine in paths() {
            let found = bytes.windows(machine.len()).any(|window| window == machine.as_bytes());
            ensure!(!found, "{name} has the path {machine} in it");
        }
    }
    Ok(())
}

/// Folders of this machine.
fn paths() -> [String; 2] {
    [workspace(), cargo_home()].map(|path| path.to_string_lossy().into_owned())
}

fn cargo_home() -> PathBuf {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    home.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"))
}

/// A program that runs a compiler with further arguments.
fn wrapper() -> Result<PathBuf> {
    let path = workspace().join("target/dist/rustc");
    let [sources, crates] = paths();
    let script = format!(
        "#!/bin/sh\nexec \"$@\" '--remap-path-prefix={sources}=/usr/src/flannel-agent' \
         '--remap-path-prefix={crates}=/usr/src/cargo'\n"
    );
    fs::create_dir_all(workspace().join("target/dist"))?;
    fs::write(&path, script).with_context(|| format!("write {path:?}"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// The host's triple. It is named to cargo, so that the folder `target/dist` is not that of the profile.
fn target() -> Result<String> {
    let version = output(Command::new("rustc").arg("-vV").current_dir(workspace()))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    Ok(host.to_owned())
}
