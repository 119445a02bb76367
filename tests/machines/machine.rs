//! A host that systemd runs: process 1 of its own namespaces, with a root file system of its own and services of its own, on the
//! network namespace of a lab's host.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::Signal;
use xtask::{
    lab::{Host, Subnet},
    process::{Process, output},
    progress::wait_for,
};

use crate::world::SOON;

pub struct Machine {
    /// `unshare`, whose child is systemd.
    process: Process,
    init: u32,
    group: PathBuf,
    /// The host's network namespace.
    network: String,
}

impl Machine {
    /// Boots one, up to the end of its start.
    pub fn boot(host: &Host) -> Self {
        let group = control_groups().join(host.netns.name());
        fs::create_dir(&group).unwrap();
        let top = host.directory().join("machine");
        fs::create_dir_all(&top).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("machines/boot.sh");
        let enter = "echo 0 > \"$0/cgroup.procs\" && exec unshare --mount --pid --fork --cgroup --ipc --uts \
                     --kill-child=KILL sh \"$1\" \"$2\"";
        let mut command = host.netns.command("sh");
        command.args(["-c", enter]).arg(&group).arg(script).arg(&top);
        let process = Process::start(&mut command, &host.directory().join("machine.log")).unwrap();
        let children = format!("/proc/{0}/task/{0}/children", process.id());
        let mut machine = Self { process, init: 0, group, network: host.netns.path() };
        let found = wait_for("systemd", SOON, || {
            let children = fs::read_to_string(&children).unwrap_or_default();
            machine.init = children.trim().parse().unwrap_or(0);
            fs::read_to_string(format!("/proc/{}/comm", machine.init)).is_ok_and(|name| name.trim() == "systemd")
        });
        assert!(found.is_ok(), "{}", machine.process.log());
        let up = wait_for("the start", SOON, || {
            machine.command("systemctl").arg("is-system-running").output().unwrap().stdout == b"running\n"
        });
        assert!(up.is_ok(), "{}\n{}", machine.process.log(), machine.run("systemctl --no-pager list-jobs"));
        machine
    }

    /// A command to run there, as root.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string()]).arg(format!("--net={}", self.network));
        command.args(["--mount", "--pid", "--cgroup", "--ipc", "--uts", "--root", "--wd", "--"]).arg(program);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Runs a command line, words divided by spaces, and returns what it printed.
    pub fn run(&self, line: &str) -> String {
        self.attempt(line).unwrap()
    }

    pub fn attempt(&self, line: &str) -> Result<String, String> {
        let mut words = line.split_whitespace();
        output(self.command(words.next().unwrap()).args(words)).map_err(|error| format!("{error:#}"))
    }

    /// A file there, as it is seen from here.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.run(&format!("systemctl show --value --property={name} {unit}")).trim().to_owned()
    }

    /// Waits until a unit is as `systemctl is-active` says.
    pub fn wait_unit(&self, unit: &str, state: &str) {
        let waited = wait_for(state, SOON, || self.property(unit, "ActiveState") == state);
        assert!(waited.is_ok(), "{unit}: {}\n{}", self.property(unit, "ActiveState"), self.journal(unit));
    }

    /// What a unit printed.
    pub fn journal(&self, unit: &str) -> String {
        self.run(&format!("journalctl --no-pager --output=cat --unit={unit}"))
    }

    /// Has the host take the subnet that the agent there was given.
    pub fn subnet_for(&self, host: &Host) -> Subnet {
        fs::create_dir_all(host.run_dir()).unwrap();
        fs::copy(self.path("/run/flannel/subnet.env"), host.run_dir().join("subnet.env")).unwrap();
        host.subnet().unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // With `unshare` goes systemd, and with it all that it started and mounted.
        let _gone = self.process.signal(Signal::SIGKILL);
        let _reaped = self.process.wait(SOON);
        let emptied = wait_for("the end of a machine", SOON, || remove_groups(&self.group).is_ok());
        if let Err(error) = emptied {
            eprintln!("{:?}: {error}", self.group);
        }
    }
}

/// Removes control groups from the leaves on.
fn remove_groups(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove_groups(&entry.path())?;
    }
    fs::remove_dir(group)
}

/// Where the second version of control groups is mounted.
fn control_groups() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    PathBuf::from(mounts.find(|fields| fields[2] == "cgroup2").expect("cgroup2 is mounted")[1])
}
