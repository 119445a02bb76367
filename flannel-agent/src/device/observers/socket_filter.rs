//! Whether a packet socket's filter can let through a packet of the overlay: classic BPF (Documentation/networking/filter.rst),
//! followed along every way that a packet of which not all is known could take.
//!
//! A DHCP client's socket, or one for LLDP, is there for packets that are none of the overlay's, and says so by its filter.

/// Instructions in one word each: `struct sock_filter` (linux/filter.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) code: u16,
    pub(super) if_true: u8,
    pub(super) if_false: u8,
    pub(super) operand: u32,
}

// linux/bpf_common.h, linux/filter.h.
const LOAD: u16 = 0;
const LOAD_INDEX: u16 = 1;
const STORE: u16 = 2;
const STORE_INDEX: u16 = 3;
const COMPUTE: u16 = 4;
const JUMP: u16 = 5;
const RETURN: u16 = 6;
const IMMEDIATE: u16 = 0x00;
const ABSOLUTE: u16 = 0x20;
const INDIRECT: u16 = 0x40;
const MEMORY: u16 = 0x60;
const HEADER_LEN: u16 = 0xa0;
const ADD: u16 = 0x00;
const OR: u16 = 0x40;
const AND: u16 = 0x50;
const ALWAYS: u16 = 0x00;
const EQUAL: u16 = 0x10;
const GREATER: u16 = 0x20;
const GREATER_EQUAL: u16 = 0x30;
const ANY_BIT: u16 = 0x40;
const BY_INDEX: u16 = 0x08;
const BY_ACCUMULATOR: u16 = 0x10;
const TO_ACCUMULATOR: u16 = 0x80;
/// `SKF_AD_OFF` and below it what the kernel knows of the packet; the first, `SKF_AD_PROTOCOL`, is its EtherType.
const ANCILLARY: u32 = 0xffff_f000;
/// `SKF_NET_OFF`: from the network header on.
const FROM_NETWORK: u32 = 0xfff0_0000;

const MEMORY_WORDS: usize = 16;
const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERNET_LEN: usize = 14;
/// With ports.
const KNOWN_LEN: usize = ETHERNET_LEN + 24;
/// Of the destination port, from the network header on.
const PORT_OFFSET: usize = 22;
/// DHCP's.
const FOREIGN_PORTS: [u32; 2] = [67, 68];

/// A packet of which some bits are known.
pub(super) struct Packet {
    bytes: [u8; KNOWN_LEN],
    known: [u8; KNOWN_LEN],
    /// Where the socket sees it begin.
    start: usize,
}

impl Packet {
    /// One of a pod's: IPv4 with no options, to one host, to any port but DHCP's.
    pub(super) fn of_pod(is_raw: bool) -> Self {
        let mut packet =
            Self { bytes: [0; KNOWN_LEN], known: [0; KNOWN_LEN], start: if is_raw { 0 } else { ETHERNET_LEN } };
        // Not a group's MAC.
        packet.set(0, 0, 1);
        packet.set(12, 8, 0xff);
        packet.set(13, 0, 0xff);
        packet.set(ETHERNET_LEN, 0x45, 0xff);
        // No later fragment.
        packet.set(ETHERNET_LEN + 6, 0, 0x9f);
        packet.set(ETHERNET_LEN + 7, 0, 0xff);
        packet
    }

    /// One in the tunnel, to this port.
    pub(super) fn of_tunnel(is_raw: bool, port: u16) -> Self {
        let mut packet = Self::of_pod(is_raw);
        packet.set(ETHERNET_LEN + 9, 17, 0xff);
        let [high, low] = port.to_be_bytes();
        packet.set(ETHERNET_LEN + PORT_OFFSET, high, 0xff);
        packet.set(ETHERNET_LEN + PORT_OFFSET + 1, low, 0xff);
        packet
    }

