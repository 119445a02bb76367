use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    time::{Duration, Instant},
};

use xtask::{
    lab::{
        Netns, Pod,
        services::{ServiceOptions, ServiceRules},
    },
    progress::wait_for,
};

use super::{passed_by, wait_forgotten};
use crate::{
    attacks::count,
    bypass::check_rule,
    calls::{Caller, Connections, Datagrams, SERVER_PORT, servers_of},
    services::{EXCHANGE, SERVICE, service, world, world_revalidating},
    sockets::{Pattern, connection, listener_in},
    stream::Stream,
    world::{SOON, World},
};

/// Until a change holds on live flows.
const LIMIT: Duration = Duration::from_secs(2);

/// A client, and servers on two other hosts.
fn pods(world: &World) -> (&Pod, [&Pod; 2]) {
    (&world.hosts[0].pods[0], [1, 2].map(|host| &world.hosts[host].pods[0]))
}

fn caller(client: &Pod, port: u16) -> Caller<'_> {
    Caller { netns: &client.netns, port, asked: SERVICE, seen_as: client.address }
}

/// Has a host forget flows to the service, as kube-proxy does where a server is gone.
fn forget_udp(host: &Netns) {
    host.exec(&format!("conntrack -D -p udp --orig-dst {}", SERVICE.ip())).unwrap();
}

#[test]
fn a_new_connection_from_the_same_port_reaches_the_new_server_only() {
    // What is known of the flow would still do for the next one.
    let (world, pattern) = (world_revalidating(3, Duration::from_secs(5)), Pattern::new());
    let (client, servers) = pods(&world);
    let host = &world.hosts[0];
    let mut port = 40_000;
    for rules in ServiceRules::FORMS {
        port += 1;
        let (what, callers) = (rules.name(), [caller(client, port)]);
        rules.set(host, &service(SERVICE, &servers[..1])).unwrap();
        let passed_by = passed_by(&world);
        let connections = Connections::new(what, &servers, &callers);
        connections.exchange(EXCHANGE, &pattern);
        assert_eq!(connections.answered()[0].server, 0, "{what}");
        passed_by.assert_packets(100, what);
        rules.replace(host, &service(SERVICE, &servers[1..])).unwrap();
        connections.end();
        let segments = || count(&servers[0].netns, "TcpInSegs");
        let before = segments();
        let connections = Connections::new(what, &servers, &callers);
        connections.exchange(EXCHANGE, &pattern);
        assert_eq!((connections.answered()[0].server, segments()), (1, before), "{what}");
        rules.remove(host).unwrap();
    }
}

#[test]
fn new_datagrams_from_the_same_port_reach_the_new_server_only() {
    let (world, pattern) = (world(3), Pattern::new());
    let (client, servers) = pods(&world);
    let host = &world.hosts[0];
    let mut port = 40_000;
    for rules in ServiceRules::FORMS {
        port += 1;
        let callers = [caller(client, port)];
        for (server, pod) in servers.into_iter().enumerate() {
            rules.set(host, &service(SERVICE, &[pod])).unwrap();
            let passed_by = passed_by(&world);
            // Each is taken by the one that it arrives at, and which that is stays the same.
            let mut datagrams = Datagrams::new(rules.name(), &servers, &callers);
            let rounds = datagrams.exchange_for(EXCHANGE, &pattern);
            assert_eq!(datagrams.answered()[0].server, server, "{}", rules.name());
            passed_by.assert_packets(rounds as u64 / 2, rules.name());
            forget_udp(&host.netns);
            wait_forgotten(&world, 0);
        }
        rules.remove(host).unwrap();
    }
}

#[test]
fn a_connection_stays_with_its_server_whatever_becomes_of_the_service() {
    let (world, pattern) = (world(3), Pattern::new());
    let (client, servers) = pods(&world);
    let host = &world.hosts[0];
    for rules in ServiceRules::FORMS {
        let what = rules.name();
        rules.set(host, &service(SERVICE, &servers[..1])).unwrap();
        let connections = Connections::new(what, &servers, &[caller(client, 0)]);
        connections.exchange(EXCHANGE, &pattern);
        for services in [&service(SERVICE, &servers[1..])[..], &[]] {
            rules.replace(host, services).unwrap();
            let passed_by = passed_by(&world);
            let bytes = connections.exchange(EXCHANGE, &pattern);
            assert!(bytes > 10_000_000, "{what}, {services:?}: {bytes} bytes");
            passed_by.assert_packets(100, what);
            if !services.is_empty() {
                let later = Connections::new(what, &servers, &[caller(client, 0)]);
                assert_eq!(later.answered()[0].server, 1, "{what}");
            }
        }
        assert_eq!(connections.answered()[0].server, 0, "{what}");
        rules.remove(host).unwrap();
    }
}

