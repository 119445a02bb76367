//! Compiles the eBPF programs, so that the object embedded in the agent is never stale.
#![expect(clippy::disallowed_types, reason = "cargo's program, not the agent")]

use std::process::{Command, Stdio};

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};

/// The name under which `cargo xtask setup` links a distribution's compiler that has a `core` for the BPF target.
const DISTRIBUTION_TOOLCHAIN: &str = "ebpf";

fn main() -> anyhow::Result<()> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../flannel-ebpf");
    println!("cargo:rerun-if-changed={manifest}/../flannel-common/src");
    let features: Vec<&str> =
        [("CARGO_FEATURE_NEXT_LAYOUT", "next-layout"), ("CARGO_FEATURE_NEXT_PROGRAMS", "next-programs")]
            .into_iter()
            .filter_map(|(variable, feature)| std::env::var_os(variable).map(|_| feature))
            .collect();
    // What `flannel-agent version` says: the same for the same source and compiler.
    let profile = std::env::var("PROFILE").context("cargo names the profile")?;
    println!("cargo:rustc-env=FLANNEL_AGENT_PROFILE={profile}");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(&rustc).arg("--version").output().context("ask the compiler for its version")?;
    println!("cargo:rustc-env=FLANNEL_AGENT_RUSTC={}", String::from_utf8_lossy(&version.stdout).trim());
    let programs = Package { name: "flannel-ebpf", root_dir: manifest, features: &features, ..Package::default() };
    build_ebpf([programs], toolchain())
        .context("the eBPF programs were not built; `cargo xtask setup` installs what that needs")
}

fn toolchain() -> Toolchain<'static> {
    let linked = Command::new("rustup")
        .args(["which", "--toolchain", DISTRIBUTION_TOOLCHAIN, "rustc"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match linked {
        Ok(status) if status.success() => Toolchain::Custom(DISTRIBUTION_TOOLCHAIN),
        // Without rustup, aya-build takes the compiler that is there and this is not used.
        _ => Toolchain::Nightly,
    }
}
