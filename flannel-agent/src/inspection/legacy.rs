//! Whether x_tables' rules are otherwise than they were. It tells of no changes, but each table's size, number of rules, and
//! where its chains begin, which a change nearly always changes, is one system call.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use crate::netfilter::legacy_tables;

/// `IPT_SO_GET_INFO` (include/uapi/linux/netfilter_ipv4/ip_tables.h).
const GET_INFO: libc::c_int = 64;

/// `struct ipt_getinfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Info {
    /// Of the table, with zeros behind.
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    num_entries: u32,
    size: u32,
}

/// All of x_tables, in short.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Digest(Vec<(String, Option<Info>)>);

impl Digest {
    /// As it is now.
    pub(super) fn read() -> Self {
        let tables = legacy_tables().unwrap_or_default();
        if tables.is_empty() {
            return Self::default();
        }
        // Any socket of the family is asked (net/netfilter/nf_sockopt.c).
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        let Ok(socket) = socket else { return Self::default() };
        Self(tables.lines().map(|table| (table.to_owned(), info(&socket, table).ok())).collect())
    }
}

fn info(socket: &OwnedFd, table: &str) -> io::Result<Info> {
    let mut info =
        Info { name: [0; 32], valid_hooks: 0, hook_entry: [0; 5], underflow: [0; 5], num_entries: 0, size: 0 };
    for (place, byte) in info.name.iter_mut().zip(table.bytes()) {
        *place = byte;
    }
    let mut len = mem::size_of::<Info>() as libc::socklen_t;
    // SAFETY: the structure has the kernel's layout and only numbers in it, it and its length live through the call, and the
    // kernel writes no more than that length.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_IP, GET_INFO, (&raw mut info).cast(), &raw mut len) };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_layout() {
        assert_eq!(mem::size_of::<Info>(), 84);
    }
}
