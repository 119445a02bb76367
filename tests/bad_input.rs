//! Bad input of every kind: one line that says what and what to do, an exit code where it is final, patience where it
//! may heal, and nothing half-made.

use std::{process::Command, time::Duration};

use nix::sys::signal::Signal;
use xtask::{lab::PREFIX, process::Process};

use crate::world::{CONFIG, SOON, World, agent, is_delivered};

/// Waits for the end of a host's agent; its exit code and the line that it ended with.
pub fn end_of<S>(world: &mut World<S>, host: usize) -> (Option<i32>, String) {
    let agent = world.hosts[host].agent.as_mut().unwrap();
    let status = agent.wait(SOON).unwrap();
    (status.code(), agent.log().lines().last().unwrap_or_default().to_owned())
}

#[test]
fn a_bad_network_config_is_named_and_waited_out() {
    let mut world = World::without_config(1);
    world.start(0, &[]);
    world.wait_log(0, "flannel config not found in etcd store. Did you create your config using etcdv3 API?");
    for (config, reason) in [
        ("not json", "not a JSON object: expected ident at line 1 column 2"),
        (r#"{"Newtork": "10.5.0.0/16"}"#, r#"it has "Newtork", did you mean "Network"?"#),
        (
            r#"{"Network": "10.5.0.0/16", "SubnetLen": "26"}"#,
            r#"SubnetLen: "26" is a string, expected a whole number (as in "SubnetLen": 26)"#,
        ),
        (r#"{"Backend": {"Type": "vxlan"}}"#, "please define a correct Network parameter in the flannel config"),
        (
            r#"{"Network": "10.5.0.0/29"}"#,
            "network is too small. Minimum useful network prefix is /28 (Network: 10.5.0.0/29)",
        ),
        (r#"{"Network": "10.5.0.0/16", "SubnetLen": 17}"#, "network must be able to accommodate at least four subnets"),
        (
            r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 16777216}}"#,
            "Backend.VNI: 16777216 is out of range, expected 0 to 9999999",
        ),
        (r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "ipsec"}}"#, "unknown backend type: ipsec"),
    ] {
        world.store.put(&format!("{PREFIX}/config"), config).unwrap();
        world.wait_log(0, reason);
    }
    world.assert_untouched(0);
    world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    world.hosts[0].wait_ready().unwrap();
}

#[test]
fn waiting_ends_at_once_when_asked() {
    let mut world = World::without_config(1);
    world.start(0, &[]);
    world.wait_log(0, "flannel config not found");
    let agent = world.hosts[0].agent.as_mut().unwrap();
    agent.signal(Signal::SIGTERM).unwrap();
    assert!(agent.wait(Duration::from_secs(3)).unwrap().success());
    world.assert_untouched(0);
}

#[test]
fn an_absent_etcd_is_named_and_waited_out() {
    let mut world = World::new(2);
    world.store.stop();
    world.start(0, &[]);
    world.wait_log(0, "check --etcd-endpoints, and that etcd runs");
    world.assert_untouched(0);
    world.store.resume().unwrap();
    world.hosts[0].wait_ready().unwrap();
}

#[test]
fn an_endpoint_that_is_dead_costs_nothing_beside_one_that_lives() {
    let mut world = World::new(1);
    // As with flannel's default endpoints, of which only the second exists on most hosts.
    let dead = "http://192.168.64.254:4001,";
    let endpoints = format!("--etcd-endpoints={dead}{}", world.store.endpoint());
    let mut command = world.agent_on(0);
    command.arg(endpoints);
    let log = world.lab.directory().join("agent.log");
    world.hosts[0].agent = Some(Process::start(&mut command, &log).unwrap());
    world.hosts[0].wait_ready().unwrap();
    assert!(!world.hosts[0].agent.as_ref().unwrap().log().contains("WARN"));
}

#[test]
fn traffic_goes_on_while_etcd_is_away_and_changes_are_seen_after() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    world.store.stop();
    world.wait_log(0, "the watch on the leases ended");
    assert!(is_delivered(&world.hosts[0].pods[0].netns, &world.hosts[1].pods[0].address.to_string()));
    world.store.resume().unwrap();
    let late = world.lab.host("node3", 3).unwrap();
    world.hosts.push(late);
    world.start(2, &[]);
    world.hosts[2].wait_ready().unwrap();
    world.hosts[2].add_pod().unwrap();
    world.wait_connected(0, 2);
}

