//! Packet tables of flows that netfilter translates: what a packet leaves before the stack, what is made of it behind, and
//! when nothing is. The stack is played by the tests: it sends a packet on, one hop older and with other addresses and ports.

use std::net::{Ipv4Addr, SocketAddrV4};

use etherparse::{EtherType, IpNumber, Ipv4Header, TcpHeader, UdpHeader};
use flannel_agent::dataplane::{
    Hook,
    test_run::{Packet, TestRuns},
};
use flannel_common::{
    event::Event,
    flow::{FlowKey, Original},
    model::flow_of,
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::{Pid, SysconfVar, sysconf},
};

use crate::{
    fast_path::{GATEWAY_MAC, POD_MAC, one_hop_on},
    frames::*,
    loaded::{verdict, with_notes},
};

const VNI: u32 = 1;
/// The note of what `from_underlay` let in: its kind, and the flow's tag.
const ADMITTED: u16 = 0xc000;

const fn end(ip: [u8; 4], port: u16) -> SocketAddrV4 {
    let [a, b, c, d] = ip;
    SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), port)
}

const CLIENT: SocketAddrV4 = end(POD_ONE, 40000);
const SERVICE: SocketAddrV4 = end([10, 96, 0, 10], 80);
const BACKEND: SocketAddrV4 = end(POD_TWO, 8080);
/// This host on the overlay, as masquerading has it.
const MASQUERADED: SocketAddrV4 = end([10, 5, 1, 0], 61234);

/// A packet, with a payload of one or another number.
#[derive(Clone, Copy, Debug)]
struct Sent {
    protocol: Protocol,
    from: SocketAddrV4,
    to: SocketAddrV4,
    number: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Fin,
    Udp,
    UdpWithoutChecksum,
}

impl Sent {
    const fn new(protocol: Protocol, from: SocketAddrV4, to: SocketAddrV4) -> Self {
        Self { protocol, from, to, number: 1 }
    }

    const fn numbered(self, number: u16) -> Self {
        Self { number, ..self }
    }

    /// As another flow's, with all that a translation leaves as it is.
    const fn translated(self, from: SocketAddrV4, to: SocketAddrV4) -> Self {
        Self { from, to, ..self }
    }

    const fn answered(self) -> Self {
        self.translated(self.to, self.from)
    }

    fn packet(self) -> Vec<u8> {
        let [source, destination] = [self.from, self.to].map(|end| end.ip().octets());
        let (source_port, destination_port) = (self.from.port(), self.to.port());
        let payload = [PAYLOAD, &self.number.to_be_bytes()].concat();
        let ip = |protocol| Ipv4Header::new(0, 63, protocol, source, destination).unwrap();
        let (protocol, transport) = match self.protocol {
            Protocol::Tcp | Protocol::Fin => {
                let mut tcp = TcpHeader::new(source_port, destination_port, u32::from(self.number) << 16, 500);
                (tcp.ack, tcp.acknowledgment_number) = (true, 77);
                tcp.fin = self.protocol == Protocol::Fin;
                tcp.checksum = tcp.calc_checksum_ipv4(&ip(IpNumber::TCP), &payload).unwrap();
                (IpNumber::TCP, tcp.to_bytes().to_vec())
            }
            Protocol::Udp | Protocol::UdpWithoutChecksum => {
                let mut udp =
                    UdpHeader::with_ipv4_checksum(source_port, destination_port, &ip(IpNumber::UDP), &payload).unwrap();
                if self.protocol == Protocol::UdpWithoutChecksum {
                    udp.checksum = 0;
                }
                (IpNumber::UDP, udp.to_bytes().to_vec())
            }
        };
        ipv4_with(source, destination, protocol, &[transport, payload].concat(), |ip| ip.identification = self.number)
    }

    fn key(self, is_from_pod: bool) -> FlowKey {
        flow_of(&self.packet(), 0, is_from_pod).unwrap()
    }
}

fn frame(source: Mac, destination: Mac, packet: &[u8]) -> Vec<u8> {
    [&ethernet(source, destination, EtherType::IPV4), packet].concat()
}

