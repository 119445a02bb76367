//! Who captures: packet sockets of this network namespace.
//!
//! The kernel tells of none that comes or goes, so they are looked for. `/proc/net/packet` is read in some microseconds. Only where
//! it names a socket that may matter, its filter is asked for (sock_diag).

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
};

use rtnetlink::sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use tracing::debug;

use super::{
    super::raw::{attribute, dump, word},
    Places, Role,
    socket_filter::{Instruction, Packet, may_accept},
};
use crate::bypass::{Kind, Restriction, Scope};

const PATH: &str = "/proc/net/packet";
// linux/if_ether.h. Sockets for other protocols see no IPv4; those for none, nothing.
const ALL: u16 = 0x0003;
const IPV4: u16 = 0x0800;
// linux/sock_diag.h, linux/packet_diag.h.
const BY_FAMILY: u16 = 20;
const SHOW_FILTER: u32 = 0x20;
const FILTER: u16 = 7;
/// `struct packet_diag_req`, and `struct packet_diag_msg` (linux/packet_diag.h).
const REQUEST_LEN: usize = 20;
const MESSAGE_LEN: usize = 16;

/// A packet socket that takes IPv4 packets of a device, or of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PacketSocket {
    inode: u32,
    /// 0 for all.
    index: u32,
    /// Whether it sees link-layer headers.
    is_raw: bool,
}

impl PacketSocket {
    /// A line: `sk RefCnt Type Proto Iface R Rmem User Inode`.
    fn of(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().skip(2);
        let is_raw = words.next()?.parse::<i32>().ok()? == nix::libc::SOCK_RAW;
        let protocol = u16::from_str_radix(words.next()?, 16).ok()?;
        let index = words.next()?.parse().ok()?;
        let is_running = words.next()? != "0";
        let inode = words.nth(2)?.parse().ok()?;
        (is_running && [ALL, IPV4].contains(&protocol)).then_some(Self { inode, index, is_raw })
    }
}

/// What a capture on the external interface would see in the place of tunnel packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    /// What it sees with flannel: they are in their tunnel, to this port.
    Tunnelled,
    /// Packets without their tunnel, since XDP takes them out of it before; from this port.
    Decapsulated(u16),
}

impl Places {
    /// Who captures on these devices, or on all. On the external interface that is nobody who does not look for tunnel packets:
    /// whoever else captures there sees what he sees with flannel.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn captures(&self, tap: Tap) -> io::Result<BTreeSet<Restriction>> {
        let text = fs::read_to_string(PATH)?;
        let sockets: Vec<_> = text.lines().skip(1).filter_map(PacketSocket::of).collect();
        let sockets: Vec<_> =
            sockets.into_iter().filter(|socket| !self.seen_by(*socket, tap, |_| true).is_empty()).collect();
        if sockets.is_empty() {
            return Ok(BTreeSet::new());
        }
        let filters = filters().unwrap_or_else(|error| {
            debug!("the filters of packet sockets can't be told: {error}");
            HashMap::new()
        });
        Ok(self.captured(&sockets, &filters, tap))
    }

    fn captured(
        &self,
        sockets: &[PacketSocket],
        filters: &HashMap<u32, Vec<Instruction>>,
        tap: Tap,
    ) -> BTreeSet<Restriction> {
        let mut found = BTreeSet::new();
        for socket in sockets {
            let accepts = |packet: &Packet| filters.get(&socket.inode).is_none_or(|filter| may_accept(filter, packet));
            let place = self.devices.get(&socket.index).map_or("all devices", |device| &device.name);
            let restriction =
                |scope| Restriction { kind: Kind::Capture, subject: format!("packet socket on {place}"), scope };
            found.extend(self.seen_by(*socket, tap, accepts).into_iter().map(restriction));
        }
        found
    }

    /// What takes the stack for a socket to see what it would with flannel, if it takes such packets.
    fn seen_by(&self, socket: PacketSocket, tap: Tap, accepts: impl Fn(&Packet) -> bool) -> Vec<Scope> {
        let role = self.devices.get(&socket.index).map(|device| device.role);
        let mut scopes = Vec::new();
        if let (Some(Role::External), Tap::Decapsulated(port)) | (None, Tap::Decapsulated(port)) = (role, tap)
            && (role.is_some() || socket.index == 0)
            && accepts(&Packet::of_tunnel(socket.is_raw, port))
        {
            // Without XDP it sees tunnel packets, those too that go on past the stack.
            scopes.push(Scope::Xdp);
        }
        if !accepts(&Packet::of_pod(socket.is_raw)) {
            return scopes;
        }
        match role {
            Some(Role::Pod) => scopes.push(Scope::Pod(socket.index)),
            Some(Role::Bridge) => scopes.extend(self.pods_of(socket.index)),
            Some(Role::Overlay) => scopes.push(Scope::OverlayCapture),
            None if socket.index == 0 => scopes.push(Scope::OverlayCapture),
            Some(Role::External | Role::Underlay) | None => {}
        }
        scopes
    }
}

