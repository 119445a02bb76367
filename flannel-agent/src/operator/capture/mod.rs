//! `flannel-agent capture`: the overlay's packets in a file, as they are on the links between hosts and as they are in the tunnel.
//!
//! What bypasses the host's stack is sent on a link and received from it as all else is, and packet sockets see it there. So there is
//! one on each link that tunnel packets come in or go out by, and none on pods' veths, bridges or `flannel.<VNI>`, where a capture would
//! take flows off the bypass.
//!
//! * `overlay` — which links, and how the overlay's packets are told from others
//! * `socket_filter` — the same, for the kernel
//! * `tap` — packet sockets
//! * `frame` — what is in a frame, and whether it is asked for
//! * `file` — pcapng
//! * `stop` — when to end: signals and time

mod file;
mod frame;
mod overlay;
mod socket_filter;
mod stop;
mod tap;

use std::{
    io,
    net::Ipv4Addr,
    os::fd::AsFd as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use bytesize::ByteSize;
use clap::Args;
use ipnet::Ipv4Net;
use nix::{errno::Errno, libc, poll::PollFlags};
use pcap_file::DataLink;

use self::{
    file::{CaptureFile, Record},
    frame::{Carried, Layout, Part, ipv4_of},
    overlay::{Overlay, Tunnel},
    socket_filter::Wanted,
    stop::Stop,
    tap::{Direction, Frame, Statistics, Tap},
};
use super::{OperatorError, ping::Target};
use crate::{cli::Cli, device::Link};

/// What the headers around an inner packet take at most: Ethernet, IPv4 with options, UDP and VXLAN.
const MOST_OUTER: usize = 14 + 60 + 8 + 8;
/// For the headers that filters are about, whatever is kept of a packet.
const LEAST_COPIED: usize = 256;
/// So many packets of one link, then it is another's turn.
const AT_A_TIME: u64 = 64;
/// Of a file with nothing but its interfaces.
const SMALLEST_FILE: u64 = 4096;
/// Said of a packet that has no outer one.
const BY_XDP: &str = "taken out of its tunnel by XDP before it was captured";

/// What is captured, and how much of it.
#[derive(Args, Debug)]
pub struct Options {
    /// The file, which must not be there yet; - for the standard output
    #[arg(short, long, value_name = "FILE")]
    write: PathBuf,
    /// Only packets from or to this address or prefix, as pods have it; twice for what is between two
    #[arg(long, value_name = "IP|CIDR", value_parser = host)]
    host: Vec<Ipv4Net>,
    /// Only packets from or to this peer
    #[arg(long, value_name = "VTEP|SUBNET")]
    peer: Option<Target>,
    /// Only TCP
    #[arg(long)]
    tcp: bool,
    /// Only UDP
    #[arg(long, conflicts_with = "tcp")]
    udp: bool,
    /// Only ICMP
    #[arg(long, conflicts_with_all = ["tcp", "udp", "port"])]
    icmp: bool,
    /// Only packets from or to this port
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Of packets in a tunnel, one of both (default: the outer packet, and behind it the inner one)
    #[arg(long, value_enum)]
    only: Option<Only>,
    /// End after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// End after so many packets; an outer packet and its inner one are one
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    packets: u64,
    /// End before the file has more bytes, as in 500000 or 16MiB
    #[arg(long, value_name = "BYTES", default_value = "16MiB", value_parser = file_size)]
    size: u64,
    /// Keep so many bytes of each packet
    #[arg(long, value_name = "BYTES", default_value_t = 262_144)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    snaplen: u32,
    /// Of several overlays, this one
    #[arg(long, value_name = "VNI")]
    vni: Option<u32>,
}

/// One of a packet's two forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Only {
    /// As pods send it.
    Inner,
    /// As it is on the wire.
    Outer,
}

impl Options {
    /// The protocol that is asked for, as IPv4 has it.
    fn protocol(&self) -> Option<u8> {
        let protocols = [(self.tcp, libc::IPPROTO_TCP), (self.udp, libc::IPPROTO_UDP), (self.icmp, libc::IPPROTO_ICMP)];
        protocols.into_iter().find(|(is_asked_for, _)| *is_asked_for).map(|(_, protocol)| protocol as u8)
    }
}

