//! Packets taken out of the tunnel by XDP: one table of frames, sent over the wire, with the same results in each mode.

use std::{collections::BTreeMap, os::fd::AsRawFd as _, time::Duration};

use flannel_agent::dataplane::{Hook, XdpMode};
use flannel_common::event::Event;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use xtask::{lab::Netns, progress::wait_for, transfer::tcp_transfer};

use crate::{
    admission,
    fast_path::{flow_of, one_hop_on},
    frames::*,
    loaded::{Loaded, enter, with_programs},
    short_frames::send,
    world::{SOON, World},
};

const MODES: [Option<XdpMode>; 3] = [None, Some(XdpMode::Native), Some(XdpMode::Generic)];

/// All that is received on one device of a namespace.
pub struct Capture {
    socket: std::os::fd::OwnedFd,
    ifindex: usize,
}

impl Capture {
    pub fn on(netns: &Netns, device: &str) -> Self {
        let path = format!("/run/netns/{}", netns.name());
        let ifindex = index_of(netns, device) as usize;
        let opened = std::thread::spawn(move || {
            enter(path.as_ref());
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, SockProtocol::EthAll).unwrap()
        });
        let socket = opened.join().unwrap();
        setsockopt(&socket, sockopt::RcvBuf, &(1 << 20)).unwrap();
        Self { socket, ifindex }
    }

    /// The IPv4 frames that came in until one that ends as `last` does, without that.
    pub fn until(&self, what: &str, last: &[u8]) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = [0; 4096];
        wait_for(what, SOON, || {
            while let Ok((len, Some(from))) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                let frame = &buffer[..len];
                // What the device sends is seen as well.
                if from.ifindex() != self.ifindex || frame.get(12..14) != Some(&[8, 0]) {
                    continue;
                }
                if frame.ends_with(last) {
                    return true;
                }
                frames.push(frame.to_vec());
            }
            false
        })
        .unwrap();
        frames
    }
}

