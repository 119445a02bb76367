//! The tunnel of the backend udp, beside a proxy of one packet with each call, as flannel's is built.

mod bad_input;
mod daemon;
mod engines;
pub mod forwarder;
mod wire;

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddrV4, UdpSocket},
    sync::atomic::Ordering,
    thread,
};

use engines::{Lease, MTU, PORT, add_pod, peers, settings, start, start_again};
use flannel_agent::udp::{Event, Tunnel};
use forwarder::Forwarder;
use nix::sys::socket::{
    setsockopt,
    sockopt::{Ipv4RecvErr, UdpGsoSegment},
};
use tempfile::TempDir;
use xtask::{
    lab::{Host, Lab},
    progress::wait_for,
    transfer::{USUAL_WRITE, tcp_transfers},
};

use crate::{
    sockets::{Pattern, connection, listener_in, socket_in},
    world::{SOON, is_answered, is_delivered, names},
};

/// Hosts 1, 2, ... with a pod each, and no tunnel yet. The fields go in this order.
struct Hosts {
    hosts: Vec<Host>,
    lab: Lab,
    _directory: TempDir,
}

impl Hosts {
    fn new(count: u8) -> Self {
        let (name, directory) = names();
        let lab = Lab::new(&name, directory.path()).unwrap();
        let hosts = (1..=count).map(|number| {
            let mut host = lab.host(&format!("node{number}"), number).unwrap();
            add_pod(&mut host, number);
            host
        });
        Self { hosts: hosts.collect(), lab, _directory: directory }
    }

    /// The leases of all but this number's.
    fn leases_beside(&self, number: u8) -> Vec<Lease> {
        let all = self.hosts.iter().zip(1..).map(|(host, number)| (number, host.address));
        all.filter(|(other, _)| *other != number).collect()
    }

    /// Starts the tunnel of a host, which knows all the others.
    fn start(&self, number: u8) -> Tunnel {
        let host = &self.hosts[usize::from(number) - 1];
        start(&host.netns, &settings(host, number), peers(number, &self.leases_beside(number))).unwrap()
    }

    fn forwarder(&self, number: u8) -> Forwarder {
        let host = &self.hosts[usize::from(number) - 1];
        Forwarder::start(host, number, MTU, PORT, self.leases_beside(number))
    }

    fn wait_connected(&self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let [from, to] = [from, to].map(|host: usize| &self.hosts[host].pods[0]);
            wait_for("pods", SOON, || is_answered(&from.netns, &to.address.to_string())).unwrap();
        }
    }

    /// Bytes by TCP in both directions at once, each where it belongs.
    fn check_tcp(&self, what: &str) {
        const ROUNDS: usize = 100;
        let pattern = &Pattern::new();
        let [client, server] = [0, 1].map(|host: usize| &self.hosts[host].pods[0]);
        let listener = listener_in(&server.netns, server.address, 8080);
        let (one, two) = connection(&client.netns, SocketAddrV4::new(server.address, 8080), &listener);
        thread::scope(|scope| {
            for stream in [&one, &two] {
                let (mut out, mut back) = (stream, stream);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        out.write_all(pattern.at(round * Pattern::LARGEST, Pattern::LARGEST)).unwrap();
                    }
                });
                scope.spawn(move || {
                    let mut buffer = vec![0; Pattern::LARGEST];
                    for round in 0..ROUNDS {
                        back.read_exact(&mut buffer).unwrap();
                        pattern.assert(round * Pattern::LARGEST, &buffer, || format!("{what}, round {round}"));
                    }
                });
            }
        });
    }

    /// Datagrams of every size, large ones that go in fragments, and many at once.
    fn check_udp(&self, what: &str) {
        let pattern = Pattern::new();
        for (from, to) in [(0, 1), (1, 0)] {
            let [sender, receiver] = [from, to].map(|host: usize| &self.hosts[host].pods[0]);
            let to = SocketAddrV4::new(receiver.address, 9000);
            let receiver = socket_in(&receiver.netns, to);
            receiver.set_read_timeout(Some(SOON)).unwrap();
            let sender = socket_in(&sender.netns, SocketAddrV4::new(sender.address, 0));
            let mut buffer = vec![0; Pattern::LARGEST];
            for len in (0..=MTU as usize - 28).chain([MTU as usize - 27, 3000, 20_000, 65_000]) {
                sender.send_to(pattern.at(len, len), to).unwrap();
                let got = receive(&receiver, &mut buffer, || format!("{what}, {len} bytes"));
                assert_eq!(got, len, "{what}");
                pattern.assert(len, &buffer[..len], || format!("{what}, {len} bytes"));
            }
            // As QUIC sends: several with one call, which the kernel cuts as late as it can.
            const SEGMENT: usize = 1200;
            const TOGETHER: usize = 40 * SEGMENT - 7;
            setsockopt(&sender, UdpGsoSegment, &(SEGMENT as i32)).unwrap();
            sender.send_to(pattern.at(0, TOGETHER), to).unwrap();
            for start in (0..TOGETHER).step_by(SEGMENT) {
                let len = SEGMENT.min(TOGETHER - start);
                let what = || format!("{what}, from {start} on");
                assert_eq!(receive(&receiver, &mut buffer, what), len, "{}", what());
                pattern.assert(start, &buffer[..len], what);
            }
        }
    }
}

