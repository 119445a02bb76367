//! What the kernel copies: a classic BPF program for each packet socket (Documentation/networking/filter.rst).

use flannel_common::{packet::Mac, vxlan::Vni};
use ipnet::Ipv4Net;
use nix::libc::{self, sock_filter};

use super::overlay::Tunnel;

// linux/bpf_common.h: class, size and mode in one word.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
/// From an offset in the index register on.
const LOAD_WORD_INDEXED: u16 = 0x40;
const LOAD_HALF_INDEXED: u16 = 0x48;
/// The length of an IPv4 header into the index register: four times the low half of an octet.
const LOAD_HEADER_LEN: u16 = 0xb1;
const AND: u16 = 0x54;
const SHIFT_RIGHT: u16 = 0x74;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

// linux/filter.h: what the kernel knows of a packet, by offsets that none has.
const PROTOCOL: u32 = 0xffff_f000;
const PACKET_TYPE: u32 = PROTOCOL + 4;
const VLAN_TAG: u32 = PROTOCOL + 44;

const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_OFFSET: u32 = 12;
const VLAN_ID: u32 = 0x0fff;
const FRAGMENT_OFFSET: u32 = 0x1fff;
/// The whole packet.
const ALL: u32 = u32::MAX;

/// Where a comparison leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Next,
    /// Past so many instructions.
    Over(u8),
    Accept,
    Reject,
}

/// Which packets of a link are the overlay's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Octets of link-layer header: Ethernet's, or none.
    pub(super) header_len: u16,
    pub(super) tunnel: Option<Tunnel>,
    /// The Network, where packets of it pass without a tunnel.
    pub(super) direct: Option<Ipv4Net>,
    /// What is for this MAC has been taken out of its tunnel by XDP.
    pub(super) decapsulated: Option<Mac>,
}

/// A program being written.
#[derive(Default)]
struct Program(Vec<(u16, u32, To, To)>);

impl Program {
    fn add(&mut self, code: u16, operand: u32) {
        self.0.push((code, operand, To::Next, To::Next));
    }

    fn jump(&mut self, code: u16, operand: u32, if_true: To, if_false: To) {
        self.0.push((code, operand, if_true, if_false));
    }

    /// With the two ends, which all jumps reach: a program has less than 256 instructions.
    fn finish(self) -> Vec<sock_filter> {
        let accept = self.0.len();
        let distance = |place: usize, to: To| match to {
            To::Next => 0,
            To::Over(count) => count,
            To::Accept => (accept - place - 1) as u8,
            To::Reject => (accept - place) as u8,
        };
        let instruction = |(place, &(code, k, if_true, if_false)): (usize, &(u16, u32, To, To))| sock_filter {
            code,
            jt: distance(place, if_true),
            jf: distance(place, if_false),
            k,
        };
        let ends = [ALL, 0].map(|k| sock_filter { code: RETURN, jt: 0, jf: 0, k });
        self.0.iter().enumerate().map(instruction).chain(ends).collect()
    }
}

impl Wanted {
    /// The program that accepts them.
    pub(super) fn program(&self) -> Vec<sock_filter> {
        let mut program = Program::default();
        let base = u32::from(self.header_len);
        if self.header_len > 0 {
            // What is for a VLAN device on this link is seen there. (0 is a priority, and no VLAN.)
            program.add(LOAD_HALF, VLAN_TAG);
            program.add(AND, VLAN_ID);
            program.jump(JUMP_IF_EQUAL, 0, To::Next, To::Reject);
            if let Some([a, b, c, d, e, f]) = self.decapsulated {
                program.add(LOAD_WORD, 0);
                program.jump(JUMP_IF_EQUAL, u32::from_be_bytes([a, b, c, d]), To::Next, To::Over(2));
                program.add(LOAD_HALF, 4);
                program.jump(JUMP_IF_EQUAL, u16::from_be_bytes([e, f]).into(), To::Accept, To::Next);
            }
            // For another MAC: a macvlan's, say, which has a link of its own.
            program.add(LOAD_BYTE, PACKET_TYPE);
            program.jump(JUMP_IF_EQUAL, libc::PACKET_OTHERHOST.into(), To::Reject, To::Next);
            program.add(LOAD_HALF, ETHERTYPE_OFFSET);
        } else {
            program.add(LOAD_HALF, PROTOCOL);
        }
        program.jump(JUMP_IF_EQUAL, ETHERTYPE_IPV4, To::Next, To::Reject);
        if let Some(network) = self.direct {
            for offset in [12, 16] {
                program.add(LOAD_WORD, base + offset);
                program.add(AND, network.netmask().to_bits());
                program.jump(JUMP_IF_EQUAL, network.network().to_bits(), To::Accept, To::Next);
            }
        }
        match self.tunnel {
            Some(tunnel) => tunnel.compare(&mut program, base),
            // Nothing but what was accepted above: the comparison is with what is loaded already, whatever it is.
            None => program.jump(JUMP_IF_EQUAL, 0, To::Reject, To::Reject),
        }
        program.finish()
    }
}

