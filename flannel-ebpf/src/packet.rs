//! The packet: the only place that touches its memory, and that calls helpers which change or redirect it.

use core::{
    ffi::c_void,
    mem::{MaybeUninit, offset_of},
    ptr,
};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_ADJ_ROOM_ENCAP_L2_SHIFT, BPF_CSUM_LEVEL_DEC, BPF_F_ADJ_ROOM_ENCAP_L2_ETH,
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
        BPF_F_ADJ_ROOM_NO_CSUM_RESET, BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_adj_room_mode,
        bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1, bpf_tunnel_key,
    },
    helpers::{
        bpf_clone_redirect, bpf_csum_level, bpf_get_hash_recalc, bpf_get_prandom_u32, bpf_l4_csum_replace,
        bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_adjust_room, bpf_skb_change_type,
        bpf_skb_load_bytes, bpf_skb_set_tunnel_key, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use flannel_common::{drops::FRAME_LEN, flow::FlowKey, maps::Decapsulated, packet::OuterHeader, vxlan};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    tcp::TcpHdr,
    udp::UdpHdr,
    vxlan::VxlanHdr,
};

use crate::routes::chosen;

/// `AF_INET`, for `struct bpf_redir_neigh`.
const AF_INET: u32 = 2;
/// `PACKET_HOST` (include/uapi/linux/if_packet.h): addressed to the device's MAC.
const PACKET_HOST: u32 = 0;
/// `PACKET_OTHERHOST`: addressed to another host's MAC.
const PACKET_OTHERHOST: u32 = 3;
/// The VLAN id within a tag's control information (IEEE 802.1Q).
const VLAN_ID_MASK: u32 = 0x0fff;
/// What one program tells another of the same overlay that sees the packet later on this host, in `tc_index`. The field
/// stays with a packet through reassembly, segmentation, bridge, netfilter, routing and the kernel's vxlan device, and
/// through a veth to other hosts or pods on the same kernel; so each program writes it before another believes it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Note {
    /// `from_pod` left a packet with this tag to the stack.
    FromPod(u32),
    /// `to_overlay` left it to the kernel. The tag is the VNI, as far as the bits go.
    HandedOn(u32),
    /// `from_underlay` let a packet with this tag through.
    Admitted(u32),
    /// `from_overlay` saw it come out of the tunnel. Another note than before, since what it holds may be a tunnel packet to
    /// this host itself, of which the inner one comes with the same note.
    Received(u32),
}

impl Note {
    /// 16 bits that no classifier of others is likely to choose: three for the kind, the rest for the tag.
    #[inline(always)]
    const fn index(self) -> u32 {
        match self {
            Self::FromPod(tag) => 0x8000 | tag & FlowKey::TAG_MASK,
            Self::HandedOn(tag) => 0xa000 | tag & FlowKey::TAG_MASK,
            Self::Admitted(tag) => 0xc000 | tag & FlowKey::TAG_MASK,
            Self::Received(tag) => 0xe000 | tag & FlowKey::TAG_MASK,
        }
    }
}

/// `EALREADY`: `bpf_skb_adjust_room` on a packet that is encapsulated already.
const EALREADY: i64 = 114;

/// Why no room could be made for an outer header. The packet is as it was.
pub(crate) enum NoRoom {
    /// It is a tunnel packet that the kernel has still to segment.
    Nested,
    /// The kernel refused.
    Refused,
}

/// A packet that headers are read from.
pub(crate) trait Headers {
    /// Bytes from the link-layer header on.
    fn len(&self) -> u32;
    /// Whether the kernel made one of several, with lengths of its own in the headers.
    fn is_aggregate(&self) -> bool;
    /// The device that it is at.
    fn device(&self) -> u32;
    /// What helpers know it by.
    fn context(&self) -> *mut c_void;
    /// Copies its first bytes. [`Err`] where there are fewer.
    fn copy_to(&self, bytes: &mut [u8; FRAME_LEN], len: u32) -> Result<(), ()>;
    /// The header at `offset`, a constant; [`None`] beyond the end.
    fn header<T: Header>(&self, offset: usize) -> Option<T>;
    /// The same at an offset that is not a constant.
    fn header_at<T: Header>(&self, offset: usize) -> Option<T>;
}

pub(crate) struct Packet<'a> {
    ctx: &'a TcContext,
}

