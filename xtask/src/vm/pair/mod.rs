//! Two machines that are connected by NICs that qemu emulates, with an agent and a pod on each and etcd on the first. What
//! the NICs' drivers do with checksums and segmentation no veth does.
//!
//! # Layout
//!
//! * `checks` — what is checked, each written once, on this side
//! * `steps` — what checks are made of
//! * `machine` — one of the two, from outside: booted, asked, reset
//! * `wire` — what connects them
//! * `nic` — which NICs there are
//! * `protocol` — what is asked by the serial port
//! * `guest`, `echo` — the machine's side of it, and what its pod says to the other's

mod checks;
mod echo;
mod guest;
mod machine;
mod nic;
mod protocol;
mod steps;
mod wire;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

pub use self::guest::{GuestOptions, guest};
pub(super) use self::nic::Nic;
use self::{
    checks::Check,
    machine::{Booting, Machine, Parts},
    protocol::Request,
    wire::Wire,
};
use super::{
    Contents, Kernel, Options, build_agent,
    image::{self, AGENT, XTASK},
    this_program, within_folder,
};
use crate::{
    lab::address,
    progress::{heading, step, wait_for},
    setup,
};

/// Programs beside those of one machine, and the Debian package of each.
const PROGRAMS: [(&str, &str); 1] = [("mke2fs", "e2fsprogs")];

/// Where each machine has its disk.
const DISK: &str = "/disk";

/// What the first process does: drivers, the disk, and what is asked by the serial port. Nothing loads a driver for a device
/// that is found at boot, for there is no udev.
const INIT: &str = r"
modprobe -a virtio_pci virtio_blk @DRIVER@
mount -t ext4 /dev/vda @DISK@
stty -F /dev/ttyS1 raw -echo
RUST_BACKTRACE=1 LAB_PATIENCE=@PATIENCE@ /@XTASK@ guest $number /dev/ttyS1 /@AGENT@ @DISK@
echo o > /proc/sysrq-trigger
sleep 60
";

/// For what is to happen soon. On an emulated processor the kernel takes its time to verify the agent's programs.
const SOON: Duration = Duration::from_secs(60);
/// What pods echo at.
const PORT: u16 = 7;

/// The two of them.
pub(super) struct Pair<'a> {
    /// By which they are connected.
    nic: Nic,
    /// The kernel's version.
    kernel: [u32; 2],
    /// What times are multiplied by.
    patience: u32,
    machines: [Machine<'a>; 2],
    /// Where each pod echoes.
    pods: [SocketAddrV4; 2],
}

/// etcd's URL, on the first machine.
fn store_endpoint() -> String {
    format!("http://{}:2379", address(1))
}

/// Boots two machines for each NIC, and has all checked.
///
/// # Errors
/// Where a check fails, or a machine can't be made.
pub(super) fn run(options: &Options, name: &str, directory: &Path) -> Result<()> {
    setup::ensure_programs(&PROGRAMS)?;
    wire::remove_leftovers()?;
    let agent = build_agent()?;
    for nic in &options.nic {
        let flavour = nic.flavour();
        let kernel = step(&format!("Debian's kernel {name}"), || Kernel::get(name, flavour, directory))?;
        within_folder(directory, |folder| with_nic(options, *nic, &kernel, &agent, folder))?;
    }
    Ok(())
}

fn with_nic(options: &Options, nic: Nic, kernel: &Kernel, agent: &Path, directory: &Path) -> Result<()> {
    let init = [
        ("@DRIVER@", nic.driver()),
        ("@DISK@", DISK),
        ("@PATIENCE@", &options.patience.to_string()),
        ("@XTASK@", XTASK),
        ("@AGENT@", AGENT),
    ];
    let contents = Contents {
        built: &[(agent.to_owned(), AGENT), (this_program()?, XTASK)],
        folders: &[DISK],
        files: &[],
        init: &init.iter().fold(INIT.to_owned(), |text, (name, value)| text.replace(name, value)),
    };
    let initramfs = step("the machines' files", || image::build(kernel, &contents, directory))?;
    let result = with_files(options, nic, kernel, &initramfs, directory);
    fs::remove_file(&initramfs).with_context(|| format!("remove {initramfs:?}"))?;
    result
}

