//! The units, by systemd's own tools and without systemd.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;
use xtask::process::output;

use super::UNIT;
use crate::metrics::deploy;

/// In tenths. 100 is a service without any confinement.
const EXPOSURE: u32 = 30;
/// Their numbers in include/uapi/linux/capability.h.
const NUMBERS: [(&str, u32); 4] = [("CAP_NET_ADMIN", 12), ("CAP_NET_RAW", 13), ("CAP_PERFMON", 38), ("CAP_BPF", 39)];

fn folder() -> PathBuf {
    deploy().join("systemd")
}

/// The values of a key of the unit.
fn values(key: &str) -> Vec<String> {
    let unit = fs::read_to_string(folder().join(UNIT)).unwrap();
    let lines = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

/// The bits of the unit's capabilities.
pub(super) fn capabilities() -> u64 {
    let number = |name: &String| NUMBERS.iter().find(|(known, _)| known == name).expect("a known capability").1;
    values("CapabilityBoundingSet").iter().map(|name| 1 << number(name)).sum()
}

#[test]
fn the_unit_has_the_agents_capabilities_and_no_others() {
    let agents = flannel_agent::privileges::NEEDED.into_iter().chain(flannel_agent::privileges::USEFUL);
    let mut agents: Vec<_> = agents.map(|capability| capability.to_string()).collect();
    agents.sort();
    let mut units = values("CapabilityBoundingSet");
    units.sort();
    assert_eq!(units, agents);
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    // A root folder that has the units, what they are ordered by, and the programs that they name.
    let root = TempDir::new().unwrap();
    let place = |from: &Path, to: &str| {
        let to = root.path().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    };
    let units = "usr/lib/systemd/system";
    for target in ["sysinit", "basic", "shutdown", "multi-user", "network-online", "network", "sockets"] {
        place(&Path::new("/").join(units).join(format!("{target}.target")), &format!("{units}/{target}.target"));
    }
    for name in ["docker.service", "docker.socket", "containerd.service"] {
        place(&Path::new("/").join(units).join(name), &format!("{units}/{name}"));
    }
    for program in ["usr/bin/flannel-agent", "usr/sbin/dockerd", "usr/bin/containerd", "sbin/modprobe", "bin/kill"] {
        place(Path::new("/bin/true"), program);
    }
    place(&folder().join(UNIT), &format!("{units}/{UNIT}"));
    place(&folder().join("docker-flannel.conf"), "etc/systemd/system/docker.service.d/flannel.conf");
    let verify = || {
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(format!("--root={}", root.path().display()));
        let result = command.args([UNIT, "docker.service"]).output().unwrap();
        (result.status.success(), String::from_utf8_lossy(&result.stderr).into_owned())
    };
    let (is_well, words) = verify();
    // Whatever it says of Docker's own unit is Docker's business.
    assert!(is_well && !words.contains("flannel"), "{words}");
    let path = root.path().join(units).join(UNIT);
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("WatchdogSec", "WatchdogSecs")).unwrap();
    assert!(verify().1.contains("WatchdogSecs"), "a wrong key is not found");
}

#[test]
fn the_unit_is_confined() {
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--no-pager", "--offline=true", &format!("--threshold={EXPOSURE}")]);
    output(command.arg(folder().join(UNIT))).unwrap();
}
