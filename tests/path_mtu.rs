//! Pods with a larger MTU than the overlay's: who sends too much is told, whether or not its flow bypasses the stack.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddrV4, UdpSocket},
    os::fd::AsFd,
    thread,
};

use nix::{
    errno::Errno,
    sys::socket::{
        getsockopt,
        sockopt::{IpMtu, TcpMaxSeg},
    },
};
use xtask::progress::wait_for;

use crate::{
    calls::SERVER_PORT,
    counted::{Asked, Counted},
    sockets::{Pattern, connection, listener_in, socket_in},
    world::{SOON, World},
};

const OVERLAY_MTU: i32 = 1450;
const POD_MTU: i32 = 1500;
/// A UDP payload that makes a packet of the pods' MTU.
const TOO_MUCH: usize = POD_MTU as usize - 28;
/// MSS within the overlay's MTU: less the IPv4 and TCP headers and the timestamps.
const OVERLAY_MSS: u32 = OVERLAY_MTU as u32 - 20 - 32;

/// Hosts whose runtime took no notice of `FLANNEL_MTU`.
pub fn world() -> World {
    let world = World::with_agents(2);
    for host in &world.hosts {
        assert_eq!(host.subnet().unwrap().mtu, OVERLAY_MTU as u32);
        for device in ["pod1", "cni0"] {
            host.netns.ip(&format!("link set {device} mtu {POD_MTU}")).unwrap();
        }
        host.pods[0].netns.ip(&format!("link set eth0 mtu {POD_MTU}")).unwrap();
    }
    world.wait_connected(0, 1);
    world
}

/// The MTU that a pod's socket takes its path to have.
fn path_mtu(socket: &impl AsFd) -> i32 {
    getsockopt(socket, IpMtu).unwrap()
}

/// Sends little until it passes by the stacks that it passes by.
fn wait_bypassed(world: &World, asked: &Asked<'_>, mut send: impl FnMut()) {
    let into = asked.inward().filter(|(host, _)| *host == 1);
    let passed_by = Counted::since_now(world, asked.outward().filter(|(host, _)| *host == 0).chain(into));
    wait_for("the bypass", SOON, || {
        send();
        passed_by.packets().iter().all(|packets| *packets > 3)
    })
    .unwrap();
}

/// Takes the next datagram that is not one of those that only keep the flow going.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> usize {
    loop {
        match socket.recv(buffer).unwrap() {
            1 => {}
            len => return len,
        }
    }
}

#[test]
fn a_pod_is_told_of_a_datagram_that_is_too_big() {
    let world = world();
    check_too_big_a_datagram(&world, &Asked::pod(&world), "by its address");
    // By the gateway of its own host, with the overlay's MTU.
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    client.netns.ip("route flush cache").unwrap();
    let ping = client.netns.exec(&format!("ping -c 1 -W 1 -M do -s {TOO_MUCH} {}", server.address));
    let gateway = world.hosts[0].subnet().unwrap().gateway;
    let said = ping.unwrap_err().to_string();
    let expected = format!("From {gateway} icmp_seq=1 Frag needed and DF set (mtu = {OVERLAY_MTU})");
    assert!(said.contains(&expected), "{said}");
}

/// Has a pod send too large a datagram in a new flow and in a known one, and be told.
pub fn check_too_big_a_datagram(world: &World, asked: &Asked<'_>, what: &str) {
    let pattern = Pattern::new();
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let receiver = socket_in(&server.netns, SocketAddrV4::new(server.address, SERVER_PORT));
    receiver.set_read_timeout(Some(SOON)).unwrap();
    for is_bypassed in [false, true] {
        let what = format!("{what}, bypassed: {is_bypassed}");
        // What it was told before.
        client.netns.ip("route flush cache").unwrap();
        let sender = socket_in(&client.netns, SocketAddrV4::new(client.address, 0));
        sender.connect(asked.address).unwrap();
        if is_bypassed {
            wait_bypassed(world, asked, || assert_eq!(sender.send(b"x").unwrap(), 1));
        }
        assert_eq!(path_mtu(&sender), POD_MTU, "{what}");
        // As all UDP does by default, it forbids fragments while it takes the path to be wide enough.
        sender.send(pattern.at(0, TOO_MUCH)).unwrap();
        wait_for("the answer", SOON, || path_mtu(&sender) == OVERLAY_MTU).unwrap();
        let error = sender.take_error().unwrap().and_then(|error| error.raw_os_error());
        assert_eq!(error, Some(Errno::EMSGSIZE as i32), "{what}");
        // The next one goes in fragments, and is the first to arrive.
        sender.send(pattern.at(1, TOO_MUCH)).unwrap();
        let mut buffer = [0; POD_MTU as usize];
        assert_eq!(receive(&receiver, &mut buffer), TOO_MUCH, "{what}");
        pattern.assert(1, &buffer[..TOO_MUCH], || what);
        receiver.set_nonblocking(true).unwrap();
        assert_eq!(receiver.recv(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
        receiver.set_nonblocking(false).unwrap();
    }
}

#[test]
fn tcp_finds_the_overlays_mtu() {
    let world = world();
    check_tcp(&world, &Asked::pod(&world), "by its address");
}

/// Has TCP find the overlay's MTU in a new flow and in a known one.
pub fn check_tcp(world: &World, asked: &Asked<'_>, what: &str) {
    let pattern = &Pattern::new();
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let listener = listener_in(&server.netns, server.address, SERVER_PORT);
    for is_bypassed in [false, true] {
        client.netns.ip("route flush cache").unwrap();
        let (mut one, mut two) = connection(&client.netns, asked.address, &listener);
        if is_bypassed {
            wait_bypassed(world, asked, || {
                one.write_all(b"x").unwrap();
                two.read_exact(&mut [0]).unwrap();
            });
        }
        assert_eq!(path_mtu(&one), POD_MTU);
        assert!(getsockopt(&one, TcpMaxSeg).unwrap() > OVERLAY_MSS);
        thread::scope(|scope| {
            scope.spawn(|| one.write_all(pattern.at(0, Pattern::LARGEST)).unwrap());
            let mut buffer = vec![0; Pattern::LARGEST];
            two.read_exact(&mut buffer).unwrap();
            pattern.assert(0, &buffer, || format!("{what}, bypassed: {is_bypassed}"));
        });
        assert_eq!((path_mtu(&one), getsockopt(&one, TcpMaxSeg).unwrap()), (OVERLAY_MTU, OVERLAY_MSS));
    }
}
