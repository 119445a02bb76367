//! How long an operator's commands and a scrape take.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use xtask::lab::Host;

use super::{Row, percentile};

/// Where the agent is scraped.
const PORT: u16 = 8081;
/// What the agent is started with for that: the most that it can be asked for.
pub(super) const ARGUMENTS: [&str; 2] = ["--healthz-port=8081", "--metrics-per-peer"];
/// The agent tells others for half a second what it read last.
const STALE: Duration = Duration::from_millis(600);
const TIMES: usize = 11;

/// Medians, each of a whole process.
pub(super) fn measure(host: &Host, binary: &Path) -> Vec<Row> {
    let command = |name, arguments: &[&str]| {
        let run = || {
            let mut command = host.agent_command(binary);
            let status = command.args(arguments).stdout(Stdio::null()).status().unwrap();
            // 3: so many hosts of which none is there are something to look at.
            assert!([Some(0), Some(3)].contains(&status.code()), "{arguments:?}: {status}");
        };
        (name, median(run))
    };
    vec![
        command("status, ms", &["status"]),
        command("status -o json, ms", &["status", "-o", "json"]),
        command("peers, ms", &["peers"]),
        command("metrics, ms", &["metrics"]),
        command("metrics --metrics-per-peer, ms", &["metrics", "--metrics-per-peer"]),
        ("GET /metrics of each peer, ms", median_after(STALE, scrape)),
    ]
}

/// When what was read before is no longer told.
fn scrape() {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
}

fn median(run: impl FnMut()) -> f64 {
    median_after(Duration::ZERO, run)
}

fn median_after(rest: Duration, mut run: impl FnMut()) -> f64 {
    let mut times: Vec<_> = (0..TIMES)
        .map(|_| {
            sleep(rest);
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    percentile(&mut times, 0.5)
}
