//! Asking peers on the same link to show how they send to this host: in the tunnel, or without (`DirectRouting`).
//!
//! A host with `rp_filter` 1 takes packets only by the device that its own route to the sender leads out of, and that may be
//! another than ours would be: flannel decides once for each peer, and another host may be behind a router on the way here and
//! not on the way back. So a peer is sent packets as it sends them itself ([`Heard`](flannel_common::maps::Heard)). Of one that
//! has sent nothing yet, or whose last packets were in the tunnel, that is found out by an ICMP echo request from this host's
//! address on the overlay to the peer's: without the tunnel, and to whom nothing was heard of, also in it. The answer comes by
//! the peer's own route. Where ICMP is filtered, its first packets say it.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use flannel_common::{maps::Vtep, packet::OuterHeader};
use ipnet::Ipv4Net;
use tracing::debug;

use crate::{dataplane::Unheard, device::raw_frame::FrameSender};

/// How long a peer has to answer before it is asked again.
const PERIOD: Duration = Duration::from_secs(10);
/// No more peers are asked at once than this.
const MOST: usize = 64;

const TTL: u8 = 64;
/// Where in the outer header what the kernel puts in front of it itself ends: after Ethernet, IPv4 and UDP.
const PAYLOAD: usize = 14 + 20 + 8;

/// Which peers were asked, and when.
#[derive(Debug, Default)]
pub struct Probes {
    asked: HashMap<Ipv4Net, (Vtep, Instant)>,
}

impl Probes {
    /// Asks those that are due. `source` is this host's VTEP address, `own` its address on the overlay, `port` the tunnel's.
    pub fn ask(&mut self, peers: &[Unheard], source: Ipv4Addr, own: Ipv4Addr, port: u16) {
        self.asked.retain(|subnet, _| peers.iter().any(|peer| peer.subnet == *subnet));
        let now = Instant::now();
        let is_due = |peer: &&Unheard| {
            let asked = self.asked.get(&peer.subnet);
            asked.is_none_or(|(vtep, at)| *vtep != peer.vtep || now.duration_since(*at) >= PERIOD)
        };
        let due: Vec<_> = peers.iter().filter(is_due).take(MOST).copied().collect();
        if due.is_empty() {
            return;
        }
        if let Err(error) = send(&due, source, own, port) {
            debug!("peers on the link can't be asked how they send: {error}");
        }
        self.asked.extend(due.into_iter().map(|peer| (peer.subnet, (peer.vtep, now))));
    }
}

fn send(peers: &[Unheard], source: Ipv4Addr, own: Ipv4Addr, port: u16) -> io::Result<()> {
    let tunnel = UdpSocket::bind((source, 0))?;
    let frames = FrameSender::open()?;
    for Unheard { subnet, vtep, heard } in peers {
        let request = echo_request(own, subnet.network())?;
        if vtep.flags & Vtep::RESOLVED != 0 {
            let (next_hop, device) = vtep.header.underlay_macs();
            frames.send(vtep.ifindex, &[&next_hop[..], &device, &[8, 0], &request].concat())?;
        }
        if heard.last == 0 {
            let OuterHeader(header) = vtep.header;
            let to = SocketAddrV4::new(Ipv4Addr::from_bits(vtep.address), port);
            tunnel.send_to(&[&header[PAYLOAD..], &request].concat(), to)?;
        }
    }
    Ok(())
}

/// An IPv4 packet with an ICMP echo request without data (RFC 792).
fn echo_request(source: Ipv4Addr, destination: Ipv4Addr) -> io::Result<Vec<u8>> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), TTL).icmpv4_echo_request(0, 0);
    builder.write(&mut packet, &[]).map_err(io::Error::other)?;
    Ok(packet)
}
