//! The frame that XDP sees, before the kernel makes a packet of it: the only place that touches its memory.

use core::{ffi::c_void, mem::MaybeUninit, ptr};

use aya_ebpf::{
    helpers::generated::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta, bpf_xdp_get_buff_len, bpf_xdp_load_bytes},
    programs::XdpContext,
};
use flannel_common::{drops::FRAME_LEN, maps::Decapsulated, vxlan};

use crate::packet::{Header, Headers};

pub(crate) struct Frame<'a> {
    ctx: &'a XdpContext,
}

impl<'a> Frame<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx }
    }

    /// Takes the outer headers away, from the first byte to the inner Ethernet header, and leaves word of it for
    /// `from_underlay`. On [`Err`] the frame is as it was.
    #[inline(always)]
    pub(crate) fn remove_tunnel(&self, mark: Decapsulated) -> Result<(), ()> {
        const MARK_LEN: i32 = size_of::<Decapsulated>() as i32;
        // First what a driver may not support. The mark moves along with the head.
        // SAFETY: the context is valid.
        if unsafe { bpf_xdp_adjust_meta(self.ctx.ctx, -MARK_LEN) } != 0 {
            return Err(());
        }
        // Until the tunnel is gone it must not say that it is, whatever the memory held.
        self.write_mark(Decapsulated { magic: 0, vni: 0 })?;
        // SAFETY: the context is valid.
        if unsafe { bpf_xdp_adjust_head(self.ctx.ctx, i32::from(vxlan::OVERHEAD as i16)) } != 0 {
            return Err(());
        }
        self.write_mark(mark)
    }

    #[inline(always)]
    fn write_mark(&self, mark: Decapsulated) -> Result<(), ()> {
        let start = self.ctx.metadata();
        if start + size_of::<Decapsulated>() > self.ctx.metadata_end() {
            return Err(());
        }
        // SAFETY: the bounds were compared with the end of the metadata, which the verifier checks again; the kernel keeps
        // metadata aligned to four bytes.
        unsafe { (start as *mut Decapsulated).write(mark) };
        Ok(())
    }
}

impl Headers for Frame<'_> {
    /// In all buffers.
    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { bpf_xdp_get_buff_len(self.ctx.ctx) as u32 }
    }

    #[inline(always)]
    fn is_aggregate(&self) -> bool {
        // Can't be told in generic mode; in native mode none is.
        false
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.ctx.ctx.cast()
    }

    #[inline(always)]
    fn copy_to(&self, bytes: &mut [u8; FRAME_LEN], len: u32) -> Result<(), ()> {
        // SAFETY: the context is valid, and no more is written than fits, which the verifier checks again.
        let result = unsafe { bpf_xdp_load_bytes(self.ctx.ctx, 0, bytes.as_mut_ptr().cast(), len) };
        if result == 0 { Ok(()) } else { Err(()) }
    }

    #[inline(always)]
    fn header<T: Header>(&self, offset: usize) -> Option<T> {
        let start = self.ctx.data() + offset;
        if start + size_of::<T>() > self.ctx.data_end() {
            // Too short, or in another buffer.
            return self.header_at(offset);
        }
        // SAFETY: the bounds were compared with data_end, which the verifier checks again; T is valid for any bytes.
        Some(unsafe { ptr::read_unaligned(start as *const T) })
    }

    #[inline(always)]
    fn header_at<T: Header>(&self, offset: usize) -> Option<T> {
        let mut header = MaybeUninit::<T>::uninit();
        // SAFETY: the context is valid, and the header has the size given.
        let result = unsafe {
            bpf_xdp_load_bytes(self.ctx.ctx, offset as u32, header.as_mut_ptr().cast(), size_of::<T>() as u32)
        };
        // SAFETY: the helper wrote all of it; T is valid for any bytes.
        (result == 0).then(|| unsafe { header.assume_init() })
    }
}