/// The length of the next datagram. A signal that has a handler ends a call that has a time limit (signal(7)).
fn receive(socket: &UdpSocket, buffer: &mut [u8], what: impl Fn() -> String) -> usize {
    loop {
        match socket.recv(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result.unwrap_or_else(|error| panic!("{}: {error}", what())),
        }
    }
}

/// Packets that something else happened to than that they were carried. The host's own IPv6 tries the device, too.
fn troubles(tunnel: &Tunnel) -> Vec<(&'static str, u64)> {
    const USUAL: [Event; 3] = [Event::Sent, Event::Received, Event::SendNotIpv4];
    let others = Event::ALL.iter().filter(|event| !USUAL.contains(event));
    others.map(|event| (event.label(), tunnel.count(*event))).filter(|(_, count)| *count > 0).collect()
}

#[test]
fn pods_talk_by_tunnels_of_ours() {
    let hosts = Hosts::new(2);
    let tunnels = [1, 2].map(|number| hosts.start(number));
    hosts.wait_connected();
    hosts.check_tcp("ours and ours");
    hosts.check_udp("ours and ours");
    // By the host's own overlay address, which it sends from without being asked to.
    let pod = hosts.hosts[1].pods[0].address.to_string();
    assert!(is_delivered(&hosts.hosts[0].netns, &pod));
    for tunnel in &tunnels {
        assert_eq!(troubles(tunnel), []);
        assert!(tunnel.count(Event::Sent) > 6000 && tunnel.count(Event::Received) > 6000);
    }
}

#[test]
fn pods_talk_where_every_frame_is_as_large_as_the_wire_takes() {
    let hosts = Hosts::new(2);
    for host in &hosts.hosts {
        host.set_underlay_gso(false).unwrap();
        host.netns.exec("ethtool -K eth0 tx-udp-segmentation off").unwrap();
    }
    let tunnels = [1, 2].map(|number| hosts.start(number));
    hosts.wait_connected();
    hosts.check_tcp("segmented");
    hosts.check_udp("segmented");
    assert_eq!(tunnels.each_ref().map(troubles), [[], []]);
}

#[test]
fn pods_talk_with_a_host_whose_proxy_is_built_as_flannels() {
    let hosts = Hosts::new(2);
    let tunnel = hosts.start(1);
    let forwarder = hosts.forwarder(2);
    hosts.wait_connected();
    hosts.check_tcp("ours and flannel's");
    hosts.check_udp("ours and flannel's");
    assert_eq!(troubles(&tunnel), []);
    assert_eq!(forwarder.longest.load(Ordering::Relaxed), MTU as usize, "no datagram is longer than its device's MTU");
}