fn host(text: &str) -> Result<Ipv4Net, String> {
    let address = || text.parse::<Ipv4Addr>().map(Ipv4Net::from);
    let prefix = || text.parse::<Ipv4Net>().map(|prefix| prefix.trunc());
    address().or_else(|_| prefix()).map_err(|_| "expected an IPv4 address or a prefix such as 10.5.7.0/24".to_owned())
}

fn file_size(text: &str) -> Result<u64, String> {
    let ByteSize(size) = text.parse().map_err(|_| "expected a number of bytes, as in 500000 or 16MiB".to_owned())?;
    if size < SMALLEST_FILE { Err(format!("a file takes {SMALLEST_FILE} bytes at least")) } else { Ok(size) }
}

/// Packets can't be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The user may not do what it takes.
    #[error("CAP_NET_RAW is missing: capture opens packet sockets; run it as root, or with that capability")]
    Privilege,
    /// More ends than a packet has.
    #[error("--host is given {0} times: a packet has two ends")]
    Hosts(usize),
    /// Nothing that is carried by this agent.
    #[error("no overlay of this host's{} has packets that this agent carries", .0.map(|vni| format!(" with VNI {vni}")).unwrap_or_default())]
    NoOverlay(Option<u32>),
    /// A device of the overlay is missing.
    #[error("{0} is gone; a running agent makes it again")]
    NoDevice(String),
    /// Nothing to capture on.
    #[error("none of the links that packets of {name} pass is there, {link} among them; see `flannel-agent status`")]
    NoLink {
        /// The overlay.
        name: String,
        /// Its external interface.
        link: String,
    },
    /// The kernel refused something.
    #[error("{call} {link}: {error}")]
    Call {
        /// What was to be done.
        call: &'static str,
        /// On which link.
        link: String,
        /// Why not.
        error: Errno,
    },
    /// Signals, or waiting.
    #[error("{call}: {error}")]
    Wait {
        /// What was to be done.
        call: &'static str,
        /// Why not.
        error: Errno,
    },
    /// Nothing is overwritten.
    #[error("{0} is there already: name another file, or remove it")]
    Exists(String),
    /// Nobody can read it there.
    #[error("the standard output is a terminal: name a file, or add `| tcpdump -nr -`")]
    Terminal,
    /// No file.
    #[error("create {name}: {error}")]
    Create {
        /// Which.
        name: String,
        /// Why not.
        error: io::Error,
    },
    /// It is whole as far as it was written.
    #[error("write {name}: {error}; it ends before the packets that had no room")]
    Write {
        /// Which.
        name: String,
        /// Why not.
        error: io::Error,
    },
    /// The end came, and what was captured has nowhere to go.
    #[error("nobody reads the standard output: what was captured last is not in it")]
    Stalled,
    /// A block could not be made.
    #[error("write a block of pcapng: {0}")]
    Encode(String),
}

impl CaptureError {
    fn call(call: &'static str, link: &Link) -> impl FnOnce(Errno) -> Self {
        let link = link.name.clone();
        move |error| Self::Call { call, link, error }
    }
}

/// What ended a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Seconds,
    Packets,
    Size,
    Signal,
}

/// A tap, and where its packets go in the file.
struct Source {
    tap: Tap,
    layout: Layout,
    /// Of [`Capture::overlays`].
    overlay: usize,
    /// The interface of packets as they are on the link; [`None`] where they are not asked for.
    outer: Option<u32>,
    inner: Option<u32>,
}

/// In packets, each with its inner one.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    received: u64,
    sent: u64,
    /// The overlay's, and not asked for.
    others: u64,
    /// Taken out of their tunnel by XDP.
    decapsulated: u64,
}

struct Capture<'a> {
    options: &'a Options,
    overlays: Vec<Overlay>,
    sources: Vec<Source>,
    file: CaptureFile,
    count: Count,
    stop: Stop,
}

/// Captures packets until one of the bounds is met, or a signal comes. Works without an agent.
///
/// # Errors
/// [`OperatorError::Status`] where no agent has run, [`OperatorError::Capture`] or [`OperatorError::Device`].
pub async fn print(cli: &Cli, options: &Options) -> Result<(), OperatorError> {
    if options.host.len() > 2 {
        return Err(CaptureError::Hosts(options.host.len()).into());
    }
    let stop = Stop::new(Duration::from_secs(options.seconds.into()))?;
    let overlays = Overlay::read(cli, options).await?;
    let mut capture = Capture::begin(options, overlays, stop)?;
    let begun = Instant::now();
    let end = capture.run();
    let statistics = capture.finish()?;
    capture.conclude(end?, begun.elapsed(), statistics);
    Ok(())
}