fn index_of(netns: &Netns, device: &str) -> u32 {
    netns.ip_json(&format!("link show {device}")).unwrap()[0]["ifindex"].as_u64().unwrap() as u32
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
struct Fate {
    counted: BTreeMap<&'static str, u64>,
    at_overlay: Vec<Vec<u8>>,
    in_pod: Vec<Vec<u8>>,
}

/// The programs on `eth0` and on a real `flannel.1`, and a pod.
struct Wire<'a, 'b> {
    programs: &'a mut Loaded<'b>,
    pod: Netns,
    veth: u32,
}

impl<'a, 'b> Wire<'a, 'b> {
    fn new(programs: &'a mut Loaded<'b>) -> Self {
        let host = programs.host;
        host.ip("link add flannel.1 address 0a:00:00:00:00:01 type vxlan id 1 dev eth0 local 192.168.64.1 dstport 8472 nolearning")
            .unwrap();
        host.ip("link set flannel.1 up").unwrap();
        let pod = Netns::create(&format!("{}-pod", host.name())).unwrap();
        host.ip(&format!("link add pod type veth peer name eth0 netns {}", pod.name())).unwrap();
        host.ip("link set pod up").unwrap();
        pod.ip("link set eth0 up").unwrap();
        let (overlay, veth) = (index_of(host, "flannel.1"), index_of(host, "pod"));
        programs.dataplane.peers.set_overlay_device(overlay).unwrap();
        programs.dataplane.attach(Hook::FromUnderlay, "eth0", programs.ifindex).unwrap();
        programs.dataplane.attach(Hook::FromOverlay, "flannel.1", overlay).unwrap();
        Self { programs, pod, veth }
    }

    /// Has it known that the stack let in a packet of this flow.
    fn know(&mut self, packet: &[u8]) {
        let flow = flow_of(packet, self.veth, Duration::from_millis(20));
        self.programs.dataplane.insert_flow(&flow).unwrap();
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let counters = self.programs.dataplane.counters().unwrap();
        counters.into_iter().map(|(event, counter)| (event.label(), counter.packets)).collect()
    }

    /// Sends a frame, and one after it for each place where it could come out.
    fn send(&mut self, overlay: &Capture, in_pod: &Capture, what: &str, frame: &[u8]) -> Fate {
        let with_payload = |ports: [u16; 2], payload: &[u8]| {
            let mut packet = Vec::new();
            etherparse::PacketBuilder::ipv4(POD_TWO, POD_ONE, 63)
                .udp(ports[0], ports[1])
                .write(&mut packet, payload)
                .unwrap();
            packet
        };
        let last_slow = with_payload([1, 2], b"the last one to the stack");
        let last_fast = with_payload([3, 4], b"the last one into the pod");
        self.know(&last_fast);
        let before = self.counters();
        let [slow, fast] = [&last_slow, &last_fast].map(|packet| FROM_TWO.around(&vxlan(8, 1), &inner(packet)));
        send(self.programs.underlay, "node1", &[frame, &slow, &fast]);
        let at_overlay = overlay.until(what, b"the last one to the stack");
        let in_pod = in_pod.until(what, b"the last one into the pod");
        let mut counted = self.counters();
        for (label, count) in &mut counted {
            *count -= before[label];
        }
        // Of the two after it. (What is no tunnel packet comes from the namespaces' own stacks as well.)
        for label in ["handed_in", "received", "delivered"] {
            *counted.get_mut(label).unwrap() -= 1;
        }
        // For a pod or not.
        *counted.get_mut("received").unwrap() += counted.remove("received_by_host").unwrap_or_default();
        counted.remove("xdp_decapsulated");
        counted.remove("not_tunnel");
        counted.retain(|_, count| *count > 0);
        Fate { counted, at_overlay, in_pod }
    }
}

/// Runs all frames in all modes.
fn with_wire(frames: &[(String, Vec<u8>)], known: &[&[u8]], check: impl Fn(&str, &Fate) + Sync) {
    with_programs(|programs| {
        let mut wire = Wire::new(programs);
        let (overlay, in_pod) = (Capture::on(wire.programs.host, "flannel.1"), Capture::on(&wire.pod, "eth0"));
        let mut without_xdp = Vec::new();
        for mode in MODES {
            wire.programs.dataplane.set_xdp(mode, wire.programs.ifindex).unwrap();
            let link = wire.programs.host.ip("-d link show eth0").unwrap();
            let shown = [" xdp ", " xdpgeneric "].map(|shown| link.contains(shown));
            let name = mode.map_or("off", XdpMode::label);
            let expected = [mode == Some(XdpMode::Native), mode == Some(XdpMode::Generic)];
            assert_eq!(shown, expected, "{name}: {link}");
            for (number, (what, frame)) in frames.iter().enumerate() {
                for packet in known {
                    wire.know(packet);
                }
                let before = wire.counters();
                let fate = wire.send(&overlay, &in_pod, &format!("{what}, {name}"), frame);
                let decapsulated = wire.counters()["xdp_decapsulated"] - before["xdp_decapsulated"];
                assert_eq!(decapsulated > 0, mode.is_some(), "{what}, {name}");
                match mode {
                    None => {
                        check(what, &fate);
                        without_xdp.push(fate);
                    }
                    Some(_) => assert_eq!(fate, without_xdp[number], "{what}, {name}, beside that without XDP"),
                }
            }
        }
    });
}

#[test]
fn the_same_is_admitted_in_the_same_bytes() {
    let table = [admission::admitted(), admission::not_ours(), admission::forged()].concat();
    // Not every row has a name of its own.
    let name = |(number, (what, ..)): (usize, &(&str, Vec<u8>, Event))| format!("{number}, {what}");
    let names: Vec<_> = table.iter().enumerate().map(name).collect();
    let frames: Vec<_> = names.iter().cloned().zip(table.iter().map(|(_, frame, _)| frame.clone())).collect();
    let event_of: BTreeMap<_, _> =
        names.iter().map(String::as_str).zip(table.iter().map(|(.., event)| *event)).collect();
    with_wire(&frames, &[], |what, fate| {
        let event = event_of[what];
        // Of what is left in the tunnel, the kernel waits for the rest of the one, and its device refuses the other.
        let comes_through = event == Event::HandedIn;
        assert_eq!(fate.at_overlay.len(), usize::from(comes_through), "{what}: {fate:?}");
        let mut counted = BTreeMap::from([(event.label(), 1)]);
        if comes_through {
            counted.insert("received", 1);
        }
        if event == Event::NotTunnel {
            counted.clear();
        }
        assert_eq!(fate.counted, counted, "{what}");
        assert!(fate.in_pod.is_empty(), "{what}: {fate:?}");
    });
}

#[test]
fn frames_cut_off_anywhere_have_the_same_fate() {
    let whole = FROM_TWO.around(&vxlan(8, 1), &inner(&udp(POD_TWO, POD_ONE)));
    let frames: Vec<_> = (15..whole.len()).map(|len| (format!("{len} bytes"), whole[..len].to_vec())).collect();
    with_wire(&frames, &[], |what, fate| {
        assert!(fate.at_overlay.is_empty(), "{what}: {fate:?}");
    });
}

#[test]
fn a_known_flow_comes_to_the_pod_in_the_same_bytes() {
    let (first, second) = (udp(POD_TWO, POD_ONE), tcp(POD_TWO, POD_ONE));
    let old = udp_with(POD_TWO, POD_ONE, |ip| ip.time_to_live = 1);
    let in_tunnel = |tunnel: Tunnel, packet: &[u8]| tunnel.around(&vxlan(8, 1), &inner(packet));
    let frames = [
        ("UDP", in_tunnel(FROM_TWO, &first)),
        ("TCP", in_tunnel(FROM_TWO, &second)),
        ("congestion on the way", in_tunnel(Tunnel { ecn: 3, ..FROM_TWO }, &first)),
        ("TTL 1", in_tunnel(FROM_TWO, &old)),
        ("forged", in_tunnel(Tunnel { source: STRANGER, ..FROM_TWO }, &first)),
    ];
    with_wire(&frames.map(|(what, frame)| (what.to_owned(), frame)), &[&first, &second], |what, fate| {
        let packet = match what {
            "UDP" => &first,
            "TCP" => &second,
            _ => return assert!(fate.in_pod.is_empty(), "{what}: {fate:?}"),
        };
        let delivered = [&[0x0a, 0x58, 0, 0, 0, 2, 0x0a, 0x58, 0, 0, 0, 1, 8, 0][..], &one_hop_on(packet)].concat();
        assert_eq!(fate.in_pod, [delivered], "{what}");
        assert_eq!(fate.counted, BTreeMap::from([("delivered", 1)]), "{what}");
    });
}

#[test]
fn hosts_talk_in_each_mode() {
    for mode in ["native", "generic"] {
        let mut world = World::new(2);
        for host in 0..2 {
            world.start(host, &[&format!("--xdp={mode}")]);
        }
        for host in &mut world.hosts {
            host.wait_ready().unwrap();
            host.add_pod().unwrap();
        }
        world.wait_connected(0, 1);
        let [client, server] = [0, 1].map(|host| &world.hosts[host].pods[0]);
        for gso in [true, false] {
            for host in &world.hosts {
                host.set_underlay_gso(gso).unwrap();
            }
            for (client, server) in [(client, server), (server, client)] {
                let before = [0, 1].map(|host| world.counter(host, "delivered"));
                let transfer =
                    tcp_transfer(&client.netns, &server.netns, server.address, 1, world.lab.directory()).unwrap();
                // How fast, the benchmark says.
                assert!(transfer.gbits > 0.01, "{mode}, {gso}: {} Gb/s", transfer.gbits);
                for host in [0, 1] {
                    assert!(
                        world.counter(host, "delivered") > before[host] + 50,
                        "{mode}: past the stack of host {host}"
                    );
                }
            }
        }
        for host in [0, 1] {
            assert!(world.counter(host, "xdp_decapsulated") > 100, "{mode}, host {host}");
            assert_eq!(world.status(host)["status"]["xdp"]["mode"], mode);
        }
    }
}

#[test]
fn an_attachment_is_kept_changed_and_taken_away_under_traffic() {
    let mut world = World::with_agents(2);
    let traffic = world.traffic(0, 1);
    assert_eq!(
        world.status(0)["status"]["xdp"]["reason"],
        "eth0 has no NIC's driver: each packet would be copied, and large ones cut"
    );
    let eth0 = index_of(&world.hosts[0].netns, "eth0");
    let link = |world: &World, mode: &str| -> Option<(u64, u64)> {
        let pin = world.hosts[0].pin_dir().join(format!("1/xdp_decap-{mode}-{eth0}"));
        let mut show = std::process::Command::new("bpftool");
        let shown = xtask::process::output(show.args(["-j", "link", "show", "pinned"]).arg(pin)).ok()?;
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        Some((shown["id"].as_u64().unwrap(), shown["prog_id"].as_u64().unwrap()))
    };
    let start = |world: &mut World, mode: &str| {
        world.start(0, &[&format!("--xdp={mode}")]);
        world.wait_log(0, "carries");
        world.wait_status(0, mode, |status| status["xdp"]["mode"] == mode);
        let shown = world.hosts[0].netns.ip("link show eth0").unwrap();
        let is_as_wanted = match mode {
            "native" => shown.contains(" xdp "),
            "generic" => shown.contains(" xdpgeneric "),
            _ => !shown.contains(" xdp"),
        };
        assert!(is_as_wanted, "{mode}: {shown}");
    };

    start(&mut world, "native");
    let (first_link, first_program) = link(&world, "native").unwrap();
    start(&mut world, "native");
    let (same_link, next_program) = link(&world, "native").unwrap();
    assert_eq!(same_link, first_link, "the program is swapped, the link stays");
    assert_ne!(next_program, first_program);
    start(&mut world, "generic");
    assert_eq!(link(&world, "native"), None);
    start(&mut world, "off");
    assert_eq!(link(&world, "generic"), None);
    start(&mut world, "native");
    traffic.assert_nothing_was_lost();

    world.hosts[0].agent = None;
    xtask::process::output(world.agent_on(0).arg("cleanup")).unwrap();
    let shown = || world.hosts[0].netns.ip("link show eth0").unwrap();
    wait_for("the end of it", SOON, || !shown().contains("xdp")).unwrap();
    world.assert_untouched(0);
}
