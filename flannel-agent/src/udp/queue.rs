//! What every thread of the tunnel has: when to stop, who the peers are, and what it counts.

use std::{
    io::{self, PipeReader, PipeWriter, Write as _},
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tokio::sync::watch;

use super::{Peers, counters::Counters};

/// Ends all threads of a tunnel.
#[derive(Debug)]
pub(super) struct Stop {
    is_set: AtomicBool,
    wakes: (PipeReader, PipeWriter),
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { is_set: AtomicBool::new(false), wakes: io::pipe()? })
    }

    pub(super) fn set(&self) {
        self.is_set.store(true, Ordering::Relaxed);
        // Nobody takes it out: all see it.
        let _awake = (&self.wakes.1).write(&[0]);
    }
}

/// One thread's part.
pub(super) struct Queue {
    stop: Arc<Stop>,
    changes: watch::Receiver<Arc<Peers>>,
    /// As they were last known.
    pub(super) peers: Arc<Peers>,
    pub(super) counters: Arc<Counters>,
}

impl Queue {
    pub(super) fn new(stop: Arc<Stop>, mut changes: watch::Receiver<Arc<Peers>>, counters: Arc<Counters>) -> Self {
        let peers = Arc::clone(&changes.borrow_and_update());
        Self { stop, changes, peers, counters }
    }

    /// Takes the peers as they are now. Once for each batch: without a change it costs an atomic load.
    pub(super) fn refresh_peers(&mut self) {
        if self.changes.has_changed().unwrap_or_default() {
            self.peers = Arc::clone(&self.changes.borrow_and_update());
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.is_set.load(Ordering::Relaxed)
    }

    /// Waits until there is something to read; `false` where the tunnel is stopped.
    pub(super) fn wait_readable(&self, of: &impl AsFd) -> io::Result<bool> {
        let of: BorrowedFd<'_> = of.as_fd();
        let mut waited = [of, self.stop.wakes.0.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut waited, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(!self.is_stopped()),
            Err(error) => Err(error.into()),
        }
    }
}
