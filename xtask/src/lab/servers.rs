//! What pods serve, and who asks them.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    path::Path,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{Shutdown, shutdown};

use super::{Netns, Pod};
use crate::{
    process::{Process, output},
    progress::wait_for,
};

const LIMIT: Duration = Duration::from_secs(10);

/// Answers every HTTP request in a pod with a line: its own name, and the address that asks. Ends when dropped.
#[derive(Debug)]
pub struct WebServer {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl WebServer {
    /// Serves a pod at a port, by a name.
    ///
    /// # Errors
    /// Where the port is taken.
    pub fn start(pod: &Pod, port: u16, name: &str) -> Result<Self> {
        let listener = pod.netns.within(|| TcpListener::bind((pod.address, port)))??;
        let (accepting, name) = (listener.try_clone()?, name.to_owned());
        let thread = thread::spawn(move || {
            for stream in accepting.incoming() {
                // One who goes away concerns nobody else; the listener's own end does.
                match stream.map(|stream| answer(stream, &name)) {
                    Ok(_) => {}
                    Err(_) => return,
                }
            }
        });
        Ok(Self { listener, thread: Some(thread) })
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        let _ended = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        let _joined = self.thread.take().map(JoinHandle::join);
    }
}

fn answer(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let lines = BufReader::new(stream.try_clone()?).lines();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let body = format!("{name} {}\n", stream.peer_addr()?.ip());
    let header = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((header + &body).as_bytes())
}

/// What `curl` was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The address and port that it was connected with.
    pub from: SocketAddrV4,
    /// Name of the pod that answered.
    pub server: String,
    /// As whom that pod sees who asks.
    pub seen_as: Ipv4Addr,
}

/// Has `curl` ask a [`WebServer`]; names are resolved by what the file says that stands in for `/etc/resolv.conf`.
///
/// # Errors
/// Where it is not answered.
pub fn curl(netns: &Netns, url: &str, resolver: Option<&Path>) -> Result<Answer> {
    let curl = ["curl", "-4", "-sS", "--noproxy", "*", "--max-time", "10", "-w", "%{remote_ip}:%{remote_port}", url];
    let text = match resolver {
        None => output(netns.command(curl[0]).args(&curl[1..])),
        Some(file) => {
            // A mount of its own, as a container has it.
            let script = r#"mount --bind "$0" /etc/resolv.conf && exec "$@""#;
            output(netns.command("unshare").args(["--mount", "sh", "-c", script]).arg(file).args(curl))
        }
    }?;
    let mut lines = text.lines();
    let (server, seen_as) = lines.next().and_then(|line| line.split_once(' ')).context("no answer of a web server")?;
    let from = lines.next().context("curl does not say whom it was connected with")?.parse()?;
    Ok(Answer { from, server: server.to_owned(), seen_as: seen_as.parse()? })
}

/// `dnsmasq` in a pod, with records of its own and no other server to ask.
#[derive(Debug)]
pub struct DnsServer {
    process: Process,
}

/// The domain of the services of the default namespace, as clusters have it.
pub const DOMAIN: &str = "default.svc.cluster.local";

impl DnsServer {
    /// Serves a pod at port 53. Names are those below [`DOMAIN`].
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn start(pod: &Pod, records: &[(&str, Ipv4Addr)], directory: &Path) -> Result<Self> {
        let mut command = pod.netns.command("dnsmasq");
        command.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file=",
            "--user=root",
            "--bind-interfaces",
        ]);
        command.args(["--no-resolv", "--no-hosts", "--local=/cluster.local/", "--log-queries", "--log-facility=-"]);
        command.arg(format!("--listen-address={}", pod.address));
        command.args(records.iter().map(|(name, address)| format!("--host-record={name}.{DOMAIN},{address}")));
        let process = Process::start(&mut command, &directory.join(format!("{}-dns.log", pod.netns.name())))?;
        let waited = wait_for("dnsmasq", LIMIT, || process.log().contains("started"));
        waited.with_context(|| process.log())?;
        Ok(Self { process })
    }

    /// The queries that it has had: each name, and who asked.
    pub fn queries(&self) -> Vec<(String, String)> {
        // "dnsmasq: query[A] test.default.svc.cluster.local from 10.5.1.2"
        let log = self.process.log();
        let queries = log.lines().filter_map(|line| line.split_once("query[A] ")?.1.split_once(" from "));
        queries.map(|(name, from)| (name.to_owned(), from.to_owned())).collect()
    }
}

/// What kubelet writes into a pod's `/etc/resolv.conf`, for a DNS service at that address.
#[must_use]
pub fn resolv_conf(dns: Ipv4Addr) -> String {
    format!("nameserver {dns}\nsearch {DOMAIN} svc.cluster.local cluster.local\noptions ndots:5\n")
}
