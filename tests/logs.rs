//! The log: as JSON, as the journal takes it, and what is repeated.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    process::{Child, Command},
};

use serde_json::Value;
use xtask::progress::wait_for;

use crate::world::{SOON, World};

/// An agent whose log goes to a file, and which is ended with this.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _ended = self.0.wait();
    }
}

fn command(world: &World, arguments: &[&str]) -> Command {
    let mut command = world.agent_on(0);
    command.args(arguments).arg("--etcd-endpoints=http://192.168.64.254:1");
    command
}

#[test]
fn each_line_is_an_object() {
    let world = World::without_config(1);
    let path = world.lab.directory().join("json.log");
    let log = || fs::read_to_string(&path).unwrap();
    let mut command = command(&world, &["--log-format=json", "-v=1"]);
    let _agent = Agent(command.stderr(File::create(&path).unwrap()).spawn().unwrap());
    wait_for("a warning", SOON, || log().contains(r#""level":"WARN""#)).unwrap();
    let text = log();
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let keys: Vec<_> = event.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys[..3], ["timestamp", "level", "message"], "{line}");
        assert!(event["timestamp"].as_str().unwrap().ends_with('Z'), "{line}");
    }
    let warning = text.lines().find(|line| line.contains("WARN")).unwrap();
    assert!(warning.contains("192.168.64.254:1") && warning.contains("onnection refused"), "{warning}");
    assert!(!warning.contains("transport error") && !warning.contains("tcp connect error"), "{warning}");
}

#[test]
fn the_journal_is_told_the_priority_of_each_line() {
    let world = World::without_config(1);
    let path = world.lab.directory().join("journal");
    let file = File::create(&path).unwrap();
    let stream = file.metadata().map(|file| format!("{}:{}", file.dev(), file.ino())).unwrap();
    let log = || fs::read_to_string(&path).unwrap();
    let mut to_journal = command(&world, &[]);
    let agent = Agent(to_journal.env("JOURNAL_STREAM", &stream).stderr(file).spawn().unwrap());
    wait_for("a warning", SOON, || log().lines().any(|line| line.starts_with("<4>"))).unwrap();
    let text = log();
    assert!(text.lines().all(|line| line.starts_with("<4>") || line.starts_with("<6>")), "{text}");
    assert!(!text.contains("WARN") && !text.contains('Z'), "{text}");
    drop(agent);
    // What was inherited from a service that logs elsewhere.
    let other = world.lab.directory().join("text");
    let mut to_text = command(&world, &[]);
    let file = File::create(&other).unwrap();
    let _agent = Agent(to_text.env("JOURNAL_STREAM", &stream).stderr(file).spawn().unwrap());
    wait_for("a warning", SOON, || fs::read_to_string(&other).unwrap().contains(" WARN ")).unwrap();
}
