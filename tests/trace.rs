//! `flannel-agent trace`: that it says what then becomes of the real packet, and leaves nothing behind.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    process::Command,
};

use flannel_common::{event::Event, maps::ABI_VERSION};
use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{
    lab::{PREFIX, capture::Capture},
    process::output,
    progress::wait_for,
};

use crate::{
    frames::*,
    short_frames::send,
    sockets::socket_in,
    world::{SOON, World, lease_value},
};
use etherparse::EtherType;

/// What the other end of the real packets has.
const PORT: u16 = 7000;

/// What a trace says.
struct Traced(Value);

impl Traced {
    fn of(world: &World, arguments: &str) -> Self {
        let mut command = world.agent_on(0);
        command.arg("trace").args(arguments.split_whitespace()).args(["-o", "json"]);
        Self(serde_json::from_str(&output(&mut command).unwrap()).unwrap())
    }

    /// The events of the programs on the way.
    fn events(&self) -> Vec<&str> {
        let steps = self.0["steps"].as_array().unwrap().iter();
        steps.filter_map(|step| step["event"].as_str()).collect()
    }

    fn fate(&self) -> (&str, &str) {
        (self.0["fate"].as_str().unwrap(), self.0["conclusion"].as_str().unwrap())
    }

    /// The step of a program.
    fn step(&self, program: &str) -> &Value {
        self.0["steps"].as_array().unwrap().iter().find(|step| step["program"] == program).unwrap()
    }
}