#[test]
fn several_flows_at_once() {
    let hosts = Hosts::new(2);
    let tunnels = [1, 2].map(|number| hosts.start(number));
    hosts.wait_connected();
    let [client, server] = [0, 1].map(|host: usize| &hosts.hosts[host].pods[0]);
    let transfer =
        tcp_transfers(&client.netns, &server.netns, server.address, 8, USUAL_WRITE, 1, hosts.lab.directory());
    let transfer = transfer.unwrap();
    assert!(transfer.is_flowing(), "{transfer:?}");
    assert_eq!(tunnels.each_ref().map(troubles), [[], []]);
}

#[test]
fn a_narrower_path_than_the_interface_has_gets_fragments() {
    let hosts = Hosts::new(2);
    let tunnels = [1, 2].map(|number| hosts.start(number));
    hosts.wait_connected();
    for (host, other) in [(0, 1), (1, 0)] {
        let to = hosts.hosts[other].address;
        hosts.hosts[host].netns.ip(&format!("route add {to} dev eth0 mtu 1300")).unwrap();
    }
    hosts.check_tcp("a narrow path");
    hosts.check_udp("a narrow path");
    assert_eq!(tunnels.each_ref().map(troubles), [[], []]);
}

#[test]
fn a_pod_that_sends_too_much_is_told() {
    let hosts = Hosts::new(2);
    let _tunnels = [1, 2].map(|number| hosts.start(number));
    hosts.wait_connected();
    let (host, pod) = (&hosts.hosts[0], &hosts.hosts[0].pods[0].netns);
    for device in ["pod1", "cni0"] {
        host.netns.ip(&format!("link set {device} mtu 1500")).unwrap();
    }
    pod.ip("link set eth0 mtu 1500").unwrap();
    let to = hosts.hosts[1].pods[0].address;
    assert!(pod.exec(&format!("ping -c 1 -W 2 -M do -s {} {to}", MTU - 28)).is_ok());
    let said = pod.exec(&format!("ping -c 1 -W 2 -M do -s {} {to}", MTU - 27)).unwrap_err().to_string();
    assert!(said.contains(&format!("Frag needed and DF set (mtu = {MTU})")), "{said}");
}

#[test]
fn who_sends_to_nobody_is_told() {
    let hosts = Hosts::new(2);
    let tunnel = hosts.start(1);
    let _other = hosts.start(2);
    hosts.wait_connected();
    let pod = &hosts.hosts[0].pods[0];
    let said = pod.netns.exec("ping -c 1 -W 2 10.5.77.3").unwrap_err().to_string();
    assert!(said.contains("From 10.5.1.0 icmp_seq=1 Destination Net Unreachable"), "{said}");
    let socket = socket_in(&pod.netns, SocketAddrV4::new(pod.address, 0));
    socket.connect("10.5.77.3:9").unwrap();
    // Without it, only fatal errors are reported (udp(7)), of which this is none.
    setsockopt(&socket, Ipv4RecvErr, &true).unwrap();
    socket.send(b"x").unwrap();
    wait_for("the answer", SOON, || {
        let error = socket.take_error().unwrap();
        error.is_some_and(|error| error.raw_os_error() == Some(nix::libc::ENETUNREACH))
    })
    .unwrap();
    assert_eq!(tunnel.count(Event::SendNoPeer), 2);
    // One off by the host's stack, one by the tunnel on either side.
    let to = hosts.hosts[1].pods[0].address;
    for (ttl, from) in [(2, "10.5.1.0"), (3, "10.5.2.0")] {
        let said = pod.netns.exec(&format!("ping -c 1 -W 2 -t {ttl} {to}")).unwrap_err().to_string();
        assert!(said.contains(&format!("From {from} icmp_seq=1 Time to live exceeded")), "{ttl}: {said}");
    }
    assert!(pod.netns.exec(&format!("ping -c 1 -W 2 -t 5 {to}")).is_ok());
    assert_eq!(tunnel.count(Event::SendTtlExceeded), 1);
}

