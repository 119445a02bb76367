//! The running agent: a loop that carries what happens between what follows the store, what keeps the kernel in step, and
//! what is told.

use std::{ops::ControlFlow, time::Duration};

use tokio::time::{Interval, MissedTickBehavior, interval};
use tracing::{info, warn};

use super::{
    Shutdown,
    datapath::Datapath,
    leases::{Change, Leases},
    reconcile::{COMPARE_PERIOD, Event, LOOK_PERIOD, WATCH_PERIOD},
    report::{Due, Reporter},
};
use crate::{
    control::{Reply, Task},
    evidence::Evidence,
    health,
    histogram::Histogram,
    lease::PeerChange,
    registry::ResyncCause,
    status::Status,
};

/// The least time between two writes of the agent's files.
const RECORD_PERIOD: Duration = Duration::from_millis(500);

/// The running agent.
pub(super) struct Agent<'a> {
    pub(super) leases: Leases,
    pub(super) datapath: Datapath<'a>,
    pub(super) reporter: Reporter,
    pub(super) evidence: Evidence,
    /// From a change of the peers being seen in the store to its being in the maps.
    pub(super) convergence: Histogram,
}

/// What is missed need not be caught up on.
fn every(period: Duration) -> Interval {
    let mut interval = interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

impl Agent<'_> {
    /// Follows store and kernel until a signal, or until the lease is taken away, which ends the process as flannel's
    /// does: started anew, it takes a lease again.
    pub(super) async fn follow(mut self, mut shutdown: Shutdown) {
        let mut compare = every(COMPARE_PERIOD);
        compare.reset();
        let mut look = every(LOOK_PERIOD);
        let mut watch = every(WATCH_PERIOD);
        let mut record = every(RECORD_PERIOD);
        let heartbeat = self.reporter.heartbeat("agent");
        let mut alive = every(health::PERIOD);
        loop {
            heartbeat.beat();
            tokio::select! {
                _ = alive.tick() => {}
                () = shutdown.requested() => {
                    info!("stopped as asked; the datapath goes on");
                    break;
                }
                incoming = self.leases.next() => match self.leases.take(incoming, |subnet| self.datapath.is_heard(subnet)) {
                    ControlFlow::Break(()) => break,
                    ControlFlow::Continue(Change::Peers(changes)) => {
                        self.apply(changes).await;
                        self.leases.take_seen().iter().for_each(|seen| self.convergence.observe(seen.elapsed()));
                    }
                    ControlFlow::Continue(Change::Lease(lease)) => {
                        self.datapath.move_to(lease, self.leases.table()).await;
                    }
                },
                due = self.datapath.next() => self.datapath.see_to(due, self.leases.table()).await,
                (request, answer) = self.reporter.asked() => {
                    // Whoever asked may be gone.
                    let _gone = answer.send(self.serve(request).await);
                }
                _ = compare.tick() => {
                    let changes = self.leases.review(|subnet| self.datapath.is_heard(subnet));
                    self.apply(changes).await;
                    self.datapath.review(self.leases.table()).await;
                    self.leases.refresh();
                }
                _ = look.tick() => {
                    if let Some(damage) = self.datapath.subnet_env_damage() {
                        self.restore_files();
                        self.datapath.restore_subnet_env(damage);
                    }
                    self.datapath.look(self.leases.table()).await;
                }
                _ = watch.tick() => self.datapath.watch_observers().await,
                _ = record.tick(), if self.is_record_due() => self.write_record(),
            }
            for event in self.datapath.take_events() {
                match event {
                    Event::External { public_ip, is_other_source } => {
                        self.leases.take_address(public_ip, is_other_source);
                    }
                    Event::Moved => self.leases.watch(ResyncCause::Moved),
                }
            }
        }
        self.leases.refresh();
        self.reporter.written().await;
        let due = self.due();
        self.reporter.write_now(due);
    }

    async fn apply(&mut self, changes: Vec<PeerChange>) {
        self.datapath.apply(changes, self.leases.table()).await;
    }

    async fn serve(&mut self, task: Task) -> Reply {
        match task {
            Task::ReleaseGuard => {
                let changes = self.leases.release();
                let peers = changes.len();
                warn!("{peers} held peers are released, as asked");
                self.apply(changes).await;
                self.leases.refresh();
                self.write_record();
                Reply::Released { peers }
            }
        }
    }

    fn is_status_due(&self) -> bool {
        self.leases.is_told_otherwise()
            || self.datapath.is_told_otherwise()
            || self.evidence.is_new()
            || self.reporter.missing().status
    }

    fn is_known_due(&self) -> bool {
        self.leases.is_known_otherwise() || self.reporter.missing().known
    }

    /// Whether something is to be written, and nothing is being written.
    fn is_record_due(&self) -> bool {
        (self.is_status_due() || self.is_known_due()) && self.reporter.is_idle()
    }

    pub(super) fn write_record(&mut self) {
        let due = self.due();
        self.reporter.write(due);
    }

    /// Writes at once what is gone of the files that the agent leaves.
    fn restore_files(&mut self) {
        self.reporter.look_for_files();
        if self.is_record_due() {
            let due = self.due();
            self.reporter.write_now(due);
        }
    }

    fn due(&mut self) -> Due {
        let (is_status_due, is_known_due) = (self.is_status_due(), self.is_known_due());
        Due { status: is_status_due.then(|| self.status()), known: is_known_due.then(|| self.leases.last_known()) }
    }

    fn status(&mut self) -> Status {
        let mut status = self.reporter.status();
        self.leases.tell(&mut status);
        self.datapath.tell(&mut status);
        status.evidence = self.evidence.take();
        status.convergence.clone_from(&self.convergence);
        status
    }
}