impl<'a> Capture<'a> {
    fn begin(options: &'a Options, overlays: Vec<Overlay>, mut stop: Stop) -> Result<Self, CaptureError> {
        let mut taps = Vec::new();
        for (number, overlay) in overlays.iter().enumerate() {
            for link in &overlay.links {
                let vtep_mac = overlay.status.lease.vtep_mac.0;
                let is_vxlan = matches!(overlay.tunnel, Some(Tunnel::Vxlan { .. }));
                let wanted = Wanted {
                    header_len: link.header_len(),
                    tunnel: overlay.tunnel,
                    direct: overlay.is_direct.then_some(overlay.status.network),
                    decapsulated: is_vxlan.then_some(vtep_mac),
                };
                let header_len = link.header_len().into();
                let layout = Layout { header_len, tunnel: overlay.tunnel, vtep_mac: wanted.decapsulated };
                taps.push((number, Tap::open(link, &wanted)?, layout));
            }
        }
        let mut file = CaptureFile::create(&options.write, options.size, options.snaplen)?;
        let mut inner = Vec::new();
        for overlay in &overlays {
            let link_type = match overlay.tunnel {
                Some(Tunnel::Vxlan { .. }) => Some(DataLink::ETHERNET),
                Some(Tunnel::Udp { .. }) => Some(DataLink::RAW),
                None => None,
            };
            let link_type = link_type.filter(|_| options.only != Some(Only::Outer));
            let add = |of| file.add_interface(&overlay.device, "packets in the tunnel", of);
            inner.push(link_type.map(add).transpose()?);
        }
        let mut sources = Vec::new();
        for (number, tap, layout) in taps {
            let is_shown = options.only != Some(Only::Inner) || overlays[number].is_direct;
            let link_type = if layout.header_len > 0 { DataLink::ETHERNET } else { DataLink::RAW };
            let add = || file.add_interface(&tap.link.name, "packets on the link", link_type);
            let outer = is_shown.then(add).transpose()?;
            sources.push(Source { tap, layout, overlay: number, outer, inner: inner[number] });
        }
        stop.begin();
        file.flush(&stop)?;
        let names = |of: &Overlay| {
            let links: Vec<_> = of.links.iter().map(|link| link.name.as_str()).collect();
            format!("{} on {}", of.status.name(), super::named(&links))
        };
        let all: Vec<_> = overlays.iter().map(names).collect();
        eprintln!("capturing packets of {}; Ctrl-C ends it", all.join(", "));
        Ok(Self { options, overlays, sources, file, count: Count::default(), stop })
    }

    fn run(&mut self) -> Result<End, CaptureError> {
        let mut buffer = vec![0; (self.options.snaplen as usize + MOST_OUTER).max(LEAST_COPIED)];
        loop {
            let taps = self.sources.iter().map(|source| (source.tap.as_fd(), PollFlags::POLLIN));
            let is_signalled = self.stop.wait(taps, "wait for packets")?.is_signalled;
            let is_over = is_signalled || self.stop.left().is_zero();
            // What came until now and still waits is part of it. (Not by their times: those that came before the kernel had turned
            // its stamps on, `net_enable_timestamp`, have that of being read.)
            let mut limits = vec![AT_A_TIME; self.sources.len()];
            if is_over {
                for (limit, source) in limits.iter_mut().zip(&mut self.sources) {
                    *limit = source.tap.waiting()?;
                }
            }
            for (source, limit) in limits.into_iter().enumerate() {
                if let Some(end) = self.take(source, &mut buffer, limit)? {
                    return Ok(end);
                }
            }
            self.file.flush(&self.stop)?;
            if is_over {
                return Ok(if is_signalled { End::Signal } else { End::Seconds });
            }
        }
    }

    /// Takes packets that wait. What ends the capture, if one does.
    fn take(&mut self, source: usize, buffer: &mut [u8], limit: u64) -> Result<Option<End>, CaptureError> {
        for number in 1..=limit {
            let Some(frame) = self.sources[source].tap.receive(buffer)? else { break };
            if !self.add(source, &frame)? {
                return Ok(Some(End::Size));
            }
            if self.count.received + self.count.sent >= self.options.packets {
                return Ok(Some(End::Packets));
            }
            if number.is_multiple_of(AT_A_TIME) {
                self.file.flush(&self.stop)?;
            }
        }
        Ok(None)
    }

