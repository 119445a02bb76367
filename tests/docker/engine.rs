//! A Docker Engine of a host: Debian's, with its own containerd, in the host's network namespace.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use xtask::{
    lab::{Host, Netns, Pod},
    process::{Process, output},
    progress::wait_for,
};

use crate::world::SOON;

const IMAGE: &str = "busybox";
/// Docker itself waits 15 s for its containers.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Takes the options as Docker's unit does, with `EnvironmentFile=-`. `$0` is that file.
///
/// Process ids, mounts and what Docker keeps in `/run` and `/etc` are the engine's own, and end with its first process.
const START: &str = r#"mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /etc/docker || exit
[ ! -f "$0" ] || . "$0"
exec docker-init -- dockerd $DOCKER_OPTS "$@""#;

pub struct Engine {
    /// `unshare`, which ends with the engine's first process.
    process: Process,
    socket: PathBuf,
    /// What its containers' namespaces are named by, and its control group.
    name: String,
}

impl Engine {
    /// Starts it with the options that are in the host's `docker_opts.env`, if there are any, and none of the machine's.
    pub fn start(host: &Host) -> Self {
        let name = host.netns.name().to_owned();
        let directory = host.run_dir().parent().unwrap().to_owned();
        fs::create_dir_all(&directory).unwrap();
        let socket = directory.join("docker.sock");
        let mut command = host.netns.command("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", START]);
        command.arg(options_file(host)).arg("--host").arg(format!("unix://{}", socket.display()));
        // As where there is no systemd, so that this is the same on all machines.
        command.args(["--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", &format!("/{name}")]);
        command.args(["--data-root", "/run/docker-data"]);
        let process = Process::start(&mut command, &directory.join("docker.log")).unwrap();
        let mut engine = Self { process, socket, name };
        let ready = wait_for("Docker", SOON, || {
            engine.command("info").output().unwrap().status.success() || !matches!(engine.process.status(), Ok(None))
        });
        let runs = ready.is_ok() && matches!(engine.process.status(), Ok(None));
        assert!(runs, "Docker does not come up:\n{}", engine.process.log());
        engine
    }

    /// Runs the client and returns what it printed.
    pub fn docker(&self, line: &str) -> String {
        output(&mut self.command(line)).unwrap_or_else(|error| panic!("{error:#}\n{}", self.process.log()))
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}", self.socket.display())).args(line.split_whitespace());
        command
    }

    /// Makes an image that holds nothing but busybox.
    pub fn import_image(&self) {
        let archive = self.socket.with_file_name("image.tar");
        let mut tar = Command::new("tar");
        output(tar.args(["--create", "--directory=/", "bin/busybox", "--file"]).arg(&archive)).unwrap();
        self.docker(&format!("import {} {IMAGE}", archive.display()));
    }

    /// Runs a container, and gives its network namespace a name.
    pub fn run(&self, name: &str) -> Pod {
        self.docker(&format!("run --detach --init --name {name} {IMAGE} busybox sleep 1000"));
        let inspect = |field: &str| self.docker(&format!("inspect --format={{{{{field}}}}} {name}")).trim().to_owned();
        let address = inspect(".NetworkSettings.Networks.bridge.IPAddress").parse().unwrap();
        // The number is one of the engine's own.
        let file = format!("/proc/{}/root/proc/{}/ns/net", self.first_process().unwrap(), inspect(".State.Pid"));
        Pod { netns: Netns::attach(&format!("{}-{name}", self.name), Path::new(&file)).unwrap(), address }
    }

    fn first_process(&self) -> Option<Pid> {
        let id = self.process.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).ok()?;
        Some(Pid::from_raw(children.trim().parse().ok()?))
    }
}

/// That no engine of a host, no container and none of their control groups is left, and nothing but the agent runs there.
pub fn assert_gone(host: &Host) {
    let processes = output(Command::new("ip").args(["netns", "pids", host.netns.name()])).unwrap();
    assert_eq!(processes.trim(), host.agent.as_ref().unwrap().id().to_string());
    assert_eq!(control_groups(host.netns.name()), Vec::<PathBuf>::new());
}

/// Where `docker-opts` writes for a host.
pub fn options_file(host: &Host) -> PathBuf {
    host.run_dir().join("docker_opts.env")
}

impl Drop for Engine {
    fn drop(&mut self) {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            if let (Ok(None), Some(process)) = (self.process.status(), self.first_process()) {
                let _gone = kill(process, signal);
                let _stopped = self.process.wait(STOP_LIMIT);
            }
        }
        remove_control_groups(&self.name);
    }
}

/// The control groups of that name, one in each hierarchy.
fn control_groups(name: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let hierarchies = fields.filter(|fields| fields[2].starts_with("cgroup"));
    hierarchies.map(|fields| Path::new(fields[1]).join(name)).filter(|group| group.exists()).collect()
}

/// Removes what Docker leaves of a `--cgroup-parent`.
fn remove_control_groups(name: &str) {
    for group in control_groups(name) {
        // A container's own is left only where Docker was killed.
        for container in fs::read_dir(&group).into_iter().flatten().flatten() {
            let _file = fs::remove_dir(container.path());
        }
        let _busy = fs::remove_dir(&group);
    }
}