#[test]
fn peers_come_and_go_under_traffic() {
    const ROUNDS: u32 = 3000;
    let hosts = Hosts::new(2);
    let tunnels = [1, 2].map(|number| hosts.start(number));
    hosts.wait_connected();
    let [client, server] = [0, 1].map(|host: usize| &hosts.hosts[host].pods[0]);
    let server_at = SocketAddrV4::new(server.address, 9000);
    let server = socket_in(&server.netns, server_at);
    let client = socket_in(&client.netns, SocketAddrV4::new(client.address, 0));
    client.connect(server_at).unwrap();
    let client_at = client.local_addr().unwrap();
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(SOON)).unwrap();
    }
    let ask = |number: u32| {
        client.send(&number.to_be_bytes()).unwrap();
        let (mut asked, mut answered) = ([0; 4], [0; 4]);
        receive(&server, &mut asked, || format!("question {number}"));
        server.send_to(&asked, client_at).unwrap();
        receive(&client, &mut answered, || format!("answer {number}"));
        assert_eq!(answered, number.to_be_bytes());
    };
    let others = |count: u8| (100..100 + count).map(|number| (number, [192, 168, 64, number].into()));
    for number in 0..ROUNDS {
        for (tunnel, own) in tunnels.iter().zip([1, 2]) {
            let leases: Vec<_> = hosts.leases_beside(own).into_iter().chain(others(number as u8 % 100)).collect();
            tunnel.set_peers(peers(own, &leases));
        }
        ask(number);
    }
    assert_eq!(tunnels.each_ref().map(troubles), [[], []]);

    tunnels[0].set_peers(peers(1, &[]));
    client.send(b"lost").unwrap();
    wait_for("the packet to nobody", SOON, || tunnels[0].count(Event::SendNoPeer) == 1).unwrap();
    tunnels[0].set_peers(peers(1, &hosts.leases_beside(1)));
    ask(ROUNDS);
}

/// What `ip` says of a host's device and the routes into it.
fn device(host: &Host, name: &str) -> (serde_json::Value, serde_json::Value) {
    let link = host.netns.ip_json(&format!("-d address show dev {name}")).unwrap()[0].take();
    (link, host.netns.ip_json(&format!("route show dev {name}")).unwrap())
}

#[test]
fn the_device_is_as_flannels_and_stays_for_the_next_start() {
    let hosts = Hosts::new(2);
    let _other = hosts.start(2);
    let tunnel = hosts.start(1);
    hosts.wait_connected();
    let host = &hosts.hosts[0];
    assert_eq!(tunnel.device(), "flannel0");
    let (link, routes) = device(host, "flannel0");
    let addresses = link["addr_info"].as_array().unwrap().iter().filter(|address| address["family"] == "inet");
    let addresses: Vec<_> = addresses.map(|address| (&address["local"], &address["prefixlen"])).collect();
    assert_eq!(addresses, [(&"10.5.1.0".into(), &32.into())]);
    assert_eq!((&link["mtu"], &link["linkinfo"]["info_data"]["type"]), (&MTU.into(), &"tun".into()));
    assert_eq!(routes.as_array().unwrap().len(), 1);
    // Nothing is said of the scope of all.
    assert_eq!((&routes[0]["dst"], &routes[0]["scope"]), (&"10.5.0.0/16".into(), &serde_json::Value::Null));

    drop(tunnel);
    let (left, routes) = device(host, "flannel0");
    assert_eq!((&left["ifindex"], routes.as_array().unwrap().len()), (&link["ifindex"], 1));
    let again = engines::settings(host, 1);
    let again = flannel_agent::udp::Settings { device: Some("flannel0".to_owned()), ..again };
    let tunnel = start_again(&host.netns, &again, &peers(1, &hosts.leases_beside(1)));
    hosts.wait_connected();
    assert_eq!(device(host, "flannel0").0["ifindex"], link["ifindex"]);

    let failure = tunnel.failure();
    assert_eq!(*failure.borrow(), None);
    host.netns.ip("link delete flannel0").unwrap();
    wait_for("the failure", SOON, || failure.borrow().is_some()).unwrap();
    drop(tunnel);
    let tunnel = start_again(&host.netns, &again, &peers(1, &hosts.leases_beside(1)));
    hosts.wait_connected();
    assert_eq!(tunnel.device(), "flannel0");
}

/// The other end of a host's tunnel, as a socket that sees each datagram.
fn bare_socket(host: &Host) -> UdpSocket {
    let socket = socket_in(&host.netns, SocketAddrV4::new(host.address, PORT));
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}
