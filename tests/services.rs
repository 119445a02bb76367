//! Service addresses and node ports: netfilter translates, with the rules that kube-proxy writes, and who asks is answered
//! by whom it asked, before and after the flow is bypassed.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    thread,
    time::{Duration, Instant},
};

use xtask::lab::{
    Netns, Pod,
    services::{Service, ServiceRules},
};

use crate::{
    bypass::DROP_INVALID,
    sockets::{Pattern, connection, listener_in, socket_in},
    world::World,
};

/// The port of the server in its pod.
const SERVER_PORT: u16 = 8080;
/// A flow goes back to the stack several times within an [`EXCHANGE`].
const REVALIDATE: &str = "--bypass-revalidate=200";
const EXCHANGE: Duration = Duration::from_secs(1);
const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 80);

/// Two hosts with kube-proxy's rule against what conntrack holds for invalid.
fn world() -> World {
    let world = World::new(2).ready(&[REVALIDATE]);
    for host in &world.hosts {
        host.netns.exec(DROP_INVALID).unwrap();
    }
    world.wait_connected(0, 1);
    world
}

/// Who asks whom for what, and what the counters of the server's host must say of it.
struct Exchange<'a> {
    world: &'a World,
    /// What is tried, for messages.
    what: &'a str,
    client: &'a Netns,
    /// What the client asks.
    asked: SocketAddrV4,
    server: &'a Pod,
    /// As whom the server sees the client.
    seen_as: Ipv4Addr,
}

impl Exchange<'_> {
    /// What passed by the stack of the server's host: into the pod, and out of it.
    fn bypassed(&self) -> [u64; 2] {
        ["delivered", "pod_encapsulated"].map(|label| self.world.counter(1, label))
    }

    /// What took the stack of the server's host, both ways.
    fn revalidated(&self) -> [u64; 2] {
        ["pod_released", "encapsulated"].map(|label| self.world.counter(1, label))
    }

    fn assert_moved(&self, before: [u64; 2], after: [u64; 2], least: u64) {
        for (before, after) in before.into_iter().zip(after) {
            assert!(after - before >= least, "{}: {before} {after}", self.what);
        }
    }

    /// Bulk both ways at once: what the client sends comes back to it, byte by byte.
    fn tcp(&self, pattern: &Pattern) {
        let listener = listener_in(&self.server.netns, self.server.address, SERVER_PORT);
        let (bypassed, revalidated) = (self.bypassed(), self.revalidated());
        let (mut client, mut server) = connection(self.client, self.asked, &listener);
        // Only what comes from there belongs to the connection.
        assert_eq!(client.peer_addr().unwrap(), SocketAddr::V4(self.asked), "{}", self.what);
        assert_eq!(server.peer_addr().unwrap().ip(), self.seen_as, "{}", self.what);
        let mut sending = client.try_clone().unwrap();
        let (sent, echoed, returned) = thread::scope(|scope| {
            let sent = scope.spawn(move || send_for(EXCHANGE, &mut sending, pattern));
            let echoed = scope.spawn(move || echo(&mut server));
            let returned = receive(&mut client, pattern, self.what);
            (sent.join().unwrap(), echoed.join().unwrap(), returned)
        });
        assert_eq!((echoed, returned), (sent, sent), "{}", self.what);
        assert!(sent > 10_000_000, "{}: {sent} bytes", self.what);
        self.assert_moved(bypassed, self.bypassed(), 100);
        self.assert_moved(revalidated, self.revalidated(), 3);
    }

    /// Each datagram is answered, by whom was asked: the socket is not connected, and takes what comes from anybody.
    fn udp(&self, pattern: &Pattern) {
        let server = socket_in(&self.server.netns, SocketAddrV4::new(self.server.address, SERVER_PORT));
        let client = socket_in(self.client, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        }
        let exchange = |number: usize| {
            let mut buffer = [0; 2000];
            let len = 1 + number % 1400;
            client.send_to(pattern.at(number, len), self.asked).unwrap();
            let (received, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!((received, from.ip()), (len, self.seen_as.into()), "{}: {number}", self.what);
            server.send_to(&buffer[..len], from).unwrap();
            buffer.fill(0);
            let (received, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((received, from), (len, SocketAddr::V4(self.asked)), "{}: {number}", self.what);
            pattern.assert(number, &buffer[..len], || format!("{}: {number}", self.what));
        };
        let (bypassed, revalidated) = (self.bypassed(), self.revalidated());
        exchange(0);
        assert_eq!(self.bypassed(), bypassed, "{}: the first of a flow", self.what);
        let begun = Instant::now();
        let mut number = 0;
        while begun.elapsed() < EXCHANGE {
            number += 1;
            exchange(number);
        }
        // Most of them, that is.
        self.assert_moved(bypassed, self.bypassed(), number as u64 / 2);
        self.assert_moved(revalidated, self.revalidated(), 3);
    }
}

/// Sends for a while, and says how much it was.
fn send_for(duration: Duration, stream: &mut TcpStream, pattern: &Pattern) -> usize {
    let begun = Instant::now();
    let mut sent = 0;
    while begun.elapsed() < duration {
        stream.write_all(pattern.at(sent, Pattern::LARGEST)).unwrap();
        sent += Pattern::LARGEST;
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    sent
}

/// Sends back what comes.
fn echo(stream: &mut TcpStream) -> usize {
    let mut buffer = vec![0; Pattern::LARGEST];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => return received,
            len => {
                stream.write_all(&buffer[..len]).unwrap();
                received += len;
            }
        }
    }
}

