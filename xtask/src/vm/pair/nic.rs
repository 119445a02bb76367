//! The NICs that qemu emulates, and what their drivers do.

use crate::vm::Flavour;

/// A NIC, by qemu's name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::vm) enum Nic {
    /// What most virtual machines have
    #[value(name = "virtio-net-pci")]
    Virtio,
    /// Intel's 82574L
    E1000e,
    /// VMware's
    Vmxnet3,
}

impl Nic {
    /// Qemu's name.
    pub(super) const fn device(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-net-pci",
            Self::E1000e => "e1000e",
            Self::Vmxnet3 => "vmxnet3",
        }
    }

    /// The kernel's module, which is what its driver calls itself too.
    pub(super) const fn driver(self) -> &'static str {
        match self {
            Self::Virtio => "virtio_net",
            Self::E1000e => "e1000e",
            Self::Vmxnet3 => "vmxnet3",
        }
    }

    /// Which kernels have that driver.
    pub(super) const fn flavour(self) -> Flavour {
        match self {
            Self::Virtio | Self::Vmxnet3 => Flavour::Cloud,
            Self::E1000e => Flavour::General,
        }
    }

    /// Since when the driver runs XDP itself, as far as it does; by the kernel's version.
    pub(super) const fn native_xdp_since(self) -> Option<[u32; 2]> {
        match self {
            Self::Virtio => Some([4, 10]),
            Self::Vmxnet3 => Some([6, 6]),
            Self::E1000e => None,
        }
    }

    /// Whether that driver hands on what an XDP program notes in front of a frame (`xdp_prepare_buff`, its last argument).
    /// Where it does not, `xdp_decap` leaves each packet in its tunnel.
    pub(super) const fn has_xdp_metadata(self) -> bool {
        matches!(self, Self::Virtio)
    }
}