    fn set(&mut self, offset: usize, byte: u8, known: u8) {
        if let (Some(at), Some(mask)) = (self.bytes.get_mut(offset), self.known.get_mut(offset)) {
            (*at, *mask) = (byte, known);
        }
    }

    fn load(&self, offset: u32, size: usize) -> Value {
        let from_start =
            |base: usize, offset: u32| usize::try_from(offset).ok().and_then(|offset| base.checked_add(offset));
        let place = match offset {
            ANCILLARY => return Value::constant(ETHERTYPE_IPV4),
            FROM_NETWORK..ANCILLARY => from_start(ETHERNET_LEN, offset - FROM_NETWORK),
            offset => from_start(self.start, offset),
        };
        let range = place.and_then(|place| Some(place..place.checked_add(size)?));
        let bytes = range.clone().and_then(|range| Some((self.bytes.get(range.clone())?, self.known.get(range)?)));
        let Some((bytes, known)) = bytes else { return Value::UNKNOWN };
        let word = |bytes: &[u8]| bytes.iter().fold(0, |word, byte| word << 8 | u32::from(*byte));
        // What is above a byte or a half word is zero.
        let above = u32::MAX.checked_shl(8 * size as u32).unwrap_or(0);
        let is_port = place == Some(ETHERNET_LEN + PORT_OFFSET) && size == 2;
        Value { bits: word(bytes), known: word(known) | above, is_port }
    }
}

/// A word of which some bits are known.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Value {
    bits: u32,
    known: u32,
    /// The destination port.
    is_port: bool,
}

impl Value {
    const UNKNOWN: Self = Self { bits: 0, known: 0, is_port: false };

    const fn constant(bits: u32) -> Self {
        Self { bits, known: u32::MAX, is_port: false }
    }

    fn exact(self) -> Option<u32> {
        (self.known == u32::MAX).then_some(self.bits)
    }

    /// What is known of either.
    fn or(self, other: Self) -> Self {
        let known = self.known & other.known & !(self.bits ^ other.bits);
        Self { bits: self.bits & known, known, is_port: self.is_port && other.is_port }
    }

    fn and(self, mask: u32) -> Self {
        Self { bits: self.bits & mask, known: self.known | !mask, is_port: false }
    }

    /// Whether it is equal to that; [`None`] where it may be.
    fn equals(self, other: u32) -> Option<bool> {
        if let Some(exact) = self.exact() {
            return Some(exact == other);
        }
        let differs = (self.bits ^ other) & self.known != 0 || self.is_port && FOREIGN_PORTS.contains(&other);
        differs.then_some(false)
    }

    fn has_any(self, bits: u32) -> Option<bool> {
        match self.and(bits) {
            Self { bits, known, .. } if bits & known != 0 => Some(true),
            Self { known: u32::MAX, .. } => Some(false),
            _ => None,
        }
    }
}

/// Registers and memory, before an instruction.
#[derive(Clone)]
struct State {
    accumulator: Value,
    index: Value,
    memory: [Value; MEMORY_WORDS],
}

impl State {
    fn or(&self, other: &Self) -> Self {
        let mut memory = self.memory;
        for (value, other) in memory.iter_mut().zip(other.memory) {
            *value = value.or(other);
        }
        Self { accumulator: self.accumulator.or(other.accumulator), index: self.index.or(other.index), memory }
    }

    fn loaded(&self, packet: &Packet, Instruction { code, operand, .. }: Instruction) -> Value {
        let size = match code & 0x18 {
            0x00 => 4,
            0x08 => 2,
            _ => 1,
        };
        match code & 0xe0 {
            IMMEDIATE => Value::constant(operand),
            ABSOLUTE => packet.load(operand, size),
            INDIRECT => {
                self.index.exact().map_or(Value::UNKNOWN, |index| packet.load(index.wrapping_add(operand), size))
            }
            MEMORY => self.memory.get(operand as usize).copied().unwrap_or(Value::UNKNOWN),
            HEADER_LEN => {
                packet.load(operand, 1).and(0xf).exact().map_or(Value::UNKNOWN, |words| Value::constant(4 * words))
            }
            _ => Value::UNKNOWN,
        }
    }

