//! What is larger than a frame: TCP and UDP of every size, segmented by the underlay or before it, with small frames and
//! large ones.

use std::{
    collections::BTreeSet,
    io::{IoSliceMut, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, getsockopt, recvmsg, setsockopt,
    sockopt::{RcvBufForce, TcpMaxSeg, UdpGroSegment, UdpGsoSegment},
};
use xtask::lab::{Netns, Pod};

use crate::{
    calls::SERVER_PORT,
    counted::{Asked, Counted},
    sockets::{Pattern, connection, listener_in, socket_in},
    world::{SOON, World},
};

/// The largest payload of a UDP packet: 65,535 bytes less the IPv4 and UDP headers.
const LARGEST_UDP: usize = 65_507;
/// IPv4 and UDP headers.
const UDP_HEADERS: usize = 28;
/// As many datagrams as every kernel takes in one send (`UDP_MAX_SEGMENTS`).
const MOST_SEGMENTS: usize = 64;

/// Two hosts with a pod each on an underlay of that MTU.
fn world(mtu: u32) -> World {
    let world = World::new(2);
    for host in &world.hosts {
        host.set_underlay_mtu(mtu).unwrap();
    }
    let world = world.ready(&[]);
    assert_eq!(world.hosts[0].subnet().unwrap().mtu, mtu - 50);
    world.wait_connected(0, 1);
    world
}

/// Does something where large packets cross the underlay whole, and where they do not, on frames of both sizes.
pub fn on_each_underlay(check: impl Fn(&World, &str)) {
    for mtu in [1500, 9000] {
        let world = world(mtu);
        for gso in [true, false] {
            for host in &world.hosts {
                host.set_underlay_gso(gso).unwrap();
            }
            check(&world, &format!("MTU {mtu}, GSO {gso}"));
        }
    }
}

fn pods(world: &World) -> [&Pod; 2] {
    [0, 1].map(|host| &world.hosts[host].pods[0])
}

/// Of so many bytes, what passes by at least: what is left to the stack are a flow's first packets, and one in a second.
const fn nearly_all(sent: usize) -> u64 {
    sent as u64 / 10 * 9
}

/// Sizes up to the largest: around each number of whole segments, around powers of two, and some of all others.
fn sizes(segment: usize, largest: usize) -> Vec<usize> {
    let multiples = (1..=largest / segment).map(|count| count * segment);
    let powers = (0..=16).map(|power| 1 << power);
    let around = multiples.chain(powers).flat_map(|size| [size - 1, size, size + 1]);
    let sizes = around.chain((1..=largest).step_by(97)).chain([largest]);
    sizes.filter(|size| (1..=largest).contains(size)).collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn tcp_of_every_size_arrives_whole() {
    on_each_underlay(|world, what| check_tcp_of_every_size(world, &Asked::pod(world), what));
}

/// Has TCP of every size sent there and back.
pub fn check_tcp_of_every_size(world: &World, asked: &Asked<'_>, what: &str) {
    let (pattern, [one, two]) = (Pattern::new(), pods(world));
    let listener = listener_in(&two.netns, two.address, SERVER_PORT);
    let (mut client, mut server) = connection(&one.netns, asked.address, &listener);
    let segment = getsockopt(&client, TcpMaxSeg).unwrap() as usize;
    let sizes = sizes(segment, Pattern::LARGEST);
    let passed_by = Counted::since_now(world, asked.outward().chain(asked.inward()));
    thread::scope(|scope| {
        // It answers with as much, once all is there. So each is a write, and a packet or few, by itself.
        let (sizes, pattern) = (&sizes, &pattern);
        scope.spawn(move || {
            for size in sizes {
                receive(&mut server, *size, pattern, what);
                server.write_all(pattern.at(*size, *size)).unwrap();
            }
        });
        for size in sizes {
            client.write_all(pattern.at(*size, *size)).unwrap();
            receive(&mut client, *size, pattern, what);
        }
    });
    passed_by.assert_bytes(nearly_all(sizes.iter().sum()), what);
}

fn receive(stream: &mut TcpStream, size: usize, pattern: &Pattern, what: &str) {
    let mut buffer = vec![0; size];
    stream.read_exact(&mut buffer).unwrap();
    pattern.assert(size, &buffer, || format!("{size} bytes of TCP, {what}"));
}

/// UDP sockets of two namespaces, with room for all datagrams of a send.
pub fn udp_pair(ends: [(&Netns, Ipv4Addr); 2], port: u16) -> [UdpSocket; 2] {
    ends.map(|(netns, address)| {
        let socket = socket_in(netns, SocketAddrV4::new(address, port));
        socket.set_read_timeout(Some(SOON)).unwrap();
        setsockopt(&socket, RcvBufForce, &(4 << 20)).unwrap();
        socket
    })
}

/// Sends of so many bytes as datagrams of a size: few and many, with a last one that is shorter or of one byte.
fn segmented(segment: usize) -> impl Iterator<Item = usize> {
    let most = MOST_SEGMENTS.min(LARGEST_UDP / segment);
    let counts: BTreeSet<usize> =
        [1, 2, 3, 5, 16, 17, most - 1, most].into_iter().filter(|count| *count <= most).collect();
    let most = (most * segment).min(LARGEST_UDP);
    counts
        .into_iter()
        .flat_map(move |count| [count * segment - 1, count * segment, count * segment + 1])
        .filter(move |size| (1..=most).contains(size))
}

#[test]
fn udp_of_every_segmentation_arrives_as_datagrams() {
    on_each_underlay(|world, what| check_every_segmentation(world, &Asked::pod(world), false, what));
}

#[test]
fn udp_of_every_segmentation_arrives_where_aggregates_are_taken() {
    on_each_underlay(|world, what| check_every_segmentation(world, &Asked::pod(world), true, what));
}

/// Has sends of every size as datagrams of every size go there and back, to sockets that take them aggregated, or one by
/// one.
pub fn check_every_segmentation(world: &World, asked: &Asked<'_>, aggregated: bool, what: &str) {
    let (pattern, pods) = (Pattern::new(), pods(world));
    let largest = world.hosts[0].subnet().unwrap().mtu as usize - UDP_HEADERS;
    let sockets = udp_pair(pods.map(|pod| (&pod.netns, pod.address)), SERVER_PORT);
    for socket in &sockets {
        setsockopt(socket, UdpGroSegment, &aggregated).unwrap();
    }
    let client = SocketAddrV4::new(pods[0].address, SERVER_PORT);
    // By whom a datagram arrives, and where it is sent.
    let (seen_by, sent_to) = ([client, asked.address], [asked.address, client]);
    // Only out of the pods: who receives may have to leave to the stack what is still to be segmented.
    let passed_by = Counted::since_now(world, asked.outward());
    let mut sent = 0;
    for segment in [1, 7, 8, 100, 511, 512, 1000, 1024, largest / 2, largest - 1, largest] {
        for socket in &sockets {
            setsockopt(socket, UdpGsoSegment, &(segment as i32)).unwrap();
        }
        for (size, [from, to]) in segmented(segment).flat_map(|size| [(size, [0, 1]), (size, [1, 0])]) {
            sent += size;
            let bytes = pattern.at(size, size);
            sockets[from].send_to(bytes, sent_to[from]).unwrap();
            let what = || format!("{size} bytes by {segment}, from {from}, {what}");
            receive_datagrams(&sockets[to], seen_by[from], bytes, segment, what);
        }
    }
    passed_by.assert_bytes(nearly_all(sent / 2), what);
}

/// Takes all datagrams of somebody's send, each of them of the segments' size but for the last. A socket that takes
/// aggregated ones is told the size of those in it.
pub fn receive_datagrams(
    socket: &UdpSocket,
    sender: SocketAddrV4,
    sent: &[u8],
    segment: usize,
    what: impl Fn() -> String,
) {
    let mut buffer = vec![0; Pattern::LARGEST];
    let mut control = nix::cmsg_space!(i32);
    let mut received = 0;
    while received < sent.len() {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty());
        let message = message.unwrap_or_else(|error| panic!("{}: {error} after {received} bytes", what()));
        let aggregated = message.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::UdpGroSegments(size) => Some(size as usize),
            _ => None,
        });
        assert_eq!(message.address.map(SocketAddrV4::from), Some(sender), "{}", what());
        let len = message.bytes;
        let rest = &sent[received..];
        match aggregated {
            Some(size) => {
                assert!(
                    size == segment && (len.is_multiple_of(segment) || len == rest.len()),
                    "{}: {len} by {size}",
                    what()
                )
            }
            None => assert_eq!(len, segment.min(rest.len()), "{}: a datagram at {received}", what()),
        }
        assert!(rest.starts_with(&buffer[..len]), "{}: wrong bytes in {received}..{}", what(), received + len);
        received += len;
    }
}

#[test]
fn udp_in_fragments_arrives_whole() {
    let pattern = Pattern::new();
    on_each_underlay(|world, what| {
        let pods = pods(world);
        let mtu = world.hosts[0].subnet().unwrap().mtu as usize;
        let sockets = udp_pair(pods.map(|pod| (&pod.netns, pod.address)), 7777);
        let mut buffer = vec![0; Pattern::LARGEST];
        // Each fragment but the last holds a multiple of eight bytes.
        for size in sizes((mtu - 20) & !7, LARGEST_UDP).into_iter().filter(|size| *size > mtu - UDP_HEADERS) {
            for (from, to) in [(0, 1), (1, 0)] {
                sockets[from].send_to(pattern.at(size, size), (pods[to].address, 7777)).unwrap();
                let len = sockets[to].recv(&mut buffer).unwrap();
                assert_eq!(len, size, "from {from}, {what}");
                pattern.assert(size, &buffer[..len], || format!("{size} bytes in fragments, from {from}, {what}"));
            }
        }
    });
}
