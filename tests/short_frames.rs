//! Frames that end within their IPv4 header. The kernel runs programs on none of its own making
//! (`bpf_prog_test_run_skb`), so they are sent through the devices that the programs are attached to.

use std::path::PathBuf;

use nix::{
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
use xtask::{lab::Netns, progress::wait_for};

use crate::{
    frames::{FROM_TWO, POD_ONE, POD_TWO, inner, on_overlay, udp, vxlan},
    loaded::enter,
    world::{SOON, World},
};

const ETHERNET: usize = 14;
const IPV4: usize = 20;

#[test]
fn are_handed_on_by_to_overlay() {
    let world = World::with_agents(1);
    let whole = on_overlay(&udp(POD_ONE, POD_TWO));
    let frames: Vec<_> = (ETHERNET + 1..ETHERNET + IPV4).map(|len| &whole[..len]).collect();
    send(&world.hosts[0].netns, "flannel.1", &frames);
    assert_eq!(world.counter(0, "encap_truncated"), frames.len() as u64);
}

#[test]
fn are_nobodys_to_from_underlay() {
    let world = World::with_agents(1);
    let links = world.hosts[0].netns.ip_json("link show eth0").unwrap();
    let mac = links[0]["address"].as_str().unwrap();
    let mut whole = FROM_TWO.around(&vxlan(8, 1), &inner(&udp(POD_TWO, POD_ONE)));
    for (byte, octet) in whole.iter_mut().zip(mac.split(':')) {
        *byte = u8::from_str_radix(octet, 16).unwrap();
    }
    let frames: Vec<_> = (ETHERNET + 1..ETHERNET + IPV4).map(|len| &whole[..len]).collect();
    let before = world.counter(0, "not_tunnel");
    send(&world.lab.underlay, "node1", &frames);
    wait_for("the frames", SOON, || world.counter(0, "not_tunnel") >= before + frames.len() as u64).unwrap();
    for label in ["admitted", "tunnel_truncated", "unknown_vtep"] {
        assert_eq!(world.counter(0, label), 0, "{label}");
    }
}

/// Sends frames out on a device as they are.
pub fn send(netns: &Netns, device: &str, frames: &[&[u8]]) {
    let path = PathBuf::from(format!("/run/netns/{}", netns.name()));
    let links = netns.ip_json(&format!("link show {device}")).unwrap();
    let ifindex = links[0]["ifindex"].as_i64().unwrap() as i32;
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| {
            enter(&path);
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).unwrap();
            for frame in frames {
                send_on(&socket, ifindex, frame);
            }
        });
        sent.join().unwrap();
    });
}

fn send_on(socket: &impl std::os::fd::AsRawFd, ifindex: i32, frame: &[u8]) {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_IP as u16).to_be(),
        sll_ifindex: ifindex,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let address_len = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: frame and address are valid for the call, with the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            address_len,
        )
    };
    assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
}
