//! What is measured of a path, one after the other, with the client on the first core and the server on the second.
//!
//! * **Bulk TCP** and what it costs: `iperf3`; the CPU time is the whole machine's, since softirqs belong to no process.
//!   In writes of 128 KiB, `iperf3`'s default, and one flow also in writes of 1 MiB, where less of the time goes into calls
//!   and wake-ups, and more into copying.
//! * **UDP**: what the receiving socket is given, see [`super::datagrams`].
//! * **Round trips**: `sockperf ping-pong` over TCP, one at a time, between ends that sleep until something comes. With idle cores
//!   that are kept from halting, see [`super::awake`], and with cores that halt: of the latter, on a virtual machine, most is
//!   the hypervisor's.
//! * **Connections**: one after the other, see [`super::connections`].
//! * **What others do** on the machine, shortly before: where that is much, the rest is not to be believed.

use std::{
    net::Ipv4Addr,
    path::Path as FilePath,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{awake::Awake, connections, datagrams, topology::Path};
use crate::{
    lab::Netns,
    process::{Process, output},
    progress::wait_for,
    transfer::{self, USUAL_WRITE, machine_cpu_seconds, tcp_transfers},
};

/// Of a round trip, there and back.
const PAYLOAD: usize = 64;
/// Of bulk TCP, once more.
const LARGE_WRITE: u32 = 1 << 20;
const PORT: u16 = 11111;
const LIMIT: Duration = Duration::from_secs(5);

/// What the servers listen to: a name of at most twelve letters, the protocol, the port.
pub(super) const PORTS: [(&str, &str, u16); 4] = [
    ("iperf3", "tcp", transfer::PORT),
    ("sockperf", "tcp", PORT),
    ("datagrams", "udp", datagrams::PORT),
    ("connections", "tcp", connections::PORT),
];

/// What a number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metric {
    TcpOne,
    TcpOneAgain,
    CpuPerGb,
    TcpLarge,
    CpuPerGbLarge,
    TcpEight,
    TcpEightAgain,
    Udp,
    RoundTripMedian,
    RoundTripTail,
    RoundTripHalting,
    Connections,
    Others,
}

impl Metric {
    /// In the order in which they are shown.
    pub(super) const ALL: [Self; 13] = [
        Self::TcpOne,
        Self::TcpOneAgain,
        Self::CpuPerGb,
        Self::TcpLarge,
        Self::CpuPerGbLarge,
        Self::TcpEight,
        Self::TcpEightAgain,
        Self::Udp,
        Self::RoundTripMedian,
        Self::RoundTripTail,
        Self::RoundTripHalting,
        Self::Connections,
        Self::Others,
    ];

    /// With its unit.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::TcpOne => "TCP, 1 flow, Gb/s",
            Self::TcpOneAgain => "TCP, 1 flow, retransmitted segments",
            Self::CpuPerGb => "TCP, 1 flow, CPU seconds per GB",
            Self::TcpLarge => "TCP, 1 flow, writes of 1 MiB, Gb/s",
            Self::CpuPerGbLarge => "TCP, 1 flow, writes of 1 MiB, CPU seconds per GB",
            Self::TcpEight => "TCP, 8 flows, Gb/s",
            Self::TcpEightAgain => "TCP, 8 flows, retransmitted segments",
            Self::Udp => "UDP, 64 bytes, 1000 delivered/s",
            Self::RoundTripMedian => "TCP round trip, cores awake, p50, µs",
            Self::RoundTripTail => "TCP round trip, cores awake, p99, µs",
            Self::RoundTripHalting => "TCP round trip, cores that halt, p50, µs",
            Self::Connections => "TCP connections per second",
            Self::Others => "others just before, % of a core",
        }
    }

    /// Whether it is a result, or only says whether others can be believed.
    pub(super) fn is_result(self) -> bool {
        !matches!(self, Self::TcpOneAgain | Self::TcpEightAgain | Self::Others)
    }

    pub(super) fn less_is_better(self) -> bool {
        !matches!(self, Self::TcpOne | Self::TcpLarge | Self::TcpEight | Self::Udp | Self::Connections)
    }
}

