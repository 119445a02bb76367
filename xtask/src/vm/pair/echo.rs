//! What pods say to each other, and its echo: bytes that tell where they belong.

use std::{
    io::{Read, Write as _},
    net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{lab::Pod, progress::patience};

/// For how long a socket waits.
const LIMIT: Duration = Duration::from_secs(5);
/// How long either way of a call may take. One that loses each large packet goes on for ever, a small one at a time.
const CALL_LIMIT: Duration = Duration::from_secs(12);
/// The largest datagram, and how much of a stream is written at once.
const LARGEST: usize = 1 << 16;

/// Bytes of which each place looks different from what a lost, doubled or misplaced packet could put there; a prime number
/// of them, so that no number of segments, pages or buffers makes a period.
struct Pattern(Vec<u8>);

impl Pattern {
    const PERIOD: usize = 65_521;

    fn new() -> Self {
        // Numerical Recipes' generator; its upper bits are good enough, and the same in each machine.
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let mut bytes: Vec<u8> = (0..Self::PERIOD).map(|_| next()).collect();
        bytes.extend_from_within(..);
        bytes.extend_from_within(..LARGEST - Self::PERIOD);
        Self(bytes)
    }

    fn at(&self, place: usize, len: usize) -> &[u8] {
        &self.0[place % Self::PERIOD..][..len]
    }

    fn write(&self, stream: &mut TcpStream, len: usize) -> Result<()> {
        let start = Instant::now();
        for place in (0..len).step_by(LARGEST) {
            anyhow::ensure!(start.elapsed() < CALL_LIMIT * patience(), "only {place} bytes in {:?}", start.elapsed());
            stream.write_all(self.at(place, LARGEST.min(len - place))).with_context(|| format!("write at {place}"))?;
        }
        Ok(())
    }

    fn read(&self, stream: &mut impl Read, len: usize) -> Result<()> {
        let start = Instant::now();
        let mut buffer = vec![0; LARGEST];
        for place in (0..len).step_by(LARGEST) {
            anyhow::ensure!(start.elapsed() < CALL_LIMIT * patience(), "only {place} bytes in {:?}", start.elapsed());
            let buffer = &mut buffer[..LARGEST.min(len - place)];
            stream.read_exact(buffer).with_context(|| format!("read at {place}"))?;
            anyhow::ensure!(buffer == self.at(place, buffer.len()), "wrong bytes behind {place}");
        }
        Ok(())
    }
}

/// Echoes what comes to a port of a pod, until the process ends: each datagram; and of each connection, which begins with how
/// much comes, all of it once it is there.
pub(super) fn serve(pod: &Pod, port: u16) -> Result<()> {
    let address = (pod.address, port);
    let (socket, listener) = pod
        .netns
        .within(|| UdpSocket::bind(address).and_then(|socket| Ok((socket, TcpListener::bind(address)?))))??;
    thread::spawn(move || {
        let mut buffer = vec![0; LARGEST];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            // Who asked waits for it, and says so.
            let _sent = socket.send_to(&buffer[..len], from);
        }
    });
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = answer(stream) {
                eprintln!("a connection to {address:?}: {error:#}");
            }
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) -> Result<()> {
    let pattern = Pattern::new();
    limit(&stream)?;
    let mut len = [0; 8];
    stream.read_exact(&mut len).context("read the length")?;
    let len = usize::try_from(u64::from_be_bytes(len))?;
    pattern.read(&mut stream, len)?;
    pattern.write(&mut stream, len)
}

fn limit(stream: &TcpStream) -> Result<()> {
    let limit = Some(LIMIT * patience());
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit).context("set a limit")
}

/// Sends a pod's bytes by TCP to one that echoes, and says how fast it was both ways.
pub(super) fn call(pod: &Pod, to: SocketAddrV4, len: usize) -> Result<String> {
    let pattern = Pattern::new();
    let mut stream = pod.netns.within(|| TcpStream::connect_timeout(&to.into(), LIMIT * patience()))??;
    limit(&stream)?;
    let start = Instant::now();
    stream.write_all(&(len as u64).to_be_bytes()).context("write the length")?;
    pattern.write(&mut stream, len).context("there")?;
    // The first byte comes when all were there.
    let mut first = [0];
    stream.read_exact(&mut first).context("the other side did not get what was sent to it")?;
    let there = start.elapsed();
    pattern.read(&mut first.chain(&mut stream), len).context("back")?;
    let back = start.elapsed() - there;
    let rate = |took: Duration| len as f64 * 8.0 / 1e6 / took.as_secs_f64();
    Ok(format!("{:.0} Mb/s there, {:.0} back", rate(there), rate(back)))
}

/// Sends a pod's datagrams to one that echoes, each when the one before is back.
pub(super) fn ask(pod: &Pod, to: SocketAddrV4, size: usize, count: usize) -> Result<String> {
    let pattern = Pattern::new();
    let socket = pod.netns.within(|| UdpSocket::bind((pod.address, 0)))??;
    socket.set_read_timeout(Some(LIMIT * patience()))?;
    let mut buffer = vec![0; LARGEST];
    for number in 0..count {
        let sent = pattern.at(number * size, size);
        socket.send_to(sent, to).with_context(|| format!("send datagram {number}"))?;
        let (len, from) = socket.recv_from(&mut buffer).with_context(|| format!("the echo of datagram {number}"))?;
        anyhow::ensure!(from == to.into(), "datagram {number}: answered by {from}");
        anyhow::ensure!(len == size, "datagram {number}: {len} bytes");
        anyhow::ensure!(buffer[..len] == *sent, "datagram {number}: wrong bytes");
    }
    Ok(format!("{count} datagrams"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_at_another_place_are_wrong() {
        let pattern = Pattern::new();
        let len = 3 * LARGEST + 1;
        let sent: Vec<u8> = (0..len).map(|place| pattern.at(place, 1)[0]).collect();
        pattern.read(&mut sent.as_slice(), len).unwrap();
        let shifted = [&sent[1..], &[0]].concat();
        assert!(pattern.read(&mut shifted.as_slice(), len).is_err());
        assert!(pattern.read(&mut &sent[..len - 1], len).is_err());
    }
}
