//! Flows whose connection or pod has ended: they leave the bypass with it.

use std::{
    io::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use flannel_agent::dataplane::{
    Forgetter, Left, PinDirectory, pinned_counters,
    test_run::{TestRuns, insert_pinned_flows},
};
use flannel_common::{
    ended::Selection,
    event::Event,
    flow::{Egress, Flow, FlowKey, Ingress},
    vxlan::Vni,
};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use nix::time::{ClockId, clock_gettime};
use xtask::{
    lab::{Netns, Pod, services::ServiceRules},
    process::output,
    progress::{patience, wait_for},
};

use crate::{
    calls::SERVER_PORT,
    loaded::with_notes,
    overlays::Overlay,
    services::{SERVICE, service},
    sockets::socket_in,
    world::{SOON, World, is_answered},
};

type End = ([u8; 4], u16);

const CLIENT: End = ([10, 5, 1, 2], 40000);
const VIRTUAL: End = ([10, 96, 0, 10], 53);
const SERVER: End = ([10, 5, 2, 2], 5353);
const MASQUERADED: End = ([10, 5, 1, 0], 61234);
const LOCAL_SERVER: End = ([10, 5, 1, 3], 5353);

/// The group of conntrack's ends, as a bit.
const DESTROY: u32 = 1 << 2;

fn key(protocol: u32, local: End, remote: End) -> FlowKey {
    FlowKey {
        local: local.0,
        remote: remote.0,
        local_port: local.1.to_be_bytes(),
        remote_port: remote.1.to_be_bytes(),
        protocol,
    }
}

fn run(line: &str) {
    let mut words = line.split_whitespace();
    output(Command::new(words.next().unwrap()).args(words)).unwrap();
}

/// A socket for the ends of connections in the thread's namespace, with the programs' filter.
fn listen(forgetter: &Forgetter) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter).unwrap();
    forgetter.listen(socket.try_clone().unwrap()).unwrap();
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, DESTROY)).unwrap();
    socket
}

/// How many messages there are to read.
fn messages(socket: &OwnedFd) -> usize {
    (0..).take_while(|_| recv(socket.as_raw_fd(), &mut [0; 16], MsgFlags::empty()).is_ok()).count()
}

fn insert(programs: &mut TestRuns, keys: &[FlowKey], veth: u32) {
    let released = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap()).as_nanos() as u64;
    for key in keys {
        let egress = Egress { released, sent_as: *key, ..Egress::default() };
        let ingress = Ingress { released, received_as: *key, veth, pod_mac: [2; 6], gateway_mac: [2; 6] };
        programs.insert_flow(&Flow { egress, ingress, ..Flow::new(*key) }).unwrap();
    }
}

fn flows(programs: &TestRuns) -> Vec<FlowKey> {
    let mut flows = programs.flows().unwrap();
    flows.sort_by_key(|key| (key.local, key.local_port, key.remote, key.remote_port, key.protocol));
    flows
}

/// Who asks, whom, who answers and to whom; and the names of the flow on this host, before the stack and behind it.
type Connection = (&'static str, [End; 4], &'static [(End, End)]);

const CONNECTIONS: [Connection; 5] = [
    ("of a pod", [CLIENT, SERVER, SERVER, CLIENT], &[(CLIENT, SERVER)]),
    ("to a pod", [SERVER, CLIENT, CLIENT, SERVER], &[(CLIENT, SERVER)]),
    ("to a service", [CLIENT, VIRTUAL, SERVER, CLIENT], &[(CLIENT, VIRTUAL), (CLIENT, SERVER)]),
    ("to one, masqueraded", [CLIENT, VIRTUAL, SERVER, MASQUERADED], &[(CLIENT, VIRTUAL), (MASQUERADED, SERVER)]),
    (
        "to a pod by another's address",
        [SERVER, CLIENT, LOCAL_SERVER, SERVER],
        &[(CLIENT, SERVER), (LOCAL_SERVER, SERVER)],
    ),
];

