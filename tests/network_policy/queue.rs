//! A program's side of `NFQUEUE` (linux/netfilter/nfnetlink_queue.h).

use std::{
    io::ErrorKind,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
        sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};
use xtask::lab::Netns;

use crate::sockets::within;

/// `NFNL_SUBSYS_QUEUE` in the upper byte.
const PACKET: u16 = 0x0300;
const VERDICT: u16 = 0x0301;
const CONFIG: u16 = 0x0302;
/// `NFQA_CFG_CMD` with `NFQNL_CFG_CMD_BIND`, `NFQA_CFG_PARAMS` with `NFQNL_COPY_PACKET`.
const CONFIG_COMMAND: u16 = 1;
const CONFIG_PARAMETERS: u16 = 2;
const BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
/// Headers are enough.
const COPIED: u32 = 128;
const PACKET_HEADER: u16 = 1;
const VERDICT_HEADER: u16 = 2;
const PAYLOAD: u16 = 10;
/// Nested (`NLA_F_NESTED`), of conntrack's attributes.
const CONNTRACK: u16 = 11 | 0x8000;
const LABELS: u16 = 22;
/// Bit 100 of 128, as words of the host's.
const ALLOWED: [u8; 16] = (1u128 << 100).to_ne_bytes();
const HEADER_LEN: usize = 20;

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is dropped.
    Drop = 0,
    /// It goes on, and its connection has the label.
    Accept = 1,
}

/// Packets that wait for a verdict.
pub struct Queue {
    socket: OwnedFd,
    number: u16,
}

impl Queue {
    pub fn open(netns: &Netns, number: u16) -> Self {
        let socket = within(netns, || {
            let protocol = SockProtocol::NetlinkNetFilter;
            let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).unwrap();
            socket
        });
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 50_000)).unwrap();
        let queue = Self { socket, number };
        queue.send(CONFIG, &[attribute(CONFIG_COMMAND, &[BIND, 0, 0, 0])]);
        let parameters = [&COPIED.to_be_bytes()[..], &[COPY_PACKET]].concat();
        queue.send(CONFIG, &[attribute(CONFIG_PARAMETERS, &parameters)]);
        queue
    }

    /// Judges what comes within a moment, each packet from its IP header on.
    pub fn judge(&self, judge: impl Fn(&[u8]) -> Verdict) {
        let mut buffer = [0; 8192];
        let len = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(std::io::Error::from) {
            Ok(len) => len,
            // ENOBUFS: some were dropped.
            Err(error) if error.kind() == ErrorKind::WouldBlock || error.raw_os_error() == Some(105) => return,
            Err(error) => panic!("{error}"),
        };
        let mut rest = &buffer[..len];
        while let Some((size, message)) =
            rest.split_first_chunk::<4>().map(|(size, _)| (u32::from_ne_bytes(*size), rest))
        {
            let size = size as usize;
            if message.get(4..6) == Some(&PACKET.to_ne_bytes()) {
                let attributes: Vec<_> = attributes(&message[HEADER_LEN..size]).collect();
                let of = |kind| attributes.iter().find(|(found, _)| *found == kind).map(|(_, value)| *value);
                let (id, packet) = (&of(PACKET_HEADER).unwrap()[..4], of(PAYLOAD).unwrap());
                self.answer(id, judge(packet));
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }

    fn answer(&self, id: &[u8], verdict: Verdict) {
        let header = attribute(VERDICT_HEADER, &[&(verdict as u32).to_be_bytes(), id].concat());
        let label = attribute(CONNTRACK, &attribute(LABELS, &ALLOWED));
        match verdict {
            Verdict::Drop => self.send(VERDICT, &[header]),
            Verdict::Accept => self.send(VERDICT, &[header, label]),
        }
    }

    fn send(&self, kind: u16, attributes: &[Vec<u8>]) {
        let attributes = attributes.concat();
        let len = (HEADER_LEN + attributes.len()) as u32;
        // Kind, NLM_F_REQUEST, no sequence number, no port; then no family, version 0, and the queue.
        let mut message = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &1u16.to_ne_bytes(), &[0; 8]].concat();
        message.extend([&[0, 0], &self.number.to_be_bytes()[..], &attributes].concat());
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty()).unwrap();
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = (4 + value.len()) as u16;
    let mut bytes = [&len.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (len, kind) = (bytes.get(..2)?, bytes.get(2..4)?);
        let len = usize::from(u16::from_ne_bytes([len[0], len[1]]));
        let value = bytes.get(4..len)?;
        let kind = u16::from_ne_bytes([kind[0], kind[1]]);
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}