#[test]
fn a_wrong_password_is_named() {
    let mut world = World::new(1);
    for command in [&["user", "add", "root:right"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]] {
        // Roles exist only once they are made.
        if command[1] == "grant-role" {
            world.store.etcdctl(&["role", "add", "root"]).unwrap();
        }
        world.store.etcdctl(command).unwrap();
    }
    world.start(0, &["--etcd-username=root", "--etcd-password=wrong"]);
    world.wait_log(0, "check --etcd-username and --etcd-password");
    let status = world.agent_on(0).arg("status").output().unwrap();
    let text = String::from_utf8_lossy(&status.stdout);
    assert!(text.contains("look at") && text.contains("check --etcd-username and --etcd-password"), "{text}");
    assert!(!text.contains("wrong"), "{text}");
    world.assert_untouched(0);
    world.start(0, &["--etcd-username=root", "--etcd-password=right"]);
    world.hosts[0].wait_ready().unwrap();
}

#[test]
fn a_host_without_a_usable_interface_is_told_so() {
    let mut world = World::new(1);
    for (flag, reason) in [
        ("--iface=eth7", "nothing matches --iface=eth7; there are lo eth0"),
        ("--iface-can-reach=203.0.113.1", "look up the route to 203.0.113.1: Network is unreachable"),
    ] {
        world.hosts[0].netns.exec("ip route flush default").unwrap_or_default();
        world.start(0, &[flag]);
        let (code, line) = end_of(&mut world, 0);
        assert!(matches!(code, Some(77 | 1)), "{line}");
        assert!(line.contains(reason), "{line}");
    }
    world.start(0, &[]);
    let (code, line) = end_of(&mut world, 0);
    assert_eq!(code, Some(77));
    assert!(line.contains("there is no default route; name the interface with --iface"), "{line}");
    world.assert_untouched(0);
}

#[test]
fn a_pin_directory_on_another_file_system_is_told_so() {
    let world = World::new(1);
    let elsewhere = world.lab.directory().join("pins");
    let mut command = world.hosts[0].netns.command(&agent().to_string_lossy());
    command.arg("--bpf-pin-dir").arg(&elsewhere).arg("--run-dir").arg(world.hosts[0].run_dir());
    let result = command.output().unwrap();
    assert_eq!(result.status.code(), Some(77));
    let text = String::from_utf8_lossy(&result.stderr);
    assert!(text.contains("is not on a bpf file system; mount one with `mount -t bpf bpf"), "{text}");
    assert!(!elsewhere.exists());
    world.assert_untouched(0);
}

#[test]
fn missing_capabilities_are_named() {
    let world = World::new(1);
    for (dropped, named) in [("bpf", "CAP_BPF"), ("net_admin", "CAP_NET_ADMIN")] {
        let mut command = world.hosts[0].netns.command("setpriv");
        command.args([&format!("--bounding-set=-{dropped}"), &format!("--inh-caps=-{dropped}")]);
        command.arg(agent()).arg("--bpf-pin-dir").arg(world.hosts[0].pin_dir());
        let result = command.output().unwrap();
        let text = String::from_utf8_lossy(&result.stderr);
        assert_eq!(result.status.code(), Some(77), "{text}");
        assert!(text.contains(&format!("the capability {named} is missing; run as root")), "{text}");
    }
    world.assert_untouched(0);
}

#[test]
fn a_renewal_margin_that_flannel_refuses_is_refused() {
    let world = World::new(1);
    for margin in ["0", "1440"] {
        let mut command = world.agent_on(0);
        let result = command.arg(format!("--subnet-lease-renew-margin={margin}")).output().unwrap();
        assert_eq!(result.status.code(), Some(78));
        let text = String::from_utf8_lossy(&result.stderr);
        assert!(text.contains("Invalid subnet-lease-renew-margin option, out of acceptable range"), "{text}");
    }
    world.assert_untouched(0);
}

#[test]
fn bad_flags_are_refused_before_anything_is_done() {
    for arguments in [&["--no-such-flag"][..], &["--public-ip=nonsense"], &["--iface-regex=("], &["no-such-command"]] {
        let result = Command::new(agent()).args(arguments).output().unwrap();
        assert_eq!(result.status.code(), Some(2), "{arguments:?}");
    }
    let version = Command::new(agent()).arg("-version").output().unwrap();
    assert!(version.status.success() && String::from_utf8_lossy(&version.stderr).starts_with("0."));
}
