//! BPF programs of others, at TCX and XDP: one that counts, by the plain system call.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use nix::{libc, net::if_::if_nametoindex};
use xtask::lab::Netns;

use super::{Served, check};
use crate::sockets::within;

// linux/bpf.h.
const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_ELEM: i32 = 1;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const MAP_TYPE_ARRAY: u32 = 2;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
const XDP: u32 = 37;
// linux/if_link.h.
const SKB_MODE: u32 = 1 << 1;
const DRV_MODE: u32 = 1 << 2;

/// A union of the call's, as words.
fn bpf(command: i32, attributes: &mut [u32]) -> io::Result<i32> {
    let len = size_of_val(attributes);
    // SAFETY: the kernel reads as many bytes; what addresses among them lead to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn made(command: i32, attributes: &mut [u32]) -> OwnedFd {
    let descriptor = bpf(command, attributes).unwrap();
    // SAFETY: the kernel has just opened it, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// An address in two words, of which the machine's order makes one.
fn words(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}

/// Where a program can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    TcxIngress,
    TcxEgress,
    XdpGeneric,
    XdpNative,
}

/// A program that counts packets and lets them on.
struct Program {
    count: OwnedFd,
    program: OwnedFd,
    at: At,
}

impl Program {
    fn load(at: At) -> Self {
        let count = made(MAP_CREATE, &mut [MAP_TYPE_ARRAY, 4, 8, 1, 0]);
        let is_xdp = matches!(at, At::XdpGeneric | At::XdpNative);
        // TCX_NEXT; XDP_PASS.
        let verdict: i32 = if is_xdp { 2 } else { -1 };
        let instruction = |code: u8, registers: u8, operand: i32| {
            u64::from(code) | u64::from(registers) << 8 | u64::from(operand as u32) << 32
        };
        let program = [
            // r1 = the address of the map's value
            instruction(0x18, 0x21, count.as_raw_fd()),
            instruction(0, 0, 0),
            // r2 = 1; lock *r1 += r2
            instruction(0xb7, 0x02, 1),
            instruction(0xdb, 0x21, 0),
            instruction(0xb7, 0x00, verdict),
            instruction(0x95, 0, 0),
        ];
        let [low, high] = words(program.as_ptr() as u64);
        let [license_low, license_high] = words(c"GPL".as_ptr() as u64);
        let kind = if is_xdp { 6 } else { 3 };
        let mut attributes = [0; 18];
        attributes[..6].copy_from_slice(&[kind, program.len() as u32, low, high, license_low, license_high]);
        attributes[17] = if is_xdp { XDP } else { 0 };
        let program = made(PROG_LOAD, &mut attributes);
        Self { count, program, at }
    }

    /// Attached as long as that is there.
    fn attach(&self, netns: &Netns, device: &str) -> OwnedFd {
        let (attach_type, flags) = match self.at {
            At::TcxIngress => (TCX_INGRESS, 0),
            At::TcxEgress => (TCX_EGRESS, 0),
            At::XdpGeneric => (XDP, SKB_MODE),
            At::XdpNative => (XDP, DRV_MODE),
        };
        let program = self.program.as_raw_fd() as u32;
        within(netns, || {
            let index = if_nametoindex(device).unwrap();
            made(LINK_CREATE, &mut [program, index, attach_type, flags, 0, 0, 0, 0])
        })
    }

    fn count(&self) -> u64 {
        let (key, mut count) = (0_u32, 0_u64);
        let ([key_low, key_high], [low, high]) = (words(&raw const key as u64), words(&raw mut count as u64));
        bpf(MAP_LOOKUP_ELEM, &mut [self.count.as_raw_fd() as u32, 0, key_low, key_high, low, high, 0, 0]).unwrap();
        count
    }
}

fn check_programs(places: &[(&str, At)]) {
    for served in Served::ALL {
        let world = served.world(1);
        if served == Served::ByUs && world.status(0)["status"]["features"]["tcx"] == false {
            return;
        }
        for (device, at) in places {
            let program = Program::load(*at);
            let netns = if *at == At::XdpNative { &world.hosts[0].pods[0].netns } else { &world.hosts[0].netns };
            let link: RefCell<Option<OwnedFd>> = RefCell::default();
            let set = |on: bool| drop(link.replace(on.then(|| program.attach(netns, device))));
            check(served, &format!("{at:?} on {device}"), &world, 1, set, || program.count());
        }
    }
}

#[test]
fn a_program_on_a_veth_sees_each_packet() {
    check_programs(&[("pod1", At::TcxIngress), ("pod1", At::TcxEgress)]);
}

/// Which `bpf_redirect_peer` passes by, and the host does not see.
#[test]
fn a_program_of_the_driver_in_a_pod_sees_each_packet() {
    check_programs(&[("eth0", At::XdpNative)]);
}

#[test]
fn a_program_on_the_bridge_sees_each_packet() {
    check_programs(&[("cni0", At::TcxIngress), ("cni0", At::TcxEgress), ("cni0", At::XdpGeneric)]);
}

#[test]
fn a_program_behind_the_tunnel_sees_each_packet() {
    check_programs(&[("flannel.1", At::TcxIngress), ("flannel.1", At::XdpGeneric)]);
}

#[test]
fn a_program_at_the_overlays_egress_sees_each_packet() {
    check_programs(&[("flannel.1", At::TcxEgress)]);
}

#[test]
fn a_program_on_the_external_interface_sees_each_tunnel_packet() {
    check_programs(&[("eth0", At::TcxIngress), ("eth0", At::TcxEgress)]);
}