/// What programs write on a host, by map, as `bpftool` reads it.
fn written(world: &World, maps: &[&'static str]) -> BTreeMap<&'static str, String> {
    let folder = world.hosts[0].pin_dir().join(format!("1/v{ABI_VERSION}"));
    let dump = |map: &&'static str| {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["-j", "map", "dump", "pinned"]).arg(folder.join(map));
        (*map, output(&mut bpftool).unwrap())
    };
    maps.iter().map(dump).collect()
}

/// Only packets of others through the tunnel, and what is dropped, change these.
const BY_TRAFFIC: [&str; 3] = ["DROPS", "HEARD", "ORIGINALS"];
/// These also change when flows end, and by ARP of pods.
const BY_ITSELF: [&str; 2] = ["FLOWS", "PODS"];
/// These events also happen to packets of the kernel's own (ARP, IPv6), and of the agent to its store.
const OF_OTHERS: [&str; 5] = ["encap_not_ipv4", "not_tunnel", "pod_other", "pod_not_from_overlay", "routed_other"];

/// That a trace leaves everything as it was, compared around several traces, of which each would change it: others change it too.
fn assert_untouched(world: &World, arguments: &str) -> Traced {
    let maps = [&BY_TRAFFIC[..], &BY_ITSELF].concat();
    let mut differing = Vec::new();
    for _ in 0..5 {
        let before = written(world, &maps);
        let mut traced = None;
        let mut grown = counted(world, || traced = Some(Traced::of(world, arguments)));
        grown.retain(|(label, _)| !OF_OTHERS.contains(label));
        // The agent asks a peer that is silent, now and then; a trace that counts, or writes, does so each time.
        let after = written(world, &maps);
        let changed = maps.iter().copied().filter(|map| before[map] != after[map]);
        differing = grown.into_iter().map(|(label, _)| label).chain(changed).collect();
        if differing.is_empty() {
            return traced.unwrap();
        }
    }
    panic!("trace {arguments} changed {differing:?}");
}

/// How many packets each event was counted for meanwhile.
fn counted(world: &World, act: impl FnOnce()) -> Vec<(&'static str, u64)> {
    let read = || {
        let text = output(world.agent_on(0).arg("counters")).unwrap();
        let count = |event: &Event| {
            let row = text.lines().find(|line| line.split_whitespace().next() == Some(event.label())).unwrap();
            row.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        Event::ALL.iter().map(|event| (event.label(), count(event))).collect::<Vec<_>>()
    };
    let before = read();
    act();
    let grown = read().into_iter().zip(before);
    grown.map(|((label, after), (_, before))| (label, after - before)).filter(|(_, count)| *count > 0).collect()
}

/// That each of these events was counted for the real packet.
fn assert_counted(grown: &[(&str, u64)], events: &[&str], what: &str) {
    for event in events {
        assert!(grown.iter().any(|(label, _)| label == event), "{what}: {event} is not among {grown:?}");
    }
}

/// Third octets of subnets that are routed into the overlay, and that nobody leases.
fn free_octets<const N: usize>(world: &World) -> [u8; N] {
    let leases = world.store.list(&format!("{PREFIX}/subnets/")).unwrap();
    let is_free = |third: &u8| !leases.iter().any(|(key, _)| key.ends_with(&format!("/10.5.{third}.0-24")));
    let free: Vec<_> = (128..=191).filter(is_free).take(N).collect();
    free.try_into().unwrap()
}

/// The lease of a host that is not there; one of its pods.
fn add_absent_peer(world: &World, third: u8, address: &str) -> Ipv4Addr {
    let key = format!("{PREFIX}/subnets/10.5.{third}.0-24");
    world.store.put(&key, &lease_value(address, "0a:00:00:00:00:09")).unwrap();
    [10, 5, third, 2].into()
}

#[test]
fn it_says_what_becomes_of_a_packet_from_a_pod() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let sender = socket_in(&from.netns, SocketAddrV4::new(from.address, 0));
    let receiver = socket_in(&to.netns, SocketAddrV4::new(to.address, PORT));
    let sport = sender.local_addr().unwrap().port();
    let between = |to: Ipv4Addr| format!("{} {to} --udp --sport {sport} --dport {PORT}", from.address);
    let arguments = between(to.address);
    let send = || {
        sender.send_to(&[7; 50], receiver.local_addr().unwrap()).unwrap();
        receiver.recv(&mut [0; 64]).unwrap();
    };

    // Nothing is known of the flow yet.
    let traced = assert_untouched(&world, &arguments);
    let (fate, conclusion) = traced.fate();
    assert_eq!(fate, "sent", "{:#}", traced.0);
    assert!(conclusion.contains("in the tunnel to 192.168.64.2 by eth0, by the stack"), "{conclusion}");
    assert_eq!(traced.events()[0], "pod_via_stack");
    assert!(traced.events()[1].starts_with("encapsulated"), "{:?}", traced.events());
    let grown = counted(&world, send);
    assert_counted(&grown, &["pod_via_stack"], "slow");
    assert!(grown.iter().any(|(label, _)| label.starts_with("encapsulated")), "{grown:?}");

    let addresses = [from.address, to.address].map(|address| address.to_string());
    world.assert_shown(0, "encapsulated", &[("10.5.1.2", &addresses[0]), ("10.5.2.7", &addresses[1])]);
    world.assert_shown(0, "the overlay has no part in it", &[("10.5.1.2", &addresses[0])]);

    // Kept alive meanwhile, it bypasses the stack; and what is put on the wire is shown.
    let bypassed = wait_for("a trace of a bypassed flow", SOON, || {
        send();
        let traced = Traced::of(&world, &arguments);
        let is_bypassed = traced.events()[0].starts_with("pod_encapsulated");
        if is_bypassed {
            assert_eq!(traced.events().len(), 1, "{:#}", traced.0);
            assert!(traced.fate().1.contains("past the stack"), "{:?}", traced.fate());
            let after = traced.step("from_pod")["after"].as_array().unwrap();
            let has = |text: &str| after.iter().any(|layer| layer.as_str().unwrap().starts_with(text));
            let outer = "IPv4 192.168.64.1 > 192.168.64.2, TTL 64, 134 bytes";
            let inner = format!("IPv4 {} > {}, TTL 63, 84 bytes", from.address, to.address);
            assert!(has(outer) && has("VXLAN VNI 1") && has(&inner), "{after:#?}");
        }
        is_bypassed
    });
    bypassed.unwrap();
    let grown = counted(&world, || (0..5).for_each(|_| send()));
    assert!(grown.iter().any(|(label, _)| label.starts_with("pod_encapsulated")), "{grown:?}");

    // To a subnet that nobody leases: the kernel's device hands it back, and there it ends.
    let [free, unresolved, unroutable] = free_octets(&world);
    let nobody: Ipv4Addr = [10, 5, free, 2].into();
    let traced = assert_untouched(&world, &between(nobody));
    assert_eq!(traced.events(), ["pod_via_stack", "encap_handed_on", "encap_no_peer"], "{:#}", traced.0);
    assert_eq!(traced.fate().0, "dropped");
    assert!(traced.fate().1.contains("dropped at flannel.1: encap_no_peer; "), "{:?}", traced.fate());
    let subnets = &traced.step("to_overlay")["tables"];
    let is_empty = |table: &Value| table["table"] == "SUBNETS" && table["answer"] == "nobody";
    assert!(subnets.as_array().unwrap().iter().any(is_empty), "{subnets:#}");
    let grown = counted(&world, || assert!(sender.send_to(&[7; 50], (nobody, PORT)).is_ok()));
    assert_counted(&grown, &traced.events(), "no peer");

    // To a peer whose next hop does not answer.
    let absent = add_absent_peer(&world, unresolved, "192.168.64.77");
    world.wait_status(0, "the peer", |status| status["peers"] == 2);
    let traced = assert_untouched(&world, &between(absent));
    assert_eq!(traced.events(), ["pod_via_stack", "encapsulated_neighbour"], "{:#}", traced.0);
    assert!(traced.fate().1.contains("the kernel finds out the next hop's MAC first"), "{:?}", traced.fate());
    let unresolved = (absent, traced.events());

    // And to one that the underlay has no route to.
    world.hosts[0].netns.ip("route add unreachable 192.0.2.9").unwrap();
    let absent = add_absent_peer(&world, unroutable, "192.0.2.9");
    world.wait_status(0, "the peer", |status| status["peers"] == 3);
    let traced = assert_untouched(&world, &between(absent));
    assert_eq!(traced.events(), ["pod_via_stack", "encap_handed_on", "encap_no_route"], "{:#}", traced.0);

    // Too large for the overlay: the stack answers, and no program of the overlay's device sees it.
    let traced = assert_untouched(&world, &format!("{arguments} --size 1451"));
    assert_eq!(traced.events().len(), 1, "{:#}", traced.0);
    assert_eq!(traced.fate().0, "refused");
    assert!(traced.fate().1.contains("too large by 1 byte:"), "{:?}", traced.fate());
    from.netns.ip("link set eth0 mtu 1500").unwrap();
    world.hosts[0].netns.ip("link set pod1 mtu 1500").unwrap();
    let too_large = || {
        let ping = format!("ping -M do -c 1 -W 1 -s {} {}", 1451 - 28, to.address);
        let error = from.netns.exec(&ping).unwrap_err().to_string();
        assert!(error.contains("mtu") || error.contains("100% packet loss"), "{error}");
    };
    let grown = counted(&world, too_large);
    assert!(!grown.iter().any(|(label, _)| label.starts_with("encap")), "{grown:?}");

    // The ports of tunnels are not for pods.
    let traced = assert_untouched(&world, &format!("{} 192.168.64.2 --udp --dport 8472", from.address));
    assert_eq!(traced.events(), ["pod_tunnel"], "{:#}", traced.0);
    let grown = counted(&world, || assert!(sender.send_to(&[7; 50], ("192.168.64.2", 8472)).is_ok()));
    assert_counted(&grown, &["pod_tunnel"], "a pod's tunnel");

    // Not before: a peer that does not answer is asked by the agent from then on.
    let (absent, events) = unresolved;
    let grown = counted(&world, || assert!(sender.send_to(&[7; 50], (absent, PORT)).is_ok()));
    assert_counted(&grown, &events, "unresolved");

    // By its veth's name, and from the host itself; the same without an agent, for people.
    world.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGKILL).unwrap();
    world.hosts[0].agent = None;
    let to = world.hosts[1].pods[0].address;
    let by_name = assert_untouched(&world, &format!("pod1 {to} --icmp"));
    assert_eq!(by_name.events()[0], "pod_other", "{:#}", by_name.0);
    let from_host = assert_untouched(&world, &format!("flannel.1 {to} --icmp"));
    assert!(from_host.events()[0].starts_with("encapsulated"), "{:#}", from_host.0);
    let table = output(world.agent_on(0).args(["trace", "pod1", &to.to_string(), "--icmp"])).unwrap();
    for part in [
        "\n1. from_pod at pod1: pod_other, next (TC_ACT_UNSPEC)",
        "\n2. the stack: routes it to flannel.1",
        "\n=> sent",
    ] {
        assert!(table.contains(part), "{part:?} is not in:\n{table}");
    }
}

