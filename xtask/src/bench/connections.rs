//! Connections per second: connect, one byte there, one byte back, close; one after the other.
//!
//! By hand, as the tools that count connections speak HTTP or keep them open. The server closes first, so that it is its
//! side that stays in TIME_WAIT: the client's ports are free again at once, and the kernel lets a SYN with a later timestamp
//! take over a connection in TIME_WAIT. No port runs out, and no setting differs from the usual.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::topology::Path;

pub(super) const PORT: u16 = 5202;
/// For one connection. A SYN that gets lost is sent again after one second.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many are made in a second.
pub(super) fn per_second(path: &Path<'_>, seconds: u32) -> Result<f64> {
    let length = Duration::from_secs(seconds.into());
    thread::scope(|scope| {
        let (listening, ready) = mpsc::channel();
        let server = scope.spawn(move || {
            path.enter_as_server()?;
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
            listening.send(())?;
            serve(&listener)
        });
        let client = scope.spawn(move || {
            path.enter_as_client()?;
            // The server's error is of more use than that there is none.
            ready.recv().context("no server")?;
            let counted = count(path.address, length);
            // Nothing asked for on it: the end.
            drop(TcpStream::connect((path.address, PORT))?);
            counted
        });
        let counted = client.join();
        server.join().map_err(|_| anyhow::anyhow!("the server panicked"))?.context("server")?;
        counted.map_err(|_| anyhow::anyhow!("the client panicked"))?.context("client")
    })
}

fn serve(listener: &TcpListener) -> Result<()> {
    let mut byte = [0];
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        match stream.read_exact(&mut byte) {
            Ok(()) => stream.write_all(&byte)?,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn count(address: Ipv4Addr, length: Duration) -> Result<f64> {
    let start = Instant::now();
    let mut connections = 0.0;
    while start.elapsed() < length {
        let mut stream = TcpStream::connect_timeout(&(address, PORT).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"?")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        anyhow::ensure!(answer == b"?", "answered with {answer:?}");
        connections += 1.0;
    }
    Ok(connections / start.elapsed().as_secs_f64())
}
