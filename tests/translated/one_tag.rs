use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use flannel_common::flow::FlowKey;
use xtask::lab::{
    Pod,
    services::{Service, ServiceRules},
};

use crate::{sockets::socket_in, world::World};

const VNI: u32 = 1;

/// Datagrams of several flows of a client, to one address, and what becomes of them. Each says whose it is and what was asked.
struct Client {
    sockets: Vec<UdpSocket>,
    asked: SocketAddrV4,
}

impl Client {
    /// On the given ports of a pod.
    fn new(pod: &Pod, ports: &[u16], asked: SocketAddrV4) -> Self {
        let sockets = ports.iter().map(|port| socket_in(&pod.netns, SocketAddrV4::new(pod.address, *port)));
        Self { sockets: sockets.collect(), asked }
    }

    fn content(&self, socket: &UdpSocket) -> Vec<u8> {
        format!("{} asks {}", socket.local_addr().unwrap(), self.asked).into_bytes()
    }

    /// Sends for a while, as fast as it can. Each answer must be its own, and from whom was asked.
    fn run(&self, duration: Duration) -> usize {
        let begun = Instant::now();
        let mut answered = 0;
        let mut buffer = [0; 100];
        while begun.elapsed() < duration {
            for socket in &self.sockets {
                let content = self.content(socket);
                for _ in 0..4 {
                    socket.send_to(&content, self.asked).unwrap();
                }
                socket.set_nonblocking(true).unwrap();
                while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                    assert_eq!((&buffer[..len], from), (&content[..], self.asked.into()));
                    answered += 1;
                }
            }
        }
        answered
    }
}

/// Sends each datagram back that is for it: asked was its own address, or else `service`.
fn answer(server: &UdpSocket, service: Option<SocketAddrV4>, is_over: &AtomicBool) {
    let own = server.local_addr().unwrap().to_string();
    let asked = service.map_or(own, |service| service.to_string());
    let mut buffer = [0; 100];
    server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    while !is_over.load(Ordering::Relaxed) {
        let Ok((len, from)) = server.recv_from(&mut buffer) else { continue };
        let content = String::from_utf8_lossy(&buffer[..len]);
        // No other flow has its port, so conntrack leaves it.
        assert_eq!(content, format!("{from} asks {asked}"));
        server.send_to(&buffer[..len], from).unwrap();
    }
}

/// All flows of two pods have one tag, and so one place for what they leave; one pod's are translated. The two send on two
/// CPUs at once, and each flow takes the stack at every tick of the clock.
#[test]
fn flows_of_one_tag_stay_apart_under_load() {
    let mut world = World::new(2).ready(&["--bypass-revalidate=1"]);
    for host in &mut world.hosts {
        host.add_pod().unwrap();
    }
    (0..2).for_each(|host| world.wait_pods(host));
    world.wait_connected(0, 1);
    let service = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 53);
    let [one, two] = [0, 1].map(|pod| &world.hosts[0].pods[pod]);
    let [first, second] = [0, 1].map(|pod| SocketAddrV4::new(world.hosts[1].pods[pod].address, 5353));
    let endpoints = vec![first];
    let rules = Service { name: "echo", protocol: "udp", address: service, node_port: None, endpoints };
    ServiceRules::Nftables.set(&world.hosts[0], &[rules]).unwrap();

    let tag = |pod: &Pod, port: u16, asked: SocketAddrV4| {
        let (local, remote) = (pod.address.octets(), asked.ip().octets());
        let (local_port, remote_port) = (port.to_be_bytes(), asked.port().to_be_bytes());
        FlowKey { local, remote, local_port, remote_port, protocol: 17 }.tag(VNI)
    };
    let wanted = tag(one, 20000, service);
    let of = |pod, asked| (1024..=u16::MAX).filter(|port| tag(pod, *port, asked) == wanted).collect::<Vec<_>>();
    let clients = [(one, service), (two, second)].map(|(pod, asked)| Client::new(pod, &of(pod, asked), asked));
    assert!(clients.iter().all(|client| client.sockets.len() >= 2));
    let servers = [0, 1].map(|pod| socket_in(&world.hosts[1].pods[pod].netns, [first, second][pod]));
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for (server, service) in servers.iter().zip([Some(service), None]) {
            let is_over = &is_over;
            scope.spawn(move || answer(server, service, is_over));
        }
        let answered = thread::scope(|scope| {
            let clients = clients.each_ref().map(|client| scope.spawn(|| client.run(Duration::from_secs(4))));
            clients.map(|client| client.join().unwrap())
        });
        is_over.store(true, Ordering::Relaxed);
        assert!(answered.iter().all(|answered| *answered > 100), "{answered:?}");
    });
    for label in ["pod_translated", "delivered_translated", "pod_encapsulated", "delivered", "pod_via_stack"] {
        let count = world.counter(0, label);
        assert!(count > 100, "{label}: {count}");
    }
}