/// All metrics of a path, each over so many seconds; those of cores that are awake where these can be kept so.
pub(super) fn measure(path: &Path<'_>, seconds: u32, directory: &FilePath) -> Result<Vec<(Metric, f64)>> {
    let others = others()?;
    let transfer = |flows, write| {
        tcp_transfers(path.client, path.server, path.address, flows, write, seconds, directory)
            .with_context(|| format!("TCP, flows: {flows}"))
    };
    let (one, large, eight) = (transfer(1, USUAL_WRITE)?, transfer(1, LARGE_WRITE)?, transfer(8, USUAL_WRITE)?);
    let udp = datagrams::per_second(path, seconds).context("UDP")?;
    let [halting, _] = round_trip(path, seconds, directory).context("TCP round trips, cores that halt")?;
    let awake = match Awake::keep()? {
        Some(_awake) => Some(round_trip(path, seconds, directory).context("TCP round trips, cores awake")?),
        None => None,
    };
    let connections = connections::per_second(path, seconds).context("TCP connections")?;
    let round_trips = awake.map(|[p50, p99]| [(Metric::RoundTripMedian, p50), (Metric::RoundTripTail, p99)]);
    let rest = [
        (Metric::TcpOne, one.gbits),
        (Metric::TcpOneAgain, one.retransmits),
        (Metric::CpuPerGb, one.cpu_seconds_per_gb()),
        (Metric::TcpLarge, large.gbits),
        (Metric::CpuPerGbLarge, large.cpu_seconds_per_gb()),
        (Metric::TcpEight, eight.gbits),
        (Metric::TcpEightAgain, eight.retransmits),
        (Metric::Udp, udp / 1e3),
        (Metric::RoundTripHalting, halting),
        (Metric::Connections, connections),
        (Metric::Others, others),
    ];
    Ok(round_trips.into_iter().flatten().chain(rest).collect())
}

/// The first transfer of a path, for nothing.
pub(super) fn warm_up(path: &Path<'_>, directory: &FilePath) -> Result<()> {
    tcp_transfers(path.client, path.server, path.address, 1, LARGE_WRITE, 1, directory).map(drop)
}

/// How busy the machine is while nothing is measured, in percent of one core.
fn others() -> Result<f64> {
    let (before, start) = (machine_cpu_seconds()?, Instant::now());
    thread::sleep(Duration::from_millis(500));
    Ok((machine_cpu_seconds()? - before) / start.elapsed().as_secs_f64() * 100.0)
}

/// p50 and p99 of a TCP round trip, there and back, in microseconds.
///
/// # Errors
/// Where `sockperf` fails.
pub fn round_trip(path: &Path<'_>, seconds: u32, directory: &FilePath) -> Result<[f64; 2]> {
    let mut listen = sockperf(path.server, 1, "server", Ipv4Addr::UNSPECIFIED);
    let _server = Process::start(&mut listen, &directory.join("sockperf.log"))?;
    let sockets = format!("ss -Hltn sport = {PORT}");
    wait_for("sockperf to listen", LIMIT, || path.server.exec(&sockets).is_ok_and(|sockets| !sockets.is_empty()))?;
    let mut ask = sockperf(path.client, 0, "ping-pong", path.address);
    ask.args(["--full-rtt", "--msg-size", &PAYLOAD.to_string(), "--time", &seconds.to_string()]);
    let report = output(&mut ask)?;
    Ok([percentile(&report, "50.000")?, percentile(&report, "99.000")?])
}

fn sockperf(netns: &Netns, core: usize, role: &str, address: Ipv4Addr) -> Command {
    let mut command = netns.command("taskset");
    command.args(["-c", &core.to_string(), "sockperf", role, "--ip", &address.to_string()]);
    command.args(["--tcp", "--port", &PORT.to_string()]);
    command
}

/// Of what `sockperf` reports, in microseconds.
fn percentile(report: &str, percent: &str) -> Result<f64> {
    // "sockperf: ---> percentile 99.000 =   24.873"
    let mut lines = report.lines().filter_map(|line| line.split_once("percentile")?.1.split_once('='));
    let (_, value) = lines
        .find(|(percentile, _)| percentile.trim() == percent)
        .with_context(|| format!("no percentile {percent} in: {report}"))?;
    Ok(value.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_sockperf_are_read() {
        let report = "sockperf: ====> avg-rtt=19.123 (std-dev=3.1)\n\
            sockperf: ---> <MAX> observation = 1171.560\n\
            sockperf: ---> percentile 99.000 =   24.873\n\
            sockperf: ---> percentile 50.000 =   18.001\n";
        assert!((percentile(report, "99.000").unwrap() - 24.873).abs() < f64::EPSILON);
        assert!((percentile(report, "50.000").unwrap() - 18.001).abs() < f64::EPSILON);
        assert!(percentile(report, "99.900").unwrap_err().to_string().contains("no percentile 99.900"));
    }
}