#[test]
fn it_says_what_becomes_of_a_packet_to_a_pod() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let [pod, peers] = [0, 1].map(|host| world.hosts[host].pods[0].address);
    let arguments = format!("{peers} {pod} --udp --sport 40000 --dport 53");
    let traced = assert_untouched(&world, &arguments);
    assert_eq!(traced.events(), ["handed_in", "received", "pod_released"], "{:#}", traced.0);
    assert_eq!(traced.fate(), ("delivered", "put into the pod at pod1, by the stack"));

    // The same packet, and such as no host should send, from the peer's VTEP address or a stranger's.
    let frames = Underlay::of(&world);
    let (two, stranger) = (NODE_TWO, [192, 168, 64, 99]);
    let [free] = free_octets(&world);
    let foreign = [10, 5, free, 2];
    let from_vtep = |address: [u8; 4]| format!(" --from-vtep {}", Ipv4Addr::from(address));
    let cases = [
        ("as it is", two, peers.octets(), String::new(), &["handed_in", "received", "pod_released"][..]),
        ("a stranger", stranger, peers.octets(), from_vtep(stranger), &["unknown_vtep"]),
        ("a spoofed source", two, foreign, from_vtep(two), &["spoofed_inner_source"]),
    ];
    for (what, outer, inner, more, expected) in cases {
        let arguments = format!("{} {pod} --udp --sport 40000 --dport 53{more}", Ipv4Addr::from(inner));
        let traced = assert_untouched(&world, &arguments);
        assert_eq!(traced.events(), expected, "{what}: {:#}", traced.0);
        let frame = frames.around(outer, &udp(inner, pod.octets()));
        let last = expected.last().unwrap();
        let before = world.counter(0, last);
        let grown = counted(&world, || {
            send(&world.lab.underlay, "node1", &[&frame]);
            wait_for(what, SOON, || world.counter(0, last) > before).unwrap();
        });
        assert_counted(&grown, expected, what);
    }

    // To the host itself, and to a pod that is not there.
    let own = world.hosts[0].netns.ip_json("address show flannel.1").unwrap();
    let own = own[0]["addr_info"][0]["local"].as_str().unwrap().to_owned();
    let traced = assert_untouched(&world, &format!("{peers} {own} --icmp"));
    assert_eq!(traced.fate().0, "received", "{:#}", traced.0);
    let mut absent = pod.octets();
    absent[3] = 77;
    let traced = assert_untouched(&world, &format!("{peers} {} --icmp", Ipv4Addr::from(absent)));
    assert!(traced.fate().1.contains("knows no pod with"), "{:?}", traced.fate());
}

