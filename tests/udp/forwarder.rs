//! A proxy of one packet with each system call, as flannel's is built (pkg/backend/udp/proxy_amd64.c): one thread that reads
//! the TUN device and the socket in turns, and waits where neither has anything.

use std::{
    ffi::{CStr, c_short},
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::OpenOptionsExt as _,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use xtask::lab::Host;

/// A host's subnet: `10.5.<number>.0/24` at `192.168.64.<number>`, or what it is on its cable.
pub type Peer = (u8, Ipv4Addr);

/// A running proxy.
pub struct Forwarder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Bytes of the longest datagram that has come.
    pub longest: Arc<AtomicUsize>,
}

impl Forwarder {
    /// Makes the device, and moves packets between it and the peers.
    pub fn start(host: &Host, number: u8, mtu: u32, port: u16, peers: Vec<Peer>) -> Self {
        let address = host.address;
        let (tun, name, socket) = host
            .netns
            .within(move || {
                let (tun, name) = open("flannel%d");
                (tun, name, UdpSocket::bind((address, port)).unwrap())
            })
            .unwrap();
        host.netns.ip(&format!("address add 10.5.{number}.0/32 dev {name}")).unwrap();
        host.netns.ip(&format!("link set {name} mtu {mtu} up")).unwrap();
        host.netns.ip(&format!("route add 10.5.0.0/16 dev {name}")).unwrap();
        socket.set_nonblocking(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let longest = Arc::new(AtomicUsize::new(0));
        let proxy = Proxy { tun, socket, port, peers, longest: Arc::clone(&longest) };
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || proxy.run(mtu as usize, &stopped));
        Self { stop, thread: Some(thread), longest }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

struct Proxy {
    tun: File,
    socket: UdpSocket,
    port: u16,
    peers: Vec<Peer>,
    longest: Arc<AtomicUsize>,
}

impl Proxy {
    fn run(mut self, mtu: usize, stopped: &AtomicBool) {
        let mut buffer = vec![0; mtu];
        while !stopped.load(Ordering::Relaxed) {
            let mut waited = [self.tun.as_fd(), self.socket.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            // The time for who stops it.
            poll(&mut waited, PollTimeout::from(100u8)).unwrap();
            loop {
                let sent = self.send(&mut buffer);
                let received = self.receive(&mut buffer);
                if !sent && !received {
                    break;
                }
            }
        }
    }

    fn send(&mut self, buffer: &mut [u8]) -> bool {
        let Ok(len) = self.tun.read(buffer) else { return false };
        let packet = &mut buffer[..len];
        let to = self.peers.iter().find(|(number, _)| packet.len() >= 20 && packet[16..19] == [10, 5, *number]);
        if let Some((_, host)) = to
            && decrement_ttl(packet)
        {
            let _lost = self.socket.send_to(packet, (*host, self.port));
        }
        true
    }

    fn receive(&mut self, buffer: &mut [u8]) -> bool {
        let Ok(len) = self.socket.recv(buffer) else { return false };
        self.longest.fetch_max(len, Ordering::Relaxed);
        let packet = &mut buffer[..len];
        if packet.len() >= 20 && decrement_ttl(packet) {
            let _lost = self.tun.write(packet);
        }
        true
    }
}

fn decrement_ttl(packet: &mut [u8]) -> bool {
    packet[8] = packet[8].wrapping_sub(1);
    [packet[10], packet[11]] = flannel_common::checksum::decrement_ttl([packet[10], packet[11]]);
    packet[8] != 0
}

/// A TUN device with such a name (`%d` stands for the first free number), as long as it is open.
pub fn open(name: &str) -> (File, String) {
    let mut options = OpenOptions::new();
    let tun = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").unwrap();
    // SAFETY: all zeros are a value of this C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as c_short;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which outlives the call.
    assert_eq!(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
    // SAFETY: the kernel ends the name with a zero byte.
    let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
    (tun, name.to_str().unwrap().to_owned())
}
