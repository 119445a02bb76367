//! `flannel-agent capture`: each packet that the overlay carries is in the file, as tshark and tcpdump read it.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use xtask::{
    process::{Process, output},
    progress::{patience, wait_for},
    transfer::tcp_transfer,
};

use crate::{
    observers::Exchange,
    world::{SOON, World},
};

/// Datagrams each way.
const ROUNDS: u32 = 200;

/// A capture on the first host.
struct Capture {
    process: Process,
    file: PathBuf,
}

/// A packet of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    interface: String,
    /// Of IPv4, the outermost first.
    addresses: Vec<(String, String)>,
    /// As the file says it: 1 for received, 2 for sent.
    direction: u32,
    /// Nanoseconds since 1970.
    time: u128,
    captured: usize,
    len: usize,
}

impl Capture {
    /// Begins to capture into a file of that name.
    fn start(world: &World, name: &str, arguments: &str) -> Self {
        let file = world.lab.directory().join(format!("{name}.pcapng"));
        let mut command = world.agent_on(0);
        command.arg("capture").arg("-w").arg(&file).args(arguments.split_whitespace());
        let process = Process::start(&mut command, &file.with_extension("log")).unwrap();
        let waited = wait_for("the capture", SOON, || process.log().contains("capturing packets of"));
        assert!(waited.is_ok(), "{}", process.log());
        Self { process, file }
    }

    /// Has it end. What it said.
    fn end(self) -> (PathBuf, String) {
        self.process.signal(Signal::SIGINT).unwrap();
        self.ended()
    }

    /// Waits for its end.
    fn ended(mut self) -> (PathBuf, String) {
        let status = self.process.wait(SOON).unwrap();
        assert!(status.success(), "{status}: {}", self.process.log());
        (self.file, self.process.log())
    }
}

/// What tshark reads.
fn packets(file: &Path) -> Vec<Packet> {
    let fields = [
        "frame.interface_name",
        "ip.src",
        "ip.dst",
        "frame.packet_flags_direction",
        "frame.time_epoch",
        "frame.cap_len",
        "frame.len",
    ];
    let mut tshark = Command::new("tshark");
    tshark.args(["-d", "udp.port==8472,vxlan", "-T", "fields"]).args(fields.map(|field| ["-e", field]).as_flattened());
    let text = output(tshark.arg("-r").arg(file)).unwrap();
    let packet = |line: &str| {
        let columns: Vec<_> = line.split('\t').collect();
        let [interface, sources, destinations, direction, time, captured, len] = columns[..] else { panic!("{line}") };
        let (seconds, nanoseconds) = time.split_once('.').unwrap();
        let list = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let direction = direction.trim_start_matches("0x");
        Packet {
            interface: interface.to_owned(),
            addresses: list(sources).into_iter().zip(list(destinations)).collect(),
            direction: u32::from_str_radix(direction, 16).unwrap(),
            time: seconds.parse::<u128>().unwrap() * 1_000_000_000 + nanoseconds.parse::<u128>().unwrap(),
            captured: captured.parse().unwrap(),
            len: len.parse().unwrap(),
        }
    };
    text.lines().map(packet).collect()
}

fn exchange(world: &World) -> Exchange {
    Exchange::new(&world.hosts[0].pods[0], &world.hosts[1].pods[0])
}

/// Pods' addresses, as packets from the first host's have them.
fn pods(world: &World) -> (String, String) {
    let [one, two] = [0, 1].map(|host| world.hosts[host].pods[0].address.to_string());
    (one, two)
}

/// How many packets there are on an interface, received and sent.
fn by_direction(packets: &[Packet], interface: &str) -> [usize; 2] {
    [1, 2].map(|direction| {
        packets.iter().filter(|packet| packet.interface == interface && packet.direction == direction).count()
    })
}