#[test]
fn what_conntrack_gives_up_is_forgotten_under_all_its_names() {
    with_notes(|programs, _| {
        let forgetter = programs.forgetter();
        let _socket = listen(&forgetter);
        let other = [key(17, CLIENT, ([10, 5, 2, 2], 5354))];
        insert(programs, &other, 1);
        for (what, [from, to, by, back], names) in CONNECTIONS {
            for (name, protocol, state) in [("udp", 17, ""), ("tcp", 6, "--state ESTABLISHED")] {
                let what = format!("{name} {what}");
                let entry = |from: End, to: End| (Ipv4Addr::from(from.0), from.1, Ipv4Addr::from(to.0), to.1);
                let ((a, ap, b, bp), (c, cp, d, dp)) = (entry(from, to), entry(by, back));
                run(&format!(
                    "conntrack -I -p {name} -s {a} -d {b} --sport {ap} --dport {bp} --reply-src {c} --reply-dst {d} \
                     --reply-port-src {cp} --reply-port-dst {dp} -t 100 {state}"
                ));
                let names: Vec<_> = names.iter().map(|(local, remote)| key(protocol, *local, *remote)).collect();
                insert(programs, &names, 1);
                // The same with the other protocol is another flow.
                let others: Vec<_> = names.iter().map(|name| FlowKey { protocol: 23 - protocol, ..*name }).collect();
                insert(programs, &others, 1);
                assert_eq!(flows(programs).len(), 2 * names.len() + 1, "{what}");
                run(&format!("conntrack -D -p {name} -s {a} -d {b}"));
                // By then: there is nothing to be waited for.
                let left = flows(programs);
                assert!(names.iter().all(|name| !left.contains(name)), "{what}: {left:?}");
                assert_eq!(left.len(), names.len() + 1, "{what}: {left:?}");
                for other in others {
                    programs.forget_flow(&other).unwrap();
                }
            }
        }
        assert_eq!(flows(programs), other);
    });
}

/// A packet that conntrack let through before, and that is noted after.
#[test]
fn what_is_noted_of_a_connection_after_its_end_is_forgotten_too() {
    const CONNECTIONS: u16 = 1500;
    with_notes(|programs, _| {
        let forgetter = programs.forgetter();
        let socket = listen(&forgetter);
        let mut commands = String::new();
        for port in 1..=CONNECTIONS {
            commands += &format!("-I -p udp -s 10.5.1.2 -d 10.5.2.2 --sport {port} --dport 53 -t 100\n");
        }
        run_lines(&commands);
        let names: Vec<_> = (1..=CONNECTIONS).map(|port| key(17, ([10, 5, 1, 2], port), ([10, 5, 2, 2], 53))).collect();
        insert(programs, &names, 1);
        assert_eq!(messages(&socket), 0, "before any has ended");
        run("conntrack -F");
        assert_eq!(flows(programs), []);
        insert(programs, &names, 1);
        // One of so many, or a few.
        let told = messages(&socket);
        assert!(told > 0 && told < 100, "{told}");
        wait_for("the rest", SOON, || forgetter.again().unwrap() == Left::Nothing).unwrap();
        assert_eq!(flows(programs), []);
        // And nothing more of that is left.
        insert(programs, &names[..1], 1);
        assert_eq!(forgetter.again().unwrap(), Left::Nothing);
        assert_eq!(flows(programs), names[..1]);
    });
}

/// Runs lines of `conntrack`'s.
fn run_lines(lines: &str) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(lines.as_bytes()).unwrap();
    output(Command::new("conntrack").arg("-R").arg(file.path())).unwrap();
}

#[test]
fn flows_into_veths_that_are_gone_are_forgotten_whatever_their_number() {
    with_notes(|programs, _| {
        let forgetter = programs.forgetter();
        let name = |veth: u32, port: u16| key(17, ([10, 5, 1, veth as u8], port), SERVER);
        let veths = 2 * Selection::VETHS as u32 + 4;
        for veth in 0..veths {
            let names: Vec<_> = (0..100).map(|port| name(veth, port)).collect();
            insert(programs, &names, veth);
        }
        // Those of which nothing came in are of no veth, and go with any.
        assert_eq!(forgetter.links_are_gone(&[5]).unwrap(), 0, "no pod's");
        forgetter.set_pods(0..veths, &[]).unwrap();
        let gone: Vec<_> = (1..veths).filter(|veth| veth % 2 == 1).collect();
        assert_eq!(forgetter.links_are_gone(&gone).unwrap() as usize, 100 * (gone.len() + 1));
        assert_eq!(flows(programs).len(), 100 * (veths as usize - gone.len() - 1));
        assert!(flows(programs).iter().all(|key| key.local[3] % 2 == 0 && key.local[3] != 0));
        assert_eq!(forgetter.links_are_gone(&gone).unwrap(), 0, "once");
        assert_eq!(forgetter.everything().unwrap() as usize, 100 * (veths as usize - gone.len() - 1));
        assert_eq!(flows(programs), []);
    });
}

