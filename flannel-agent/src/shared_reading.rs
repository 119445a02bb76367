//! What is read for whoever asks over HTTP: at most so often, however many ask, and on a thread that is none of the agent's loops'.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    runtime,
    sync::Mutex,
    task::{JoinError, spawn_blocking},
    time::Instant,
};

/// What was read last, and when. Clones are the same.
#[derive(Debug)]
pub struct SharedReading<T> {
    /// For so long what was read is told to others who ask: whoever asks all the time costs no more than one who asks so often.
    fresh: Duration,
    latest: Arc<Mutex<Option<(Instant, T)>>>,
}

impl<T> Clone for SharedReading<T> {
    fn clone(&self) -> Self {
        Self { fresh: self.fresh, latest: Arc::clone(&self.latest) }
    }
}

impl<T: Send + 'static> SharedReading<T> {
    /// Nothing yet.
    pub fn new(fresh: Duration) -> Self {
        Self { fresh, latest: Arc::default() }
    }

    /// Tells of what was read, once it is read again where it is older than that.
    ///
    /// # Errors
    /// [`JoinError`], where the reading panicked.
    pub async fn tell<U: Send + 'static>(
        &self,
        read: impl FnOnce() -> T + Send + 'static,
        tell: impl FnOnce(&T) -> U + Send + 'static,
    ) -> Result<U, JoinError> {
        let mut latest = Arc::clone(&self.latest).lock_owned().await;
        let fresh = self.fresh;
        // The lock goes with the work: a client that leaves does not let the next one begin beside it.
        let work = move || {
            let reading = latest.take().filter(|(read, _)| read.elapsed() <= fresh);
            let (_, reading) = latest.insert(reading.unwrap_or_else(|| (Instant::now(), read())));
            tell(reading)
        };
        spawn_blocking(work).await
    }
}

/// Runs to its end what asks the kernel, on a runtime of its own, since that of the agent's loops has one thread.
///
/// # Errors
/// Where the kernel has no descriptors left for one.
pub fn complete<F: Future>(future: F) -> io::Result<F::Output> {
    Ok(runtime::Builder::new_current_thread().enable_all().build()?.block_on(future))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn who_asks_while_it_is_fresh_is_told_the_same() {
        let count = Arc::new(AtomicUsize::new(0));
        let ask = async |shared: &SharedReading<usize>| {
            let count = Arc::clone(&count);
            shared.tell(move || count.fetch_add(1, Ordering::Relaxed) + 1, |reading| *reading).await.unwrap()
        };
        let shared = SharedReading::new(Duration::from_secs(3600));
        let all = [ask(&shared).await, ask(&shared.clone()).await, ask(&shared).await];
        assert_eq!(all, [1, 1, 1]);
        let stale = SharedReading::new(Duration::ZERO);
        let all = [ask(&stale).await, ask(&stale.clone()).await];
        assert_eq!(all, [2, 3]);
    }

    #[tokio::test]
    async fn a_reading_that_panicked_stops_no_other() {
        let shared = SharedReading::<u8>::new(Duration::from_secs(3600));
        assert!(shared.tell(|| std::panic::resume_unwind(Box::new("as a bug would")), |_| ()).await.is_err());
        assert_eq!(shared.tell(|| 1, |reading| *reading).await.unwrap(), 1);
    }
}
