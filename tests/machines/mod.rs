//! The Debian package, installed on hosts that systemd runs, and the unit in it.
//!
//! * [`machine`] — a host with systemd as process 1 and a root file system of its own
//! * [`docker`] — Docker's unit with the drop-in
//! * [`unit`] — what systemd's own tools say of the units

mod docker;
mod machine;
mod unit;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use tempfile::TempDir;
use xtask::{
    dist::{self, Effort},
    process::output,
    progress::wait_for,
};

use self::machine::Machine;
use crate::world::{SOON, World, agent};

const UNIT: &str = "flannel-agent.service";
const SETTINGS: &str = "/etc/default/flannel-agent";

/// What is packed of the programs that the tests run, once for all of them: package, archive, list of crates, checksums.
fn packed() -> &'static [PathBuf] {
    static PACKED: OnceLock<Vec<PathBuf>> = OnceLock::new();
    PACKED.get_or_init(|| {
        let programs = agent().parent().unwrap().to_owned();
        dist::pack(&programs, &programs.join("packed"), Effort::Quick).unwrap()
    })
}

/// The package.
fn package() -> &'static Path {
    packed().iter().find(|path| path.extension().is_some_and(|extension| extension == "deb")).unwrap()
}

fn install(machine: &Machine) {
    let package = package();
    let name = package.file_name().unwrap().to_str().unwrap();
    fs::copy(package, machine.path("/tmp").join(name)).unwrap();
    // The triggers are other packages': an index of manual pages, which takes seconds. One that waits for a store does not end.
    machine.run(&format!("timeout 60 dpkg --no-triggers --install /tmp/{name}"));
}

#[test]
fn hosts_with_the_package_talk_as_soon_as_they_know_their_store() {
    let mut world = World::new(2);
    let machines: Vec<_> = world.hosts.iter().map(Machine::boot).collect();
    forbid_starts(&machines[1]);
    for (machine, state) in machines.iter().zip(["activating", "inactive"]) {
        install(machine);
        // Installing does not wait for it, and it waits for a store.
        machine.wait_unit(UNIT, state);
        assert_eq!(machine.run(&format!("systemctl is-enabled {UNIT}")).trim(), "enabled");
        tell_store(machine, &world);
    }
    for (host, machine) in world.hosts.iter_mut().zip(&machines) {
        let subnet = machine.subnet_for(host);
        host.add_pod_in(&subnet).unwrap();
    }
    world.wait_connected(0, 1);

    assert_confined(&machines[0]);
    // What an operator runs, by its installed name.
    wait_for("a status", SOON, || machines[0].attempt("flannel-agent status").is_ok()).unwrap();
    assert!(machines[0].path("/usr/share/man/man1/flannel-agent-status.1.gz").exists());

    // A crash, and the package once more, as an upgrade does.
    let traffic = world.traffic(0, 1);
    let before = machines[0].property(UNIT, "MainPID");
    machines[0].run(&format!("systemctl kill --signal=KILL {UNIT}"));
    wait_for_another(&machines[0], &before);
    let before = machines[0].property(UNIT, "MainPID");
    install(&machines[0]);
    wait_for_another(&machines[0], &before);
    let settings = fs::read_to_string(machines[0].path(SETTINGS)).unwrap();
    assert!(settings.starts_with("FLANNELD_ETCD_ENDPOINTS="), "the administrator's file was replaced: {settings}");
    machines[0].run(&format!("systemctl stop {UNIT}"));
    assert_eq!(machines[0].property(UNIT, "Result"), "success", "{}", machines[0].journal(UNIT));
    // Who stopped it wants it stopped.
    install(&machines[0]);
    assert_eq!(machines[0].property(UNIT, "ActiveState"), "inactive");
    traffic.assert_nothing_was_lost();

    // With the package goes what it made.
    machines[0].run(&format!("systemctl start {UNIT}"));
    machines[0].run("dpkg --no-triggers --purge flannel-agent");
    assert!(world.hosts[0].netns.ip("link show flannel.1").is_err(), "flannel.1 exists");
    for gone in [SETTINGS, "/usr/bin/flannel-agent", "/sys/fs/bpf/flannel/1", "/run/flannel/subnet.env"] {
        assert!(!machines[0].path(gone).exists(), "{gone} exists");
    }
}

/// Writes where the store is, and waits for the agent.
fn tell_store(machine: &Machine, world: &World) {
    fs::write(machine.path(SETTINGS), format!("FLANNELD_ETCD_ENDPOINTS={}\n", world.store.endpoint())).unwrap();
    machine.run(&format!("systemctl restart {UNIT}"));
    machine.wait_unit(UNIT, "active");
}

/// Has an administrator forbid packages to start services.
fn forbid_starts(machine: &Machine) {
    let policy = machine.path("/usr/sbin/policy-rc.d");
    fs::write(&policy, "#!/bin/sh\nexit 101\n").unwrap();
    fs::set_permissions(policy, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Waits until another agent than that of this process is ready.
fn wait_for_another(machine: &Machine, before: &str) {
    wait_for("another agent", SOON, || !["0", before].contains(&&*machine.property(UNIT, "MainPID"))).unwrap();
    machine.wait_unit(UNIT, "active");
}

/// That the agent runs with the capabilities of its unit, below its filter of system calls, and that it complains of nothing.
fn assert_confined(machine: &Machine) {
    let id = machine.property(UNIT, "MainPID");
    let status = machine.run(&format!("cat /proc/{id}/status"));
    let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned();
    let expected = unit::capabilities();
    for key in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(u64::from_str_radix(&value(key), 16).unwrap(), expected, "{key}");
    }
    assert_eq!([value("NoNewPrivs:"), value("Seccomp:")], ["1", "2"]);
    assert_ne!(machine.property(UNIT, "WatchdogTimestampMonotonic"), "0");
    // What it says of the store that it did not know yet came before.
    let journal = machine.journal(&format!("{UNIT} _PID={id}"));
    assert!(!journal.is_empty() && !journal.contains("WARN") && !journal.contains("ERROR"), "{journal}");
}

#[test]
fn packed_twice_is_the_same() {
    let again = TempDir::new().unwrap();
    let second = dist::pack(agent().parent().unwrap(), again.path(), Effort::Quick).unwrap();
    for (first, second) in packed().iter().zip(second) {
        assert_eq!(first.file_name(), second.file_name());
        assert!(fs::read(first).unwrap() == fs::read(&second).unwrap(), "{first:?}");
    }
    output(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(again.path())).unwrap();
}