/// The programs, and the device at which packets seem to be.
struct Host<'a> {
    programs: &'a mut TestRuns,
    ifindex: u32,
}

impl Host<'_> {
    /// What a program makes of a frame with a note: the note that it has then.
    fn note(&mut self, hook: Hook, frame: &[u8], note: u16) -> u16 {
        let packet = Packet { frame, ifindex: self.ifindex, gso_size: 0, note, mark: 0, priority: 0 };
        self.programs.note(hook, packet, &mut Vec::new()).unwrap().note
    }

    /// And the frame, where it must count it so.
    fn expect(&mut self, hook: Hook, frame: &[u8], event: Event) -> Vec<u8> {
        let before = self.programs.counter(event).unwrap().packets;
        let packet = Packet { frame, ifindex: self.ifindex, gso_size: 0, note: 0, mark: 0, priority: 0 };
        let mut out = Vec::new();
        assert_eq!(self.programs.verdict(hook, packet, &mut out).unwrap().0, verdict(event), "{event:?}");
        assert_eq!(self.programs.counter(event).unwrap().packets, before + 1, "{event:?}");
        out
    }

    /// `from_pod` leaves it to the stack: its note, and where its flow is left.
    fn leave(&mut self, sent: Sent) -> (u16, u32) {
        let note = self.note(Hook::FromPod, &frame(POD_MAC, GATEWAY_MAC, &sent.packet()), 0);
        let place = Original::index(note.into(), true);
        self.forget_hash(place);
        (note, place)
    }

    /// The same for one from the overlay, at `from_overlay`.
    fn let_in(&mut self, sent: Sent) -> (u16, u32) {
        let admitted = ADMITTED | sent.key(false).tag(VNI) as u16;
        let note = self.note(Hook::FromOverlay, &inner(&sent.packet()), admitted);
        let place = Original::index(note.into(), false);
        self.forget_hash(place);
        (note, place)
    }

    /// Frames that are run here have a hash in one run only.
    fn forget_hash(&mut self, place: u32) {
        let original = self.programs.original(place).unwrap();
        self.programs.set_original(place, Original { hash: 0, ..original }).unwrap();
    }

    /// The stack lets it out, to the overlay.
    fn send(&mut self, sent: Sent, note: u16) {
        self.note(Hook::ToOverlay, &on_overlay(&one_hop_on(&sent.packet())), note);
    }

    /// The stack lets it out, to the pod.
    fn give(&mut self, sent: Sent, note: u16) {
        self.note(Hook::ToPod, &frame(GATEWAY_MAC, POD_MAC, &one_hop_on(&sent.packet())), note);
    }

    /// The next of a flow bypasses the stack, as the stack would have sent it.
    fn expect_sent_as(&mut self, sent: Sent, as_what: Sent) {
        let event = if sent.key(true) == as_what.key(true) { Event::PodEncapsulated } else { Event::PodTranslated };
        let out = self.expect(Hook::FromPod, &frame(POD_MAC, GATEWAY_MAC, &sent.packet()), event);
        let carried = frame(VTEP_ONE_MAC, VTEP_TWO_MAC, &one_hop_on(&as_what.packet()));
        assert_eq!(out[50..], carried, "{sent:?} as {as_what:?}");
    }

    fn expect_received_as(&mut self, sent: Sent, as_what: Sent) {
        let is_plain = sent.key(false) == as_what.key(false);
        let event = if is_plain { Event::Delivered } else { Event::DeliveredTranslated };
        let out = self.expect(Hook::FromUnderlay, &FROM_TWO.around(&vxlan(8, VNI), &inner(&sent.packet())), event);
        assert_eq!(out, frame(GATEWAY_MAC, POD_MAC, &one_hop_on(&as_what.packet())), "{sent:?} as {as_what:?}");
    }

    fn expect_nothing_known(&self, what: &str) {
        assert_eq!(self.programs.flows().unwrap(), [], "{what}");
    }
}

