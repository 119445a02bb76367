//! Connections that conntrack has given up, as ctnetlink tells of them (include/uapi/linux/netfilter/nfnetlink_conntrack.h;
//! `ctnetlink_conntrack_event`, net/netfilter/nf_conntrack_netlink.c), and which flows end with one.
//!
//! The kernel writes such a message with both tuples in front, each with its attributes in the same order. What is read here
//! is that order only; anything else is [`Unclear`].

use crate::flow::FlowKey;

/// A message has another form than the one that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unclear;

/// `struct nlattr`, in host order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Attribute {
    len: u16,
    kind: u16,
}

impl Attribute {
    /// Without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
    const KIND_MASK: u16 = 0x3fff;

    const fn is(self, kind: u16, len: u16) -> bool {
        self.kind & Self::KIND_MASK == kind && self.len == len
    }
}

/// `CTA_TUPLE_ORIG` or `CTA_TUPLE_REPLY` of an IPv4 packet with ports. Addresses and ports are in wire order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tuple {
    whole: Attribute,
    ip: Attribute,
    source_attribute: Attribute,
    source: [u8; 4],
    destination_attribute: Attribute,
    destination: [u8; 4],
    transport: Attribute,
    protocol_attribute: Attribute,
    protocol: u8,
    protocol_padding: [u8; 3],
    source_port_attribute: Attribute,
    source_port: [u8; 2],
    source_port_padding: [u8; 2],
    destination_port_attribute: Attribute,
    destination_port: [u8; 2],
    destination_port_padding: [u8; 2],
}

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const AF_INET: u8 = 2;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

impl Tuple {
    /// The flow from its source, where the protocol has ports; [`None`] where it has none.
    ///
    /// # Errors
    /// [`Unclear`].
    #[inline(always)]
    fn flow(&self, direction: u16) -> Result<Option<FlowKey>, Unclear> {
        const CTA_TUPLE_IP: u16 = 1;
        const CTA_TUPLE_PROTO: u16 = 2;
        const CTA_IP_V4_SRC: u16 = 1;
        const CTA_IP_V4_DST: u16 = 2;
        const CTA_PROTO_NUM: u16 = 1;
        const CTA_PROTO_SRC_PORT: u16 = 2;
        const CTA_PROTO_DST_PORT: u16 = 3;
        // With a zone of its own (`CTA_TUPLE_ZONE`), a tuple is longer.
        let is_addressed = self.whole.kind & Attribute::KIND_MASK == direction
            && self.whole.len as usize >= size_of::<Self>()
            && self.ip.is(CTA_TUPLE_IP, 20)
            && self.source_attribute.is(CTA_IP_V4_SRC, 8)
            && self.destination_attribute.is(CTA_IP_V4_DST, 8)
            && self.transport.kind & Attribute::KIND_MASK == CTA_TUPLE_PROTO
            && self.protocol_attribute.is(CTA_PROTO_NUM, 5);
        let is_other = is_addressed && self.protocol != IPPROTO_TCP && self.protocol != IPPROTO_UDP;
        if is_other {
            return Ok(None);
        }
        let has_ports = self.transport.len == 28
            && self.source_port_attribute.is(CTA_PROTO_SRC_PORT, 6)
            && self.destination_port_attribute.is(CTA_PROTO_DST_PORT, 6);
        if !is_addressed || !has_ports {
            return Err(Unclear);
        }
        Ok(Some(FlowKey {
            local: self.source,
            remote: self.destination,
            local_port: self.source_port,
            remote_port: self.destination_port,
            protocol: self.protocol as u32,
        }))
    }
}

/// A message, as far as the tuple of the connection's first packet.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// `struct nlmsghdr`.
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    sender: u32,
    /// `struct nfgenmsg`.
    family: u8,
    version: u8,
    resource: [u8; 2],
    original: Tuple,
}

impl Message {
    /// Where the tuple of the answers is, in bytes from the beginning.
    #[inline(always)]
    pub fn reply_offset(&self) -> usize {
        const ALIGNMENT: usize = 4;
        let behind = size_of::<Self>() - size_of::<Tuple>();
        behind + (self.original.whole.len as usize).next_multiple_of(ALIGNMENT)
    }

    /// The flow of the connection's first packet, as its sender sees it. [`None`] where nothing ended that can bypass the
    /// stack.
    ///
    /// # Errors
    /// [`Unclear`].
    #[inline(always)]
    pub fn original(&self) -> Result<Option<FlowKey>, Unclear> {
        /// `NFNL_SUBSYS_CTNETLINK`, `IPCTNL_MSG_CT_DELETE`.
        const ENDED: u16 = 1 << 8 | 2;
        if self.kind != ENDED || self.family != AF_INET {
            return Ok(None);
        }
        self.original.flow(CTA_TUPLE_ORIG)
    }
}

/// A message of rtnetlink's about a link, as far as its own header (`struct nlmsghdr`, `struct ifinfomsg`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LinkMessage {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    sender: u32,
    family: u8,
    padding: u8,
    link_type: u16,
    index: u32,
    link_flags: u32,
    change: u32,
}

