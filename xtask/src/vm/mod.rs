//! `cargo xtask vm`: the tests on another kernel, in a virtual machine that is Debian's kernel image, the programs that the
//! tests call, and nothing else; or two machines with NICs between them. It needs no KVM.
//!
//! # Layout
//!
//! * `kernel` — Debian's images, found and unpacked, not installed
//! * `image` — the guest's files
//! * `pair` — two machines, each with an agent, and what their NICs' drivers can make a difference to

mod image;
mod kernel;
mod pair;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

pub use self::pair::{GuestOptions, guest};
use self::{
    image::Contents,
    kernel::{Flavour, Kernel},
    pair::Nic,
};
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
    /// How many machines: 1 for the tests on one; 2 for an agent on each of two that are connected by their NICs, which
    /// needs root
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    hosts: u8,
    /// By which NICs the two are connected, one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_value = "virtio-net-pci")]
    nic: Vec<Nic>,
    /// Of the two, only what takes little time
    #[arg(long)]
    short: bool,
    /// End the machine after so many minutes
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// What the tests' limits are multiplied by: an emulated processor is slow
    #[arg(long, default_value_t = 5)]
    patience: u32,
    /// Only tests whose names contain one of these; further arguments of the test binary. Without: what the kernel decides.
    /// Of two machines: only checks whose names contain one of these
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

/// What the first process does where the tests are run: that, and ends the machine.
const INIT: &str = r"
stty -opost < /dev/ttyS1
exec > /dev/ttyS1 2>&1
# A service manager's limit of open files; the kernel's own is 1024.
ulimit -n 65536
xargs -d '\n' -a /etc/tests env RUST_BACKTRACE=1 LAB_PATIENCE=@PATIENCE@ /@TESTS@
echo $? > /dev/ttyS2
# Both ports are written to the end before the machine is off.
stty -F /dev/ttyS1 sane
stty -F /dev/ttyS2 sane
sleep 1
echo o > /proc/sysrq-trigger
sleep 60
";

/// Runs the tests on a kernel, or the checks of two machines.
///
/// # Errors
/// Where one fails, or a machine can't be made, or does not come to an end.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure_programs(&PROGRAMS)?;
    let Some(name) = options.kernel.as_deref().filter(|_| !options.list) else {
        return kernel::list();
    };
    let directory = workspace().join("target/vm");
    if options.hosts == 2 {
        return pair::run(options, name, &directory);
    }
    let kernel = step(&format!("Debian's kernel {name}"), || Kernel::get(name, Flavour::Cloud, &directory))?;
    let [agent, tests] = [build_agent()?, build_tests()?];
    let names = match options.tests.as_slice() {
        [] => TESTS.map(str::to_owned).to_vec(),
        tests => tests.to_vec(),
    };
    let contents = Contents {
        built: &[(agent, image::AGENT), (this_program()?, image::XTASK), (tests, image::TESTS)],
        folders: &[],
        files: &[("etc/tests", names.join("\n"))],
        init: &INIT.replace("@PATIENCE@", &options.patience.to_string()).replace("@TESTS@", image::TESTS),
    };
    within_folder(&directory, |guest| {
        let initramfs = step("the machine's files", || image::build(&kernel, &contents, guest))?;
        let result = boot(&kernel, &initramfs, guest, Duration::from_secs(60 * options.minutes));
        fs::remove_file(&initramfs).with_context(|| format!("remove {initramfs:?}"))?;
        result
    })
}

/// Does something with a folder for the files of machines. The kernels' own words stay where something went wrong.
fn within_folder(directory: &Path, work: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    remove_leftovers(directory)?;
    let guest = directory.join(format!("{GUEST}{}", std::process::id()));
    work(&guest)?;
    fs::remove_dir_all(&guest).with_context(|| format!("remove {guest:?}"))
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

fn build_agent() -> Result<PathBuf> {
    executable(&["build", "--package", "flannel-agent"], "flannel-agent")
}

fn build_tests() -> Result<PathBuf> {
    executable(&["test", "--package", "tests", "--no-run"], "dataplane")
}

/// Has cargo build something, and returns the binary that it names so.
fn executable(arguments: &[&str], name: &str) -> Result<PathBuf> {
    inherit(cargo().args(arguments))?;
    let messages = output(cargo().args(arguments).args(["-q", "--message-format=json"]))?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo names no binary {name}"))
}

fn this_program() -> Result<PathBuf> {
    std::env::current_exe().context("which program this is")
}

/// A machine without devices but its two processors, which ends where it would boot again.
fn machine(kernel: &Kernel, initramfs: &Path) -> Command {
    // A machine must not outlive what watches it, however that ends.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    // Emulated always: a KVM that is there may not work, and then hangs instead of failing.
    // One thread for both processors: with one each, what the kernel patches in its own text (static keys, by way of int3) is
    // now and then run half patched, and it dies of an int3 that is nobody's.
    command.args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", MEMORY]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
    command
}

/// What every kernel is told: its console, that it ends the machine where it fails, and how it names its NICs; and not to try
/// whether the timer ticks, for which an emulated processor beside other work is too slow now and then (`check_timer`).
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 oops=panic random.trust_cpu=on net.ifnames=0 no_timer_check";

/// The last lines of a kernel's console.
fn last_words(console: &Path) -> String {
    let words = fs::read_to_string(console).unwrap_or_default();
    let lines: Vec<_> = words.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Boots the machine and waits for its end. Its first serial port is the kernel's console, the second the tests' output,
/// the third their exit code.
fn boot(kernel: &Kernel, initramfs: &Path, guest: &Path, limit: Duration) -> Result<()> {
    let console = guest.join("console.log");
    let status = guest.join("status");
    let mut command = machine(kernel, initramfs);
    command.args(["-append", KERNEL_ARGUMENTS]);
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
        "" => bail!(
            "the machine ended ({ended}) before the tests did; its last words ({console:?}):\n{}",
            last_words(&console)
        ),
        code => bail!("tests failed on {} (exit code {code})", kernel.release),
    }
}