/// Headers that may be read from a packet: any bytes are a valid value.
///
/// # Safety
/// `#[repr(C)]` of integers and byte arrays, without padding.
pub(crate) unsafe trait Header: Copy {}

// SAFETY: #[repr(C)] of bytes and one u16.
unsafe impl Header for EthHdr {}
// SAFETY: #[repr(C)] of bytes.
unsafe impl Header for Ipv4Hdr {}
// SAFETY: #[repr(C)] of bytes.
unsafe impl Header for UdpHdr {}
// SAFETY: #[repr(C)] of bytes.
unsafe impl Header for VxlanHdr {}
// SAFETY: #[repr(C)] of bytes.
unsafe impl Header for TcpHdr {}
// SAFETY: #[repr(C)] of bytes.
unsafe impl Header for OuterHeader {}
// SAFETY: #[repr(C)] of bytes.
unsafe impl<const N: usize> Header for [u8; N] {}

impl<'a> Packet<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        Self { ctx }
    }

    #[inline(always)]
    fn skb(&self) -> *mut __sk_buff {
        self.ctx.skb.skb
    }

    #[inline(always)]
    pub(crate) fn is_ipv4(&self) -> bool {
        self.ctx.skb.protocol() == u32::from(EtherType::Ipv4 as u16)
    }

    /// Whether the kernel would deliver it on the device it was received by: not to another's MAC (it takes unicast IPv4
    /// from broadcast frames), and not of a VLAN whose packets go to a device of their own. (VLAN id 0 is a priority
    /// tag.)
    #[inline(always)]
    pub(crate) fn is_for_device(&self) -> bool {
        // SAFETY: the context is valid for the program's run; this field is readable for TC programs.
        let packet_type = unsafe { (*self.skb()).pkt_type };
        packet_type != PACKET_OTHERHOST && !self.is_of_vlan()
    }

    /// Whether it came with the tag of a VLAN that has a device of its own.
    #[inline(always)]
    pub(crate) fn is_of_vlan(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.skb()).vlan_tci & VLAN_ID_MASK != 0 }
    }

    /// Whether `xdp_decap` left this mark on it.
    #[inline(always)]
    pub(crate) fn has_mark(&self, mark: Decapsulated) -> bool {
        // SAFETY: as above.
        let (start, end) = unsafe { ((*self.skb()).data_meta as usize, (*self.skb()).data as usize) };
        if start + size_of::<Decapsulated>() > end {
            return false;
        }
        // SAFETY: the bounds were compared with the end of the metadata, which the verifier checks again; the kernel keeps
        // metadata aligned to four bytes.
        unsafe { (start as *const Decapsulated).read() == mark }
    }

    /// Whether the kernel or the device segments it later.
    #[inline(always)]
    pub(crate) fn is_gso(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.skb()).gso_size != 0 }
    }

    /// What rules, queues and routes of this host tell it from others by.
    #[inline(always)]
    pub(crate) fn mark_and_priority(&self) -> (u32, u32) {
        // SAFETY: as above.
        unsafe { ((*self.skb()).mark, (*self.skb()).priority) }
    }

    /// Has it told from others by these.
    #[inline(always)]
    pub(crate) fn set_mark_and_priority(&self, (mark, priority): (u32, u32)) {
        // SAFETY: the context is valid; TC programs may write these fields.
        unsafe {
            (*self.skb()).mark = mark;
            (*self.skb()).priority = priority;
        }
    }

    /// Sends a copy as it is out on a device.
    #[inline(always)]
    pub(crate) fn send_copy(&self, ifindex: u32) {
        // Where there is no memory for one, nothing is shown.
        // SAFETY: the context is valid.
        unsafe { bpf_clone_redirect(self.skb(), ifindex, 0) };
    }

    #[inline(always)]
    fn linear<T: Header>(&self, offset: usize) -> Option<T> {
        let start = self.ctx.data() + offset;
        if start + size_of::<T>() > self.ctx.data_end() {
            return None;
        }
        // SAFETY: the bounds were compared with data_end, which the verifier checks again; T is valid for any bytes.
        Some(unsafe { ptr::read_unaligned(start as *const T) })
    }

    /// The hash of the packet's flow, as the kernel computes it for its own tunnels. The packet keeps it, also when it is
    /// translated.
    #[inline(always)]
    pub(crate) fn flow_hash(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { bpf_get_hash_recalc(self.skb()) }
    }

    /// The hash that it has, whatever became of its addresses since it was computed; 0 for none.
    #[inline(always)]
    pub(crate) fn hash_so_far(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { (*self.skb()).hash }
    }

    /// Makes room for an outer header between the Ethernet and the IPv4 header, so that the packet can still be
    /// segmented by kernel or device.
    ///
    /// The L2 length is that of the inner Ethernet header alone: with the VXLAN header in it, the kernel would look
    /// for the inner MAC there and lose every GSO packet (`validate_xmit_skb`).
    #[inline(always)]
    pub(crate) fn make_room(&self) -> Result<(), NoRoom> {
        const ENCAPSULATE: u64 =
            (BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2_ETH) as u64
                | (EthHdr::LEN as u64) << BPF_ADJ_ROOM_ENCAP_L2_SHIFT;
        match self.grow(ENCAPSULATE) {
            0 => Ok(()),
            // A packet that a pod encapsulated. Segmented as it is, it needs no further note of where its headers are;
            // one to be segmented would come out with wrong lengths in the middle headers.
            error if error == -EALREADY => match self.is_gso() {
                true => Err(NoRoom::Nested),
                false if self.grow(0) == 0 => Ok(()),
                false => Err(NoRoom::Refused),
            },
            _ => Err(NoRoom::Refused),
        }
    }

    #[inline(always)]
    fn grow(&self, flags: u64) -> i64 {
        // FIXED_GSO: the pods' MTU leaves the room; without it the kernel would shrink the segments.
        let flags = flags | (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET) as u64;
        // SAFETY: the context is valid.
        unsafe {
            bpf_skb_adjust_room(
                self.skb(),
                i32::from(vxlan::OVERHEAD as i16),
                bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
                flags,
            )
        }
    }

    /// Overwrites the first bytes of the packet.
    #[inline(always)]
    pub(crate) fn write<T: Header>(&self, header: &T) -> Result<(), ()> {
        // SAFETY: the context and the header are valid for the call, and all of the header's bytes are defined.
        let result =
            unsafe { bpf_skb_store_bytes(self.skb(), 0, ptr::from_ref(header).cast(), size_of::<T>() as u32, 0) };
        if result == 0 { Ok(()) } else { Err(()) }
    }

    /// Has the TCP or UDP checksum at `offset` fit other addresses and ports. Both differences are as of
    /// [`checksum::difference`](flannel_common::checksum::difference).
    ///
    /// Where the checksum is still to be completed, addresses are in what is there already and ports are not
    /// (`inet_proto_csum_replace_by_diff`, net/core/utils.c); and of UDP, 0 stands for none.
    #[inline(always)]
    pub(crate) fn adjust_checksum(&self, offset: u32, addresses: u32, ports: u32, is_udp: bool) -> Result<(), ()> {
        let flags = if is_udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        for (difference, flags) in [(addresses, flags | u64::from(BPF_F_PSEUDO_HDR)), (ports, flags)] {
            // SAFETY: the context is valid. A size of 0 says that a difference is given.
            if unsafe { bpf_l4_csum_replace(self.skb(), offset, 0, difference.into(), flags) } != 0 {
                return Err(());
            }
        }
        Ok(())
    }

    /// Takes the outer headers away, from behind the outer Ethernet header to the inner IPv4 header. What the outer
    /// checksum was good for is taken off the packet's checksum state with it.
    #[inline(always)]
    pub(crate) fn remove_tunnel(&self) -> Result<(), ()> {
        // FIXED_GSO: the segments are the sender's, and as large as it made them.
        let flags = (BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET) as u64;
        // SAFETY: the context is valid.
        let result = unsafe {
            bpf_skb_adjust_room(
                self.skb(),
                -i32::from(vxlan::OVERHEAD as i16),
                bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
                flags,
            )
        };
        if result != 0 {
            return Err(());
        }
        // SAFETY: the context is valid. Where there is no level to take off, nothing happens.
        unsafe { bpf_csum_level(self.skb(), BPF_CSUM_LEVEL_DEC as u64) };
        Ok(())
    }

    /// Notes the device whose peer, in the pod's namespace, takes the packet as received and its own. Whom the frame around
    /// it was for stays with it before 6.15 (`skb_do_redirect`), and what `xdp_decap` took out is for the inner MAC, another
    /// host's: a pod's IP takes nothing of another host's, its TCP no broadcasts.
    #[inline(always)]
    pub(crate) fn redirect_to_peer(&self, ifindex: u32) {
        // SAFETY: the context is valid; this field is readable for TC programs.
        if unsafe { (*self.skb()).pkt_type } != PACKET_HOST {
            // SAFETY: the context is valid.
            unsafe { bpf_skb_change_type(self.skb(), PACKET_HOST) };
        }
        // SAFETY: no memory involved.
        unsafe { bpf_redirect_peer(ifindex, 0) };
    }

    /// Bytes of payload in each segment; 0 where it is not to be segmented.
    #[inline(always)]
    pub(crate) fn segment_size(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb()).gso_size }
    }

    /// Notes the device that takes the packet as received.
    #[inline(always)]
    pub(crate) fn redirect_to_ingress(&self, ifindex: u32) {
        // SAFETY: no memory involved.
        unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) };
    }

    /// Notes the device that the packet is sent out on, with the link-layer header that it has.
    #[inline(always)]
    pub(crate) fn redirect(&self, ifindex: u32) {
        self.forget_receive_queue();
        // SAFETY: no memory involved.
        unsafe { bpf_redirect(ifindex, 0) };
    }

    /// Notes the device and next hop (wire order) that the packet is sent to, with the next hop's MAC found by the
    /// kernel.
    #[inline(always)]
    pub(crate) fn redirect_to_neighbour(&self, ifindex: u32, next_hop: [u8; 4]) {
        self.forget_receive_queue();
        self.forget_route();
        let mut params = bpf_redir_neigh {
            nh_family: AF_INET,
            __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [u32::from_ne_bytes(next_hop), 0, 0, 0] },
        };
        // SAFETY: the parameters are valid for the call, with the size given.
        unsafe { bpf_redirect_neigh(ifindex, &raw mut params, size_of::<bpf_redir_neigh>() as i32, 0) };
    }

    /// The same, as [`choose`](crate::routes::choose) has chosen it.
    #[inline(always)]
    pub(crate) fn redirect_to_chosen(&self, ifindex: u32) {
        self.forget_receive_queue();
        self.forget_route();
        if let Some(next_hop) = chosen() {
            // SAFETY: the map's value is valid for the call, with the size given.
            unsafe { bpf_redirect_neigh(ifindex, next_hop, size_of::<bpf_redir_neigh>() as i32, 0) };
        }
    }

    /// While a neighbour is being resolved, the kernel queues packets to it, and sends them to the neighbour that their
    /// *route* names when the answer comes (`neigh_update`): the overlay's made-up next hop. Tunnel metadata takes the
    /// place of the route, and means nothing to an underlay device.
    #[inline(always)]
    fn forget_route(&self) {
        // Up to `local_ipv4`, which came with 5.19: older kernels refuse a longer key.
        const KEY_LEN: u32 = offset_of!(bpf_tunnel_key, __bindgen_anon_3) as u32;
        const WORDS: usize = (KEY_LEN as usize).div_ceil(8);
        let mut key = MaybeUninit::<[u64; WORDS]>::uninit();
        fill_with_zeros(&mut key);
        // SAFETY: the context and the key are valid for the call, with a size within the key.
        unsafe { bpf_skb_set_tunnel_key(self.skb(), key.as_mut_ptr().cast::<bpf_tunnel_key>(), KEY_LEN, 0) };
    }

    /// Leaves a note for a later program.
    #[inline(always)]
    pub(crate) fn write_note(&self, note: Note) {
        // SAFETY: the context is valid; TC programs may write this field.
        unsafe { (*self.skb()).tc_index = note.index() };
    }

    /// The tag of the note, where an earlier program left one of this kind.
    #[inline(always)]
    pub(crate) fn noted(&self, kind: fn(u32) -> Note) -> Option<u32> {
        // SAFETY: the context is valid.
        let index = unsafe { (*self.skb()).tc_index };
        let tag = index & FlowKey::TAG_MASK;
        (kind(tag).index() == index).then_some(tag)
    }

    /// Whether an earlier program left this note.
    #[inline(always)]
    pub(crate) fn has_note(&self, note: Note) -> bool {
        // SAFETY: the context is valid.
        unsafe { (*self.skb()).tc_index == note.index() }
    }

    /// Whether `from_pod` left it to the stack.
    #[inline(always)]
    pub(crate) fn is_from_pod(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.skb()).tc_index & !FlowKey::TAG_MASK == Note::FromPod(0).index() }
    }

    /// Takes away whatever is noted.
    #[inline(always)]
    pub(crate) fn forget_note(&self) {
        // SAFETY: the context is valid; TC programs may write this field.
        unsafe { (*self.skb()).tc_index = 0 };
    }

    /// A forwarded packet remembers the queue it was received on, and a multi-queue device would send it on the queue
    /// of that number: for pods, whose veths have one queue, always the first. Passing through `flannel.<VNI>` has the
    /// kernel forget it; so it is here.
    #[inline(always)]
    fn forget_receive_queue(&self) {
        // SAFETY: the context is valid; TC programs may write this field.
        unsafe { (*self.skb()).queue_mapping = 0 };
    }
}