impl LinkMessage {
    /// The number of the link that is gone. (A bridge's port that is one no longer is told of by `AF_BRIDGE`.)
    #[inline(always)]
    pub const fn gone(&self) -> Option<u32> {
        const RTM_DELLINK: u16 = 17;
        const AF_UNSPEC: u8 = 0;
        if self.kind == RTM_DELLINK && self.family == AF_UNSPEC { Some(self.index) } else { None }
    }
}

/// The flow of the answers, as who answers sees it.
///
/// # Errors
/// [`Unclear`].
#[inline(always)]
pub fn reply(tuple: &Tuple) -> Result<FlowKey, Unclear> {
    tuple.flow(CTA_TUPLE_REPLY)?.ok_or(Unclear)
}

/// The flows that end with a connection, as any of its ends may be a local pod: before the stack and after, to and fro. Where
/// nothing was translated, what is before and after is the same.
#[inline(always)]
pub fn flows(original: FlowKey, reply: FlowKey) -> [Option<FlowKey>; 4] {
    let back = reversed(original);
    let is_plain = back == reply;
    let translated = |key| if is_plain { None } else { Some(key) };
    [Some(original), Some(back), translated(reply), translated(reversed(reply))]
}

const fn reversed(key: FlowKey) -> FlowKey {
    let FlowKey { local, remote, local_port, remote_port, protocol } = key;
    FlowKey { local: remote, remote: local, local_port: remote_port, remote_port: local_port, protocol }
}

/// What the programs that forget flows are patched with at load.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bypass {
    /// For how long a flow may bypass the stack after the stack let a packet of it out, in nanoseconds.
    pub time: u64,
    /// Network address of this host's lease, host order.
    pub subnet: u32,
    /// Netmask of this host's lease.
    pub subnet_mask: u32,
}

impl Bypass {
    /// Whether a flow can be one of a pod's of this host.
    #[inline(always)]
    pub const fn is_local(&self, key: &FlowKey) -> bool {
        u32::from_be_bytes(key.local) & self.subnet_mask == self.subnet
    }

    /// Whether a flow may bypass the stack, where the stack let a packet of it out then. To be on the safe side, for twice
    /// as long: the times are those of another clock, which is as exact as the kernel's tick.
    #[inline(always)]
    pub const fn may_be_fresh(&self, released: u64, now: u64) -> bool {
        // Another CPU may have noted it since.
        let age = now.wrapping_sub(released) as i64;
        released != 0 && (age < 0 || age as u64 / 2 <= self.time)
    }
}

/// The name of the read-only global that holds [`Bypass`].
pub const BYPASS: &str = "BYPASS";

/// For how long a packet may still be in the stack that conntrack let through before it gave the connection up, in
/// nanoseconds. What such a packet leaves noted is forgotten when that time is over.
pub const REST: u64 = 5_000_000;
/// The least time between two messages that the agent gets, in nanoseconds. Shorter than [`REST`]: what comes after the agent
/// has found nothing left is always told.
pub const WAKE_INTERVAL: u64 = 4_000_000;

/// What the program that forgets once more has found.
pub mod left {
    /// No connection that ended is left.
    pub const NOTHING: u32 = 0;
    /// Those left have ended within [`REST`](super::REST).
    pub const YOUNG: u32 = 1;
    /// There are more, which a next run forgets.
    pub const MORE: u32 = 2;
    /// A message was [`Unclear`](super::Unclear), or there was no room: any flow may have ended.
    pub const UNCLEAR: u32 = 4;
}

/// Which flows the program that looks at all of them forgets: its packet, behind an Ethernet header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Not 0: all.
    pub everything: u32,
    /// Those into these veths, and those of which it is not known; 0 for none.
    pub veths: [u32; Selection::VETHS],
    /// How many it has forgotten.
    pub forgotten: u32,
}

impl Selection {
    /// As many veths as it takes at once.
    pub const VETHS: usize = 14;
}

