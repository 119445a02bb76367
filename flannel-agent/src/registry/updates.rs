//! What a watch reports, with the time at which it saw it.

use std::time::Instant;

use tokio::sync::mpsc::{self, error::SendError};

use super::Update;

/// A report.
#[derive(Debug)]
pub struct Seen {
    /// What happened.
    pub update: Update,
    /// When that was seen.
    pub at: Instant,
}

/// Where a watch reports to.
#[derive(Clone, Debug)]
pub struct Updates(mpsc::Sender<Seen>);

impl Updates {
    /// Room for so many that nobody has received yet.
    pub fn channel(room: usize) -> (Self, mpsc::Receiver<Seen>) {
        let (sender, receiver) = mpsc::channel(room);
        (Self(sender), receiver)
    }

    /// Reports what was just seen.
    ///
    /// # Errors
    /// Where nobody receives any more.
    pub async fn send(&self, update: Update) -> Result<(), SendError<Seen>> {
        self.0.send(Seen { update, at: Instant::now() }).await
    }

    /// Waits until nobody receives any more.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}