impl Headers for Packet<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.ctx.len()
    }

    #[inline(always)]
    fn is_aggregate(&self) -> bool {
        self.is_gso()
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.skb()).ifindex }
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.skb().cast()
    }

    #[inline(always)]
    fn copy_to(&self, bytes: &mut [u8; FRAME_LEN], len: u32) -> Result<(), ()> {
        // SAFETY: the context is valid, and no more is written than fits, which the verifier checks again.
        let result = unsafe { bpf_skb_load_bytes(self.skb().cast(), 0, bytes.as_mut_ptr().cast(), len) };
        if result == 0 { Ok(()) } else { Err(()) }
    }

    #[inline(always)]
    fn header<T: Header>(&self, offset: usize) -> Option<T> {
        if let Some(header) = self.linear(offset) {
            return Some(header);
        }
        // Not in the linear part: the packet is too short, or the device left headers in a page.
        let end = (offset + size_of::<T>()) as u32;
        if end > self.len() || self.ctx.skb.pull_data(end).is_err() {
            return None;
        }
        self.linear(offset)
    }

    #[inline(always)]
    fn header_at<T: Header>(&self, offset: usize) -> Option<T> {
        self.ctx.load(offset).ok()
    }
}

/// A packet of a device without a link-layer header, read by offsets that the compiler need not know.
pub(crate) struct Unframed<'a>(pub(crate) &'a Packet<'a>);