/// The filters of packet sockets by inode, where they are classic programs. A socket without one takes everything; what an eBPF
/// program takes is not known.
fn filters() -> io::Result<HashMap<u32, Vec<Instruction>>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    let mut request = [0; REQUEST_LEN];
    request[0] = nix::libc::AF_PACKET as u8;
    request[8..12].copy_from_slice(&SHOW_FILTER.to_ne_bytes());
    let mut filters = HashMap::new();
    dump(&mut socket, BY_FAMILY, &request, |payload| {
        let (Some(inode), Some(attributes)) = (word(payload, 4), payload.get(MESSAGE_LEN..)) else { return };
        if let Some(program) = attribute(attributes, FILTER).filter(|program| !program.is_empty()) {
            filters.insert(inode, program.chunks_exact(8).filter_map(instruction).collect());
        }
    })?;
    Ok(filters)
}

fn instruction(bytes: &[u8]) -> Option<Instruction> {
    let [code_low, code_high, if_true, if_false, operand @ ..] = bytes.first_chunk::<8>()?;
    let code = u16::from_ne_bytes([*code_low, *code_high]);
    Some(Instruction { code, if_true: *if_true, if_false: *if_false, operand: u32::from_ne_bytes(*operand) })
}

#[cfg(test)]
mod tests {
    use super::{super::Device, *};
    use crate::device::PodLink;

    const HEADER: &str = "sk               RefCnt Type Proto  Iface R Rmem   User   Inode";

    fn places() -> Places {
        let device = |name: &str, role| Device { name: name.to_owned(), role, xdp: None, has_setting: false };
        let devices = [
            (2, "eth0", Role::External),
            (3, "flannel.1", Role::Overlay),
            (4, "cni0", Role::Bridge),
            (5, "veth5", Role::Pod),
        ];
        Places {
            pods: vec![PodLink { name: "veth5".to_owned(), index: 5, bridge: Some(4) }],
            underlay: Vec::new(),
            devices: devices.into_iter().map(|(index, name, role)| (index, device(name, role))).collect(),
        }
    }

    fn socket(index: u32) -> PacketSocket {
        PacketSocket { inode: 1, index, is_raw: true }
    }

    #[test]
    fn the_kernels_lines_are_read() {
        let read = |line: &str| PacketSocket::of(line).map(|socket| (socket.index, socket.is_raw, socket.inode));
        assert_eq!(read(HEADER), None);
        assert_eq!(read("00000000f7f6a0d1 3      3    0003   2     1 0      0      46190"), Some((2, true, 46190)));
        assert_eq!(read("00000000f7f6a0d1 3      2    0800   0     1 1280   0      7"), Some((0, false, 7)));
        // Not bound yet; for LLDP; for nothing.
        assert_eq!(read("00000000f7f6a0d1 3      3    0003   2     0 0      0      46190"), None);
        assert_eq!(read("00000000f7f6a0d1 3      3    88cc   2     1 0      0      46190"), None);
        assert_eq!(read("00000000f7f6a0d1 3      3    0000   2     1 0      0      46190"), None);
    }

    #[test]
    fn who_captures_where_is_shown_what_passes_there() {
        let places = places();
        let scopes = |index, tap| -> Vec<_> {
            let found = places.captured(&[socket(index)], &HashMap::new(), tap);
            found.into_iter().map(|restriction| restriction.scope).collect()
        };
        let decapsulated = Tap::Decapsulated(8472);
        assert_eq!(scopes(2, Tap::Tunnelled), []);
        assert_eq!(scopes(2, decapsulated), [Scope::Xdp]);
        assert_eq!(scopes(3, decapsulated), [Scope::OverlayCapture]);
        assert_eq!(scopes(4, Tap::Tunnelled), [Scope::Pod(5)]);
        assert_eq!(scopes(5, Tap::Tunnelled), [Scope::Pod(5)]);
        assert_eq!(scopes(9, decapsulated), []);
        assert_eq!(scopes(0, Tap::Tunnelled), [Scope::OverlayCapture]);
        assert_eq!(scopes(0, decapsulated), [Scope::OverlayCapture, Scope::Xdp]);
    }

    #[test]
    fn a_socket_for_other_packets_is_nobody_who_looks() {
        // ldh [12]; jeq #0x88cc; ret #-1; ret #0.
        let lldp = [(40, 0, 0, 12), (21, 0, 1, 0x88cc), (6, 0, 0, u32::MAX), (6, 0, 0, 0)];
        let lldp = lldp.map(|(code, if_true, if_false, operand)| Instruction { code, if_true, if_false, operand });
        let filters = HashMap::from([(1, lldp.to_vec())]);
        let sockets = [0, 2, 3, 4, 5].map(socket);
        assert!(places().captured(&sockets, &filters, Tap::Decapsulated(8472)).is_empty());
    }
}
