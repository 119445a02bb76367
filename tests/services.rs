//! Service addresses and node ports: netfilter translates, with the rules that kube-proxy writes, and who asks is answered
//! by whom it asked, before and after the flow is bypassed.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use xtask::lab::{
    Pod,
    services::{Service, ServiceRules},
};

use crate::{
    bypass::DROP_INVALID,
    calls::{Caller, Connections, Datagrams, SERVER_PORT},
    counted::Counted,
    netfilter::overlay_address,
    sockets::Pattern,
    world::World,
};

/// A flow goes back to the stack several times within an [`EXCHANGE`].
pub const REVALIDATE: Duration = Duration::from_millis(200);
pub const EXCHANGE: Duration = Duration::from_secs(1);
pub const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 80);

/// Hosts with kube-proxy's rule against what conntrack holds for invalid. The first reaches all others.
pub fn world(hosts: u8) -> World {
    world_revalidating(hosts, REVALIDATE)
}

/// The same with another time in which a flow goes past the stack.
pub fn world_revalidating(hosts: u8, revalidate: Duration) -> World {
    let world = World::new(hosts).ready(&[&format!("--bypass-revalidate={}", revalidate.as_millis())]);
    for host in &world.hosts {
        host.netns.exec(DROP_INVALID).unwrap();
    }
    for host in 1..world.hosts.len() {
        world.wait_connected(0, host);
    }
    world
}

/// A service of these pods, for TCP and UDP.
pub fn service(address: SocketAddrV4, servers: &[&Pod]) -> [Service; 2] {
    let endpoints: Vec<_> = servers.iter().map(|server| SocketAddrV4::new(server.address, SERVER_PORT)).collect();
    let service = |protocol| Service { name: "echo", protocol, address, node_port: None, endpoints: endpoints.clone() };
    ["tcp", "udp"].map(service)
}

/// Has a server on the second host called, by TCP and UDP: bulk, and datagrams that are each answered. Most of it must pass
/// by the stack of its host, and some take it.
pub fn exchange(world: &World, what: &str, caller: Caller<'_>, server: &Pod, pattern: &Pattern) {
    let since_now = |labels: [&'static str; 2]| Counted::since_now(world, labels.map(|label| (1, label)));
    let bypassed = || since_now(["delivered", "pod_encapsulated"]);
    let revalidated = || since_now(["pod_released", "encapsulated"]);

    let (passed_by, taken) = (bypassed(), revalidated());
    let bytes = Connections::new(what, &[server], &[caller]).exchange(EXCHANGE, pattern);
    assert!(bytes > 10_000_000, "{what}: {bytes} bytes");
    passed_by.assert_packets(100, what);
    taken.assert_packets(3, what);

    let (passed_by, taken) = (bypassed(), revalidated());
    let mut datagrams = Datagrams::new(what, &[server], &[caller]);
    datagrams.exchange(pattern);
    assert_eq!(passed_by.packets(), [0, 0], "{what}: the first of a flow");
    let number = datagrams.exchange_for(EXCHANGE, pattern);
    // Most of them, that is.
    passed_by.assert_packets(number as u64 / 2, what);
    taken.assert_packets(3, what);
}

#[test]
fn a_service_address_answers_before_and_after_the_bypass() {
    let (world, pattern) = (world(2), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    for rules in ServiceRules::FORMS {
        rules.set(&world.hosts[0], &service(SERVICE, &[server])).unwrap();
        let here = Counted::since_now(&world, [(0, "pod_translated"), (0, "delivered_translated")]);
        let caller = Caller { netns: &client.netns, port: 0, asked: SERVICE, seen_as: client.address };
        exchange(&world, rules.name(), caller, server, &pattern);
        // On the client's host, where conntrack translates the first of them, and one in a while.
        here.assert_packets(1000, rules.name());
        rules.remove(&world.hosts[0]).unwrap();
    }
}

/// From outside, by a host that has not the pod, which masquerades so that answers come back by it.
#[test]
fn a_node_port_leads_to_a_pod_of_another_host() {
    let (world, pattern) = (world(2), Pattern::new());
    let (node, server) = (&world.hosts[0], &world.hosts[1].pods[0]);
    let gateway = node.subnet().unwrap().gateway;
    let mut port = 30080;
    for rules in ServiceRules::ALL {
        // Out of flannel.1, whose address masquerading takes; or as an address of the host's own choice.
        for (is_masqueraded, seen_as) in [(true, overlay_address(&gateway)), (false, gateway)] {
            // A port for each, so that no earlier connection is in the way.
            port += 1;
            let services = service(SERVICE, &[server]).map(|service| Service { node_port: Some(port), ..service });
            let mut text = rules.text(node.address, &services);
            if !is_masqueraded {
                text = text.replace("MASQUERADE --random-fully", &format!("SNAT --to-source {gateway}"));
                text = text.replace("masquerade fully-random", &format!("snat to {gateway}"));
            }
            rules.set_text(node, &text).unwrap();
            let asked = SocketAddrV4::new(node.address, port);
            let what = &format!("{}, seen as {seen_as}", rules.name());
            let caller = Caller { netns: &world.lab.underlay, port: 0, asked, seen_as };
            exchange(&world, what, caller, server, &pattern);
            rules.remove(node).unwrap();
        }
    }
}

/// By the pods themselves, by the device that leaves the host, or by nobody, as between veths.
#[test]
fn checksums_fit_whoever_completes_them() {
    let (world, pattern) = (world(2), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    ServiceRules::Iptables.set(&world.hosts[0], &service(SERVICE, &[server])).unwrap();
    let pods = [&client.netns, &server.netns];
    let hosts = [&world.hosts[0].netns, &world.hosts[1].netns];
    for (what, namespaces) in [("hosts", hosts), ("pods", pods)] {
        for netns in namespaces {
            netns.exec("ethtool -K eth0 tx off").unwrap();
        }
        let caller = Caller { netns: &client.netns, port: 0, asked: SERVICE, seen_as: client.address };
        exchange(&world, what, caller, server, &pattern);
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
