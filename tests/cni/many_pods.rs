//! 250 pods on a host, as many as a /24 has room for, made and removed under traffic.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddrV4,
    process::Command,
    time::{Duration, Instant},
};

use flannel_common::maps::{ABI_VERSION, FLOWS};
use xtask::{
    lab::{Netns, cni},
    process::output,
    progress::wait_for,
};

use super::{
    runtime::{Expected as _, Runtime, pod},
    world,
};
use crate::{
    sockets::{connection, listener_in},
    world::{SOON, World, is_answered, is_delivered},
};

const PODS: usize = 250;
/// How many containers a runtime starts at once.
const AT_ONCE: usize = 4;
/// Every such pod has a connection to the other host.
const EACH: usize = 25;

/// What a host has of pods: interfaces, programs, pins, addresses, rules.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    links: BTreeSet<String>,
    programs: String,
    pins: BTreeSet<String>,
    addresses: String,
    rules: String,
}

impl Traces {
    fn of(world: &World, host: usize) -> Self {
        let host = &world.hosts[host];
        let links = host.netns.ip_json("link").unwrap();
        let pins = fs::read_dir(host.pin_dir().join("1")).unwrap();
        // Attached programs, by TCX or by filter.
        let programs = host.netns.exec("bpftool -j net").unwrap();
        let programs: serde_json::Value = serde_json::from_str(&programs).unwrap();
        Self {
            links: links.as_array().unwrap().iter().map(|link| link["ifname"].to_string()).collect(),
            programs: programs[0]["tc"].to_string(),
            pins: pins.map(|pin| pin.unwrap().file_name().into_string().unwrap()).collect(),
            addresses: host.netns.ip("-4 -br address").unwrap(),
            rules: host
                .netns
                .exec("iptables-save -t nat")
                .unwrap()
                .lines()
                .filter(|line| line.starts_with("-A"))
                .collect(),
        }
    }
}

/// How many entries of the host's flows are into pods' veths.
fn flows(world: &World, host: usize) -> usize {
    let map = world.hosts[host].pin_dir().join(format!("1/v{ABI_VERSION}/{FLOWS}"));
    let dump = output(Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(map)).unwrap();
    serde_json::from_str::<serde_json::Value>(&dump).unwrap().as_array().unwrap().len()
}

#[test]
fn come_and_go_without_a_trace() {
    let world = world(2);
    let runtimes: Vec<_> = world.hosts.iter().map(Runtime::alone).collect();
    let (one, _) = pod(&runtimes[0], &world.hosts[0], "first");
    let (two, _) = pod(&runtimes[1], &world.hosts[1], "first");
    wait_for("pods", SOON, || is_answered(&one.netns, &two.address.to_string())).unwrap();
    let pins_of_pods = |traces: &Traces| traces.pins.iter().filter(|pin| pin.starts_with("from_pod-")).count();
    wait_for("the first pod's programs", SOON, || pins_of_pods(&Traces::of(&world, 0)) == 1).unwrap();
    let before = Traces::of(&world, 0);
    let traffic = one.netns.command("ping").args(["-i", "0.01", "-q", &two.address.to_string()]).spawn().unwrap();
    let traffic = Ended(traffic);

    let names: Vec<_> = (0..PODS).map(|number| format!("{}-m{number}", world.hosts[0].netns.name())).collect();
    let netns: Vec<_> = names.iter().map(|name| Netns::create(name).unwrap()).collect();
    let id = |number: usize| format!("m{number}");
    let started = Instant::now();
    let pods: Vec<(usize, Duration, std::net::Ipv4Addr)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE)
            .map(|worker| {
                let (netns, runtime) = (&netns, Runtime::alone(&world.hosts[0]));
                scope.spawn(move || {
                    let of_worker = (worker..PODS).step_by(AT_ONCE);
                    of_worker
                        .map(|number| {
                            let started = Instant::now();
                            let reply = runtime.add_alone(&id(number), &netns[number].path()).succeeded();
                            (number, started.elapsed(), cni::address(&reply.json()).unwrap())
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let attached = started.elapsed();
    let mut times: Vec<_> = pods.iter().map(|(_, time, _)| *time).collect();
    times.sort();
    println!(
        "{PODS} pods in {attached:?}, {AT_ONCE} at once; ADD: median {:?}, worst {:?}",
        times[PODS / 2],
        times[PODS - 1]
    );
    assert_eq!(pods.iter().map(|(.., address)| address).collect::<BTreeSet<_>>().len(), PODS, "an address each");
    wait_for("all pods' programs", SOON, || pins_of_pods(&Traces::of(&world, 0)) == PODS + 1).unwrap();

    let listener = listener_in(&two.netns, two.address, 80);
    let asked = SocketAddrV4::new(two.address, 80);
    let connections: Vec<_> = pods
        .iter()
        .filter(|(number, ..)| number % EACH == 0)
        .map(|(number, _, address)| {
            let (client, server) = connection(&netns[*number], asked, &listener);
            assert_eq!(server.peer_addr().unwrap().ip(), *address);
            exchange(&client, &server);
            (client, server)
        })
        .collect();
    assert!(flows(&world, 0) >= PODS / EACH, "the connections are noted");
    drop(connections);

    let started = Instant::now();
    for (number, netns) in netns.into_iter().enumerate() {
        // Of every other the namespace goes first.
        let (netns_path, netns) = (netns.path(), (number % 2 == 0).then_some(netns));
        let netns_path = if netns.is_some() { netns_path } else { String::new() };
        runtimes[0].del_alone(&id(number), &netns_path).succeeded();
    }
    println!("{PODS} pods removed in {:?}", started.elapsed());
    drop(traffic);
    assert_eq!(runtimes[0].states(), ["first"]);
    assert_eq!(runtimes[0].addresses(), [one.address.to_string()]);
    let same = wait_for("all traces to be gone", SOON, || Traces::of(&world, 0) == before);
    assert!(same.is_ok(), "{:#?}\nbefore: {before:#?}", Traces::of(&world, 0));
    // Those of the connections to pods that are gone; ping's are none.
    wait_for("the flows to be forgotten", SOON, || flows(&world, 0) == 0).unwrap();
    assert!(is_delivered(&one.netns, &two.address.to_string()));
}

/// Some rounds, so that the flow is noted on both sides.
fn exchange(mut client: &std::net::TcpStream, mut server: &std::net::TcpStream) {
    use std::io::{Read as _, Write as _};
    let mut word = [0; 4];
    for _ in 0..4 {
        client.write_all(b"ping").unwrap();
        server.read_exact(&mut word).unwrap();
        server.write_all(b"pong").unwrap();
        client.read_exact(&mut word).unwrap();
    }
}

/// A program that is ended with this.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}
