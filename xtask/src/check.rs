//! `cargo xtask check`: what a change must pass besides the tests.

use anyhow::Result;

use crate::{
    process::{cargo, inherit},
    setup,
};

/// Runs all of it, the eBPF programs' part with their own compiler and target.
///
/// # Errors
/// The first that fails.
pub fn run() -> Result<()> {
    setup::ensure()?;
    inherit(cargo().args(["fmt", "--all", "--check"]))?;
    let host = ["--workspace", "--exclude", "flannel-ebpf"];
    inherit(cargo().arg("clippy").args(host).args(["--all-targets", "--", "-D", "warnings"]))?;
    inherit(
        cargo().args(["doc", "--no-deps", "--document-private-items"]).args(host).env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    ebpf("clippy", &["--", "-D", "warnings"])
}

fn ebpf(command: &str, arguments: &[&str]) -> Result<()> {
    let (mut cargo, builds_core) = setup::ebpf_cargo();
    cargo.args([command, "--package", "flannel-ebpf", "--target", "bpfel-unknown-none"]);
    // Its own folder, so that the two compilers do not undo each other's work.
    cargo.args(["--target-dir", "target/ebpf"]);
    if builds_core {
        cargo.args(["-Z", "build-std=core"]);
    }
    inherit(cargo.args(arguments))
}
