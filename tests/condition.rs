//! `flannel-agent status` of an agent that does not answer; its short forms, and as a probe.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Output, Stdio},
};

use nix::{
    mount::{MsFlags, mount, umount},
    sys::signal::Signal,
};
use serde_json::json;
use xtask::{lab::PREFIX, progress::wait_for};

use crate::world::{CONFIG, SOON, World, lease_value};

fn status(world: &World, arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = world.agent_on(0).arg("status").args(arguments).output().unwrap();
    (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

/// Exit codes of the probes: startup, live, ready.
fn probes(world: &World) -> [Option<i32>; 3] {
    ["startup", "live", "ready"].map(|check| status(world, &["--check", check]).0)
}

#[test]
fn an_agent_that_hangs_is_asked_and_what_it_wrote_is_not_told_as_of_now() {
    let world = World::with_agents(1);
    assert_eq!(status(&world, &["--wait"]).0, Some(0));
    assert_eq!(probes(&world), [Some(0); 3]);
    let agent = world.hosts[0].agent.as_ref().unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    let (code, text) = status(&world, &[]);
    let said = "look at    the agent runs and does not answer within 2s: it was stopped (SIGSTOP";
    assert!(code == Some(3) && text.contains(said) && text.contains("; this is from "), "{text}");
    assert!(!text.contains("all is well"), "{text}");
    world.assert_shown(0, "the agent runs and does not answer within 2s", &[]);
    let shown = world.status(0);
    assert_eq!((&shown["running"], &shown["answers"]), (&json!(true), &json!(false)));
    assert_eq!(probes(&world), [Some(0), Some(3), Some(3)]);
    let (code, text) = status(&world, &["--check=live"]);
    assert!(code == Some(3) && text.starts_with("flannel.1: the agent runs and does not answer"), "{text}");
    agent.signal(Signal::SIGCONT).unwrap();
    assert_eq!(status(&world, &["--wait", "--brief"]).0, Some(0));
    assert_eq!(probes(&world), [Some(0); 3]);
    assert_eq!(world.status(0)["answers"], true);
}

/// A directory that nothing can be written to until this is dropped.
struct ReadOnly<'a>(&'a Path);

impl<'a> ReadOnly<'a> {
    fn make(directory: &'a Path) -> Self {
        let set = |flags| mount(Some(directory), directory, None::<&str>, flags, None::<&str>).unwrap();
        set(MsFlags::MS_BIND);
        let made = Self(directory);
        set(MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
        made
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        umount(self.0).unwrap();
    }
}

#[test]
fn a_status_that_cant_be_written_is_not_told_as_of_now() {
    let world = World::with_agents(1);
    assert_eq!(status(&world, &["--wait"]).0, Some(0));
    let run_dir = world.hosts[0].run_dir();
    let disk = ReadOnly::make(&run_dir);
    world
        .store
        .put(&format!("{PREFIX}/subnets/10.5.7.0-24"), &lease_value("192.168.64.7", "0a:00:00:00:00:07"))
        .unwrap();
    wait_for("it to be told", SOON, || {
        let (code, text) = status(&world, &[]);
        code == Some(3)
            && text.contains("look at    the agent can't write its status: ")
            && text.contains("; this is from ")
    })
    .unwrap();
    world.assert_shown(0, "the agent can't write its status", &[]);
    assert_eq!(probes(&world), [Some(0); 3], "pods are served");
    drop(disk);
    let (code, text) = status(&world, &["--wait"]);
    assert!(code == Some(0) && text.contains("all is well"), "{text}");
}

#[test]
fn probes_and_those_who_wait_are_told_of_each_step_of_the_start() {
    let mut world = World::without_config(1);
    for arguments in [&["--check=startup"][..], &["--wait", "--timeout=1"]] {
        let (code, text) = status(&world, arguments);
        assert!(code == Some(1) && text.contains("no agent has run"), "{text}");
    }
    let waits = |arguments: &[&str]| {
        let mut command = world.agent_on(0);
        command.arg("status").args(arguments).stdout(Stdio::piped()).spawn().unwrap()
    };
    let until_ready = waits(&["--wait", "--check=ready"]);
    let until_well = waits(&["--wait", "--brief"]);
    world.start(0, &[]);
    wait_for("it to begin", SOON, || status(&world, &["--check=startup"]).0 == Some(0)).unwrap();
    assert_eq!(probes(&world), [Some(0), Some(0), Some(3)]);
    let (_, text) = status(&world, &["--check=ready"]);
    assert!(text.starts_with("the agent waits: ") && text.contains("flannel config not found"), "{text}");
    world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    let ended = |child: std::process::Child| {
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(ended(until_ready), (Some(0), String::new()));
    let (code, text) = ended(until_well);
    assert!(
        code == Some(0) && text.starts_with("flannel.1: 10.5.") && text.ends_with(" by eth0, 0 peers: all is well\n"),
        "{text}"
    );
    assert_eq!(probes(&world), [Some(0); 3]);
}

#[test]
fn it_is_brief_or_has_each_pod_or_is_printed_again_and_again() {
    let world = World::with_agents(1);
    world.wait_pods(0);
    assert_eq!(status(&world, &["--wait"]).0, Some(0));
    let (_, text) = status(&world, &[]);
    assert!(text.contains("from_pod at the veth of 1 pod: attached") && !text.contains(" at pod1: "), "{text}");
    let (_, text) = status(&world, &["--pods"]);
    assert!(text.contains("from_pod at pod1: attached") && !text.contains("the veth of"), "{text}");
    world.hosts[0].netns.ip("link set dev cni0 mtu 1500").unwrap();
    world.hosts[0].netns.exec("sysctl -qw net/ipv4/conf/cni0/forwarding=0").unwrap();
    wait_for("the trouble", SOON, || status(&world, &["--brief"]).1.contains(": look at: ")).unwrap();
    let (code, text) = status(&world, &["--brief"]);
    assert!(code == Some(3) && text.lines().count() == 1 && text.contains("cni0"), "{text}");
    world.hosts[0].netns.exec("sysctl -qw net/ipv4/conf/cni0/forwarding=1").unwrap();

    let mut command: Command = world.agent_on(0);
    let mut watch = command.args(["status", "--watch", "--brief"]).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    assert_eq!(lines.map_while(Result::ok).filter(|line| line.starts_with("flannel.1: ")).take(2).count(), 2);
    watch.kill().unwrap();
    watch.wait().unwrap();
    let (code, text) = status(&world, &["--watch", "--wait"]);
    assert!(code == Some(2) && text.contains("--wait"), "{text}");
}
