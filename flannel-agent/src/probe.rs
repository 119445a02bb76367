//! Asking peers on the same link to show how they send to this host: in the tunnel, or without (`DirectRouting`).
//!
//! A host with `rp_filter` 1 takes packets only by the device that its own route to the sender leads out of, and that may be
//! another than ours would be: flannel decides once for each peer, and another host may be behind a router on the way here and
//! not on the way back. So a peer is sent packets as it sends them itself ([`Heard`](flannel_common::maps::Heard)). Of one that
//! has sent nothing yet, or whose last packets were in the tunnel, that is found out by an ICMP echo request from this host's
//! address on the overlay to the peer's: without the tunnel, and to a peer that does not answer that and was never heard, also in it.
//! The answer comes by the peer's own route. Where ICMP is filtered, its first packets say it.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    time::{Duration, Instant},
};

use etherparse::PacketBuilder;
use flannel_common::{maps::Vtep, packet::OuterHeader};
use ipnet::Ipv4Net;
use tracing::{debug, warn};

use crate::{dataplane::Unheard, device::raw_frame::FrameSender};

/// How long a peer has to answer before it is asked again: of which nothing was heard yet, and which sends in the tunnel.
const SOON: Duration = Duration::from_secs(1);
const LATER: Duration = Duration::from_secs(30);
/// After so many questions without an answer it is asked as seldom as the others.
const PATIENCE: u32 = 5;
/// No more peers are asked at once than this.
const MOST: usize = 256;

const TTL: u8 = 64;
/// Where in the outer header what the kernel puts in front of it itself ends: after Ethernet, IPv4 and UDP.
const PAYLOAD: usize = 14 + 20 + 8;

/// Which peers were asked, and when.
#[derive(Debug, Default)]
pub struct Probes {
    asked: HashMap<Ipv4Net, Asked>,
    is_said: bool,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    vtep: Vtep,
    at: Instant,
    times: u32,
}

impl Probes {
    /// Asks those that are due, who waited for longest first. `source` is this host's VTEP address, `own` its address on the
    /// overlay, `port` the tunnel's. Returns next hops whose MAC has to be known first.
    pub fn ask(&mut self, peers: &[Unheard], source: Ipv4Addr, own: Ipv4Addr, port: u16) -> Vec<(u32, Ipv4Addr)> {
        let due = self.due(peers, Instant::now());
        if due.is_empty() {
            return Vec::new();
        }
        let frames = FrameSender::open().map_err(|error| {
            if !std::mem::replace(&mut self.is_said, true) {
                warn!(
                    "peers on the link can't be asked to send without the tunnel: {error}; give the agent CAP_NET_RAW for \
                     DirectRouting, or their first packets decide"
                );
            }
        });
        let tunnel = UdpSocket::bind((source, 0));
        let mut unresolved = Vec::new();
        for (Unheard { subnet, vtep, heard }, times) in due {
            let Ok(request) = echo_request(own, subnet.network()) else { continue };
            if vtep.flags & Vtep::RESOLVED == 0 {
                unresolved.push((vtep.ifindex, Ipv4Addr::from(vtep.next_hop)));
            } else if let Ok(frames) = &frames {
                let (next_hop, device) = vtep.header.underlay_macs();
                let sent = frames.send(vtep.ifindex, &[&next_hop[..], &device, &[8, 0], &request].concat());
                say(sent);
            }
            // Not at first: an agent that hears it takes this host for one that sends in the tunnel.
            if heard.last == 0 && times > 1 {
                let OuterHeader(header) = vtep.header;
                let to = SocketAddrV4::new(Ipv4Addr::from_bits(vtep.address), port);
                let datagram = [&header[PAYLOAD..], &request].concat();
                say(tunnel.as_ref().map_or(Ok(()), |tunnel| tunnel.send_to(&datagram, to).map(drop)));
            }
        }
        unresolved
    }

    /// With how often each was asked before.
    fn due(&mut self, peers: &[Unheard], now: Instant) -> Vec<(Unheard, u32)> {
        let current: HashSet<Ipv4Net> = peers.iter().map(|peer| peer.subnet).collect();
        self.asked.retain(|subnet, _| current.contains(subnet));
        let mut due: Vec<_> = peers
            .iter()
            .filter_map(|peer| {
                let asked = self.asked.get(&peer.subnet);
                let wait = match asked {
                    Some(asked) if asked.times >= PATIENCE || peer.heard.last != 0 => LATER,
                    _ => SOON,
                };
                let is_due = asked.is_none_or(|asked| {
                    let is_resolved_now = peer.vtep.flags & !asked.vtep.flags & Vtep::RESOLVED != 0;
                    is_resolved_now || now.duration_since(asked.at) >= wait
                });
                is_due.then_some((asked.map(|asked| asked.at), *peer, asked.map_or(0, |asked| asked.times)))
            })
            .collect();
        due.sort_by_key(|(at, peer, _)| (*at, peer.subnet));
        due.truncate(MOST);
        for (_, Unheard { subnet, vtep, .. }, times) in &due {
            self.asked.insert(*subnet, Asked { vtep: *vtep, at: now, times: times + 1 });
        }
        due.into_iter().map(|(_, peer, times)| (peer, times)).collect()
    }
}

fn say(sent: io::Result<()>) {
    if let Err(error) = sent {
        debug!("a peer on the link can't be asked how it sends: {error}");
    }
}

/// An IPv4 packet with an ICMP echo request without data (RFC 792).
fn echo_request(source: Ipv4Addr, destination: Ipv4Addr) -> io::Result<Vec<u8>> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), TTL).icmpv4_echo_request(0, 0);
    builder.write(&mut packet, &[]).map_err(io::Error::other)?;
    Ok(packet)
}