const _: () = {
    assert!(size_of::<Tuple>() == 52 && size_of::<Message>() == 72 && size_of::<Selection>() == 64);
    assert!(size_of::<LinkMessage>() == 32);
    assert!(WAKE_INTERVAL < REST);
};

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only, no padding.
unsafe impl aya::Pod for Bypass {}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP connection of 10.5.1.2:40000 to 10.96.0.10:53, which 10.5.2.2:5353 answers, as Linux 6.18 tells of its end.
    const UDP: [u32; 33] = [
        0x94000000, 0x02010000, 0x00000000, 0xf93e0000, 0x02000000, 0x34000180, 0x14000180, 0x08000100, 0x0a050102,
        0x08000200, 0x0a60000a, 0x1c000280, 0x05000100, 0x11000000, 0x06000200, 0x9c400000, 0x06000300, 0x00350000,
        0x34000280, 0x14000180, 0x08000100, 0x0a050202, 0x08000200, 0x0a050102, 0x1c000280, 0x05000100, 0x11000000,
        0x06000200, 0x14e90000, 0x06000300, 0x9c400000, 0x08000c00, 0x76c6cd00,
    ];
    const TYPE_WORD: usize = 1;
    const FAMILY_WORD: usize = 4;
    const ORIGINAL_WORD: usize = 5;
    const REPLY_WORD: usize = 18;

    const CLIENT: ([u8; 4], [u8; 2]) = ([10, 5, 1, 2], 40000_u16.to_be_bytes());
    const SERVICE: ([u8; 4], [u8; 2]) = ([10, 96, 0, 10], 53_u16.to_be_bytes());
    const BACKEND: ([u8; 4], [u8; 2]) = ([10, 5, 2, 2], 5353_u16.to_be_bytes());

    fn flow((local, local_port): ([u8; 4], [u8; 2]), (remote, remote_port): ([u8; 4], [u8; 2])) -> FlowKey {
        FlowKey { local, remote, local_port, remote_port, protocol: 17 }
    }

    /// Both tuples of a message, as the program reads them.
    fn read(words: &[u32]) -> Result<Option<(FlowKey, FlowKey)>, Unclear> {
        fn at<T: Copy>(bytes: &[u8], offset: usize) -> Result<T, Unclear> {
            let bytes = bytes.get(offset..offset + size_of::<T>()).ok_or(Unclear)?;
            // SAFETY: as long as a T, which is made of integers only.
            Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let message: Message = at(&bytes, 0)?;
        let Some(original) = message.original()? else { return Ok(None) };
        Ok(Some((original, reply(&at(&bytes, message.reply_offset())?)?)))
    }

    fn with(place: usize, word: u32) -> Vec<u32> {
        let mut words = UDP.to_vec();
        words[place] = word;
        words
    }

    #[test]
    fn a_translated_connection_has_four_flows() {
        let (original, reply) = read(&UDP).unwrap().unwrap();
        assert_eq!((original, reply), (flow(CLIENT, SERVICE), flow(BACKEND, CLIENT)));
        let ends = [flow(CLIENT, SERVICE), flow(SERVICE, CLIENT), flow(BACKEND, CLIENT), flow(CLIENT, BACKEND)];
        assert_eq!(flows(original, reply), ends.map(Some));
        let plain = flows(flow(CLIENT, BACKEND), flow(BACKEND, CLIENT));
        assert_eq!(plain, [Some(flow(CLIENT, BACKEND)), Some(flow(BACKEND, CLIENT)), None, None]);
        let bypass = Bypass { time: 1, subnet: 0x0a05_0100, subnet_mask: 0xffff_ff00 };
        assert_eq!(ends.map(|key| bypass.is_local(&key)), [true, false, false, true]);
    }

    #[test]
    fn a_flow_is_fresh_for_the_time_of_the_bypass_at_least() {
        const SECOND: u64 = 1_000_000_000;
        let bypass = Bypass { time: SECOND, subnet: 0, subnet_mask: 0 };
        let fresh = |released| bypass.may_be_fresh(released, 10 * SECOND);
        assert_eq!([0, 1, 7 * SECOND].map(fresh), [false; 3]);
        assert_eq!([8 * SECOND, 9 * SECOND, 10 * SECOND, 11 * SECOND].map(fresh), [true; 4]);
        // Where the kernel was booted a moment ago.
        assert!(!bypass.may_be_fresh(0, 5));
    }

    /// `CTA_TUPLE_ZONE`, of the original direction only.
    #[test]
    fn a_zone_makes_a_tuple_longer() {
        let mut words = UDP.to_vec();
        words[ORIGINAL_WORD] = 0x3c000180;
        words.splice(REPLY_WORD..REPLY_WORD, [0x06000300, 0x00070000]);
        assert_eq!(read(&words), read(&UDP));
    }

    #[test]
    fn what_is_no_end_of_a_flow_is_passed_over() {
        for (what, words) in [
            ("a new connection", with(TYPE_WORD, 0x00010000)),
            ("another table's", with(TYPE_WORD, 0x02020000)),
            ("IPv6", with(FAMILY_WORD, 0x0a000000)),
            ("ICMP", with(13, 0x01000000)),
        ] {
            assert_eq!(read(&words), Ok(None), "{what}");
        }
        // In another direction's place ICMP is no answer to UDP.
        assert_eq!(read(&with(26, 0x01000000)), Err(Unclear));
    }

    #[test]
    fn what_has_another_form_is_unclear() {
        for place in [5, 6, 7, 9, 11, 12, 14, 16, 19, 20, 22, 24, 25, 27, 29] {
            for changed in [0x0100_0000, 0x0000_0400] {
                assert_eq!(read(&with(place, UDP[place] ^ changed)), Err(Unclear), "word {place}");
            }
        }
        for len in 5..REPLY_WORD + 13 {
            assert_eq!(read(&UDP[..len]), Err(Unclear), "{len} words");
        }
    }
}
