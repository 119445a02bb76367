//! What the agent needs, what it keeps, and what it believes of files and of the store's text.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use xtask::{
    lab::{PREFIX, capture::Capture},
    process::{Process, output},
    progress::wait_for,
};

use crate::{
    numbered::kill,
    world::{SOON, World, agent, is_delivered},
};

/// `nobody`.
const USER: u32 = 65534;
/// Their numbers in include/uapi/linux/capability.h.
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;
const PERFMON: u64 = 1 << 38;
const BPF: u64 = 1 << 39;

/// Gives a host's run folder to an ordinary user, and makes a copy of the agent that it can reach.
fn prepare_user(world: &World, host: usize) -> PathBuf {
    let directory = world.lab.directory();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    let binary = directory.join("agent-of-user");
    if !binary.exists() {
        fs::copy(agent(), &binary).unwrap();
    }
    // The folder for pins it makes itself: anybody may on a bpf file system as it is mounted.
    let run = world.hosts[host].run_dir();
    fs::create_dir_all(&run).unwrap();
    chown(&run, Some(USER), Some(USER)).unwrap();
    binary
}

/// The agent on a host as an ordinary user with these capabilities and no others, also none to gain.
fn as_user(world: &World, host: usize, binary: &Path, capabilities: &str) -> Command {
    let only = format!("-all,{capabilities}");
    let mut command = world.hosts[host].netns.command("setpriv");
    command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups"]);
    command.args(["--inh-caps", &only, "--ambient-caps", &only, "--bounding-set", &only, "--"]).arg(binary);
    command.arg("--run-dir").arg(world.hosts[host].run_dir()).arg("--bpf-pin-dir").arg(world.hosts[host].pin_dir());
    command.args(["--etcd-endpoints", world.store.endpoint()]);
    command
}

fn start_as_user(world: &mut World, host: usize, capabilities: &str) {
    let binary = prepare_user(world, host);
    let mut command = as_user(world, host, &binary, capabilities);
    let log = world.lab.directory().join(format!("user-{host}.log"));
    world.hosts[host].agent = Some(Process::start(&mut command, &log).unwrap());
}

/// What threads may lend to nft and iptables, which they start (capabilities(7)).
const CAP_NET_ADMIN: u64 = 1 << 12;

