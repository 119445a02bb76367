//! Packet sockets, as tcpdump opens them.

use std::{
    cell::{Cell, RefCell},
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socket, sockopt::RcvBufForce},
};
use xtask::{lab::Netns, process::Process, progress::wait_for};

use super::{Exchange, Served, check};
use crate::{sockets::within, world::SOON};

/// For a few thousand packets.
const BUFFER_LEN: usize = 8 << 20;

/// A packet socket on a device, or on all (`any`), that counts the datagrams of the exchange.
struct Tap {
    socket: OwnedFd,
    count: Cell<u64>,
}

impl Tap {
    fn open(netns: &Netns, device: &str) -> Self {
        let socket = within(netns, || {
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, None).unwrap();
            setsockopt(&socket, RcvBufForce, &BUFFER_LEN).unwrap();
            let address = libc::sockaddr_ll {
                sll_family: libc::AF_PACKET as u16,
                sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
                sll_ifindex: if device == "any" { 0 } else { if_nametoindex(device).unwrap() as i32 },
                sll_hatype: 0,
                sll_pkttype: 0,
                sll_halen: 0,
                sll_addr: [0; 8],
            };
            let len = size_of::<libc::sockaddr_ll>() as u32;
            // SAFETY: the kernel reads an address of this size, which outlives the call.
            let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
            assert_eq!(bound, 0, "{}", Errno::last());
            socket
        });
        Self { socket, count: Cell::default() }
    }

    /// How many datagrams of the exchange it was given so far.
    fn count(&self) -> u64 {
        let mut frame = [0; 64];
        loop {
            match recv(self.socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(len) => self.count.update(|count| count + u64::from(is_of_exchange(&frame[..len]))),
                Err(Errno::EAGAIN) => return self.count.get(),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Ethernet, IPv4, UDP.
fn is_of_exchange(frame: &[u8]) -> bool {
    frame.len() >= 46 && frame[12..15] == [8, 0, 0x45] && frame[36..38] == Exchange::PORT.to_be_bytes()
}

fn check_capture(device: &str, per_round: u64) {
    for served in Served::ALL {
        let world = served.world(1);
        let host = &world.hosts[0].netns;
        let tap: RefCell<Option<Tap>> = RefCell::default();
        let set = |on: bool| drop(tap.replace(on.then(|| Tap::open(host, device))));
        let seen = || tap.borrow().as_ref().map_or(0, Tap::count);
        check(served, &format!("capture on {device}"), &world, per_round, set, seen);
    }
}

#[test]
fn a_capture_on_a_veth_shows_each_packet() {
    check_capture("pod1", 2);
}

#[test]
fn a_capture_on_the_bridge_shows_each_packet() {
    check_capture("cni0", 2);
}

#[test]
fn a_capture_on_the_overlays_device_shows_each_packet() {
    check_capture("flannel.1", 2);
}

/// On its veth, the bridge and the overlay's device, both ways: as flannel has it.
#[test]
fn a_capture_on_all_devices_shows_each_packet_on_each() {
    check_capture("any", 6);
}

/// What runs on hosts all day is nobody who looks: a DHCP client's socket on the external interface, LLDP's on all devices.
#[test]
fn sockets_for_other_protocols_cost_no_speed() {
    let world = Served::ByUs.world(1);
    let host = &world.hosts[0];
    let exchange = Exchange::new(&host.pods[0], &world.hosts[1].pods[0]);
    exchange.wait_bypassed(&world, 0);
    let directory = world.lab.directory();
    let listen = |name: &str, arguments: &[&str]| {
        let mut command = host.netns.command("tcpdump");
        command.args(["-Z", "root", "-n", "-l"]).args(arguments);
        let process = Process::start(&mut command, &directory.join(name)).unwrap();
        wait_for(name, SOON, || process.log().contains("listening on")).unwrap();
        process
    };
    let others = [
        listen("dhcp", &["-i", "eth0", "udp dst port 68"]),
        listen("lldp", &["-i", "any", "ether proto 0x88cc"]),
        listen("dhcp-overlay", &["-i", "flannel.1", "udp dst port 67 or udp dst port 68"]),
    ];
    // One that does look is found meanwhile: the others have been looked at by then.
    let all = listen("all", &["-i", "pod1"]);
    world.wait_status(0, "the capture", |status| {
        let found = status["bypass"]["restrictions"].as_array().unwrap().iter();
        let found: Vec<_> = found.filter(|restriction| restriction["kind"] != "helper").collect();
        found.len() == 1 && found[0].to_string().contains("pod1")
    });
    drop(all);
    exchange.wait_bypassed(&world, 0);
    drop(others);
}
