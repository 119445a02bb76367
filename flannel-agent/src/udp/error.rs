//! Why a tunnel can't be.

use std::{io, net::SocketAddrV4};

use nix::libc;

use crate::device::DeviceError;

/// The tunnel could not be made. Nothing of it stays.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// Another program has the port.
    #[error(
        "UDP port {} of {} is taken: end the program that has it (`ss -lunp sport = {}` names it; another agent or flanneld?), \
         or give the backend another \"Port\", the same on all hosts",
        .0.port(), .0.ip(), .0.port()
    )]
    PortTaken(SocketAddrV4),
    /// The address is none of this host's.
    #[error("{} is no address of this host: the tunnel needs one that is (--iface)", .0.ip())]
    NoAddress(SocketAddrV4),
    /// The socket can't be had for another reason.
    #[error("listen on UDP {address}: {source}")]
    Bind {
        /// Where.
        address: SocketAddrV4,
        /// Why not.
        source: io::Error,
    },
    /// No TUN devices.
    #[error(
        "open /dev/net/tun: {0}; the backend udp needs TUN devices: load the module tun (`modprobe tun`), and let a container \
         have /dev/net/tun"
    )]
    NoTun(io::Error),
    /// Making devices is not allowed.
    #[error("make the TUN device {name}: {source}; the agent needs CAP_NET_ADMIN")]
    NotPermitted {
        /// Its name.
        name: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// Another kind of device has the name.
    #[error("{name} is there and no TUN device of this agent's: rename or delete it (`ip link delete {name}`)")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// Another program carries the packets of the device.
    #[error("the TUN device {name} is in use by another program: another agent of this network? End that one first")]
    InUse {
        /// The device.
        name: String,
    },
    /// A call on the TUN device failed.
    #[error("{call} the TUN device {name}: {source}")]
    Call {
        /// What was asked.
        call: &'static str,
        /// Of which device.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// Netlink.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No thread.
    #[error("start a thread of the tunnel: {0}")]
    Thread(io::Error),
}

impl UdpError {
    pub(super) fn bind(address: SocketAddrV4, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::PortTaken(address),
            io::ErrorKind::AddrNotAvailable => Self::NoAddress(address),
            _ => Self::Bind { address, source },
        }
    }

    pub(super) fn attach(name: &str, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM) => Self::NotPermitted { name, source },
            // Of another kind, or with other settings than ours.
            Some(libc::EINVAL) => Self::NameTaken { name },
            Some(libc::EBUSY) => Self::InUse { name },
            _ => Self::Call { call: "make", name, source },
        }
    }
}