    fn operand(&self, Instruction { code, operand, .. }: Instruction) -> Value {
        if code & BY_INDEX == 0 { Value::constant(operand) } else { self.index }
    }

    fn computed(&self, instruction: Instruction) -> Value {
        let (value, operand) = (self.accumulator, self.operand(instruction).exact());
        match (instruction.code & 0xf0, value.exact(), operand) {
            (AND, _, Some(mask)) => value.and(mask),
            (ADD, Some(value), Some(operand)) => Value::constant(value.wrapping_add(operand)),
            (OR, Some(value), Some(operand)) => Value::constant(value | operand),
            _ => Value::UNKNOWN,
        }
    }

    /// Whether a jump is taken; [`None`] where it may be.
    fn takes(&self, instruction: Instruction) -> Option<bool> {
        let (value, operand) = (self.accumulator, self.operand(instruction).exact());
        match (instruction.code & 0xf0, value.exact(), operand) {
            (EQUAL, _, Some(operand)) => value.equals(operand),
            (ANY_BIT, _, Some(operand)) => value.has_any(operand),
            (GREATER, Some(value), Some(operand)) => Some(value > operand),
            (GREATER_EQUAL, Some(value), Some(operand)) => Some(value >= operand),
            _ => None,
        }
    }
}

/// Whether there is a packet like this that the filter lets through. One that is not understood may.
pub(super) fn may_accept(filter: &[Instruction], packet: &Packet) -> bool {
    let mut states: Vec<Option<State>> = vec![None; filter.len()];
    let begin =
        State { accumulator: Value::constant(0), index: Value::constant(0), memory: [Value::UNKNOWN; MEMORY_WORDS] };
    match states.first_mut() {
        Some(first) => *first = Some(begin),
        None => return true,
    }
    // Jumps lead forward only (`bpf_check_classic`, net/core/filter.c).
    for (place, instruction) in filter.iter().enumerate() {
        let Some(mut state) = states.get_mut(place).and_then(Option::take) else { continue };
        let Instruction { code, if_true, if_false, operand } = *instruction;
        let mut targets = [Some(0), None];
        match code & 0x07 {
            LOAD => state.accumulator = state.loaded(packet, *instruction),
            LOAD_INDEX => state.index = state.loaded(packet, *instruction),
            STORE | STORE_INDEX => {
                let value = if code & 0x07 == STORE { state.accumulator } else { state.index };
                if let Some(word) = state.memory.get_mut(operand as usize) {
                    *word = value;
                }
            }
            COMPUTE => state.accumulator = state.computed(*instruction),
            JUMP if code & 0xf0 == ALWAYS => targets = [Some(operand as usize), None],
            JUMP => {
                let (yes, no) = (usize::from(if_true), usize::from(if_false));
                targets = match state.takes(*instruction) {
                    Some(true) => [Some(yes), None],
                    Some(false) => [Some(no), None],
                    None => [Some(yes), Some(no)],
                };
            }
            RETURN => {
                let result = if code & 0x18 == BY_ACCUMULATOR { state.accumulator } else { Value::constant(operand) };
                if result.exact() != Some(0) {
                    return true;
                }
                continue;
            }
            _ if code & 0xf8 == TO_ACCUMULATOR => state.accumulator = state.index,
            _ => state.index = state.accumulator,
        }
        for target in targets.into_iter().flatten() {
            // One that leads out of the program would not have been taken by the kernel.
            let Some(next) = place.checked_add(1 + target).and_then(|next| states.get_mut(next)) else { return true };
            *next = Some(next.as_ref().map_or_else(|| state.clone(), |other| other.or(&state)));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From lines of `tcpdump -ddd`: the number of instructions, then code, jumps and operand of each.
    fn filter(text: &str) -> Vec<Instruction> {
        text.lines()
            .skip(1)
            .map(|line| {
                let numbers: Vec<u32> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
                let [code, if_true, if_false, operand] = numbers[..] else { panic!("{line}") };
                let (code, if_true, if_false) = (code as u16, if_true as u8, if_false as u8);
                Instruction { code, if_true, if_false, operand }
            })
            .collect()
    }

    // tcpdump -ddd -y EN10MB.
    const DHCP: &str = "11\n40 0 0 12\n21 0 8 2048\n48 0 0 23\n21 0 6 17\n40 0 0 20\n69 4 0 8191\n177 0 0 14\n72 0 0 16\n21 0 1 68\n6 0 0 262144\n6 0 0 0";
    const LLDP: &str = "4\n40 0 0 12\n21 0 1 35020\n6 0 0 262144\n6 0 0 0";
    /// Any group's MAC, as what finds neighbours by several protocols asks first.
    const GROUP: &str = "4\n48 0 0 0\n69 0 1 1\n6 0 0 262144\n6 0 0 0";
    const TCP: &str = "6\n40 0 0 12\n21 0 3 2048\n48 0 0 23\n21 0 1 6\n6 0 0 262144\n6 0 0 0";
    const PORT_53: &str = "11\n40 0 0 12\n21 0 8 2048\n48 0 0 23\n21 0 6 17\n40 0 0 20\n69 4 0 8191\n177 0 0 14\n72 0 0 16\n21 0 1 53\n6 0 0 262144\n6 0 0 0";
    const TUNNEL: &str = "11\n40 0 0 12\n21 0 8 2048\n48 0 0 23\n21 0 6 17\n40 0 0 20\n69 4 0 8191\n177 0 0 14\n72 0 0 16\n21 0 1 8472\n6 0 0 262144\n6 0 0 0";

    #[test]
    fn a_filter_for_others_is_told_from_one_that_may_show_pods() {
        for (name, text, of_pod, of_tunnel) in [
            ("dhcp", DHCP, false, false),
            ("lldp", LLDP, false, false),
            ("group", GROUP, false, false),
            ("tcp", TCP, true, false),
            ("port 53", PORT_53, true, false),
            ("tunnel", TUNNEL, true, true),
            ("everything", "1\n6 0 0 262144", true, true),
            ("nothing", "1\n6 0 0 0", false, false),
        ] {
            let filter = filter(text);
            assert_eq!(may_accept(&filter, &Packet::of_pod(true)), of_pod, "{name}");
            assert_eq!(may_accept(&filter, &Packet::of_tunnel(true, 8472)), of_tunnel, "{name}");
        }
    }

    #[test]
    fn without_a_link_header_the_network_header_is_first() {
        // ldb [9]; jeq #1: ICMP or not.
        let icmp = filter("4\n48 0 0 9\n21 0 1 1\n6 0 0 262144\n6 0 0 0");
        assert!(may_accept(&icmp, &Packet::of_pod(false)));
        assert!(!may_accept(&icmp, &Packet::of_tunnel(false, 8472)));
        // ldh ethertype; jeq #IPv6.
        let ipv6 = filter("4\n40 0 0 4294963200\n21 0 1 34525\n6 0 0 262144\n6 0 0 0");
        assert!(!may_accept(&ipv6, &Packet::of_pod(false)));
    }

    #[test]
    fn whatever_the_program_it_ends() {
        let mut state = 1_u32;
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for _ in 0..20_000 {
            let len = number() % 12;
            let any = |number: &mut dyn FnMut() -> u32| Instruction {
                code: number() as u16,
                if_true: number() as u8,
                if_false: number() as u8,
                operand: if number().is_multiple_of(2) { number() } else { number() % 64 },
            };
            let program: Vec<_> = (0..len).map(|_| any(&mut number)).collect();
            may_accept(&program, &Packet::of_pod(len % 2 == 0));
        }
    }
}
