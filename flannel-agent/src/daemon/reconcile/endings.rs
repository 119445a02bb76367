//! The end of connections and of pods: their flows leave the bypass as it is heard of, whatever else the agent is doing.

use std::{
    io,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use flannel_common::ended::REST;
use tokio::{
    sync::broadcast::{self, error::RecvError},
    task::JoinHandle,
    time::sleep,
};
use tracing::{info, warn};

use crate::{
    conntrack::events::{self, Events, EventsError, Told},
    dataplane::{DataplaneError, Forgetter, Left},
    device::LinkSocket,
    status::{EndsStatus, now},
};

/// Listening to conntrack.
#[derive(Default)]
pub(super) struct Endings {
    task: Option<JoinHandle<()>>,
    lost: Arc<AtomicU64>,
    status: EndsStatus,
}

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
enum ListenError {
    #[error(transparent)]
    Events(#[from] EventsError),
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    #[error("duplicate a socket: {0}")]
    Duplicate(io::Error),
    #[error("hear of links: {0}")]
    Links(io::Error),
}

impl Endings {
    /// Listens, if nobody does. How it stands.
    pub(super) fn ensure(&mut self, forgetter: &Forgetter) -> EndsStatus {
        let is_listening = self.task.as_ref().is_some_and(|task| !task.is_finished()) && forgetter.is_listening();
        let problem = if is_listening { Ok(()) } else { self.listen(forgetter) };
        self.status.problem = match problem {
            Ok(()) => events::problem(),
            Err(error) => {
                (self.task, self.status.since) = (None, 0);
                Some(format!("{error}; the bypass sees a connection's end only within the time of --bypass-revalidate"))
            }
        };
        self.status.lost = self.lost.load(Ordering::Relaxed);
        self.status.clone()
    }

    fn listen(&mut self, forgetter: &Forgetter) -> Result<(), ListenError> {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        let events = Events::open()?;
        // First: none comes that does not meet the program.
        forgetter.listen(events.as_fd().try_clone_to_owned().map_err(ListenError::Duplicate)?)?;
        events.join()?;
        info!("conntrack's events tell of connections that end");
        self.status.since = now();
        self.task = Some(tokio::spawn(follow_connections(events, forgetter.clone(), Arc::clone(&self.lost))));
        Ok(())
    }
}

async fn follow_connections(events: Events, forgetter: Forgetter, lost: Arc<AtomicU64>) {
    loop {
        let forgotten = match events.told().await {
            Told::Ended => Ok(0),
            Told::Lost => {
                lost.fetch_add(1, Ordering::Relaxed);
                forgetter.everything()
            }
        };
        let forgotten = match forgotten {
            Ok(_) => forget_again(&forgetter).await,
            Err(error) => Err(error),
        };
        if let Err(error) = forgotten {
            warn!("{error}; flows of connections that ended may bypass the stack until they are revalidated");
        }
    }
}

async fn forget_again(forgetter: &Forgetter) -> Result<(), DataplaneError> {
    let mut left = Left::Later;
    loop {
        match left {
            Left::Nothing => return Ok(()),
            Left::Later => sleep(Duration::from_nanos(REST)).await,
            Left::More => tokio::task::yield_now().await,
        }
        left = forgetter.again()?;
    }
}

/// Has flows into links that go be left to the stack from the moment in which the kernel tells of it, before they are forgotten.
pub(super) fn watch_links(forgetter: &Forgetter) {
    let watch = || -> Result<(), ListenError> {
        let socket = LinkSocket::open().map_err(ListenError::Links)?;
        // First: none comes that does not meet the program.
        forgetter.watch_links(socket.as_fd().try_clone_to_owned().map_err(ListenError::Duplicate)?)?;
        socket.join().map_err(ListenError::Links)
    };
    if let Err(error) = watch() {
        warn!("{error}; flows of pods that go leave the bypass some milliseconds later");
    }
}

/// Forgets the flows of pods whose links go.
pub(super) async fn follow_links(mut gone: broadcast::Receiver<u32>, forgetter: Forgetter) {
    loop {
        let forgotten = match gone.recv().await {
            Ok(first) => {
                let mut links = vec![first];
                while let Ok(link) = gone.try_recv() {
                    links.push(link);
                }
                forgetter.links_are_gone(&links)
            }
            Err(RecvError::Lagged(_)) => forgetter.everything(),
            Err(RecvError::Closed) => return,
        };
        if let Err(error) = forgotten {
            warn!("{error}; flows of pods that are gone may bypass the stack until they are revalidated");
        }
    }
}