/// Where somebody captures on the overlay's device, the program sends it a copy of each packet: the one thing that a run of
/// it would really do.
#[test]
fn it_sends_nothing_also_where_a_copy_is_shown() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let capture = Capture::start(&world.hosts[0].netns, "flannel.1", "udp port 7000", world.lab.directory()).unwrap();
    let arguments = format!("{} {} --udp --dport {PORT}", from.address, to.address);
    let is_shown = |traced: &Traced| {
        let tables = traced.step("to_overlay")["tables"].as_array().unwrap();
        tables.iter().any(|table| table["table"] == "CONFIG" && table["answer"].as_str().unwrap().contains("is shown"))
    };
    wait_for("the capture", SOON, || is_shown(&Traced::of(&world, &arguments))).unwrap();
    let traced = assert_untouched(&world, &arguments);
    assert!(traced.events()[1].starts_with("encapsulated"), "{:#}", traced.0);
    assert_eq!(world.counter(0, "encap_shown"), 0);
    let sender = socket_in(&from.netns, SocketAddrV4::new(from.address, 0));
    sender.send_to(&[7; 50], (to.address, PORT)).unwrap();
    wait_for("the real packet", SOON, || world.counter(0, "encap_shown") == 1).unwrap();
    drop(capture);
}

#[test]
fn it_follows_packets_without_a_tunnel() {
    let mut world = World::with_backend(2, r#"{"Type": "host-gw"}"#).ready(&[]);
    world.wait_connected(0, 1);
    let [pod, peers] = [0, 1].map(|host| world.hosts[host].pods[0].address);
    let out = assert_untouched(&world, &format!("{pod} {peers} --udp"));
    assert_eq!(out.events()[0], "pod_via_stack", "{:#}", out.0);
    assert!(out.events()[1].starts_with("routed"), "{:#}", out.0);
    assert!(out.fate().1.starts_with("sent without encapsulation to 192.168.64.2 by eth0"), "{:?}", out.fate());
    let back = assert_untouched(&world, &format!("{peers} {pod} --udp"));
    assert_eq!(back.events(), ["direct_received", "pod_released"], "{:#}", back.0);
    assert_eq!(back.fate().0, "delivered");
    world.hosts[0].agent = None;
}

#[test]
fn what_can_not_be_traced_is_said_in_one_line() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let pod = world.hosts[0].pods[0].address;
    let refused = |mut command: Command| {
        let result = command.output().unwrap();
        let text = String::from_utf8(result.stderr).unwrap();
        assert_eq!((result.status.code(), text.lines().count()), (Some(1), 1), "{text}");
        assert!(result.stdout.is_empty());
        text
    };
    let trace = |arguments: &str| {
        let mut command = world.agent_on(0);
        command.arg("trace").args(arguments.split_whitespace());
        refused(command)
    };
    let [one, two, three] = free_octets(&world).map(|third| format!("10.5.{third}.2"));
    add_absent_peer(&world, two.split('.').nth(2).unwrap().parse().unwrap(), "192.168.64.77");
    world.wait_status(0, "the peer", |status| status["peers"] == 2);
    let mut absent = pod.octets();
    absent[3] = 77;
    let absent = Ipv4Addr::from(absent);
    let peers = world.hosts[1].pods[0].address;
    for (arguments, said) in [
        (format!("{one} {pod}"), format!("no host leases the subnet of {one}")),
        (
            format!("{two} {peers}"),
            "run this on the host with the VTEP address 192.168.64.77, which sends it".to_owned(),
        ),
        (format!("{two} {three}"), format!("or on the host that has {three}, which no lease covers")),
        (format!("{absent} {peers}"), format!("knows no pod with {absent}")),
        (format!("nothing {pod}"), "\"nothing\" is neither an IPv4 address nor an interface".to_owned()),
        (format!("{pod} {peers} --vni 9"), "no dataplane of VNI 9 is pinned below".to_owned()),
    ] {
        let text = trace(&arguments);
        assert!(text.contains(&said), "{arguments}: {text}");
    }
    // It is run by root; anybody else is told what it takes.
    let command = world.agent_on(0);
    let mut as_nobody = world.hosts[0].netns.command("setpriv");
    as_nobody.args(["--reuid=65534", "--clear-groups", "--inh-caps=-all"]);
    as_nobody.args(command.get_args().skip_while(|argument| !argument.to_string_lossy().ends_with("flannel-agent")));
    as_nobody.args(["trace", &pod.to_string(), &peers.to_string()]);
    let text = refused(as_nobody);
    assert!(text.contains("CAP_BPF is missing") && text.contains("run it as root"), "{text}");
    // Of another build, which runs other instructions.
    let path = crate::world::agent();
    let other = path.with_file_name("flannel-agent-next-programs");
    let mut command = world.hosts[0].agent_command(&other);
    command.args(["trace", &pod.to_string(), &peers.to_string()]);
    let text = refused(command);
    assert!(text.contains("is another build's"), "{text}");
}

/// Frames to the first host, as its link and its lease want them.
struct Underlay {
    destination_mac: Mac,
    vtep_mac: Mac,
    peer_mac: Mac,
}

impl Underlay {
    fn of(world: &World) -> Self {
        let mac = |text: &str| -> Mac {
            let octets: Vec<u8> = text.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
            octets.try_into().unwrap()
        };
        let links = world.hosts[0].netns.ip_json("link show eth0").unwrap();
        let leased = |host: usize| {
            let value: Value = serde_json::from_str(&world.lease_of(host).1).unwrap();
            mac(value["BackendData"]["VtepMAC"].as_str().unwrap())
        };
        Self { destination_mac: mac(links[0]["address"].as_str().unwrap()), vtep_mac: leased(0), peer_mac: leased(1) }
    }

    fn around(&self, source: [u8; 4], packet: &[u8]) -> Vec<u8> {
        let inner = [&ethernet(self.peer_mac, self.vtep_mac, EtherType::IPV4), packet].concat();
        let tunnel = Tunnel { destination_mac: self.destination_mac, source, ..FROM_TWO };
        tunnel.around(&vxlan(8, 1), &inner)
    }
}