/// That each packet of the exchange is there both ways, outer and inner, one behind the other.
fn assert_all_tunnelled(world: &World, packets: &[Packet], what: &str) {
    let each = ROUNDS as usize;
    for interface in ["eth0", "flannel.1"] {
        assert_eq!(by_direction(packets, interface), [each, each], "{what}, {interface}");
    }
    let (one, two) = pods(world);
    for pair in packets.chunks(2) {
        let [outer, inner] = pair else { panic!("{what}: {pair:?}") };
        let interfaces = [&outer.interface, &inner.interface];
        assert_eq!(
            (interfaces, outer.direction, outer.time),
            (["eth0", "flannel.1"].map(|name| name.to_owned()).each_ref(), inner.direction, inner.time),
            "{what}"
        );
        let turned = |(from, to): (&str, &str)| {
            let (from, to) = if inner.direction == 2 { (from, to) } else { (to, from) };
            (from.to_owned(), to.to_owned())
        };
        let expected = [("192.168.64.1", "192.168.64.2"), (one.as_str(), two.as_str())].map(turned);
        assert_eq!(outer.addresses, expected, "{what}");
        assert_eq!(inner.addresses, expected[1..], "{what}");
        assert_eq!((inner.len, outer.len - inner.len, outer.captured), (46, 50, outer.len), "{what}");
    }
}

/// The captures that an agent makes way for.
fn captures(status: &serde_json::Value) -> Vec<&str> {
    let all = status["bypass"]["restrictions"].as_array().unwrap().iter();
    let captures = all.filter(|restriction| restriction["kind"] == "capture");
    captures.map(|restriction| restriction["subject"].as_str().unwrap()).collect()
}

#[test]
fn each_packet_is_in_the_file_through_the_stack_past_it_and_by_xdp() {
    for arguments in [&["--bypass=off"][..], &[], &["--xdp=generic"]] {
        let what = format!("{arguments:?}");
        let (is_bypassed, has_xdp) = (!arguments.contains(&"--bypass=off"), arguments.contains(&"--xdp=generic"));
        let world = World::new(2).ready(arguments);
        world.wait_connected(0, 1);
        let exchange = exchange(&world);
        if is_bypassed {
            exchange.wait_bypassed(&world, 0);
        }
        // All the while, so that the agent has found one when that starts whose packets are counted.
        let first = Capture::start(&world, "first", "--udp --port 7777 --seconds 120");
        if has_xdp {
            world.wait_status(0, "the capture", |status| captures(status) == ["packet socket on eth0"]);
        } else if is_bypassed {
            // One that does restrict is found meanwhile: this one has been looked at by then.
            let log = world.lab.directory().join("tcpdump");
            let mut tcpdump = world.hosts[0].netns.command("tcpdump");
            let tcpdump = Process::start(tcpdump.args(["-Z", "root", "-i", "pod1", "-w", "/dev/null"]), &log).unwrap();
            world.wait_status(0, "tcpdump", |status| captures(status) == ["packet socket on pod1"]);
            drop(tcpdump);
            world.wait_status(0, "no tcpdump", |status| captures(status).is_empty());
        }
        // A flow that was left to the stack meanwhile is noted again.
        if is_bypassed {
            exchange.wait_bypassed(&world, 0);
        }
        let capture = Capture::start(&world, "counted", "--udp --port 7777");
        let counts = || ["pod_encapsulated", "delivered"].map(|label| world.counter(0, label));
        let before = counts();
        exchange.times(ROUNDS);
        let bypassed = counts().iter().zip(before).map(|(now, before)| now - before).min().unwrap();
        // On a slow machine, one or two of a second take the stack.
        assert_eq!(bypassed > u64::from(ROUNDS) / 2, is_bypassed, "{what}: {bypassed}");
        let (file, said) = capture.end();
        first.end();
        let expected = "400 packets captured (200 received, 200 sent), 0 dropped by the kernel;";
        assert!(said.contains(expected) && said.contains("ended by a signal"), "{what}: {said}");
        assert!(!said.contains("XDP"), "{what}: {said}");
        assert_all_tunnelled(&world, &packets(&file), &what);
        if has_xdp {
            check_without_agent(world, &exchange);
        }
    }
}