#[test]
fn live_datagrams_move_to_the_new_server() {
    let world = world(3);
    let (client, servers) = pods(&world);
    let host = &world.hosts[0];
    for rules in ServiceRules::FORMS {
        let what = rules.name();
        rules.set(host, &service(SERVICE, &servers[..1])).unwrap();
        let passed_by = passed_by(&world);
        let stream = Stream::start_to(client, SERVICE, &servers);
        wait_for("datagrams", SOON, || stream.count_at(0) > 1000).unwrap();
        // Only the way out: none is answered.
        assert!(passed_by.packets().iter().take(1).all(|packets| *packets > 500), "{what}");
        rules.replace(host, &service(SERVICE, &servers[1..])).unwrap();
        forget_udp(&host.netns);
        let forgotten = Instant::now();
        wait_for("the new server", SOON, || stream.count_at(1) > 0).unwrap();
        assert!(forgotten.elapsed() < LIMIT, "{what}: {:?}", forgotten.elapsed());
        wait_for("datagrams", SOON, || stream.count_at(1) > 1000).unwrap();
        let (sent, arrived) = stream.end_each();
        let [old, new] = &arrived[..] else { panic!("two servers") };
        let numbers = |arrived: &[_]| arrived.iter().map(|(number, _)| *number).collect::<BTreeSet<u32>>();
        let (old, new) = (numbers(old), numbers(new));
        // None is lost, none has come twice, and none comes to the old one any more.
        assert_eq!(arrived.iter().map(Vec::len).sum::<usize>(), sent as usize, "{what}");
        assert_eq!(&old | &new, (0..sent).collect(), "{what}");
        assert!(old.last() < new.first(), "{what}: {:?} {:?}", old.last(), new.first());
        forget_udp(&host.netns);
        wait_forgotten(&world, 0);
        rules.remove(host).unwrap();
    }
}

#[test]
fn a_policy_takes_hold_on_a_live_flow_to_a_service_and_lets_go_of_it() {
    let world = world(2);
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let host = &world.hosts[0];
    let rule = format!("-s {} -d {} -j DROP", client.address, server.address);
    for rules in ServiceRules::FORMS {
        rules.set(host, &service(SERVICE, &[server])).unwrap();
        let passed = passed_by(&world);
        let stream = Stream::start_to(client, SERVICE, &[server]);
        wait_for("datagrams", SOON, || stream.count() > 1000).unwrap();
        assert!(passed.packets().iter().take(1).all(|packets| *packets > 500), "{}", rules.name());
        check_rule(&host.netns, &stream, &rule);
        stream.end();

        let passed = passed_by(&world);
        let listener = listener_in(&server.netns, server.address, SERVER_PORT);
        let (mut one, mut two) = connection(&client.netns, SERVICE, &listener);
        let mut arrives = |limit| {
            one.write_all(b"x").unwrap();
            two.set_read_timeout(Some(limit)).unwrap();
            two.read_exact(&mut [0]).is_ok()
        };
        let begun = Instant::now();
        while begun.elapsed() < EXCHANGE {
            assert!(arrives(SOON), "{}", rules.name());
        }
        passed.assert_packets(100, rules.name());
        host.netns.exec(&format!("iptables -I FORWARD {rule}")).unwrap();
        let ruled = Instant::now();
        // A segment that is lost is sent again after 200 ms at the earliest.
        let silence = Duration::from_millis(500);
        wait_for("silence", SOON, || !arrives(silence)).unwrap();
        assert!(ruled.elapsed() < LIMIT + silence, "{}: {:?}", rules.name(), ruled.elapsed());
        host.netns.exec(&format!("iptables -D FORWARD {rule}")).unwrap();
        for _ in 0..1000 {
            assert!(arrives(SOON), "{}", rules.name());
        }
        rules.remove(host).unwrap();
    }
}

/// By `recent` of iptables' and by a set of nftables'. That as many callers find the same server by chance happens once in
/// 2^29 times.
#[test]
fn all_connections_of_an_affine_client_go_to_one_server() {
    let (world, pattern) = (world(3), Pattern::new());
    let (client, servers) = pods(&world);
    let host = &world.hosts[0];
    let options = ServiceOptions { affinity: Some(10_800), ..ServiceOptions::default() };
    for rules in ServiceRules::FORMS {
        let text = rules.text_with(options, host.address, &service(SERVICE, &servers));
        rules.set_text(host, &text).unwrap();
        let callers = [caller(client, 0); 30];
        // Of two first connections at once, neither finds what the other leaves.
        call(&world, rules.name(), &servers, &callers[..1], &pattern);
        for servers in call(&world, rules.name(), &servers, &callers, &pattern) {
            assert_eq!(servers.len(), 1, "{}: {servers:?}", rules.name());
        }
        rules.remove(host).unwrap();
        // Who calls from a port that one of these had would go on with its server.
        forget_udp(&host.netns);
    }
}

/// That one of three is never chosen by so many happens once in 10^10 times.
#[test]
fn each_of_many_connections_has_one_of_three_servers() {
    let (mut world, pattern) = (world(3), Pattern::new());
    world.hosts[0].add_pod().unwrap();
    let (client, [second, third]) = pods(&world);
    let host = &world.hosts[0];
    let beside = &host.pods[1];
    for rules in ServiceRules::FORMS {
        rules.set(host, &service(SERVICE, &[beside, second, third])).unwrap();
        let callers = [caller(client, 0); 60];
        for servers in call(&world, rules.name(), &[beside, second, third], &callers, &pattern) {
            assert_eq!(servers, BTreeSet::from([0, 1, 2]), "{}", rules.name());
        }
        rules.remove(host).unwrap();
    }
}

/// Has all call at once, by TCP, then by UDP. The servers that answered, of each.
fn call(
    world: &World,
    what: &str,
    servers: &[&Pod],
    callers: &[Caller<'_>],
    pattern: &Pattern,
) -> [BTreeSet<usize>; 2] {
    let passed_by = passed_by(world);
    let connections = Connections::new(what, servers, callers);
    connections.exchange(EXCHANGE, pattern);
    let mut datagrams = Datagrams::new(what, servers, callers);
    let rounds = datagrams.exchange_for(2 * EXCHANGE, pattern);
    passed_by.assert_packets((rounds * callers.len() / 4) as u64, what);
    [connections.answered(), datagrams.answered()].map(|answered| servers_of(&answered))
}
