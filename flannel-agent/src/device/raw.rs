//! Netlink messages as they lie in a datagram, read no further than a question needs.

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NlasIterator},
    sys::{Socket, SocketAddr},
};

/// Of a netlink message's header (`struct nlmsghdr`).
const HEADER_LEN: usize = 16;
/// As much as the kernel puts into one datagram of a dump (`netlink_dump`, net/netlink/af_netlink.c).
pub(super) const DATAGRAM_LEN: usize = 1 << 15;

/// The messages of a datagram: type, sequence number, payload. What is cut off is left out.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let len = usize::try_from(word(rest, 0)?).ok()?;
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        let sequence = word(rest, 8)?;
        let payload = rest.get(HEADER_LEN..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, sequence, payload))
    })
}

/// Four bytes as a number, in the host's order.
pub(super) fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

/// The value of an attribute.
pub(super) fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    let mut attributes = NlasIterator::new(attributes).filter_map(Result::ok);
    attributes.find(|attribute| attribute.kind() == kind).map(|attribute| attribute.into_inner())?.get(4..)
}

/// A text that ends with a zero.
pub(super) fn text(value: &[u8]) -> &str {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    value.get(..end).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default()
}

/// Asks for all that the kernel has of something: a message of this type and payload, answered by any number of others.
pub(super) fn dump(socket: &mut Socket, kind: u16, payload: &[u8], take: impl FnMut(&[u8])) -> io::Result<()> {
    ask(socket, kind, NLM_F_DUMP, payload, take)
}

/// Has the kernel do something.
pub(super) fn act(socket: &mut Socket, kind: u16, payload: &[u8]) -> io::Result<()> {
    ask(socket, kind, NLM_F_ACK, payload, |_| {})
}

fn ask(socket: &mut Socket, kind: u16, flags: u16, payload: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut request = Vec::with_capacity(HEADER_LEN + payload.len());
    request.extend(((HEADER_LEN + payload.len()) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence number and port: one question at a time, from one socket.
    request.extend([0; 8]);
    request.extend(payload);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut datagram = Vec::with_capacity(DATAGRAM_LEN);
    loop {
        datagram.clear();
        socket.recv(&mut datagram, 0)?;
        for (kind, _, payload) in messages(&datagram) {
            match kind {
                // Both begin with an error number, 0 for none.
                NLMSG_DONE | NLMSG_ERROR => {
                    return match payload.first_chunk().map(|error| i32::from_ne_bytes(*error)) {
                        Some(error) if error != 0 => Err(io::Error::from_raw_os_error(-error)),
                        _ => Ok(()),
                    };
                }
                _ => take(payload),
            }
        }
    }
}
