//! `cargo xtask setup`: from a bare machine to one that builds and tests. It looks at what is there, says what it will
//! install, and installs it with the system's package manager; where it does not know that, it prints the list.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    lab::cni,
    package,
    process::{cargo, inherit, output},
};

/// Options of `cargo xtask setup`.
#[derive(clap::Args, Default)]
pub struct Options {
    /// Only say what is missing, and fail if anything is
    #[arg(long)]
    pub check: bool,
}

/// Programs that build, lab and tests call, and the Debian package of each.
pub(crate) const PROGRAMS: [(&str, &str); 30] = [
    ("protoc", "protobuf-compiler"),
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("tc", "iproute2"),
    ("ss", "iproute2"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("flock", "util-linux"),
    ("unshare", "util-linux"),
    ("taskset", "util-linux"),
    ("sysctl", "procps"),
    ("ping", "iputils-ping"),
    ("iperf3", "iperf3"),
    ("sockperf", "sockperf"),
    ("tcpdump", "tcpdump"),
    ("tshark", "tshark"),
    ("ethtool", "ethtool"),
    ("openssl", "openssl"),
    ("bpftool", "bpftool"),
    ("iptables", "iptables"),
    ("ebtables", "iptables"),
    ("ipset", "ipset"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
    ("curl", "curl"),
    ("dnsmasq", "dnsmasq-base"),
    ("cc", "gcc"),
    ("c++", "g++"),
];

/// Those of them that only the build calls.
pub(crate) const BUILD_ONLY: [&str; 3] = ["protoc", "cc", "c++"];

/// What only `cargo xtask test` calls. Neither for who tries the lab, whose Docker this may become, nor for the guests of
/// `cargo xtask vm`, whose kernels make no difference to it.
const DOCKER: [(&str, &str); 4] =
    [("dockerd", "docker.io"), ("docker", "docker.io"), ("docker-init", "docker.io"), ("containerd", "containerd")];
/// What tests of the Kubernetes store look at the API server with, in guests too where it is there.
pub(crate) const KUBECTL: (&str, &str) = ("kubectl", "kubernetes-client");
/// What looks at the agent's page.
const BROWSER: (&str, &str) = ("chromium", "chromium");
/// What reads the agent's unit, and runs it on the hosts of some tests. (Debian's package `systemd` makes it no machine's first process.)
const SYSTEMD: (&str, &str) = ("systemd-analyze", "systemd");
/// What is in a container, and needs no libraries there. (The file tells it from the package `busybox`, which does.)
const BUSYBOX: (&str, &str) = ("/usr/share/doc/busybox-static", "busybox-static");

/// What reads metrics, alerts and rules. It is unpacked only: its package starts a server on port 9090 where there is a service manager.
const PROMETHEUS: &str = "prometheus";

/// The well-known types that etcd's interface files import.
const PROTO_INCLUDE: (&str, &str) = ("google/protobuf/descriptor.proto", "libprotobuf-dev");
/// The plugins that ours delegates to.
const CNI_PLUGINS: &str = "containernetworking-plugins";

/// The name under which a distribution's compiler is linked for the eBPF programs; flannel-agent/build.rs looks for it.
const TOOLCHAIN: &str = "ebpf";
/// A compiler with a prebuilt `core` for bpfel, its clippy, and its LLVM, as Debian 12 has them.
const COMPILER_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "rust-web-clippy"];
/// The linker is held at the version that these compilers' LLVM was tried with.
const BPF_LINKER: [&str; 4] = ["install", "bpf-linker", "--version", "0.13.0"];

/// Something that is not there.
#[derive(Debug, PartialEq, Eq)]
enum Missing {
    /// A package.
    Package(&'static str),
    /// A package that is unpacked, and not installed.
    Unpacked(&'static str),
    /// A compiler for the eBPF programs.
    Compiler,
    /// The linker for them.
    Linker,
}

/// Reports or installs what is missing.
///
/// # Errors
/// With `--check` where something is missing, else where it can't be installed.
pub fn run(options: &Options) -> Result<()> {
    let mut missing = missing();
    missing.extend(missing_for_tests());
    if missing.is_empty() {
        println!("nothing is missing");
        return Ok(());
    }
    if options.check {
        for item in &missing {
            println!("missing: {}", describe(item));
        }
        bail!("run `cargo xtask setup` to install what is missing");
    }
    install(&missing)
}

/// Installs what is missing, if anything is; silent where nothing is.
///
/// # Errors
/// Where it can't be installed.
pub fn ensure() -> Result<()> {
    match missing() {
        missing if missing.is_empty() => Ok(()),
        missing => install(&missing),
    }
}

/// The same, and for all tests.
///
/// # Errors
/// Where something can't be installed.
pub(crate) fn ensure_all() -> Result<()> {
    ensure_further(missing_for_tests())
}

/// The same, and for further programs, each with its package.
///
/// # Errors
/// Where something can't be installed.
pub(crate) fn ensure_programs(programs: &[(&str, &'static str)]) -> Result<()> {
    ensure_further(packages_of(programs).into_iter().map(Missing::Package).collect())
}

fn ensure_further(further: Vec<Missing>) -> Result<()> {
    ensure()?;
    if further.is_empty() { Ok(()) } else { install(&further) }
}

/// A program of Prometheus' package, as `promtool`: that which is installed, or the one that was unpacked.
pub fn prometheus(program: &str) -> PathBuf {
    which::which(program).unwrap_or_else(|_| package::directory().join(PROMETHEUS).join("usr/bin").join(program))
}

/// Those of what only the tests call that are not there.
fn missing_for_tests() -> Vec<Missing> {
    let mut packages = packages_of(&DOCKER);
    packages.extend(packages_of(&[KUBECTL, BROWSER, SYSTEMD]));
    if !Path::new(BUSYBOX.0).exists() {
        packages.push(BUSYBOX.1);
    }
    let mut missing: Vec<_> = packages.into_iter().map(Missing::Package).collect();
    let is_missing = ["promtool", "prometheus"].into_iter().any(|program| !prometheus(program).exists());
    missing.extend(is_missing.then_some(Missing::Unpacked(PROMETHEUS)));
    missing
}

/// A command of the toolchain that builds the eBPF programs, and whether it has to build `core` itself.
pub fn ebpf_cargo() -> (Command, bool) {
    if which::which("rustup").is_err() {
        return (cargo(), false);
    }
    let toolchain = if has_linked_compiler() { TOOLCHAIN } else { "nightly" };
    let mut command = Command::new("rustup");
    command.args(["run", toolchain, "cargo"]).env_remove("CARGO_TERM_QUIET").env_remove("RUSTC").env_remove("CARGO");
    command.current_dir(crate::process::workspace());
    (command, toolchain == "nightly")
}

fn missing() -> Vec<Missing> {
    let mut missing = Vec::new();
    let mut packages = packages_of(&PROGRAMS);
    let includes = ["/usr/include", "/usr/local/include"];
    if !includes.iter().any(|folder| Path::new(folder).join(PROTO_INCLUDE.0).exists()) {
        packages.push(PROTO_INCLUDE.1);
    }
    if cni::delegates().is_none() {
        packages.push(CNI_PLUGINS);
    }
    missing.extend(packages.into_iter().map(Missing::Package));
    if !has_compiler() {
        missing.push(Missing::Compiler);
    }
    if linker().is_none() {
        missing.push(Missing::Linker);
    }
    missing
}

/// The packages of those programs that are not there.
fn packages_of(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    let missing = programs.iter().filter(|(program, _)| which::which(program).is_err());
    missing.map(|(_, package)| *package).collect::<BTreeSet<_>>().into_iter().collect()
}

fn describe(item: &Missing) -> String {
    match item {
        Missing::Package(name) => format!("package {name}"),
        Missing::Unpacked(name) => format!("package {name}, unpacked below target/packages"),
        Missing::Compiler => format!(
            "a compiler for the eBPF programs: packages {}, or a rustup nightly with rust-src",
            COMPILER_PACKAGES.join(" ")
        ),
        Missing::Linker => "bpf-linker".to_owned(),
    }
}

fn has_compiler() -> bool {
    if which::which("rustup").is_err() {
        return sysroot(Command::new("rustc")).is_some_and(|sysroot| has_bpf_core(&sysroot));
    }
    has_linked_compiler() || has_nightly_source()
}

fn has_linked_compiler() -> bool {
    sysroot_of(TOOLCHAIN).is_some_and(|sysroot| has_bpf_core(&sysroot))
}

/// A nightly is of use with its source only.
fn has_nightly_source() -> bool {
    sysroot_of("nightly").is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/core").exists())
}

fn sysroot_of(toolchain: &str) -> Option<PathBuf> {
    let mut command = Command::new("rustup");
    command.args(["run", toolchain, "rustc"]);
    sysroot(command)
}

fn sysroot(mut rustc: Command) -> Option<PathBuf> {
    // The variables of the cargo that runs this would pick its own compiler.
    rustc.env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN").args(["--print", "sysroot"]);
    output(&mut rustc).ok().map(|text| PathBuf::from(text.trim()))
}

fn has_bpf_core(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/bpfel-unknown-none/lib").exists()
}

fn linker() -> Option<PathBuf> {
    which::which("bpf-linker").ok()
}

fn install(missing: &[Missing]) -> Result<()> {
    println!("This machine lacks what the project is built and tested with. Installing:");
    for item in missing {
        println!("  {}", describe(item));
    }
    if which::which("apt-get").is_err() {
        bail!(
            "only Debian's package manager is known here; install the list above by the names that your system has for it"
        );
    }
    let packages: Vec<_> = missing
        .iter()
        .filter_map(|item| match item {
            Missing::Package(name) => Some(*name),
            Missing::Unpacked(_) | Missing::Compiler | Missing::Linker => None,
        })
        .collect();
    apt(&["update", "-q"])?;
    if !packages.is_empty() {
        apt_install(&packages)?;
    }
    for item in missing {
        if let Missing::Unpacked(name) = item {
            println!("+ apt-get download {name}");
            package::unpacked(name, &package::directory())?;
        }
    }
    if missing.contains(&Missing::Compiler) {
        install_compiler()?;
    }
    if missing.contains(&Missing::Linker) {
        install_linker()?;
    }
    match self::missing() {
        rest if rest.is_empty() => Ok(()),
        rest => bail!("still missing: {}", rest.iter().map(describe).collect::<Vec<_>>().join("; ")),
    }
}

/// The distribution's compiler where it has one with `core` for bpfel, else rustup's nightly with its source.
fn install_compiler() -> Result<()> {
    let candidates = output(Command::new("apt-cache").args(["search", "--names-only", "^libstd-rust-web-dev-bpf$"]))?;
    if candidates.trim().is_empty() {
        println!("+ rustup toolchain install nightly --component rust-src");
        return inherit(Command::new("rustup").args([
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "--component",
            "rust-src",
            "--component",
            "clippy",
        ]));
    }
    apt_install(&COMPILER_PACKAGES)?;
    if which::which("rustup").is_ok() {
        println!("+ rustup toolchain link {TOOLCHAIN} /usr");
        inherit(Command::new("rustup").args(["toolchain", "link", TOOLCHAIN, "/usr"]))?;
    }
    Ok(())
}

/// bpf-linker for the LLVM of the compiler that it links for.
fn install_linker() -> Result<()> {
    let distribution = Path::new("/usr/lib/rustlib/bpfel-unknown-none").exists();
    let mut install = cargo();
    install.args(BPF_LINKER).env_remove("RUSTC_BOOTSTRAP");
    if distribution {
        let version = output(Command::new("/usr/bin/rustc").arg("-vV"))?;
        let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "));
        let major = llvm.and_then(|version| version.split('.').next()).context("rustc names no LLVM version")?;
        apt_install(&[&format!("llvm-{major}-dev")])?;
        // Without the prefix, its build looks for LLVM in the wrong folder.
        let prefix = output(Command::new(format!("llvm-config-{major}")).arg("--prefix"))?;
        install.env("LLVM_PREFIX", prefix.trim()).args(["--no-default-features", "--features"]);
        install.arg(format!("llvm-{major}"));
    }
    println!("+ cargo {}", BPF_LINKER.join(" "));
    inherit(&mut install)
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(packages);
    apt(&arguments)
}

fn apt(arguments: &[&str]) -> Result<()> {
    println!("+ apt-get {}", arguments.join(" "));
    let is_root = nix::unistd::geteuid().is_root();
    let mut command = if is_root { Command::new("apt-get") } else { Command::new("sudo") };
    if !is_root {
        command.arg("apt-get");
    }
    // Its own words only where it fails: they are many.
    output(command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
        .map(drop)
        .with_context(|| format!("install by hand: apt-get {}", arguments.join(" ")))
}
