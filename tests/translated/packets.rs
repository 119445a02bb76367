use std::net::SocketAddrV4;

use nix::{libc, setsockopt_impl, sockopt_impl, sys::socket::setsockopt};
use xtask::lab::{
    capture::Capture,
    services::{Service, ServiceRules},
};

use super::{PASSED_BY, asked, passed_by};
use crate::{
    calls::{Caller, Datagrams},
    large_packets::{check_every_segmentation, check_tcp_of_every_size, on_each_underlay},
    numbered::{BothWays, RATE, Way},
    path_mtu,
    services::{EXCHANGE, SERVICE, service, world},
    sockets::Pattern,
};

sockopt_impl!(
    /// Whether UDP is sent without a checksum.
    NoCheck,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_NO_CHECK,
    bool
);

#[test]
fn packets_of_every_size_arrive_whole_by_a_service() {
    on_each_underlay(|world, what| {
        for rules in ServiceRules::FORMS {
            let what = format!("{}, {what}", rules.name());
            rules.set(&world.hosts[0], &service(SERVICE, &[&world.hosts[1].pods[0]])).unwrap();
            check_tcp_of_every_size(world, &asked(), &what);
            for aggregated in [false, true] {
                check_every_segmentation(world, &asked(), aggregated, &what);
            }
            rules.remove(&world.hosts[0]).unwrap();
        }
    });
}

#[test]
fn the_paths_mtu_is_found_by_a_service() {
    let world = path_mtu::world();
    for rules in ServiceRules::FORMS {
        rules.set(&world.hosts[0], &service(SERVICE, &[&world.hosts[1].pods[0]])).unwrap();
        path_mtu::check_too_big_a_datagram(&world, &asked(), rules.name());
        path_mtu::check_tcp(&world, &asked(), rules.name());
        rules.remove(&world.hosts[0]).unwrap();
    }
}

/// Zero says that there is none (RFC 768), and must stay zero where another is corrected.
#[test]
fn datagrams_without_a_checksum_stay_without() {
    let (world, pattern) = (world(2), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let caller = Caller { netns: &client.netns, port: 0, asked: SERVICE, seen_as: client.address };
    for rules in ServiceRules::FORMS {
        rules.set(&world.hosts[0], &service(SERVICE, &[server])).unwrap();
        for gso in [true, false] {
            for host in &world.hosts {
                host.set_underlay_gso(gso).unwrap();
            }
            let what = format!("{}, GSO {gso}", rules.name());
            // What arrives with one.
            let mut captures = [(server, client.address), (client, *SERVICE.ip())].map(|(at, from)| {
                let filter = format!("udp and src {from} and udp[6:2] != 0");
                Capture::start(&at.netns, "eth0", &filter, world.lab.directory()).unwrap()
            });
            let passed_by = passed_by(&world);
            let mut datagrams = Datagrams::new(&what, &[server], &[caller]);
            let set = |datagrams: &Datagrams<'_>, is_without: bool| {
                datagrams.sockets().for_each(|socket| setsockopt(socket, NoCheck, &is_without).unwrap());
            };
            set(&datagrams, true);
            let rounds = datagrams.exchange_for(EXCHANGE, &pattern);
            passed_by.assert_packets(rounds as u64 / 2, &what);
            // So the captures see them.
            set(&datagrams, false);
            datagrams.exchange(&pattern);
            for capture in &mut captures {
                capture.end_after(1).unwrap();
                let checksums = capture.decoded(&["-T", "fields", "-e", "udp.checksum"]).unwrap();
                assert_eq!(checksums.lines().count(), 1, "{what}: of {rounds} without: {checksums}");
            }
        }
        rules.remove(&world.hosts[0]).unwrap();
    }
}

#[test]
fn nothing_is_lost_between_the_two_ways_by_a_service() {
    let world = world(2);
    let server = &world.hosts[1].pods[0];
    for rules in ServiceRules::FORMS {
        let services = [("fast", Way::Fast), ("slow", Way::Slow)].map(|(name, way)| Service {
            name,
            protocol: "udp",
            address: SocketAddrV4::new(*SERVICE.ip(), way.port()),
            node_port: None,
            endpoints: vec![SocketAddrV4::new(server.address, way.port())],
        });
        rules.set(&world.hosts[0], &services).unwrap();
        let streams = BothWays::start_to(&world, *SERVICE.ip());
        let passed_by = passed_by(&world);
        streams.wait_for_more(5 * RATE);
        // Only the way out: none is answered.
        let passed = passed_by.packets();
        assert!(passed.iter().take(1).all(|packets| *packets > 4 * RATE), "{passed:?} of {PASSED_BY:?}");
        streams.end_whole(rules.name());
        rules.remove(&world.hosts[0]).unwrap();
    }
}