/// Takes the pattern to its end.
fn receive(stream: &mut TcpStream, pattern: &Pattern, what: &str) -> usize {
    let mut buffer = vec![0; Pattern::LARGEST];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => return received,
            len => {
                pattern.assert(received, &buffer[..len], || format!("{what}: at {received}"));
                received += len;
            }
        }
    }
}

/// A service of one pod, for TCP and UDP.
fn service(address: SocketAddrV4, node_port: Option<u16>, server: &Pod) -> [Service; 2] {
    ["tcp", "udp"].map(|protocol| Service {
        name: "echo",
        protocol,
        address,
        node_port,
        endpoints: vec![SocketAddrV4::new(server.address, SERVER_PORT)],
    })
}

#[test]
fn a_service_address_answers_before_and_after_the_bypass() {
    let (world, pattern) = (world(), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    for rules in ServiceRules::FORMS {
        rules.set(&world.hosts[0], &service(SERVICE, None, server)).unwrap();
        let here = || ["pod_translated", "delivered_translated"].map(|label| world.counter(0, label));
        let before = here();
        let (what, client, seen_as) = (rules.name(), &client.netns, client.address);
        let exchange = Exchange { world: &world, what, client, asked: SERVICE, server, seen_as };
        exchange.tcp(&pattern);
        exchange.udp(&pattern);
        // On the client's host, where conntrack translates the first of them, and one in a while.
        exchange.assert_moved(before, here(), 1000);
        rules.remove(&world.hosts[0]).unwrap();
    }
}

/// From outside, by a host that has not the pod, which masquerades so that answers come back by it.
#[test]
fn a_node_port_leads_to_a_pod_of_another_host() {
    let (world, pattern) = (world(), Pattern::new());
    let (node, server) = (&world.hosts[0], &world.hosts[1].pods[0]);
    let gateway = node.subnet().unwrap().gateway;
    let overlay_address = Ipv4Addr::from_bits(gateway.to_bits() - 1);
    let mut port = 30080;
    for rules in ServiceRules::ALL {
        // Out of flannel.1, whose address masquerading takes; or as an address of the host's own choice.
        for (is_masqueraded, seen_as) in [(true, overlay_address), (false, gateway)] {
            // A port for each, so that no earlier connection is in the way.
            port += 1;
            let mut text = rules.text(node.address, &service(SERVICE, Some(port), server));
            if !is_masqueraded {
                text = text.replace("MASQUERADE --random-fully", &format!("SNAT --to-source {gateway}"));
                text = text.replace("masquerade fully-random", &format!("snat to {gateway}"));
            }
            rules.set_text(node, &text).unwrap();
            let asked = SocketAddrV4::new(node.address, port);
            let what = &format!("{}, seen as {seen_as}", rules.name());
            let exchange = Exchange { world: &world, what, client: &world.lab.underlay, asked, server, seen_as };
            exchange.tcp(&pattern);
            exchange.udp(&pattern);
            rules.remove(node).unwrap();
        }
    }
}

/// By the pods themselves, by the device that leaves the host, or by nobody, as between veths.
#[test]
fn checksums_fit_whoever_completes_them() {
    let (world, pattern) = (world(), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    ServiceRules::Iptables.set(&world.hosts[0], &service(SERVICE, None, server)).unwrap();
    let pods = [&client.netns, &server.netns];
    let hosts = [&world.hosts[0].netns, &world.hosts[1].netns];
    for (what, namespaces) in [("hosts", hosts), ("pods", pods)] {
        for netns in namespaces {
            netns.exec("ethtool -K eth0 tx off").unwrap();
        }
        let exchange =
            Exchange { world: &world, what, client: &client.netns, asked: SERVICE, server, seen_as: client.address };
        exchange.tcp(&pattern);
        exchange.udp(&pattern);
        for netns in namespaces {
            netns.exec("ethtool -K eth0 tx on").unwrap();
        }
    }
    // The stack looks at each that is not said to be right already.
    for netns in pods {
        let errors = netns.exec("nstat -asz TcpInCsumErrors UdpInCsumErrors").unwrap();
        assert!(errors.lines().skip(1).all(|line| line.split_whitespace().nth(1) == Some("0")), "{errors}");
    }
}