/// The programs go on without the agent, which would have XDP leave packets in their tunnel.
fn check_without_agent(mut world: World, exchange: &Exchange) {
    // It has XDP take them out again.
    world.wait_status(0, "no capture", |status| captures(status).is_empty());
    exchange.wait_bypassed(&world, 0);
    world.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGKILL).unwrap();
    world.hosts[0].agent = None;
    let capture = Capture::start(&world, "alone", "--udp");
    let before = ["pod_encapsulated", "xdp_decapsulated"].map(|label| world.counter(0, label));
    exchange.times(ROUNDS);
    for (label, before) in ["pod_encapsulated", "xdp_decapsulated"].into_iter().zip(before) {
        assert!(world.counter(0, label) > before + 100, "{label}");
    }
    let (file, said) = capture.end();
    assert!(said.contains("400 packets captured (200 received, 200 sent), 0 dropped by the kernel"), "{said}");
    assert!(said.contains("of 200 packets there is only the inner one, since XDP"), "{said}");
    let packets = packets(&file);
    let each = ROUNDS as usize;
    assert_eq!([by_direction(&packets, "eth0"), by_direction(&packets, "flannel.1")], [[0, each], [each, each]]);
    let comments = output(Command::new("tshark").args(["-Y", "frame.comment contains XDP", "-r"]).arg(&file)).unwrap();
    assert_eq!(comments.lines().count(), each);
}

