//! A short run of what `cargo xtask chaos` does for hours, and that it sees what it is to see.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use flannel_common::maps::{ABI_VERSION, SUBNETS, VTEPS};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use xtask::{
    chaos::{Invariant, Kind, Report, Schedule, Shape, run_on},
    lab::{Backend, Lab},
    process::output,
    progress::wait_for,
};

use crate::world::{SOON, agent, names};

const SEED: u64 = 5;

/// Runs by a schedule, with something else that goes wrong meanwhile.
fn run(schedule: Schedule, besides: impl FnOnce(&Path) + Send) -> Report {
    let (name, directory) = names();
    let lab = Lab::new(&name, directory.path()).unwrap();
    let logs = directory.path().join("logs");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let besides = scope.spawn(|| {
            besides(lab.directory());
            over.load(Ordering::Relaxed)
        });
        let report = run_on(&lab, schedule, Backend::default(), &agent(), &logs, &AtomicBool::new(false)).unwrap();
        over.store(true, Ordering::Relaxed);
        assert!(!besides.join().unwrap(), "what goes wrong besides came too late");
        report
    })
}

#[test]
fn every_kind_of_fault_is_survived() {
    let report = run(Schedule::draw(SEED, 4, Shape::short()), |_| {});
    assert!(report.violations.is_empty(), "{report}");
    for kind in Kind::ALL {
        assert_eq!(report.faults.get(kind).map(|(done, _)| *done), Some(1), "{}\n{report}", kind.name());
    }
    for invariant in Invariant::ALL {
        assert!(report.checks.get(&invariant).is_some_and(|checks| *checks > 0), "{}\n{report}", invariant.name());
    }
    assert!(report.totals.received > 10_000, "{report}");
    assert!(report.totals.by_service > 3_000, "{report}");
}

/// Two hosts to which nothing happens for a while.
fn nothing() -> Schedule {
    let second = Duration::from_secs(1);
    let shape =
        Shape { rounds: 1, faults: second, settle: 20 * second, rest: 6 * second, length: Duration::ZERO, count: 0 };
    Schedule::draw(SEED, 2, shape)
}

fn signal_agent(directory: &Path, host: &str, signal: Signal) {
    let status = directory.join(format!("{host}/run/flannel.1.status.json"));
    let pid = || {
        let status: serde_json::Value = serde_json::from_slice(&std::fs::read(&status).ok()?).ok()?;
        status["pid"].as_i64()
    };
    // Before, the run would wait for it in vain.
    let subnet = directory.join(format!("{host}/run/subnet.env"));
    wait_for("the agent", SOON, || pid().is_some() && subnet.exists()).unwrap();
    kill(Pid::from_raw(pid().unwrap() as i32), signal).unwrap();
}

#[test]
fn a_map_entry_that_nobody_named_is_seen() {
    let report = run(nothing(), |directory| {
        let maps = directory.join(format!("bpf/node1/1/v{ABI_VERSION}"));
        let key = |map: &str, key: [u8; 4]| {
            let bytes = key.map(|byte| byte.to_string());
            let mut command = Command::new("bpftool");
            command.args(["map", "lookup", "pinned"]).arg(maps.join(map)).arg("key").args(bytes);
            output(&mut command)
        };
        // The first VTEP is the other host.
        wait_for("the peer", SOON, || key(VTEPS, [1, 0, 0, 0]).is_ok_and(|value| value.contains("c0"))).unwrap();
        // It would put it right within a second.
        signal_agent(directory, "node1", Signal::SIGSTOP);
        let mut command = Command::new("bpftool");
        command.args(["map", "update", "pinned"]).arg(maps.join(SUBNETS));
        command.args("key 250 0 0 0 value 1 0 0 0".split_whitespace());
        output(&mut command).unwrap();
    });
    assert!(report.violated.contains_key(&Invariant::OnlyNamed), "{report}");
    let violation = report.violations.iter().find(|violation| violation.invariant == Invariant::OnlyNamed).unwrap();
    assert_eq!(violation.host, "node1");
    assert!(violation.evidence.contains("10.5.250.0/24"), "{report}");
}

#[test]
fn an_agent_that_ends_is_seen() {
    let report = run(nothing(), |directory| {
        signal_agent(directory, "node2", Signal::SIGKILL);
    });
    assert!(report.violated.contains_key(&Invariant::AgentsLive), "{report}");
    assert!(!report.violated.contains_key(&Invariant::NoLoss), "{report}");
}
