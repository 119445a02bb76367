//! Compiles the eBPF programs, so that the object embedded in the agent is never stale.
#![expect(clippy::disallowed_types, reason = "cargo's program, not the agent")]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

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
        .context("the eBPF programs were not built; `cargo xtask setup` installs what that needs")?;
    let folder = std::env::var_os("OUT_DIR").context("cargo names a folder for the build's output")?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_file() {
            drop_debug_information(&path).with_context(|| format!("drop the debug information of {path:?}"))?;
        }
    }
    Ok(())
}

/// Takes DWARF out of an object, four fifths of it: its BTF is made from that, and the kernel and aya read nothing but BTF.
fn drop_debug_information(path: &Path) -> anyhow::Result<()> {
    let object = fs::read(path)?;
    let mut builder = Builder::read(&*object)?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        section.delete |= name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    // LLVM has sections' names among the symbols', which the builder keeps apart.
    if !builder.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = builder.sections.add();
        names.name = b".shstrtab"[..].into();
        names.sh_type = SHT_STRTAB;
        names.data = SectionData::SectionString;
    }
    builder.delete_orphans();
    let mut smaller = Vec::new();
    builder.write(&mut smaller)?;
    Ok(fs::write(path, smaller)?)
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
