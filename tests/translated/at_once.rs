use std::net::{Ipv4Addr, SocketAddrV4};

use xtask::lab::{
    Pod,
    services::{Service, ServiceOptions, ServiceRules},
};

use super::passed_by;
use crate::{
    calls::{Caller, Connections, Datagrams, SERVER_PORT},
    netfilter::overlay_address,
    services::{EXCHANGE, SERVICE, exchange, service, world},
    sockets::Pattern,
    world::World,
};

const OTHER_SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 20), 443);

/// Has all call the server at once, by TCP, then by UDP. The ports from which the server takes them to call, of each.
fn call_at_once(world: &World, what: &str, server: &Pod, callers: &[Caller<'_>], pattern: &Pattern) -> [Vec<u16>; 2] {
    let passed_by = || passed_by(world);
    let by_tcp = passed_by();
    let connections = Connections::new(what, &[server], callers);
    let bytes = connections.exchange(EXCHANGE, pattern);
    assert!(bytes > 10_000_000, "{what}: {bytes} bytes");
    by_tcp.assert_packets(100, what);
    let by_udp = passed_by();
    let mut datagrams = Datagrams::new(what, &[server], callers);
    let rounds = datagrams.exchange_for(EXCHANGE, pattern);
    by_udp.assert_packets(rounds as u64 / 2, what);
    [connections.answered(), datagrams.answered()]
        .map(|answered| answered.iter().map(|answered| answered.port).collect())
}

/// Two connections with the same ends once they are translated: conntrack gives the later one another port.
#[test]
fn a_pod_calls_a_server_directly_and_by_two_services_at_once() {
    let (world, pattern) = (world(2), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let direct = SocketAddrV4::new(server.address, SERVER_PORT);
    // None has been used before, by a connection that conntrack still knows.
    let mut port = 40_000;
    for rules in ServiceRules::FORMS {
        let second = service(OTHER_SERVICE, &[server]).map(|service| Service { name: "second", ..service });
        rules.set(&world.hosts[0], &[service(SERVICE, &[server]), second].concat()).unwrap();
        for (asked, clash) in [
            ([SERVICE, direct], false),
            ([SERVICE, direct], true),
            ([direct, SERVICE], true),
            ([SERVICE, OTHER_SERVICE], true),
        ] {
            port += 2;
            let ports = [port, if clash { port } else { port + 1 }];
            let callers = [0, 1].map(|caller| Caller {
                netns: &client.netns,
                port: ports[caller],
                asked: asked[caller],
                seen_as: client.address,
            });
            let what = format!("{}, {asked:?} from {ports:?}", rules.name());
            for seen in call_at_once(&world, &what, server, &callers, &pattern) {
                assert_eq!((seen[0], seen[1] == ports[1]), (ports[0], !clash), "{what}: seen as {seen:?}");
            }
        }
        rules.remove(&world.hosts[0]).unwrap();
    }
}

/// As `--masquerade-all` has it: both ends of what a pod sends are translated, and back.
#[test]
fn a_masqueraded_pod_is_answered_by_a_service() {
    let (world, pattern) = (world(2), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let options = ServiceOptions { masquerade_all: true, ..ServiceOptions::default() };
    for rules in ServiceRules::FORMS {
        let host = &world.hosts[0];
        rules.set_text(host, &rules.text_with(options, host.address, &service(SERVICE, &[server]))).unwrap();
        let passed_by = passed_by(&world);
        let seen_as = overlay_address(&client.address);
        let caller = Caller { netns: &client.netns, port: 0, asked: SERVICE, seen_as };
        exchange(&world, rules.name(), caller, server, &pattern);
        passed_by.assert_packets(1000, rules.name());
        rules.remove(host).unwrap();
    }
}

/// It has to be masqueraded, or it would answer itself by its own address.
#[test]
fn a_pod_calls_itself_while_another_calls_it() {
    let (world, pattern) = (world(2), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let gateway = world.hosts[1].subnet().unwrap().gateway;
    // As CNI's plugin `bridge` has it by `hairpinMode`: what leaves by the port that it came from.
    world.hosts[1].netns.exec("bridge link set dev pod1 hairpin on").unwrap();
    for rules in ServiceRules::FORMS {
        for host in &world.hosts {
            rules.set(host, &service(SERVICE, &[server])).unwrap();
        }
        let callers = [(client, client.address), (server, gateway)];
        let callers = callers.map(|(pod, seen_as)| Caller { netns: &pod.netns, port: 0, asked: SERVICE, seen_as });
        call_at_once(&world, rules.name(), server, &callers, &pattern);
        for host in &world.hosts {
            rules.remove(host).unwrap();
        }
    }
}
