//! Whether somebody else uses an overlay's device by now: flannel's daemon, which keeps and uses the device that it finds,
//! and gives it the same address and the same `subnet.env` (flannel: pkg/backend/vxlan/device.go, `ensureLink`).

use std::{fs, path::Path};

use flannel_common::vxlan::Vni;
use nix::unistd::{SysconfVar, sysconf};

use crate::{
    cli::Cli,
    dataplane,
    device::{DeviceError, Link, Netlink},
    lease::MacAddress,
    ownership::Written,
    status::Status,
};

/// The name of flannel's daemon.
const DAEMON: &str = "flanneld";
/// The file's times are in whole seconds.
const SECOND: u64 = 1;

/// What shows it, in words. [`None`] where nothing does.
pub(super) async fn evidence(
    cli: &Cli,
    netlink: &Netlink,
    vni: Vni,
    device: Option<&Link>,
    status: Option<&Status>,
) -> Result<Option<String>, DeviceError> {
    if let Some(Link { name, index, mac, .. }) = device {
        match netlink.flannels_peers(*index).await?.as_slice() {
            [] => {}
            [one] => return Ok(Some(format!("somebody else routes {one} into {name}, as flannel's daemon does"))),
            [one, rest @ ..] => {
                let rest = rest.len();
                let reason =
                    format!("somebody else routes {one} and {rest} more into {name}, as flannel's daemon does");
                return Ok(Some(reason));
            }
        }
        let pinned = dataplane::overlay_devices(&cli.bpf_pin_dir, vni);
        let has_our_mac = status.is_none_or(|status| *mac == Some(status.lease.vtep_mac.0));
        if !has_our_mac || !pinned.is_empty() && !pinned.contains(index) {
            let mac = mac.map(|mac| MacAddress(mac).to_string()).unwrap_or_default();
            return Ok(Some(format!("somebody else made {name} anew or changed it: it has the MAC {mac}")));
        }
    }
    if let Some(written) = Written::recall(&cli.run_dir, vni).filter(Written::is_replaced) {
        let path = written.path.display();
        return Ok(Some(format!("somebody else has written {path} since the agent did, as flannel's daemon does")));
    }
    // One that has just begun has left no other trace; one that was there beside the agent serves another overlay.
    let since = status.map_or(0, |status| status.written);
    let daemon = processes(DAEMON).into_iter().find(|process| process.started + SECOND >= since);
    Ok(daemon.map(|daemon| format!("{DAEMON} runs here as process {} since the agent has stopped", daemon.pid)))
}

struct Process {
    pid: u32,
    /// In seconds since 1970.
    started: u64,
}

/// The processes of that name in this network namespace.
fn processes(name: &str) -> Vec<Process> {
    let netns = |pid: &str| fs::read_link(Path::new("/proc").join(pid).join("ns/net")).ok();
    let own = netns("self");
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        if comm.trim_end() != name || netns(&pid.to_string()) != own {
            return None;
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Process { pid, started: boot_time()? + started(&stat)? })
    })
    .collect()
}

/// When a process was started, in seconds since boot, from its `/proc/<pid>/stat` (proc_pid_stat(5), field 22).
fn started(stat: &str) -> Option<u64> {
    // The name before may hold anything.
    let (_, after_name) = stat.rsplit_once(')')?;
    let ticks: u64 = after_name.split_whitespace().nth(19)?.parse().ok()?;
    let per_second = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok()?;
    ticks.checked_div(per_second)
}

/// In seconds since 1970.
fn boot_time() -> Option<u64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::now;

    #[test]
    fn a_process_is_found_by_name_with_its_start() {
        let comm = fs::read_to_string("/proc/self/comm").expect("read");
        let processes = processes(comm.trim_end());
        let this = processes.iter().find(|process| process.pid == std::process::id()).expect("found");
        assert!(this.started <= now() + SECOND && this.started + 3600 > now(), "{} and {}", this.started, now());
        assert_eq!(started("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 400 20"), Some(4));
        assert_eq!(started("7 (a"), None);
    }
}
