//! ICMP echo (RFC 792), one request at a time.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Slice, Icmpv4Type, Ipv4Slice};
use nix::{
    errno::Errno,
    libc,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recvfrom, sendto, setsockopt,
            socket, sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

/// For so long an answer is waited for.
const TIMEOUT: Duration = Duration::from_secs(1);
/// IPv4 and ICMP headers, in bytes.
pub(super) const HEADERS: u16 = 28;

/// Echo requests can't be sent.
#[derive(Debug, thiserror::Error)]
pub enum EchoError {
    /// No socket.
    #[error("open a socket for ICMP: {0}; it needs root, or CAP_NET_RAW")]
    Open(Errno),
    /// One that can't be used.
    #[error("set {option} of a socket for ICMP: {source}")]
    Option {
        /// What.
        option: &'static str,
        /// Why not.
        source: Errno,
    },
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It was answered after so long.
    After(Duration),
    /// Nothing came.
    None,
    /// This host did not send it.
    Unsent(Errno),
    /// Somebody on the way refused it, by the code of "destination unreachable" (RFC 792, RFC 1191).
    Refused {
        /// Who.
        by: Ipv4Addr,
        /// The code.
        code: u8,
    },
}

/// Sends requests that no router may fragment.
pub(super) struct Echo {
    socket: OwnedFd,
    id: u16,
    sequence: u16,
}

impl Echo {
    pub(super) fn open() -> Result<Self, EchoError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Icmp).map_err(EchoError::Open)?;
        // What the kernel has learned of the path counts for nothing: that is what is asked for.
        let probe = libc::IP_PMTUDISC_PROBE;
        // SAFETY: the pointer is to an int of the size given, which the kernel reads.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                (&raw const probe).cast(),
                size_of_val(&probe) as libc::socklen_t,
            )
        };
        Errno::result(result).map_err(|source| EchoError::Option { option: "IP_MTU_DISCOVER", source })?;
        Ok(Self { socket, id: std::process::id() as u16, sequence: 0 })
    }

    /// Asks an address by a packet of so many bytes of IPv4.
    pub(super) fn ask(&mut self, to: Ipv4Addr, size: u16) -> Result<Answer, EchoError> {
        self.sequence = self.sequence.wrapping_add(1);
        let payload = vec![0x5a; usize::from(size.saturating_sub(HEADERS))];
        let echo = IcmpEchoHeader { id: self.id, seq: self.sequence };
        let header = Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &payload);
        let request = [header.to_bytes().as_slice(), &payload].concat();
        let sent = Instant::now();
        let address = SockaddrIn::from(SocketAddrV4::new(to, 0));
        match sendto(self.socket.as_raw_fd(), &request, &address, MsgFlags::empty()) {
            // The socket has the error of an answer to the one before.
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH) => {}
            Err(error) => return Ok(Answer::Unsent(error)),
            Ok(_) => {}
        }
        let mut buffer = vec![0; usize::from(u16::MAX)];
        loop {
            let left = TIMEOUT.saturating_sub(sent.elapsed());
            if left.is_zero() {
                return Ok(Answer::None);
            }
            let wait = TimeVal::from(libc::timeval {
                tv_sec: left.as_secs() as libc::time_t,
                tv_usec: left.subsec_micros().max(1).into(),
            });
            setsockopt(&self.socket, ReceiveTimeout, &wait)
                .map_err(|source| EchoError::Option { option: "SO_RCVTIMEO", source })?;
            match recvfrom::<SockaddrIn>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((len, _)) => match self.meaning(&buffer[..len], to) {
                    Some(Answer::After(_)) => return Ok(Answer::After(sent.elapsed())),
                    Some(answer) => return Ok(answer),
                    None => {}
                },
                Err(Errno::EAGAIN) => return Ok(Answer::None),
                // Told of by the packet itself, too.
                Err(_) => {}
            }
        }
    }

    /// What a received packet is to the request that was sent last.
    fn meaning(&self, packet: &[u8], to: Ipv4Addr) -> Option<Answer> {
        let ip = Ipv4Slice::from_slice(packet).ok()?;
        let icmp = Icmpv4Slice::from_slice(ip.payload().payload).ok()?;
        let own = IcmpEchoHeader { id: self.id, seq: self.sequence };
        match icmp.icmp_type() {
            Icmpv4Type::EchoReply(echo) => {
                (echo == own && ip.header().source_addr() == to).then_some(Answer::After(Duration::ZERO))
            }
            Icmpv4Type::DestinationUnreachable(reason) => {
                // The packet that it is about, cut off behind its first bytes (RFC 1812 section 4.3.2.3).
                let about = icmp.payload();
                let header_len = usize::from(about.first()? & 0xf) * 4;
                let destination: [u8; 4] = about.get(16..20)?.try_into().ok()?;
                let request = about.get(header_len..header_len + 8)?;
                let [id, sequence] = [4, 6].map(|at| u16::from_be_bytes([request[at], request[at + 1]]));
                let is_own =
                    (id, sequence) == (own.id, own.seq) && request[0] == 8 && Ipv4Addr::from(destination) == to;
                is_own.then(|| Answer::Refused { by: ip.header().source_addr(), code: reason.code_u8() })
            }
            _ => None,
        }
    }
}
