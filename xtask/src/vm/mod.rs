//! `cargo xtask vm`: the tests on another kernel, in a virtual machine that is Debian's kernel image, the programs that the
//! tests call, and nothing else. It needs no KVM.
//!
//! # Layout
//!
//! * `kernel` — Debian's images, found and unpacked, not installed
//! * `image` — the guest's files

mod image;
mod kernel;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use self::kernel::Kernel;
use crate::{
    process::{cargo, inherit, output, workspace},
    progress::step,
    setup,
};

/// Options of `cargo xtask vm`.
#[derive(clap::Args)]
pub struct Options {
    /// Which, as `6.1` or `6.12`: the newest that Debian has of it
    #[arg(required_unless_present = "list")]
    kernel: Option<String>,
    /// Only say which kernels there are
    #[arg(long)]
    list: bool,
    /// End the machine after so many minutes
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// What the tests' limits are multiplied by: an emulated processor is slow
    #[arg(long, default_value_t = 5)]
    patience: u32,
    /// Only tests whose names contain one of these; further arguments of the test binary. Without: what the kernel decides
    #[arg(last = true)]
    tests: Vec<String>,
}

/// Programs that the machine is made and run with, and the Debian package of each.
const PROGRAMS: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("dpkg-deb", "dpkg"),
    ("strip", "binutils"),
];

/// What a kernel can make a difference to: verifier and helpers, hooks and their replacement, whole packets through all of
/// it. What the agent makes of a store is the same on each.
const TESTS: [&str; 12] = [
    "kernels::",
    "encapsulation::",
    "admission::",
    "fast_path::",
    "originals::",
    "bypass::a_translated_flow",
    "translated::one_tag",
    "model::agrees_about_mutated_frames",
    "short_frames::",
    "xdp::a_known_flow",
    "lifecycle::the_datapath_outlives",
    "two_hosts::",
];

/// What the folders of machines are named by, before the command's process id.
const GUEST: &str = "machine-";
/// Memory of the machine, which holds its files.
const MEMORY: &str = "3G";

/// Runs the tests on a kernel.
///
/// # Errors
/// Where one fails, or the machine can't be made, or does not come to an end.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure_programs(&PROGRAMS)?;
    let Some(name) = options.kernel.as_deref().filter(|_| !options.list) else {
        return kernel::list();
    };
    let directory = workspace().join("target/vm");
    let kernel = step(&format!("Debian's kernel {name}"), || Kernel::get(name, &directory))?;
    let tests = build()?;
    let arguments = match options.tests.as_slice() {
        [] => TESTS.map(str::to_owned).to_vec(),
        tests => tests.to_vec(),
    };
    remove_leftovers(&directory)?;
    let guest = directory.join(format!("{GUEST}{}", std::process::id()));
    let result = step("the machine's files", || image::build(&kernel, &tests, &arguments, options.patience, &guest))
        .and_then(|initramfs| {
            let result = boot(&kernel, &initramfs, &guest, Duration::from_secs(60 * options.minutes));
            fs::remove_file(&initramfs).with_context(|| format!("remove {initramfs:?}"))?;
            result
        });
    // The kernel's own words stay where something went wrong.
    if result.is_ok() {
        fs::remove_dir_all(&guest).with_context(|| format!("remove {guest:?}"))?;
    }
    result
}

/// Removes the files of machines whose command is gone; the console's log of the last that failed is among them.
fn remove_leftovers(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("list {directory:?}"))?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(GUEST)) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            fs::remove_dir_all(entry.path()).with_context(|| format!("remove {:?}", entry.path()))?;
        }
    }
    Ok(())
}

/// Builds agent and tests, and returns the tests' binary.
fn build() -> Result<PathBuf> {
    inherit(cargo().args(["build", "--package", "flannel-agent"]))?;
    inherit(cargo().args(["test", "--package", "tests", "--no-run"]))?;
    let messages = output(cargo().args(["test", "-q", "--package", "tests", "--no-run", "--message-format=json"]))?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "dataplane")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo names no test binary")
}

/// Boots the machine and waits for its end. Its first serial port is the kernel's console, the second the tests' output,
/// the third their exit code.
fn boot(kernel: &Kernel, initramfs: &Path, guest: &Path, limit: Duration) -> Result<()> {
    let console = guest.join("console.log");
    let status = guest.join("status");
    // A machine must not outlive what watches it, however that ends.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    // Emulated always: a KVM that is there may not work, and then hangs instead of failing.
    // One thread for both processors: with one each, what the kernel patches in its own text (static keys, by way of int3) is
    // now and then run half patched, and it dies of an int3 that is nobody's.
    command.args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", MEMORY]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
    command.args(["-append", "console=ttyS0 panic=-1 oops=panic random.trust_cpu=on net.ifnames=0"]);
    command.arg("-serial").arg(format!("file:{}", console.display()));
    command.args(["-chardev", "stdio,id=tests,signal=on", "-serial", "chardev:tests"]);
    command.arg("-serial").arg(format!("file:{}", status.display()));

    println!("── the tests on {} ──", kernel.release);
    let start = Instant::now();
    let mut machine = command.stdin(Stdio::null()).spawn().with_context(|| format!("start {command:?}"))?;
    let ended = loop {
        match machine.try_wait() {
            Ok(None) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(100)),
            Ok(None) => break Err(anyhow::anyhow!("the machine still ran after {} minutes", limit.as_secs() / 60)),
            Ok(Some(ended)) => break Ok(ended),
            Err(error) => break Err(error.into()),
        }
    };
    if ended.is_err() {
        let _gone = machine.kill();
        let _reaped = machine.wait();
    }
    let ended = ended?;
    let code = fs::read_to_string(&status).unwrap_or_default();
    println!("── {}: {:.0} s ──", kernel.release, start.elapsed().as_secs_f64());
    match code.trim() {
        "0" => Ok(()),
        "" => {
            let words = fs::read_to_string(&console).unwrap_or_default();
            let last: Vec<_> = words.lines().rev().take(20).collect();
            let last: Vec<_> = last.into_iter().rev().collect();
            bail!(
                "the machine ended ({ended}) before the tests did; its last words ({console:?}):\n{}",
                last.join("\n")
            )
        }
        code => bail!("tests failed on {} (exit code {code})", kernel.release),
    }
}
