//! `flannel-agent trace`: what becomes of a packet on this host, by the attached programs and the tables as they are.
//!
//! Each program on the way is run by its replica ([`crate::dataplane::replica`]), so that nothing is sent, counted or noted. In
//! between there is the stack, which is asked for its routes and MTUs; its packet rules are not run.
//!
//! * `host` — what is known of this host
//! * `packet` — the packet at each place
//! * `way` — from place to place
//! * `consulted` — what the tables answer, in words
//! * `layers`, `report` — the output

mod consulted;
mod host;
mod layers;
mod packet;
mod report;
mod way;

use std::{net::Ipv4Addr, path::PathBuf};

use caps::{CapSet, Capability};
use clap::Args;
use etherparse::err::packet::BuildWriteError;
use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;

use self::{
    host::Host,
    packet::{Protocol, Query, SMALLEST},
    report::Trace,
};
use crate::{
    cli::{Cli, Output},
    dataplane::{DataplaneError, replica::ReplicaError},
    device::DeviceError,
    operator::OperatorError,
};

/// What the kernel asks for: to run programs, to look at links, and to be told of programs by their numbers.
const NEEDED: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_SYS_ADMIN];

/// What is traced.
#[derive(Args, Debug)]
pub struct Options {
    /// Who sends it: an address of a pod or host of the overlay, or an interface of this host (a pod's veth for the pod)
    #[arg(value_name = "SRC")]
    source: String,
    /// Whom it is for, likewise
    #[arg(value_name = "DST")]
    destination: String,
    /// A TCP segment of an established connection; this is the default
    #[arg(long)]
    tcp: bool,
    /// A UDP datagram
    #[arg(long, conflicts_with = "tcp")]
    udp: bool,
    /// An ICMP echo request
    #[arg(long, conflicts_with_all = ["tcp", "udp"])]
    icmp: bool,
    /// Source port
    #[arg(long, value_name = "PORT", default_value_t = 40000)]
    sport: u16,
    /// Destination port
    #[arg(long, value_name = "PORT", default_value_t = 80)]
    dport: u16,
    /// Bytes of IPv4 packet
    #[arg(long, value_name = "BYTES", default_value_t = 84)]
    #[arg(value_parser = clap::value_parser!(u16).range(i64::from(SMALLEST)..=9216))]
    size: u16,
    /// The VTEP address that it comes from in its tunnel, where that is not the one which leases SRC's subnet
    #[arg(long, value_name = "IP")]
    from_vtep: Option<Ipv4Addr>,
    /// Of several overlays, this one
    #[arg(long, value_name = "VNI")]
    vni: Option<u32>,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// A packet can't be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The user may not do what it takes.
    #[error(
        "{0} is missing: trace runs programs in the kernel, for which it takes CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN; run it as root"
    )]
    Privilege(Capability),
    /// The process' own capabilities can't be read.
    #[error("read the capabilities of this process: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// No agent left anything there.
    #[error("no dataplane{} is pinned below {}; name the directory with --bpf-pin-dir", .vni.map(|vni| format!(" of VNI {vni}")).unwrap_or_default(), .directory.display())]
    NoDataplane {
        /// The directory.
        directory: PathBuf,
        /// What was asked for.
        vni: Option<u32>,
    },
    /// The backend has no programs.
    #[error(
        "VNI {vni} has the backend {backend}, whose packets meet no program of this agent's: there is nothing to trace; try `ip route get`"
    )]
    NoPrograms {
        /// Whose.
        vni: Vni,
        /// Which.
        backend: &'static str,
    },
    /// A device of the overlay is not there.
    #[error("{0} is gone; a running agent makes it again")]
    NoDevice(String),
    /// A link went meanwhile.
    #[error("the link {0} is gone")]
    Gone(String),
    /// An end that is neither address nor interface.
    #[error("{0:?} is neither an IPv4 address nor an interface of this host that has one")]
    NoSuchEnd(String),
    /// The pod of a veth has not been heard of.
    #[error("nothing is known of the pod at {0}, which has sent nothing yet: name its address")]
    UnknownVeth(String),
    /// An address of this host's lease that nobody has been seen with.
    #[error(
        "this host leases {subnet}, but knows no pod with {address} (`ip neighbour` has no MAC for it at a pod's veth; {veths}): has the pod started, and has it sent anything?"
    )]
    UnknownPod {
        /// The address.
        address: Ipv4Addr,
        /// The lease.
        subnet: Ipv4Net,
        /// The pods' veths, in words.
        veths: String,
    },
    /// Nobody sends from there.
    #[error(
        "no host leases the subnet of {0}, and it is no VTEP's address (`flannel-agent peers` lists them): name the host that sends it with --from-vtep"
    )]
    NotLeased(Ipv4Addr),
    /// It does not come by here.
    #[error(
        "neither end is on this host, which leases {here}: run this on {source_host}, which sends it, or on {destination_host}"
    )]
    NotHere {
        /// This host's lease.
        here: Ipv4Net,
        /// Who leases the source.
        source_host: String,
        /// Who leases the destination.
        destination_host: String,
    },
    /// The kernel runs programs on Ethernet frames only.
    #[error(
        "{0} has no Ethernet headers, and the kernel runs programs on Ethernet frames only (bpf_prog_test_run_skb): packets that come in by it can't be traced"
    )]
    NoEthernet(String),
    /// The host's addresses.
    #[error("list the addresses of this host: {0}")]
    Addresses(nix::errno::Errno),
    /// The packet could not be made.
    #[error("make the packet: {0}")]
    Packet(#[from] BuildWriteError),
    /// Netlink.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Maps.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// Programs.
    #[error(transparent)]
    Replica(Box<ReplicaError>),
}

impl From<ReplicaError> for TraceError {
    fn from(error: ReplicaError) -> Self {
        Self::Replica(Box::new(error))
    }
}

/// Prints what becomes of a packet. Works without an agent.
///
/// # Errors
/// [`OperatorError::Trace`].
pub async fn print(cli: &Cli, options: &Options) -> Result<(), OperatorError> {
    trace(cli, options).await.map_err(Box::new)?.print(options.output);
    Ok(())
}

async fn trace(cli: &Cli, options: &Options) -> Result<Trace, TraceError> {
    let effective = caps::read(None, CapSet::Effective)?;
    if let Some(missing) = NEEDED.into_iter().find(|needed| !effective.contains(needed)) {
        return Err(TraceError::Privilege(missing));
    }
    let host = Host::read(cli, options).await?;
    let protocol = match (options.udp, options.icmp) {
        (true, _) => Protocol::Udp,
        (_, true) => Protocol::Icmp,
        (false, false) => Protocol::Tcp,
    };
    let query = Query {
        source: host.resolve(&options.source)?,
        destination: host.resolve(&options.destination)?,
        protocol,
        source_port: options.sport,
        destination_port: options.dport,
        size: options.size,
    };
    way::trace(&host, &query, options.from_vtep).await
}