#[test]
fn it_ends_at_the_first_bound_with_a_whole_file() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let traffic = world.traffic(0, 1);
    let ended = |name: &str, arguments: &str| {
        let (file, said) = Capture::start(&world, name, arguments).ended();
        // Whole: tshark warns of a packet that is cut short by the file's end.
        let read = Command::new("tshark").arg("-r").arg(&file).output().unwrap();
        let warned = String::from_utf8_lossy(&read.stderr).into_owned();
        assert!(read.status.success() && !warned.contains("cut short"), "{name}: {warned}");
        (file, said)
    };
    let (file, said) = ended("packets", "--packets 10");
    assert!(said.contains("10 packets captured") && said.contains("ended by --packets 10"), "{said}");
    assert_eq!(packets(&file).len(), 20);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    let (file, said) = ended("size", "--size 8192");
    assert!(said.contains("ended by --size 8192"), "{said}");
    let size = fs::metadata(&file).unwrap().len();
    assert!((7_500..=8192).contains(&size), "{size}");

    let begun = Instant::now();
    let (file, said) = ended("seconds", "--seconds 1 --snaplen 60 --only inner");
    assert!(said.contains("ended by --seconds 1"), "{said}");
    assert!((Duration::from_secs(1)..Duration::from_secs(6) * patience()).contains(&begun.elapsed()));
    let packets_of = packets(&file);
    assert!(!packets_of.is_empty() && packets_of.iter().all(|packet| packet.interface == "flannel.1"), "{said}");
    assert!(packets_of.iter().all(|packet| (packet.captured, packet.len) == (60, 98)), "{packets_of:?}");

    let capture = Capture::start(&world, "terminated", "--only outer");
    wait_for("packets", SOON, || fs::metadata(&capture.file).unwrap().len() > 1000).unwrap();
    capture.process.signal(Signal::SIGTERM).unwrap();
    let (file, said) = capture.ended();
    assert!(said.contains("ended by a signal"), "{said}");
    assert!(packets(&file).iter().all(|packet| packet.interface == "eth0"));
    traffic.assert_nothing_was_lost();

    // What is there stays as it is.
    let before = fs::read(&file).unwrap();
    let refused = world.agent_on(0).args(["capture", "-w"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("is there already: name another file"), "{said}");
    assert_eq!(fs::read(&file).unwrap(), before);

    // Of what the kernel is still to segment, whole packets; and a reader that has stopped to read is not waited for.
    let capture = Capture::start(&world, "large", "--tcp --packets 200");
    let mut stalled = world.agent_on(0);
    stalled.args(["capture", "-w", "-", "--seconds", "120"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut stalled = stalled.spawn().unwrap();
    let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    assert!(tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap().is_flowing());
    let (file, said) = capture.ended();
    let inner: Vec<_> = packets(&file).into_iter().filter(|packet| packet.interface == "flannel.1").collect();
    assert!(inner.iter().any(|packet| packet.len > 10_000 && packet.captured == packet.len), "{said}");
    kill(Pid::from_raw(stalled.id() as i32), Signal::SIGTERM).unwrap();
    wait_for("the stalled one", SOON, || stalled.try_wait().unwrap().is_some()).unwrap();
    let stalled = stalled.wait_with_output().unwrap();
    let ended = String::from_utf8_lossy(&stalled.stderr).into_owned();
    assert_eq!(stalled.status.code(), Some(1), "{ended}");
    assert!(ended.contains("nobody reads the standard output"), "{ended}");
    let malformed = output(Command::new("tshark").args(["-Y", "_ws.malformed", "-r"]).arg(&file)).unwrap();
    assert_eq!(malformed, "", "{said}");
}

#[test]
fn a_filter_takes_what_it_says_and_the_end_says_what_it_did_not_match() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let (exchange, traffic) = (exchange(&world), world.traffic(0, 1));
    let ((one, two), subnet) = (pods(&world), world.lease_of(1).0.replace('-', "/"));
    let started = [
        ("port", "--udp --port 7777".to_owned(), Some(true)),
        ("pair", format!("--udp --host {two} --host {one}"), Some(true)),
        ("prefix", format!("--udp --host {subnet}"), Some(true)),
        ("vtep", "--udp --peer 192.168.64.2".to_owned(), Some(true)),
        ("subnet", format!("--udp --peer {subnet}"), Some(true)),
        ("icmp", format!("--icmp --host {one}"), Some(false)),
        ("tcp", "--tcp".to_owned(), None),
        ("other port", "--udp --port 7778".to_owned(), None),
        ("half a pair", format!("--host {one} --host 10.5.1.1"), None),
        ("service", "--host 10.96.0.1".to_owned(), None),
        ("nobody", "--peer 192.168.64.77".to_owned(), None),
        ("others", "--host 10.5.1.1 --host 10.5.1.2".to_owned(), None),
    ];
    let started = started
        .map(|(name, arguments, is_udp)| (name, Capture::start(&world, &name.replace(' ', "-"), &arguments), is_udp));
    exchange.times(20);
    for (name, capture, is_udp) in started {
        let (file, said) = capture.end();
        let packets = if is_udp.is_some() { packets(&file) } else { Vec::new() };
        match is_udp {
            Some(true) => assert_eq!(by_direction(&packets, "flannel.1"), [20, 20], "{name}: {said}"),
            Some(false) => {
                let is_ping = |packet: &&Packet| packet.interface == "flannel.1" && packet.len == 98;
                assert_eq!(packets.iter().filter(is_ping).count() * 2, packets.len(), "{name}: {said}");
                assert!(!packets.is_empty(), "{name}: {said}");
            }
            None => {
                let listed = output(Command::new("tcpdump").arg("-nr").arg(&file)).unwrap();
                assert_eq!(listed, "", "{name}: {said}");
                assert!(said.contains("0 packets captured (0 received, 0 sent)"), "{name}: {said}");
                assert!(
                    said.contains(" other packets of the overlay passed, which the filter does not match"),
                    "{said}"
                );
            }
        }
        match name {
            "service" => assert!(said.contains("10.96.0.1/32 is not in the Network 10.5.0.0/16"), "{said}"),
            "nobody" => assert!(said.contains("no peer of flannel.1 is 192.168.64.77 by now"), "{said}"),
            "others" => assert!(said.contains("do not pass this host, which leases 10.5."), "{said}"),
            _ => {}
        }
    }
    traffic.assert_nothing_was_lost();
}

#[test]
fn it_writes_to_a_pipe_and_needs_one_capability_only() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let traffic = world.traffic(0, 1);
    fs::set_permissions(world.lab.directory(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = world.lab.directory().join("flannel-agent");
    fs::copy(crate::world::agent(), &binary).unwrap();
    let command = format!(
        "{} --run-dir {} --bpf-pin-dir {} capture",
        binary.display(),
        world.hosts[0].run_dir().display(),
        world.hosts[0].pin_dir().display()
    );
    let run = |capabilities: &str, line: &str| {
        let mut setpriv = world.hosts[0].netns.command("setpriv");
        setpriv.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        setpriv.args(["--inh-caps", capabilities, "--ambient-caps", capabilities, "--bounding-set", capabilities]);
        setpriv.args(["sh", "-c", line]).output().unwrap()
    };
    let piped = run("-all,+net_raw", &format!("{command} -w - --packets 5 --icmp --peer 192.168.64.2 | tcpdump -nr -"));
    let (listed, said) = (String::from_utf8_lossy(&piped.stdout), String::from_utf8_lossy(&piped.stderr));
    assert!(piped.status.success() && said.contains("5 packets captured"), "{said}");
    let (one, two) = pods(&world);
    let is_outer = |line: &&str| [1, 2].iter().any(|host| line.contains(&format!("> 192.168.64.{host}.8472: ")));
    assert_eq!(listed.lines().filter(is_outer).count(), 5, "{listed}{said}");
    let echoes = listed.lines().filter(|line| line.contains(&one) && line.contains(&two) && line.contains("ICMP echo"));
    assert_eq!(echoes.count(), 10, "{listed}{said}");

    let shown = world.lab.directory().join("overlay.pcapng");
    world.assert_shown(0, "packets captured", &[("10.5.2.7", &two), ("overlay.pcapng", &shown.to_string_lossy())]);

    let refused = run("-all", &format!("{command} -w refused.pcapng"));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("CAP_NET_RAW is missing: capture opens packet sockets"), "{said}");
    assert!(!Path::new("refused.pcapng").exists());
    traffic.assert_nothing_was_lost();
}

#[test]
fn packets_without_a_tunnel_and_of_the_backend_udp_are_captured() {
    for (backend, inner) in [
        (r#"{"Type": "host-gw"}"#, None),
        (r#"{"Type": "vxlan", "DirectRouting": true}"#, None),
        (r#"{"Type": "udp"}"#, Some("flannel0")),
    ] {
        let world = World::with_backend(2, backend).with_ready_agents(&[]);
        let mut world = world;
        for host in &mut world.hosts {
            host.add_pod().unwrap();
        }
        world.wait_connected(0, 1);
        let exchange = exchange(&world);
        let capture = Capture::start(&world, "direct", "--udp --port 7777");
        exchange.times(ROUNDS);
        let (file, said) = capture.end();
        assert!(said.contains("400 packets captured (200 received, 200 sent), 0 dropped"), "{backend}: {said}");
        let packets = packets(&file);
        let each = ROUNDS as usize;
        assert_eq!(by_direction(&packets, "eth0"), [each, each], "{backend}");
        assert_eq!(packets.len(), if inner.is_some() { 4 * each } else { 2 * each }, "{backend}");
        let (one, two) = pods(&world);
        let interface = inner.unwrap_or("eth0");
        let shown = packets.iter().filter(|packet| packet.interface == interface);
        let expected = |packet: &Packet| {
            let addresses = (one.clone(), two.clone());
            [if packet.direction == 2 { addresses } else { (addresses.1, addresses.0) }]
        };
        assert!(shown.into_iter().all(|packet| packet.addresses == expected(packet)), "{backend}: {packets:#?}");
    }
}