    /// Adds a packet to the file, if it is asked for. `false` where it has no room.
    fn add(&mut self, source: usize, frame: &Frame<'_>) -> Result<bool, CaptureError> {
        let source = &self.sources[source];
        let carried = source.layout.carried(frame.part);
        let Some(records) = source.records(frame.part, &carried, &self.overlays[source.overlay], self.options.only)
        else {
            self.count.others += 1;
            return Ok(true);
        };
        if !self.file.add(&records, frame.time, frame.direction)? {
            return Ok(false);
        }
        self.count.decapsulated += u64::from(carried == Carried::Decapsulated);
        if !records.is_empty() {
            match frame.direction {
                Direction::Received => self.count.received += 1,
                Direction::Sent => self.count.sent += 1,
            }
        }
        Ok(true)
    }

    /// Completes the file. What the taps were given, in all.
    fn finish(&mut self) -> Result<Statistics, CaptureError> {
        let mut sum = Statistics::default();
        for source in &mut self.sources {
            let statistics = source.tap.statistics()?;
            sum.accepted += statistics.accepted;
            sum.dropped += statistics.dropped;
            if let Some(interface) = source.outer.or(source.inner) {
                self.file.add_statistics(interface, statistics)?;
            }
        }
        self.file.flush(&self.stop)?;
        Ok(sum)
    }

    /// Says how it went.
    fn conclude(&self, end: End, took: Duration, statistics: Statistics) {
        let Count { received, sent, others, decapsulated } = self.count;
        let captured = received + sent;
        let ended_by = match end {
            End::Seconds => format!("--seconds {}", self.options.seconds),
            End::Packets => format!("--packets {}", self.options.packets),
            End::Size => format!("--size {}", self.options.size),
            End::Signal => "a signal".to_owned(),
        };
        eprintln!(
            "{captured} packets captured ({received} received, {sent} sent), {} dropped by the kernel; {} in {:.1} s; ended by {ended_by}",
            statistics.dropped,
            ByteSize(self.file.len()),
            took.as_secs_f64()
        );
        if others > 0 {
            eprintln!("{others} other packets of the overlay passed, which the filter does not match");
        }
        if captured == 0 && others == 0 {
            eprintln!("no packet of the overlay passed these links meanwhile");
        }
        if captured == 0 {
            let mismatches = self.overlays.iter().filter_map(Overlay::mismatch);
            mismatches.for_each(|mismatch| eprintln!("{mismatch}"));
        }
        if decapsulated > 0 {
            eprintln!(
                "of {decapsulated} packets there is only the inner one, since XDP had taken them out of their tunnel"
            );
        }
    }
}

impl Source {
    /// What of a frame goes into the file. [`None`] where it is not asked for.
    fn records<'f>(
        &self,
        frame: Part<'f>,
        carried: &Carried<'f>,
        Overlay { filter, tunnel, .. }: &Overlay,
        only: Option<Only>,
    ) -> Option<Vec<Record<'f>>> {
        let record = |interface, part| Record { interface, part, comment: None };
        match carried {
            Carried::Tunnelled { vteps, inner } => {
                let ipv4 = |part: &Part<'f>| match tunnel {
                    Some(Tunnel::Udp { .. }) => part.bytes,
                    _ => ipv4_of(part.bytes),
                };
                let mut asked_for = inner.clone();
                asked_for.retain(|part| filter.matches(ipv4(part), Some(*vteps)));
                if asked_for.is_empty() && !(filter.is_empty() && inner.is_empty()) {
                    return None;
                }
                let outer = self.outer.filter(|_| only != Some(Only::Inner)).map(|interface| record(interface, frame));
                let inner = self.inner.map(|interface| asked_for.into_iter().map(move |part| record(interface, part)));
                Some(outer.into_iter().chain(inner.into_iter().flatten()).collect())
            }
            Carried::Direct => {
                let packet = frame.bytes.get(self.layout.header_len..).unwrap_or_default();
                filter.matches(packet, None).then(|| self.outer.map(|outer| record(outer, frame)).into_iter().collect())
            }
            Carried::Decapsulated => filter.matches(ipv4_of(frame.bytes), None).then(|| {
                let record = |interface| Record { interface, part: frame, comment: Some(BY_XDP) };
                self.inner.map(record).into_iter().collect()
            }),
        }
    }
}
