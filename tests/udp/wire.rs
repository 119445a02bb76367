//! Datagrams as a plain socket sees and sends them.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use flannel_agent::udp::Event;
use xtask::progress::wait_for;

use super::{Hosts, PORT, bare_socket};
use crate::{sockets::socket_in, world::SOON};

/// The next datagram, and who sent it.
fn receive_from(socket: &UdpSocket, buffer: &mut [u8]) -> (usize, SocketAddr) {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result.unwrap(),
        }
    }
}

#[test]
fn a_datagram_is_the_packet_with_its_ttl_less_by_one() {
    let hosts = Hosts::new(2);
    let _tunnel = hosts.start(1);
    let peer = bare_socket(&hosts.hosts[1]);
    let pod = &hosts.hosts[0].pods[0];
    let sender = socket_in(&pod.netns, SocketAddrV4::new(pod.address, 4000));
    for len in [0, 1, 999, 1000] {
        let payload: Vec<u8> = (0..len).map(|place| place as u8).collect();
        sender.send_to(&payload, "10.5.2.9:53").unwrap();
        let mut buffer = [0; 2000];
        let (got, from) = receive_from(&peer, &mut buffer);
        assert_eq!(from, SocketAddrV4::new(hosts.hosts[0].address, PORT).into());
        let sliced = SlicedPacket::from_ip(&buffer[..got]).unwrap();
        let Some(NetSlice::Ipv4(ip)) = sliced.net else { panic!("no IPv4") };
        assert_eq!(usize::from(ip.header().total_len()), got, "nothing else is in it");
        // 64, less one by the host's stack.
        assert_eq!(ip.header().ttl(), 62);
        assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
        assert_eq!((ip.header().source_addr(), ip.header().destination_addr()), (pod.address, [10, 5, 2, 9].into()));
        let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("no UDP") };
        assert_eq!((udp.source_port(), udp.destination_port(), udp.payload()), (4000, 53, &payload[..]));
        let expected = udp.to_header().calc_checksum_ipv4(&ip.header().to_header(), udp.payload()).unwrap();
        assert_eq!(udp.checksum(), expected);
    }
}

fn datagram(source: [u8; 4], destination: [u8; 4], ttl: u8) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(source, destination, ttl).udp(4000, 9000).write(&mut packet, b"hello").unwrap();
    packet
}

#[test]
fn what_no_lease_covers_is_refused_and_counted() {
    let hosts = Hosts::new(3);
    let tunnel = hosts.start(1);
    // The third is a stranger.
    tunnel.set_peers(super::peers(1, &[(2, hosts.hosts[1].address)]));
    let pod = &hosts.hosts[0].pods[0];
    let receiver = socket_in(&pod.netns, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 9000));
    receiver.set_read_timeout(Some(SOON)).unwrap();
    let [peer, stranger] = [1, 2].map(|host: usize| bare_socket(&hosts.hosts[host]));
    let to = SocketAddrV4::new(hosts.hosts[0].address, PORT);
    let (pod, good) = (pod.address.octets(), [10, 5, 2, 2]);
    let whole = datagram(good, pod, 64);
    let mut ipv6 = whole.clone();
    ipv6[0] = 0x60;
    let cut = &whole[..whole.len() - 1];
    let cases: [(&str, bool, &[u8], Event); 13] = [
        ("another's pod", true, &datagram([10, 5, 3, 2], pod, 64), Event::SpoofedInnerSource),
        ("our own pod", true, &datagram([10, 5, 1, 3], pod, 64), Event::SpoofedInnerSource),
        ("an address outside", true, &datagram([8, 8, 8, 8], pod, 64), Event::SpoofedInnerSource),
        ("a stranger with a peer's pod", false, &whole, Event::UnknownPeer),
        ("a stranger with its own", false, &datagram([10, 5, 3, 2], pod, 64), Event::UnknownPeer),
        ("to a pod elsewhere", true, &datagram(good, [10, 5, 3, 2], 64), Event::ForeignInnerDestination),
        ("to the world", true, &datagram(good, [8, 8, 8, 8], 64), Event::ForeignInnerDestination),
        ("to a group", true, &datagram(good, [224, 0, 0, 1], 64), Event::NotUnicast),
        ("from loopback", true, &datagram([127, 0, 0, 1], pod, 64), Event::NotUnicast),
        ("of version 6", true, &ipv6, Event::NotIpv4),
        ("cut off", true, cut, Event::Truncated),
        ("empty", true, &[], Event::Truncated),
        ("at its end", true, &datagram(good, pod, 1), Event::TtlExceeded),
    ];
    let mut buffer = [0; 100];
    for (good_before, (what, is_peer, bytes, event)) in (0..).zip(cases) {
        let before = Event::ALL.iter().map(|event| tunnel.count(*event)).collect::<Vec<_>>();
        let sender = if is_peer { &peer } else { &stranger };
        sender.send_to(bytes, to).unwrap();
        wait_for(what, SOON, || tunnel.count(event) > before[event as usize]).unwrap();
        // What the sender is told is sent, and the host's own IPv6 tries the device, too.
        let outward = [Event::Sent, Event::SendNotIpv4];
        for (other, before) in Event::ALL.iter().zip(before).filter(|(other, _)| !outward.contains(other)) {
            let expected = before + u64::from(*other == event);
            assert_eq!(tunnel.count(*other), expected, "{what}: {}", other.label());
        }
        // The next one to arrive is the peer's good one.
        peer.send_to(&whole, to).unwrap();
        let (len, from) = receive_from(&receiver, &mut buffer);
        assert_eq!((&buffer[..len], from), (&b"hello"[..], SocketAddrV4::new(good.into(), 4000).into()), "{what}");
        wait_for("its count", SOON, || tunnel.count(Event::Received) == good_before + 1).unwrap();
    }
    // Behind the packet there may be more: flannel's proxy takes it too.
    peer.send_to(&[&whole[..], b"more"].concat(), to).unwrap();
    assert_eq!(receive_from(&receiver, &mut buffer).0, 5);
    // In one message with a good one before and after, it costs only itself.
    let mixed = [whole.clone(), datagram([8, 8, 8, 8], pod, 64), whole];
    let lens: Vec<_> = mixed.iter().map(Vec::len).collect();
    assert!(lens.iter().all(|len| *len == lens[0]));
    nix::sys::socket::setsockopt(&peer, nix::sys::socket::sockopt::UdpGsoSegment, &(lens[0] as i32)).unwrap();
    let before = tunnel.count(Event::SpoofedInnerSource);
    peer.send_to(&mixed.concat(), to).unwrap();
    for _ in 0..2 {
        assert_eq!(receive_from(&receiver, &mut buffer).0, 5);
    }
    assert_eq!(tunnel.count(Event::SpoofedInnerSource), before + 1);
}