impl Headers for Unframed<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        self.0.device()
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.0.context()
    }

    #[inline(always)]
    fn copy_to(&self, bytes: &mut [u8; FRAME_LEN], len: u32) -> Result<(), ()> {
        self.0.copy_to(bytes, len)
    }

    #[inline(always)]
    fn is_aggregate(&self) -> bool {
        self.0.is_aggregate()
    }

    #[inline(always)]
    fn header<T: Header>(&self, offset: usize) -> Option<T> {
        self.0.header_at(offset)
    }

    #[inline(always)]
    fn header_at<T: Header>(&self, offset: usize) -> Option<T> {
        self.0.header_at(offset)
    }
}

/// Makes all bytes zero, word by word: the compiler's `memset` is a loop that the kernel refuses to agents without CAP_PERFMON
/// (`sanitize_check_bounds`). It makes one of everything that it sees to be zero, so what is filled here stays where it is.
#[inline(always)]
pub(crate) fn fill_with_zeros<T>(value: &mut MaybeUninit<T>) {
    const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
    for word in 0..size_of::<T>() / 8 {
        // SAFETY: within the value, and aligned.
        unsafe { value.as_mut_ptr().cast::<u64>().add(word).write_volatile(0) };
    }
}

/// A copy of a header in a map, word by word: the compiler's `memcpy` subtracts pointers, which the kernel refuses to agents
/// without CAP_PERFMON.
#[inline(always)]
pub(crate) fn copy_header(from: &OuterHeader) -> OuterHeader {
    let (from, mut to) = (ptr::from_ref(from).cast::<u64>(), MaybeUninit::<OuterHeader>::uninit());
    for word in 0..OuterHeader::LEN / 8 {
        // SAFETY: within both, and aligned.
        unsafe { to.as_mut_ptr().cast::<u64>().add(word).write(from.add(word).read_volatile()) };
    }
    // SAFETY: all of its words were written.
    unsafe { to.assume_init() }
}

/// A value that no two packets within reach of each other share by rule, for the outer identification.
#[inline(always)]
pub(crate) fn random_id() -> u16 {
    // SAFETY: no memory involved.
    unsafe { bpf_get_prandom_u32() as u16 }
}