fn with_host(test: impl FnOnce(&mut Host<'_>) + Send) {
    with_notes(|programs, ifindex| {
        programs.set_pod(ifindex, Some(POD_MAC)).unwrap();
        test(&mut Host { programs, ifindex });
    });
}

/// What is asked, and what the stack makes of a packet to it: source and destination.
const TRANSLATIONS: [(&str, SocketAddrV4, SocketAddrV4, SocketAddrV4); 6] = [
    ("nothing", end(POD_TWO, 53), CLIENT, end(POD_TWO, 53)),
    ("destination", SERVICE, CLIENT, BACKEND),
    ("destination, and the port as it is", SERVICE, CLIENT, end(POD_TWO, SERVICE.port())),
    ("source", BACKEND, MASQUERADED, BACKEND),
    ("source and destination", SERVICE, MASQUERADED, BACKEND),
    ("ports that look like each other's", SERVICE, end(POD_ONE, 80), end(POD_TWO, 40000)),
];

#[test]
fn the_stacks_translation_is_made_past_it_both_ways() {
    with_host(|host| {
        for (what, asked, from, to) in TRANSLATIONS {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::UdpWithoutChecksum] {
                let sent = Sent::new(protocol, CLIENT, asked);
                let out = |number| sent.numbered(number).translated(from, to);
                on_cpu(0);
                let (note, _) = host.leave(sent);
                host.expect_nothing_known(what);
                // It may come out on another.
                on_cpu(1);
                host.send(out(1), note);
                host.expect_sent_as(sent.numbered(2), out(2));

                let (note, _) = host.let_in(out(3).answered());
                on_cpu(0);
                host.give(sent.answered().numbered(3), note);
                host.expect_received_as(out(4).answered(), sent.answered().numbered(4));
                for key in [sent.key(true), out(0).key(true)] {
                    host.programs.forget_flow(&key).unwrap();
                }
                host.expect_nothing_known(what);
            }
        }
    });
}

/// Has the programs run on this one of the CPUs that there are.
fn on_cpu(number: usize) {
    let count = sysconf(SysconfVar::_NPROCESSORS_ONLN).unwrap().unwrap() as usize;
    let mut cpus = CpuSet::new();
    cpus.set(number % count).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
}

/// Two flows of one tag.
fn of_one_tag(sent: Sent) -> Sent {
    let tag = |sent: Sent| sent.key(true).tag(VNI);
    let others = (1024..=u16::MAX).map(|port| Sent { from: end(POD_ONE, port), ..sent });
    others.into_iter().find(|other| other.from != sent.from && tag(*other) == tag(sent)).unwrap()
}