/// Numbered datagrams, two thousand in a second, and who got each.
struct Timed {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    sender: thread::JoinHandle<Vec<Instant>>,
    receivers: Vec<thread::JoinHandle<Vec<u32>>>,
}

impl Timed {
    const RATE: u32 = 2000;

    fn start(from: &Pod, asked: SocketAddrV4, receivers: &[&Pod]) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let receivers = receivers.iter().map(|pod| {
            let socket = socket_in(&pod.netns, SocketAddrV4::new(pod.address, SERVER_PORT));
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
            thread::spawn(move || {
                let (mut numbers, mut number) = (Vec::new(), [0; 4]);
                loop {
                    match socket.recv(&mut number) {
                        Ok(_) => {
                            numbers.push(u32::from_be_bytes(number));
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(_) if stop.load(Ordering::Relaxed) => return numbers,
                        Err(_) => {}
                    }
                }
            })
        });
        let receivers = receivers.collect();
        let socket = socket_in(&from.netns, SocketAddrV4::new(from.address, SERVER_PORT));
        let sender = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let begun = Instant::now();
                let mut sent = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let due = begun + sent.len() as u32 * Duration::from_secs(1) / Self::RATE;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    let number = (sent.len() as u32).to_be_bytes();
                    sent.push(Instant::now());
                    // Refused where nobody is there; that is a number less that arrives.
                    let _refused = socket.send_to(&number, asked);
                }
                sent
            }
        });
        Self { stop, count, sender, receivers }
    }

    /// Waits until so many more have come.
    fn wait_for_more(&self, datagrams: usize) {
        let before = self.count.load(Ordering::Relaxed);
        wait_for("datagrams", SOON, || self.count.load(Ordering::Relaxed) > before + datagrams).unwrap();
    }

    /// Ends it. When each was sent, and which receiver got it.
    fn end(self) -> Vec<(Instant, Option<usize>)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all: Vec<_> = self.sender.join().unwrap().into_iter().map(|sent| (sent, None)).collect();
        for (receiver, numbers) in self.receivers.into_iter().enumerate() {
            for number in numbers.join().unwrap() {
                all[number as usize].1 = Some(receiver);
            }
        }
        all
    }
}

/// As kube-proxy has it when an endpoint goes: other rules, and an end to the connections with it. Its pod goes then.
#[test]
fn datagrams_to_a_service_whose_endpoint_goes_are_lost_no_more_than_with_flannel() {
    for overlay in [Overlay::Kernel, Overlay::Slow, Overlay::Fast] {
        let world = overlay.world();
        let (client, [first, second]) = (&world.hosts[0].pods[0], &world.hosts[1].pods[..]) else { panic!("two pods") };
        let rules = ServiceRules::Nftables;
        let (mut lost, most) = (Vec::new(), 5 * patience() as usize);
        for (ended, [old, new]) in
            [("conntrack -F", [first, second]), ("conntrack -D -p udp --dst-nat", [second, first])]
        {
            let what = format!("{overlay:?}, {ended}");
            rules.set(&world.hosts[0], &service(SERVICE, &[old])).unwrap();
            world.hosts[0].netns.exec("conntrack -F").unwrap();
            let bypassed = || match overlay {
                Overlay::Fast => world.counter(0, "pod_translated"),
                Overlay::Slow | Overlay::Kernel => 0,
            };
            let before = bypassed();
            let stream = Timed::start(client, SERVICE, &[old, new]);
            if overlay == Overlay::Fast {
                wait_for("the bypass", SOON, || bypassed() > before + 500).unwrap();
            } else {
                stream.wait_for_more(500);
            }
            rules.replace(&world.hosts[0], &service(SERVICE, &[new])).unwrap();
            let line = if ended.ends_with("nat") { format!("{ended} {}", old.address) } else { ended.to_owned() };
            world.hosts[0].netns.exec(&line).unwrap();
            let end = Instant::now();
            if old.address == second.address {
                world.hosts[1].netns.ip("link delete pod2").unwrap();
            }
            let before = bypassed();
            if overlay == Overlay::Fast {
                wait_for("the bypass again", SOON, || bypassed() > before + 500).unwrap();
            } else {
                stream.wait_for_more(500);
            }
            let all = stream.end();
            let is_late = |(sent, got): &&(Instant, Option<usize>)| *sent > end && *got != Some(1);
            let late: Vec<_> = all.iter().filter(is_late).map(|(sent, got)| (*sent - end, *got)).collect();
            lost.push(all.iter().filter(|(_, got)| got.is_none()).count());
            println!(
                "{what}: of {} sent, {:?} lost; after the end to the old one or lost: {late:?}",
                all.len(),
                lost.last()
            );
            // What the stack had let through by then may still be on its way.
            let within = Duration::from_millis(20) * patience();
            assert!(late.iter().all(|(after, _)| *after < within), "{what}: {late:?}");
            assert!(late.len() < most, "{what}: {late:?}");
        }
        assert!(lost.iter().all(|lost| *lost < most), "{overlay:?}: {lost:?}");
    }
}