/// That every thread of an agent has these capabilities, no others, and none to gain.
fn assert_capabilities(world: &World, host: usize, bits: u64) {
    let id = world.hosts[host].agent.as_ref().unwrap().id();
    for task in fs::read_dir(format!("/proc/{id}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned();
        let set = |key| u64::from_str_radix(&value(key), 16).unwrap();
        for key in ["CapPrm:", "CapEff:", "CapBnd:"] {
            assert_eq!(set(key), bits, "{key} {status}");
        }
        for key in ["CapInh:", "CapAmb:"] {
            assert_eq!(set(key) & !CAP_NET_ADMIN, 0, "{key} {status}");
        }
        assert_eq!(value("NoNewPrivs:"), "1");
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn two_capabilities_and_no_root_are_enough() {
    let mut world = World::new(2);
    for host in 0..2 {
        start_as_user(&mut world, host, "+bpf,+net_admin");
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    kill(&mut world, 0);
    start_as_user(&mut world, 0, "+bpf,+net_admin");
    world.wait_log(0, "leases in etcd");
    world.wait_connected(0, 1);
    // The programs for a device that somebody uses are others.
    let netns = &world.hosts[0].netns;
    let capture = Capture::start(netns, "flannel.1", "icmp", world.lab.directory()).unwrap();
    wait_restricted(&world, "capture");
    world.wait_connected(0, 1);
    drop(capture);
    netns.exec("tc qdisc add dev flannel.1 root tbf rate 1gbit burst 64kb latency 50ms").unwrap();
    wait_restricted(&world, "queue");
    world.wait_connected(0, 1);
    netns.exec("tc qdisc del dev flannel.1 root").unwrap();
    for host in 0..2 {
        assert_capabilities(&world, host, BPF | NET_ADMIN);
        let log = world.hosts[host].agent.as_ref().unwrap().log();
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
        let forwarding = world.hosts[host].netns.exec("sysctl -n net.ipv4.ip_forward").unwrap();
        assert_eq!(forwarding.trim(), "1");
    }
    let run = world.hosts[0].run_dir();
    let files = [
        ("subnet.env", 0o644),
        ("flannel.1.status.json", 0o644),
        ("flannel.1.leases", 0o600),
        ("flannel.1.lock", 0o600),
        ("flannel.1.sock", 0o600),
    ];
    for (name, expected) in files {
        wait_for(name, SOON, || run.join(name).exists()).unwrap();
        assert_eq!(mode(&run.join(name)), expected, "{name}");
    }
    for pin in fs::read_dir(world.hosts[0].pin_dir().join("1")).unwrap() {
        let pin = pin.unwrap().path();
        assert_eq!(mode(&pin), if pin.is_dir() { 0o755 } else { 0o600 }, "{pin:?}");
    }
}

/// Waits until something of a kind restricts the bypass of the first host.
fn wait_restricted(world: &World, kind: &str) {
    world.wait_status(0, kind, |status| {
        let restrictions = status["bypass"]["restrictions"].as_array();
        restrictions.is_some_and(|all| all.iter().any(|restriction| restriction["kind"] == kind))
    });
}

#[test]
fn one_capability_less_is_said() {
    let mut world = World::new(1);
    for (capability, missing) in [("+bpf", "CAP_NET_ADMIN"), ("+net_admin", "CAP_BPF")] {
        start_as_user(&mut world, 0, capability);
        let status = world.hosts[0].agent.as_mut().unwrap().wait(SOON).unwrap();
        assert_eq!(status.code(), Some(77));
        world.wait_log(0, &format!("the capability {missing} is missing"));
        world.assert_untouched(0);
    }
}

#[test]
fn root_gives_up_what_the_dataplane_does_not_need() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    assert_capabilities(&world, 0, BPF | NET_ADMIN | NET_RAW | PERFMON);
}

#[test]
fn what_belongs_to_another_user_is_said_and_goes_on_as_it_was() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    world.hosts[0].agent = None;
    let run = world.hosts[0].run_dir();
    let (pod, address) = (&world.hosts[0].pods[0], world.hosts[1].pods[0].address.to_string());
    assert!(is_delivered(&pod.netns, &address));

    // First the run folder's files are root's, then only the pins.
    for what in ["flannel.1.lock", "v4"] {
        start_as_user(&mut world, 0, "+bpf,+net_admin");
        let status = world.hosts[0].agent.as_mut().unwrap().wait(SOON).unwrap();
        assert!(!status.success());
        let log = world.hosts[0].agent.as_ref().unwrap().log();
        let line = log.lines().last().unwrap();
        assert!(line.contains("Permission denied") && line.contains("chown"), "{what}: {log}");
        assert!(is_delivered(&world.hosts[0].pods[0].netns, &address), "after {what}");
        output(Command::new("chown").args(["-R", &USER.to_string()]).arg(&run)).unwrap();
    }
    output(Command::new("chown").args(["-R", &USER.to_string()]).arg(world.hosts[0].pin_dir())).unwrap();
    start_as_user(&mut world, 0, "+bpf,+net_admin");
    world.wait_log(0, "leases in etcd");
    world.wait_connected(0, 1);
}

#[test]
fn nobody_else_can_hold_the_lock() {
    let mut world = World::with_agents(1);
    fs::set_permissions(world.lab.directory(), fs::Permissions::from_mode(0o755)).unwrap();
    let lock = world.hosts[0].run_dir().join("flannel.1.lock");
    let as_nobody = || {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups", "--"]);
        command
    };
    let hold = || output(as_nobody().args(["flock", "--nonblock"]).arg(&lock).arg("true"));
    world.hosts[0].agent = None;
    assert!(hold().unwrap_err().to_string().contains("Permission denied"));
    // One that others may read, they may hold.
    fs::set_permissions(&lock, fs::Permissions::from_mode(0o644)).unwrap();
    hold().unwrap();
    world.start(0, &[]);
    world.wait_log(0, "leases in etcd");
    world.hosts[0].agent = None;
    assert!(hold().unwrap_err().to_string().contains("Permission denied"));

    let mut status = as_nobody();
    status.arg(prepare_user(&world, 0)).arg("--run-dir").arg(world.hosts[0].run_dir()).arg("status");
    let shown = String::from_utf8(status.output().unwrap().stdout).unwrap();
    assert!(shown.contains("whether an agent is running, only root and the agent's user can tell"), "{shown}");
}

#[test]
fn symbolic_links_in_the_place_of_files_are_refused() {
    let mut world = World::with_agents(1);
    world.wait_last_known(0);
    let run = world.hosts[0].run_dir();
    let victim = world.lab.directory().join("victim");
    fs::write(&victim, "as it was").unwrap();
    // Whether the agent can do without.
    let files = [
        ("flannel.1.status.json", true, "flannel.1.status.json: replace: it is a symbolic link"),
        ("flannel.1.leases", true, "flannel.1.leases: replace: it is a symbolic link"),
        ("flannel.1.sock", true, "something that is no socket is in its place"),
        ("flannel.1.lock", false, "Too many levels of symbolic links"),
        ("subnet.env", false, "subnet.env: replace: it is a symbolic link"),
    ];
    for (name, can_do_without, words) in files {
        world.hosts[0].agent = None;
        let path = run.join(name);
        fs::remove_file(&path).unwrap();
        symlink(&victim, &path).unwrap();
        world.start(0, &[]);
        world.wait_log(0, words);
        if can_do_without {
            world.wait_log(0, "leases in etcd");
        } else {
            let status = world.hosts[0].agent.as_mut().unwrap().wait(SOON).unwrap();
            assert_eq!(status.code(), Some(1), "{name}");
        }
        world.hosts[0].agent = None;
        assert!(path.is_symlink(), "{name} was replaced");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "as it was", "{name}");
        fs::remove_file(&path).unwrap();
        world.start(0, &[]);
        world.wait_log(0, "leases in etcd");
        wait_for("the file", SOON, || fs::symlink_metadata(&path).is_ok_and(|found| !found.is_symlink())).unwrap();
    }
    assert!(fs::symlink_metadata(run.join("flannel.1.sock")).unwrap().file_type().is_socket());

    // The folder's own place is the operator's business.
    world.hosts[0].agent = None;
    let moved = run.with_file_name("moved");
    fs::rename(&run, &moved).unwrap();
    symlink(&moved, &run).unwrap();
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    world.wait_log(0, "leases in etcd");
}

/// The screen erased, a line of the log forged, the direction of writing turned.
const HOSTILE: &str = "x\u{1b}[2J\u{9b}31m\n2026-01-01T00:00:00.000000Z ERROR forged\r\u{7}\u{202e}\u{7f}";

#[test]
fn nothing_of_the_store_is_obeyed_by_a_terminal() {
    let world = World::with_agents(1);
    let json = |text: &str| serde_json::to_string(text).unwrap();
    let put = |key: &str, value: &str| world.store.put(&format!("{PREFIX}/{key}"), value).unwrap();
    let hostile = json(HOSTILE);
    put(&format!("subnets/{HOSTILE}"), "{}");
    put(&format!("subnets/../../{HOSTILE}/10.5.130.0-24"), "{}");
    put("subnets/10.5.131.0-24", &format!(r#"{{"PublicIP":{hostile},"BackendType":"vxlan"}}"#));
    put("subnets/10.5.132.0-24", &format!(r#"{{"PublicIP":"192.168.64.9","BackendType":{hostile}}}"#));
    put("subnets/10.5.133.0-24", HOSTILE);
    put(
        "subnets/10.5.134.0-24",
        &format!(
            r#"{{"PublicIP":"192.168.64.9","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":{hostile}}}}}"#
        ),
    );
    put("subnets/10.5.135.0-24", &format!(r#"{{{hostile}:1}}"#));
    world.wait_status(0, "the entries", |status| {
        let len = |value: &serde_json::Value| value.as_object().unwrap().len();
        (len(&status["store"]["passedOver"]), len(&status["otherBackends"])) == (6, 1)
    });
    let configs = [
        format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":{hostile}}}}}"#),
        format!(r#"{{"Network":{hostile}}}"#),
        format!(r#"{{{hostile}:1}}"#),
        HOSTILE.to_owned(),
    ];
    let mut before = serde_json::Value::Null;
    for config in configs {
        put("config", &config);
        world.wait_status(0, "the config", |status| {
            !status["configDiffers"].is_null() && status["configDiffers"] != before
        });
        before = world.status(0)["status"]["configDiffers"].clone();
    }
    let is_obeyed = |c: char| c.is_control() && c != '\n' || ('\u{202a}'..='\u{202e}').contains(&c);
    let log = world.hosts[0].agent.as_ref().unwrap().log();
    let status = String::from_utf8(world.agent_on(0).arg("status").output().unwrap().stdout).unwrap();
    let metrics = String::from_utf8(world.agent_on(0).arg("metrics").output().unwrap().stdout).unwrap();
    for (what, text) in [("log", &log), ("status", &status), ("metrics", &metrics)] {
        assert!(!text.contains(is_obeyed), "{what}: {text:?}");
        assert!(!text.lines().any(|line| line.starts_with("2026-01-01")), "{what}: a forged line:\n{text}");
    }
    assert!(log.contains("forged"), "{log}");
    let files = fs::read_dir(world.hosts[0].run_dir()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(files.into_iter().all(|name| !name.to_string_lossy().contains("forged")));
}