fn with_files(options: &Options, nic: Nic, kernel: &Kernel, initramfs: &Path, directory: &Path) -> Result<()> {
    let start = Instant::now();
    let sockets = tempfile::tempdir()?;
    let wire = Wire::new()?;
    let parts = Parts {
        kernel,
        initramfs,
        nic,
        wire: &wire,
        directory,
        sockets: sockets.path(),
        patience: options.patience,
        deadline: start + Duration::from_secs(60 * options.minutes),
    };
    heading(&format!("{}, two machines with {}", kernel.release, nic.device()));
    let machines = step("both boot", || {
        let [first, second] = [Booting::first(&parts, 1)?, Booting::first(&parts, 2)?];
        Ok([first.ready()?, second.ready()?])
    })?;
    let nobody = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT);
    let mut pair = Pair { nic, kernel: kernel.version()?, patience: options.patience, machines, pods: [nobody; 2] };
    let result = step("an agent and a pod on each", || pair.prepare()).and_then(|()| {
        let chosen = checks::CHECKS.iter().filter(|check| check.is_wanted(options));
        let failed = chosen.filter(|check| pair.fails(check)).count();
        anyhow::ensure!(failed == 0, "{failed} checks failed with {} on {}", nic.device(), kernel.release);
        Ok(())
    });
    if result.is_err() {
        pair.say_logs();
    }
    println!("── {}, {}: {:.0} s ──", kernel.release, nic.device(), start.elapsed().as_secs_f64());
    result
}

impl Pair<'_> {
    /// Runs a check, and says what came of it.
    fn fails(&mut self, check: &Check) -> bool {
        let mut seen = String::new();
        let result = step(check.name(), || {
            // Each would fail of the same, and take its time.
            for machine in &mut self.machines {
                anyhow::ensure!(machine.is_up(), "machine {} has ended, or does not answer", machine.number);
            }
            seen = (check.run)(self)?;
            self.ensure_no_complaints()
        });
        match &result {
            Ok(()) if seen.is_empty() => {}
            Ok(()) => println!("  {seen}"),
            Err(error) => println!("  {error:#}"),
        }
        result.is_err()
    }

    /// Resets a machine, and boots it again.
    fn reset(&mut self, number: usize) -> Result<()> {
        self.machines[number].reset()
    }

    /// Waits until the agent of a machine says so.
    fn wait(&mut self, number: usize, what: &str, condition: impl Fn(&serde_json::Value) -> bool) -> Result<()> {
        let mut status = serde_json::Value::Null;
        let waited = self.wait_until(number, what, |machine| {
            status = machine.status()?;
            Ok(condition(&status))
        });
        waited.map_err(|error| anyhow::anyhow!("{error:#}\n{status:#}"))
    }

    /// Waits until something holds of a machine.
    fn wait_until(
        &mut self,
        number: usize,
        what: &str,
        mut condition: impl FnMut(&mut Machine<'_>) -> Result<bool>,
    ) -> Result<()> {
        let machine = &mut self.machines[number];
        let mut last = None;
        let waited = wait_for(what, SOON * self.patience, || match condition(machine) {
            Ok(holds) => holds,
            Err(error) => {
                last = Some(error);
                false
            }
        });
        match (waited, last) {
            (Ok(_), _) => Ok(()),
            (Err(error), Some(last)) => Err(last.context(error)),
            (Err(error), None) => Err(error),
        }
        .with_context(|| format!("machine {}", number + 1))
    }

    /// What the agents said.
    fn say_logs(&mut self) {
        for machine in &mut self.machines {
            heading(&format!("the agent of machine {}", machine.number));
            match machine.ask(&Request::AgentLog) {
                Ok(log) => println!("{log}"),
                Err(error) => println!("{error:#}"),
            }
        }
    }
}
