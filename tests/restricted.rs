//! What a plan keeps off the bypass, by the programs of running hosts: the agent of one is gone, and this process goes on with
//! what it left.

use std::{net::Ipv4Addr, path::Path};

use flannel_agent::{
    bypass::{Plan, Ports, Protocol},
    config::NetworkConfig,
    dataplane::{BpfLogLevel, Capacity, Dataplane, Hook, PinDirectory, XdpMode},
    device::PodLink,
};
use flannel_common::{flow::SourcePorts, maps::Config, packet::Mac, vxlan::Vni};
use nix::sys::signal::Signal;
use xtask::{lab::Netns, progress::wait_for};

use crate::{
    loaded::enter,
    stream::Stream,
    world::{CONFIG, SOON, World},
};

/// MAC and number of a device.
fn link(netns: &Netns, device: &str) -> (Mac, u32) {
    let links = netns.ip_json(&format!("link show {device}")).unwrap();
    let octets: Vec<_> =
        links[0]["address"].as_str().unwrap().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
    (octets.try_into().unwrap(), links[0]["ifindex"].as_u64().unwrap() as u32)
}

/// Runs a test with the dataplane of host 0, attached anew under an empty plan. The thread is in the host's namespace.
fn with_dataplane(test: impl FnOnce(&World, &mut Dataplane) + Send) {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let mut agent = world.hosts[0].agent.take().unwrap();
    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait(SOON).unwrap();
    let host = &world.hosts[0];
    let ((underlay_mac, external), (vtep_mac, overlay), (_, veth)) =
        (link(&host.netns, "eth0"), link(&host.netns, "flannel.1"), link(&host.netns, "pod1"));
    let subnet = host.subnet().unwrap().gateway.to_bits() - 1;
    let network = NetworkConfig::parse(CONFIG).unwrap();
    let capacity = Capacity::of(network.network, network.subnet_len);
    let config = Config {
        bypass_time: 1_000_000_000,
        network: u32::from(Ipv4Addr::new(10, 5, 0, 0)),
        slot_shift: 8,
        slots: capacity.slots,
        subnet,
        subnet_mask: 0xffff_ff00,
        vtep_address: host.address.to_bits(),
        vni: 1,
        mtu: 1450,
        underlay_header_len: 14,
        underlay_mac,
        port: 8472,
        vtep_mac,
        source_ports: SourcePorts { min: 32768, max: 60999 },
        flags: 0,
    };
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            enter(Path::new(&host.netns.path()));
            let pins = PinDirectory::new(host.pin_dir(), Vni::DEFAULT);
            let mut dataplane = Dataplane::load(pins, &config, capacity, BpfLogLevel::Off).unwrap();
            for (hook, device, index) in [
                (Hook::FromUnderlay, "eth0", external),
                (Hook::ToOverlay, "flannel.1", overlay),
                (Hook::FromOverlay, "flannel.1", overlay),
            ] {
                dataplane.attach(hook, device, index).unwrap();
            }
            dataplane.attach_pods(&[PodLink { name: "pod1".to_owned(), index: veth, bridge: None }]).unwrap();
            test(&world, &mut dataplane);
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Traffic in both directions.
fn both(world: &World) -> [Stream; 2] {
    let [one, two] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    [Stream::start(one, two), Stream::start_on(two, one, Stream::PORT + 1)]
}

/// Waits until packets of both directions pass the stack of host 0 by.
fn wait_bypass(world: &World) {
    for label in ["pod_encapsulated", "delivered"] {
        let before = world.counter(0, label);
        wait_for(label, SOON, || world.counter(0, label) > before + 200).unwrap();
    }
}

/// That none does, while many take the stack.
fn assert_none_passes(world: &World, labels: &[&str], what: &str) {
    let counters = || labels.iter().map(|label| world.counter(0, label)).collect::<Vec<_>>();
    let (fast, slow) = (counters(), world.counter(0, "received"));
    wait_for("packets by the stack", SOON, || world.counter(0, "received") > slow + 500).unwrap();
    let now = counters();
    assert_eq!(now, fast, "{what}: {labels:?}");
}

const FAST: [&str; 2] = ["pod_encapsulated", "delivered"];

#[test]
fn a_plan_is_carried_out_at_once_and_taken_back_without_a_loss() {
    with_dataplane(|world, dataplane| {
        let (_, veth) = link(&world.hosts[0].netns, "pod1");
        let streams = both(world);
        let ports = [Stream::PORT, Stream::PORT + 1].map(|port| Ports::new(Protocol::Udp, &(port..=port)));
        for (what, plan) in [
            ("everything", Plan { everything: true, ..Plan::default() }),
            ("the pod", Plan { pods: [veth].into(), ..Plan::default() }),
        ] {
            wait_bypass(world);
            dataplane.restrict(&plan).unwrap();
            assert_none_passes(world, &FAST, what);
            dataplane.restrict(&Plan::default()).unwrap();
        }
        wait_bypass(world);
        dataplane.restrict(&Plan { external_interface: true, ..Plan::default() }).unwrap();
        assert_none_passes(world, &FAST[1..], "what comes in");
        dataplane.restrict(&Plan::default()).unwrap();
        let other = Plan { pods: [veth + 1].into(), ..Plan::default() };
        dataplane.restrict(&other).unwrap();
        wait_bypass(world);
        // What is excluded goes within the second.
        let address = world.hosts[1].pods[0].address;
        for (what, plan) in [
            ("addresses", Plan { addresses: [format!("{address}/32").parse().unwrap()].into(), ..Plan::default() }),
            ("ports", Plan { ports: ports.into(), ..Plan::default() }),
        ] {
            wait_bypass(world);
            dataplane.restrict(&plan).unwrap();
            wait_for(what, SOON, || {
                let flows = &world.status(0)["dataplane"]["flows"]["plain"];
                [&flows["egress"], &flows["ingress"]].iter().all(|count| **count == 0)
            })
            .unwrap();
            assert_none_passes(world, &FAST, what);
            dataplane.restrict(&Plan::default()).unwrap();
        }
        // XDP goes on where it is, and lets all through.
        let (_, external) = link(&world.hosts[0].netns, "eth0");
        dataplane.set_xdp(Some(XdpMode::Generic), external).unwrap();
        let before = world.counter(0, "xdp_decapsulated");
        wait_for("XDP", SOON, || world.counter(0, "xdp_decapsulated") > before + 200).unwrap();
        dataplane.restrict(&Plan { external_interface: true, ..Plan::default() }).unwrap();
        assert_none_passes(world, &["delivered", "xdp_decapsulated", "handed_in"], "what comes in by XDP");
        // For who captures there, it still bypasses the stack.
        dataplane.restrict(&Plan { xdp_passes: true, ..Plan::default() }).unwrap();
        wait_bypass(world);
        let before = world.counter(0, "xdp_decapsulated");
        wait_bypass(world);
        assert_eq!(world.counter(0, "xdp_decapsulated"), before);
        for stream in streams {
            let (sent, received) = stream.end();
            assert_eq!(received.len(), sent as usize, "datagrams");
        }
    });
}

#[test]
fn who_captures_on_the_overlay_sees_each_packet_once() {
    with_dataplane(|world, dataplane| {
        let plan = Plan { everything: true, overlay_capture: true, ..Plan::default() };
        dataplane.restrict(&plan).unwrap();
        let host = &world.hosts[0];
        let log = world.lab.directory().join("tcpdump.log");
        let mut command = host.netns.command("tcpdump");
        command.args(["-Z", "root", "-i", "flannel.1", "-n", "-e", "-l", "-Q", "inout", "-B", "16384", "udp"]);
        let mut tcpdump = xtask::process::Process::start(&mut command, &log).unwrap();
        wait_for("tcpdump", SOON, || tcpdump.log().contains("listening on")).unwrap();
        let streams = both(world);
        wait_for("many", SOON, || streams.iter().all(|stream| stream.count() > 1000)).unwrap();
        let ends = streams.map(Stream::end);
        let [out, incoming] = ends.each_ref().map(|(sent, _)| *sent as usize);
        let count = |log: &str, port: u16| log.lines().filter(|line| line.contains(&format!(".{port}: UDP"))).count();
        let whole = wait_for("all", SOON, || {
            let log = tcpdump.log();
            count(&log, Stream::PORT) >= out && count(&log, Stream::PORT + 1) >= incoming
        });
        tcpdump.signal(Signal::SIGINT).unwrap();
        tcpdump.wait(SOON).unwrap();
        let log = tcpdump.log();
        let shown = [count(&log, Stream::PORT), count(&log, Stream::PORT + 1)];
        assert_eq!((shown, whole.is_ok()), ([out, incoming], true), "{}", &log[..log.len().min(600)]);
        for (sent, received) in ends {
            assert_eq!(received.len(), sent as usize);
        }
        // As flannel's devices send it to each other.
        let macs = [0, 1]
            .map(|host| link(&world.hosts[host].netns, "flannel.1").0.map(|octet| format!("{octet:02x}")).join(":"));
        let line = log.lines().find(|line| line.contains(&format!(".{}: UDP", Stream::PORT))).unwrap();
        assert!(line.contains(&format!("{} > {}", macs[0], macs[1])), "{line}");
        assert!(world.counter(0, "encap_shown") >= out as u64);
        // Segments that the kernel has still to make are shown, and sent, in one.
        let [one, two] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        let transfer =
            xtask::transfer::tcp_transfer(&one.netns, &two.netns, two.address, 1, world.lab.directory()).unwrap();
        assert!(transfer.is_flowing(), "{} Gb/s", transfer.gbits);
    });
}

#[test]
fn the_queue_of_the_overlay_holds_what_it_is_to_hold() {
    with_dataplane(|world, dataplane| {
        let netns = &world.hosts[0].netns;
        netns.exec("tc qdisc add dev flannel.1 root tbf rate 20mbit burst 64kb latency 100ms").unwrap();
        dataplane.restrict(&Plan { everything: true, overlay_queue: true, ..Plan::default() }).unwrap();
        let [one, two] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        let gbits = || {
            let transfer =
                xtask::transfer::tcp_transfer(&one.netns, &two.netns, two.address, 2, world.lab.directory()).unwrap();
            transfer.gbits
        };
        let limited = gbits();
        assert!(limited > 0.005 && limited < 0.04, "{limited} Gb/s");
        assert!(world.counter(0, "encap_queued") > 100);
        netns.exec("tc qdisc del dev flannel.1 root").unwrap();
        dataplane.restrict(&Plan::default()).unwrap();
        let free = gbits();
        assert!(free > 0.1, "{free} Gb/s");
    });
}