#[test]
fn a_pods_flows_leave_the_bypass_with_its_veth() {
    let world = Overlay::Fast.world();
    let [client, server] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let pins = PinDirectory::new(world.hosts[1].pin_dir(), Vni::new_checked(1).unwrap());
    let counter = |event: Event| {
        let counters = pinned_counters(&pins).unwrap();
        counters.iter().find(|(of, _)| *of == event).unwrap().1.packets
    };
    let stream = Timed::start(client, SocketAddrV4::new(server.address, SERVER_PORT), &[server]);
    wait_for("the bypass", SOON, || counter(Event::Delivered) > 500).unwrap();
    world.hosts[1].netns.ip("link delete pod1").unwrap();
    let (gone, delivered) = (Instant::now(), counter(Event::Delivered));
    let admitted = counter(Event::HandedIn);
    wait_for("the stack", SOON, || counter(Event::HandedIn) > admitted + 200).unwrap();
    let (after, took) = (counter(Event::Delivered) - delivered, gone.elapsed());
    println!("{after} datagrams past the stack after the veth was gone, and 200 through it by {took:?}");
    // Of two thousand in the second that it would have had.
    assert!(after < 400, "{after}");
    stream.end();
}

/// By an interface that is made with the number of one that is gone, as a runtime may do that restores a container.
#[test]
fn a_link_with_the_number_of_one_that_is_gone_is_another() {
    let mut world = Overlay::Fast.world();
    let client = world.hosts[0].pods[0].address;
    let host = &mut world.hosts[1];
    let index = host.netns.ip_json("link show pod1").unwrap()[0]["ifindex"].as_u64().unwrap();
    host.netns.ip("link delete pod1").unwrap();
    let pod = &host.pods[0];
    let names = format!("name pod1 index {index} type veth peer name eth0 netns {}", pod.netns.name());
    host.netns.ip(&format!("link add {names}")).unwrap();
    host.netns.ip("link set pod1 master cni0 up").unwrap();
    let subnet = host.subnet().unwrap();
    pod.netns.ip(&format!("address add {}/{} dev eth0", pod.address, subnet.len)).unwrap();
    pod.netns.ip(&format!("link set eth0 mtu {} up", subnet.mtu)).unwrap();
    pod.netns.ip(&format!("route add default via {}", subnet.gateway)).unwrap();
    wait_for("the pod", SOON, || is_answered(&pod.netns, &client.to_string())).unwrap();
    let stream = Timed::start(
        &world.hosts[0].pods[0],
        SocketAddrV4::new(world.hosts[1].pods[0].address, SERVER_PORT),
        &[&world.hosts[1].pods[0]],
    );
    let delivered = world.counter(1, "delivered");
    wait_for("the bypass", SOON, || world.counter(1, "delivered") > delivered + 500).unwrap();
    stream.end();
}

/// A socket that hears of links of a host.
fn hear_of_links(host: &Netns) -> OwnedFd {
    const LINK: u32 = 1;
    let open = || {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        let socket = socket.unwrap();
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, LINK)).unwrap();
        socket
    };
    host.within(open).unwrap()
}

