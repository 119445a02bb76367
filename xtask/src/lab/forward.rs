//! A port of the machine's loopback that leads to one of a namespace, which nothing else does.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener as AsyncListener, TcpStream},
    sync::oneshot,
};

use super::Netns;

/// Carries bytes between both until it is dropped.
#[derive(Debug)]
pub struct Forward {
    address: SocketAddr,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Forward {
    /// Listens at `port` of 127.0.0.1, or at any other where that is taken, and connects who comes to an address in the namespace.
    ///
    /// # Errors
    /// Where no port is to be had, or the namespace can't be entered.
    pub fn start(netns: &Netns, port: u16, to: SocketAddr) -> Result<Self> {
        let bind = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        let listener = bind(port).or_else(|_| bind(0)).context("listen at 127.0.0.1")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (end, ended) = oneshot::channel();
        // What the thread makes is in the namespace; the listener stays where it was made.
        let thread = netns.within(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let inside = move || runtime.block_on(carry(listener, to, ended));
            anyhow::Ok(thread::spawn(inside))
        })??;
        Ok(Self { address, end: Some(end), thread: Some(thread) })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn carry(listener: TcpListener, to: SocketAddr, ended: oneshot::Receiver<()>) {
    let accept = async {
        let listener = AsyncListener::from_std(listener).context("listen")?;
        loop {
            let (mut near, _) = listener.accept().await.context("accept")?;
            tokio::spawn(async move {
                // Who is not reached there is hung up on, as here.
                if let Ok(mut far) = TcpStream::connect(to).await {
                    let _ended = copy_bidirectional(&mut near, &mut far).await;
                }
            });
        }
    };
    let failed: Result<(), anyhow::Error> = tokio::select! {
        failed = accept => failed,
        _ = ended => Ok(()),
    };
    if let Err(error) = failed {
        eprintln!("the way to {to}: {error:#}");
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        drop(self.end.take());
        let _panicked = self.thread.take().map(JoinHandle::join);
    }
}