#[test]
fn what_does_not_fit_the_packet_is_not_believed() {
    let sent = Sent::new(Protocol::Tcp, CLIENT, SERVICE);
    let out = sent.translated(CLIENT, BACKEND);
    let other = of_one_tag(sent);
    type Meanwhile<'a> = &'a (dyn Fn(&mut Host<'_>, u32) + Sync);
    let set = |change: fn(&mut Original)| {
        move |host: &mut Host<'_>, place: u32| {
            let mut original = host.programs.original(place).unwrap();
            change(&mut original);
            host.programs.set_original(place, original).unwrap();
        }
    };
    let disturbed: [(&str, Meanwhile<'_>); 9] = [
        ("a later packet of the flow went in", &|host, _| {
            host.leave(sent.numbered(2));
        }),
        ("a packet of a flow with the same tag went in", &|host, _| {
            host.leave(other.numbered(2));
        }),
        ("one that only its hash tells from this one", &|host, _| {
            host.note(Hook::FromPod, &frame(POD_MAC, GATEWAY_MAC, &other.packet()), 0);
        }),
        ("that one's flow was written by another CPU, and no more", &{
            let key = other.key(true);
            move |host: &mut Host<'_>, place| {
                let original = host.programs.original(place).unwrap();
                host.programs.set_original(place, Original { key, ..original }).unwrap();
            }
        }),
        ("that one's digest was", &set(|original| original.digest ^= 1 << 40)),
        ("the stack changes more of it", &set(|original| original.treatment ^= 1)),
        ("that one's hash was", &set(|original| original.hash = 1)),
        ("nothing was left", &set(|original| *original = Original::default())),
        ("another protocol's", &set(|original| original.key.protocol = 17)),
    ];
    with_host(|host| {
        for (what, meanwhile) in disturbed {
            let (note, place) = host.leave(sent);
            meanwhile(host, place);
            host.send(out, note);
            host.expect_nothing_known(what);
        }
        let (note, place) = host.leave(sent);
        for (what, sent, note) in [
            ("a number that is another's", out, note ^ 1),
            ("a note of another kind", out, note ^ 0x6000),
            ("no note", out, 0),
            ("an identification of its own", out.numbered(2), note),
            ("what is longer by now", Sent { protocol: Protocol::Udp, ..out }, note),
        ] {
            host.send(sent, note);
            host.expect_nothing_known(what);
        }
        // And all that time it was there.
        host.send(out, note);
        host.expect_sent_as(sent.numbered(2), out.numbered(2));
        assert_eq!(host.programs.original(place).unwrap().key, sent.key(true));
    });
}

#[test]
fn packets_that_come_out_late_are_noted_under_their_own_flow() {
    let one = Sent::new(Protocol::Udp, CLIENT, SERVICE);
    let two = of_one_tag(one);
    let out = |sent: Sent| sent.translated(sent.from, BACKEND);
    with_host(|host| {
        let (first, _) = host.leave(one);
        let (second, _) = host.leave(two.numbered(2));
        assert_eq!(first, second);
        // In the other order. The first one's is gone.
        host.send(out(two.numbered(2)), second);
        host.send(out(one), first);
        assert_eq!(host.programs.flows().unwrap(), [two.key(true)]);
        host.expect_sent_as(two.numbered(3), out(two.numbered(3)));
    });
}

#[test]
fn the_end_of_a_connection_is_its_end_under_both_names() {
    let data = Sent::new(Protocol::Tcp, CLIENT, SERVICE);
    let fin = Sent::new(Protocol::Fin, CLIENT, SERVICE);
    let out = |sent: Sent| sent.translated(MASQUERADED, BACKEND);
    with_host(|host| {
        let know = |host: &mut Host<'_>| {
            let (note, _) = host.leave(data);
            host.send(out(data), note);
            let (note, _) = host.let_in(out(data).answered());
            host.give(data.answered(), note);
            assert_eq!(host.programs.flows().unwrap().len(), 2);
        };
        know(host);
        let (note, _) = host.leave(fin);
        assert_eq!(host.programs.flows().unwrap(), [out(data).key(true)]);
        host.send(out(fin), note);
        host.expect_nothing_known("FIN from the pod");

        know(host);
        host.expect(
            Hook::FromUnderlay,
            &FROM_TWO.around(&vxlan(8, VNI), &inner(&out(fin).answered().packet())),
            Event::HandedIn,
        );
        assert_eq!(host.programs.flows().unwrap(), [data.key(true)]);
        let (note, _) = host.let_in(out(fin).answered());
        host.give(fin.answered(), note);
        host.expect_nothing_known("FIN to the pod");
    });
}

#[test]
fn a_backend_that_changes_is_the_flows_next() {
    let sent = Sent::new(Protocol::Udp, CLIENT, SERVICE);
    let moved = end([10, 5, 2, 77], 8080);
    with_host(|host| {
        for to in [BACKEND, moved] {
            // As after a while, when one takes the stack again.
            host.programs.forget_flow(&sent.key(true)).unwrap();
            let (note, _) = host.leave(sent);
            host.send(sent.translated(CLIENT, to), note);
            host.expect_sent_as(sent.numbered(2), sent.numbered(2).translated(CLIENT, to));
        }
        // Of what no host leases any more nothing passes by.
        let (note, _) = {
            host.programs.forget_flow(&sent.key(true)).unwrap();
            host.leave(sent)
        };
        host.send(sent.translated(CLIENT, end([10, 5, 9, 9], 8080)), note);
        host.expect_nothing_known("no peer");
    });
}