/// Waits until the kernel tells that a link is gone.
fn wait_gone(socket: &OwnedFd, index: u32) {
    const DELETED_LINK: [u8; 2] = 17_u16.to_ne_bytes();
    let mut message = [0; 1 << 15];
    loop {
        let length = recv(socket.as_raw_fd(), &mut message, MsgFlags::empty()).unwrap();
        let is_of_all_families = message[16] == 0;
        if length > 24 && message[4..6] == DELETED_LINK && is_of_all_families && message[20..24] == index.to_ne_bytes()
        {
            return;
        }
    }
}

/// Many flows, half of them of the pod that goes: however long it takes to forget them.
#[test]
fn no_flow_is_delivered_to_a_veth_that_is_gone_for_longer_than_20_ms() {
    const ROUNDS: usize = 20;
    const FLOWS: u32 = 60_000;
    let mut world = Overlay::Fast.world();
    for _ in 0..ROUNDS {
        world.hosts[1].add_pod().unwrap();
    }
    world.wait_pods(1);
    let host = &world.hosts[1];
    let pins = PinDirectory::new(host.pin_dir(), Vni::new_checked(1).unwrap());
    let counter = |event: Event| {
        let counters = pinned_counters(&pins).unwrap();
        counters.iter().find(|(of, _)| *of == event).unwrap().1.packets
    };
    let index = |name: &str| host.netns.ip_json(&format!("link show {name}")).unwrap()[0]["ifindex"].as_u64().unwrap();
    let of_others = index("pod1") as u32;
    let links = hear_of_links(&host.netns);
    let mut all = Vec::new();
    for (number, server) in (1..).zip(&host.pods).skip(2) {
        let name = format!("pod{number}");
        let going = index(&name) as u32;
        let stream = Timed::start(&world.hosts[0].pods[0], SocketAddrV4::new(server.address, SERVER_PORT), &[server]);
        let delivered = counter(Event::Delivered);
        wait_for("the bypass", SOON, || counter(Event::Delivered) > delivered + 100).unwrap();
        let released = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap()).as_nanos() as u64;
        let flows = (0..FLOWS).map(|flow| {
            let key = key(17, ([10, 9, 1, (flow >> 14) as u8], flow as u16), SERVER);
            let veth = if flow % 2 == 0 { going } else { of_others };
            let ingress = Ingress { released, received_as: key, veth, pod_mac: [2; 6], gateway_mac: [2; 6] };
            Flow { ingress, ..Flow::new(key) }
        });
        insert_pinned_flows(&pins, flows).unwrap();
        let delivered = counter(Event::Delivered);
        wait_for("the bypass", SOON, || counter(Event::Delivered) > delivered + 20).unwrap();
        let (mut last, gone) = thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                wait_gone(&links, going);
                (counter(Event::Delivered), Instant::now())
            });
            host.netns.ip(&format!("link delete {name}")).unwrap();
            waiting.join().unwrap()
        });
        let (before, admitted, mut took) = (last, counter(Event::HandedIn), Duration::ZERO);
        while counter(Event::HandedIn) < admitted + 100 {
            let now = counter(Event::Delivered);
            if now != last {
                (last, took) = (now, gone.elapsed());
            }
            assert!(gone.elapsed() < SOON, "round {number}: {took:?}");
        }
        all.push((took, last - before));
        stream.end();
    }
    println!("for how long, and how many datagrams: {all:?}");
    assert!(all.iter().all(|(took, _)| *took < Duration::from_millis(20) * patience()), "{all:?}");
}

#[test]
fn status_tells_whether_ends_are_seen() {
    let world = World::new(1).ready(&[]);
    let ends = |status: &serde_json::Value| status["bypass"]["ends"].clone();
    world.wait_status(0, "ends to be seen", |status| {
        ends(status)["since"].as_u64() > Some(0) && ends(status)["problem"].is_null() && ends(status)["lost"] == 0
    });
    let host = &world.hosts[0].netns;
    host.exec("sysctl -qw net.netfilter.nf_conntrack_events=0").unwrap();
    world.wait_status(0, "the problem", |status| {
        ends(status)["problem"].as_str().is_some_and(|problem| problem.starts_with("nf_conntrack_events is 0"))
    });
    host.exec("sysctl -qw net.netfilter.nf_conntrack_events=2").unwrap();
    world.wait_status(0, "no problem", |status| ends(status)["problem"].is_null());
}
