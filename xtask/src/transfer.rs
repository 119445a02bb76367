//! Bulk TCP between two namespaces, by `iperf3`, and what it costs the machine.

use std::{net::Ipv4Addr, path::Path, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    lab::Netns,
    process::{Process, output},
    progress::{patience, wait_for},
};

/// What `iperf3` reports of bulk TCP.
#[derive(Debug, PartialEq)]
pub struct Transfer {
    /// Rate at the receiver.
    pub gbits: f64,
    /// Bytes that the receiver got.
    pub bytes: f64,
    /// Segments sent again.
    pub retransmits: f64,
    /// What all CPUs together were busy with, by whomever, while the client ran.
    pub cpu_seconds: f64,
}

impl Transfer {
    /// What a gigabyte (10^9 bytes) costs.
    #[must_use]
    pub fn cpu_seconds_per_gb(&self) -> f64 {
        self.cpu_seconds / (self.bytes / 1e9)
    }

    /// Whether it went on without stalling: at a tenth of a gigabit a second, as far as the machine is not a slow one
    /// ([`patience`]). Paths that lose large packets are far below; how fast it can be, the benchmark says.
    pub fn is_flowing(&self) -> bool {
        self.gbits * f64::from(patience()) > 0.1
    }
}

/// How much a client of [`tcp_transfer`] writes at once: what `iperf3` does by itself.
pub const USUAL_WRITE: u32 = 128 << 10;

/// Where `iperf3` listens by itself.
pub const PORT: u16 = 5201;

/// One flow to an address by which a client's namespace reaches a server's, the client on the first and the server on the
/// second core.
///
/// # Errors
/// Where `iperf3` fails.
pub fn tcp_transfer(
    client: &Netns,
    server: &Netns,
    address: Ipv4Addr,
    seconds: u32,
    directory: &Path,
) -> Result<Transfer> {
    tcp_transfers(client, server, address, 1, USUAL_WRITE, seconds, directory)
}

/// The same with so many flows at once, and so many bytes in each write.
///
/// # Errors
/// Where `iperf3` fails.
pub fn tcp_transfers(
    client: &Netns,
    server: &Netns,
    address: Ipv4Addr,
    flows: u32,
    write: u32,
    seconds: u32,
    directory: &Path,
) -> Result<Transfer> {
    let mut listen = server.command("taskset");
    listen.args(["-c", "1", "iperf3", "--server", "--one-off", "--bind", "0.0.0.0"]);
    let mut listening = Process::start(&mut listen, &directory.join("iperf3.log"))?;
    let sockets = format!("ss -Hltn sport = {PORT}");
    wait_for("iperf3 to listen", Duration::from_secs(5), || {
        server.exec(&sockets).is_ok_and(|sockets| !sockets.is_empty())
    })?;
    let line =
        format!("-c 0 iperf3 --json -C cubic --parallel {flows} --length {write} --time {seconds} --client {address}");
    let mut send = client.command("taskset");
    send.args(line.split_whitespace());
    let before = machine_cpu_seconds()?;
    let report = output(&mut send)?;
    let cpu_seconds = machine_cpu_seconds()? - before;
    listening.wait(Duration::from_secs(5))?;
    parse(&report, cpu_seconds)
}

fn parse(report: &str, cpu_seconds: f64) -> Result<Transfer> {
    let report: serde_json::Value = serde_json::from_str(report)?;
    let end = &report["end"];
    let number = |value: &serde_json::Value| value.as_f64().context("iperf3 reports no number");
    Ok(Transfer {
        gbits: number(&end["sum_received"]["bits_per_second"])? / 1e9,
        bytes: number(&end["sum_received"]["bytes"])?,
        retransmits: number(&end["sum_sent"]["retransmits"])?,
        cpu_seconds,
    })
}

/// What all CPUs have been busy with since boot.
///
/// # Errors
/// Where the kernel does not say so.
pub fn machine_cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")?;
    let per_second = i32::try_from(per_second)?;
    Ok(busy_ticks(&stat)? / f64::from(per_second))
}

/// User, nice, system, irq and softirq. Not what the hypervisor gave to others (steal): nothing ran here meanwhile.
fn busy_ticks(stat: &str) -> Result<f64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu ")).context("/proc/stat has no line of all CPUs")?;
    let ticks: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else {
        anyhow::bail!("/proc/stat has too few numbers: {line}")
    };
    Ok(user + nice + system + irq + softirq)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_iperf3_is_read() {
        let report = r#"{"start": {}, "end": {
            "sum_sent": {"bytes": 2000, "bits_per_second": 3e9, "retransmits": 7},
            "sum_received": {"bytes": 1000, "bits_per_second": 2.5e9}}}"#;
        let expected = Transfer { gbits: 2.5, bytes: 1000.0, retransmits: 7.0, cpu_seconds: 1.5 };
        assert_eq!(parse(report, 1.5).unwrap(), expected);
        assert!(parse(r#"{"error": "unable to connect"}"#, 0.0).is_err());
    }

    #[test]
    fn idle_iowait_and_steal_are_not_busy() {
        let stat = "cpu  100 20 300 40000 5000 6 7 800 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert!((busy_ticks(stat).unwrap() - 433.0).abs() < f64::EPSILON);
        assert!(busy_ticks("cpu 1 2 3\n").is_err());
    }
}