impl Tunnel {
    fn compare(self, program: &mut Program, base: u32) {
        program.add(LOAD_BYTE, base + 9);
        program.jump(JUMP_IF_EQUAL, libc::IPPROTO_UDP as u32, To::Next, To::Reject);
        program.add(LOAD_HALF, base + 6);
        program.jump(JUMP_IF_ANY_BIT, FRAGMENT_OFFSET, To::Reject, To::Next);
        program.add(LOAD_HEADER_LEN, base);
        program.add(LOAD_HALF_INDEXED, base + 2);
        program.jump(JUMP_IF_EQUAL, self.port().into(), To::Next, To::Reject);
        if let Self::Vxlan { vni, .. } = self {
            program.add(LOAD_WORD_INDEXED, base + 12);
            program.add(SHIFT_RIGHT, 8);
            program.jump(JUMP_IF_EQUAL, Vni::get(vni), To::Next, To::Reject);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 8472;
    const VTEP_MAC: Mac = [0x0a, 0, 0, 0, 0, 1];

    /// What the kernel knows of a packet besides its octets.
    #[derive(Clone, Copy)]
    struct Known {
        packet_type: u8,
        vlan_tag: u16,
    }

    const FOR_US: Known = Known { packet_type: 0, vlan_tag: 0 };

    /// What the kernel would say, by the instructions that are used here (`bpf_prog_run_clear_cb`); past the end it rejects.
    fn accepts(program: &[sock_filter], packet: &[u8], known: Known) -> bool {
        let (mut accumulator, mut index, mut place) = (0u32, 0u32, 0);
        let read = |offset: u32, len: usize| -> Option<u32> {
            let octets = packet.get(offset as usize..)?.get(..len)?;
            Some(octets.iter().fold(0, |word, octet| word << 8 | u32::from(*octet)))
        };
        loop {
            let sock_filter { code, jt, jf, k } = program[place];
            place += 1;
            let loaded = match (code, k) {
                (LOAD_HALF, PROTOCOL) => Some(ETHERTYPE_IPV4),
                (LOAD_HALF, VLAN_TAG) => Some(known.vlan_tag.into()),
                (LOAD_BYTE, PACKET_TYPE) => Some(known.packet_type.into()),
                (LOAD_WORD, _) => read(k, 4),
                (LOAD_HALF, _) => read(k, 2),
                (LOAD_BYTE, _) => read(k, 1),
                (LOAD_WORD_INDEXED, _) => read(index + k, 4),
                (LOAD_HALF_INDEXED, _) => read(index + k, 2),
                (LOAD_HEADER_LEN, _) => {
                    let Some(octet) = read(k, 1) else { return false };
                    index = 4 * (octet & 0x0f);
                    continue;
                }
                (AND, _) => Some(accumulator & k),
                (SHIFT_RIGHT, _) => Some(accumulator >> k),
                (RETURN, _) => return k > 0,
                (JUMP_IF_EQUAL | JUMP_IF_ANY_BIT, _) => {
                    let is_true = if code == JUMP_IF_EQUAL { accumulator == k } else { accumulator & k != 0 };
                    place += usize::from(if is_true { jt } else { jf });
                    continue;
                }
                _ => panic!("{code:x}"),
            };
            let Some(loaded) = loaded else { return false };
            accumulator = loaded;
        }
    }

    fn ipv4(options: usize, fragment_offset: u16, source: [u8; 4], destination: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let header = [0x45 + options as u8, 0, 0, 0, 0, 0];
        let rest = [64, 17, 0, 0];
        let options = vec![0; 4 * options];
        [&header[..], &fragment_offset.to_be_bytes(), &rest, &source, &destination, &options, payload].concat()
    }

    fn tunnel(port: u16, vni: u8) -> Vec<u8> {
        let udp = [[0x12, 0x34], port.to_be_bytes(), [0; 2], [0; 2]].concat();
        [&udp[..], &[8, 0, 0, 0, 0, 0, vni, 0], &[0; 60]].concat()
    }

    fn frame(destination: Mac, packet: &[u8]) -> Vec<u8> {
        [&destination[..], &[2; 6], &[8, 0], packet].concat()
    }

    fn vxlan() -> Wanted {
        let vni = Vni::new_checked(7).unwrap();
        let tunnel = Some(Tunnel::Vxlan { port: PORT, vni });
        Wanted { header_len: 14, tunnel, direct: None, decapsulated: Some(VTEP_MAC) }
    }

    const HOSTS: [[u8; 4]; 2] = [[192, 0, 2, 1], [192, 0, 2, 2]];
    const PODS: [[u8; 4]; 2] = [[10, 5, 1, 2], [10, 5, 2, 2]];

    fn between_hosts(options: usize, fragment_offset: u16, payload: &[u8]) -> Vec<u8> {
        ipv4(options, fragment_offset, HOSTS[0], HOSTS[1], payload)
    }

    #[test]
    fn only_packets_of_this_tunnel_are_copied() {
        let program = vxlan().program();
        let is_copied = |packet: &[u8], known| accepts(&program, &frame([1; 6], packet), known);
        let own = between_hosts(0, 0, &tunnel(PORT, 7));
        assert!(is_copied(&own, FOR_US));
        assert!(is_copied(&between_hosts(3, 0, &tunnel(PORT, 7)), FOR_US), "with options");
        assert!(is_copied(&own, Known { vlan_tag: 0x6000, ..FOR_US }), "with a priority");
        assert!(!is_copied(&own, Known { vlan_tag: 0x6005, ..FOR_US }), "of a VLAN");
        assert!(!is_copied(&own, Known { packet_type: libc::PACKET_OTHERHOST, ..FOR_US }), "for another MAC");
        assert!(!is_copied(&between_hosts(0, 0, &tunnel(PORT, 8)), FOR_US), "another VNI");
        assert!(!is_copied(&between_hosts(0, 0, &tunnel(4789, 7)), FOR_US), "another port");
        assert!(!is_copied(&between_hosts(0, 185, &tunnel(PORT, 7)), FOR_US), "a later fragment");
        assert!(!is_copied(&ipv4(0, 0, PODS[0], PODS[1], &[0; 60]), FOR_US), "no tunnel packet");
        assert!(!is_copied(&[0x45; 6], FOR_US), "too short");
    }

    #[test]
    fn what_xdp_took_out_of_the_tunnel_is_told_by_its_mac() {
        let inner = frame(VTEP_MAC, &ipv4(0, 0, PODS[1], PODS[0], &[0; 40]));
        let known = Known { packet_type: libc::PACKET_OTHERHOST, ..FOR_US };
        assert!(accepts(&vxlan().program(), &inner, known));
        assert!(!accepts(&Wanted { decapsulated: None, ..vxlan() }.program(), &inner, known));
        // One that differs in its second part.
        let other = frame([0x0a, 0, 0, 0, 0, 2], &ipv4(0, 0, PODS[1], PODS[0], &[0; 40]));
        assert!(!accepts(&vxlan().program(), &other, known));
    }

    #[test]
    fn packets_of_the_network_are_copied_where_there_is_no_tunnel() {
        let network = "10.5.0.0/16".parse().unwrap();
        let direct = Wanted { direct: Some(network), ..vxlan() };
        for wanted in [direct, Wanted { tunnel: None, decapsulated: None, ..direct }] {
            let program = wanted.program();
            let is_copied = |source, destination| {
                accepts(&program, &frame([1; 6], &ipv4(0, 0, source, destination, &[0; 40])), FOR_US)
            };
            assert!(is_copied(PODS[0], PODS[1]) && is_copied(HOSTS[0], PODS[1]) && is_copied(PODS[0], HOSTS[1]));
            assert!(!is_copied(HOSTS[0], HOSTS[1]));
            let in_tunnel = frame([1; 6], &between_hosts(0, 0, &tunnel(PORT, 7)));
            assert_eq!(accepts(&program, &in_tunnel, FOR_US), wanted.tunnel.is_some());
        }
    }

    #[test]
    fn without_a_link_header_the_packet_is_first() {
        let program = Wanted { header_len: 0, ..vxlan() }.program();
        assert!(accepts(&program, &between_hosts(0, 0, &tunnel(PORT, 7)), FOR_US));
        assert!(!accepts(&program, &frame([1; 6], &between_hosts(0, 0, &tunnel(PORT, 7))), FOR_US));
        let udp = Wanted { tunnel: Some(Tunnel::Udp { port: 8285 }), ..vxlan() }.program();
        assert!(accepts(&udp, &frame([1; 6], &between_hosts(0, 0, &tunnel(8285, 9))), FOR_US));
    }
}
