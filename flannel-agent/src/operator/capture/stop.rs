//! When a capture ends, besides by what it has captured: at a signal, or when its time is over.

use std::{
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use super::CaptureError;

/// A signal, and a deadline.
pub(super) struct Stop {
    signals: SignalFd,
    after: Duration,
    deadline: Instant,
}

/// What was waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Woken {
    pub(super) is_signalled: bool,
    /// Whether one of the others is ready.
    pub(super) is_ready: bool,
}

impl Stop {
    /// After this, SIGINT and SIGTERM are only what is waited for. It has to come before there is another thread, to which the kernel
    /// would give them.
    pub(super) fn new(after: Duration) -> Result<Self, CaptureError> {
        let wait = |call| move |error| CaptureError::Wait { call, error };
        let mut signals = SigSet::empty();
        [Signal::SIGINT, Signal::SIGTERM].into_iter().for_each(|signal| signals.add(signal));
        signals.thread_block().map_err(wait("block signals"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals, flags).map_err(wait("wait for signals"))?;
        Ok(Self { signals, after, deadline: Instant::now() + after })
    }

    /// The time runs from now on.
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now() + self.after;
    }

    /// How long there is still.
    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Waits until one of these is ready, or for the end.
    pub(super) fn wait<'fd>(
        &'fd self,
        others: impl Iterator<Item = (BorrowedFd<'fd>, PollFlags)>,
        call: &'static str,
    ) -> Result<Woken, CaptureError> {
        let own = (self.signals.as_fd(), PollFlags::POLLIN);
        let mut waited: Vec<_> = std::iter::once(own).chain(others).map(|(fd, what)| PollFd::new(fd, what)).collect();
        // Rounded up: less than a millisecond would be none.
        let at_most = PollTimeout::try_from(self.left() + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut waited, at_most) {
            Ok(_) => {
                let is = |fd: &PollFd<'_>| fd.any().unwrap_or_default();
                Ok(Woken { is_signalled: is(&waited[0]), is_ready: waited[1..].iter().any(is) })
            }
            Err(Errno::EINTR) => Ok(Woken::default()),
            Err(error) => Err(CaptureError::Wait { call, error }),
        }
    }
}
