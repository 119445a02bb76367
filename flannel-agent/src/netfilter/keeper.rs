//! The task that keeps the packet rules as they should be. Programs of others that take their time, or a lock, hold up
//! nothing else.

use std::time::Duration;

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::{
    Masquerade, NetfilterError, Preference, Rules,
    kernel::{Kernel, Mode, Set, State},
};
use crate::status::RulesStatus;

/// How long may be waited for the first attempt. What comes after goes on without rules.
const FIRST_ATTEMPT_LIMIT: Duration = Duration::from_secs(15);

/// The packet rules of an overlay, kept by a task that ends with this.
pub struct Keeper {
    wanted: watch::Sender<Option<Rules>>,
    report: watch::Receiver<Report>,
    task: JoinHandle<()>,
}

/// How it stands.
#[derive(Clone, Debug, Default)]
struct Report {
    /// For these rules an attempt has ended.
    rules: Option<Rules>,
    status: RulesStatus,
}

impl Keeper {
    /// Keeps none yet. Those that it will be told are looked at once per `resync`.
    pub fn new(resync: Duration) -> Self {
        let (wanted, receiver) = watch::channel(None);
        let (sender, report) = watch::channel(Report::default());
        let task = tokio::spawn(keep(receiver, sender, resync));
        Self { wanted, report, task }
    }

    /// Has these rules kept from now on, and waits for the first attempt to set them.
    pub async fn set(&self, rules: Rules) {
        self.wanted.send_if_modified(|wanted| {
            let is_new = wanted.as_ref() != Some(&rules);
            *wanted = Some(rules.clone());
            is_new
        });
        let mut report = self.report.clone();
        let attempted = report.wait_for(|report| report.rules.as_ref() == Some(&rules));
        if timeout(FIRST_ATTEMPT_LIMIT, attempted).await.is_err() {
            warn!("the packet rules are still not set after {FIRST_ATTEMPT_LIMIT:?}; going on without");
        }
    }

    /// Waits until it stands otherwise than it did.
    pub async fn changed(&mut self) -> RulesStatus {
        if self.report.changed().await.is_err() {
            // The task ends with the runtime only.
            std::future::pending::<()>().await;
        }
        self.report.borrow_and_update().status.clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(mut wanted: watch::Receiver<Option<Rules>>, report: watch::Sender<Report>, resync: Duration) {
    let mut upkeep = Upkeep::default();
    loop {
        let Some(rules) = wanted.borrow_and_update().clone() else {
            if wanted.changed().await.is_err() {
                return;
            }
            continue;
        };
        upkeep.bring(&rules).await;
        report.send_if_modified(|report| {
            let is_new = report.rules.as_ref() != Some(&rules) || report.status != upkeep.status;
            *report = Report { rules: Some(rules.clone()), status: upkeep.status.clone() };
            is_new
        });
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = sleep(resync) => {}
        }
    }
}

#[derive(Default)]
struct Upkeep {
    kernel: Kernel,
    /// The rules that were set last, and what the kernel had then.
    last: Option<(Rules, Mode, State)>,
    status: RulesStatus,
}

impl Upkeep {
    /// Looks at what is set, and sets it where that is not as it was left. What fails is said once.
    async fn bring(&mut self, rules: &Rules) {
        let result = self.try_bring(rules).await;
        if result.is_err() {
            self.last = None;
        }
        let problem = result.map_or_else(|error| Some(error.to_string()), |()| self.contradiction(rules));
        match &problem {
            Some(problem) if self.status.problem.as_ref() != Some(problem) => {
                warn!("packet rules: {problem}; trying again");
            }
            None if self.status.problem.is_some() => info!("the packet rules are set"),
            _ => {}
        }
        self.status.problem = problem;
    }

    async fn try_bring(&mut self, rules: &Rules) -> Result<(), NetfilterError> {
        let mode = self.kernel.mode(rules)?;
        if let Some((set, with, left)) = &self.last
            && (set, *with) == (rules, mode)
        {
            let now = self.kernel.state(mode, rules).await?;
            if now == *left {
                return Ok(());
            }
            if now.is_changed_from(left) {
                count_repair(&mut self.status);
            }
            if now.forward() != left.forward() {
                info!("another iptables is in use than before; forwarding is accepted in each that is");
            }
        }
        let (set, state) = match self.apply(mode, rules).await {
            // Somebody may have flushed them in this moment.
            Err(NetfilterError::WithoutEffect { .. }) => {
                let applied = self.apply(mode, rules).await?;
                count_repair(&mut self.status);
                applied
            }
            result => result?,
        };
        self.status.masquerade = match (rules.masquerade, set.mode) {
            (Masquerade::Off, _) => "off",
            (_, Mode::Nftables) => "nftables",
            (_, Mode::Iptables) => "iptables",
        }
        .to_owned();
        self.status.forward = !state.forward().is_empty();
        self.status.forward_in = state.forward().into_iter().map(|kind| kind.label().to_owned()).collect();
        let is_new = self.status.fallback != set.fallback;
        self.status.fallback = set.fallback;
        self.last = state.is_settled().then(|| (rules.clone(), set.mode, state));
        if let Some(fallback) = self.status.fallback.as_ref().filter(|_| is_new && self.contradiction(rules).is_none())
        {
            warn!("packet rules: {fallback}");
        }
        Ok(())
    }

    /// Sets the rules, and looks whether they are there.
    async fn apply(&mut self, mode: Mode, rules: &Rules) -> Result<(Set, State), NetfilterError> {
        let (set, result) = self.kernel.apply(mode, rules).await;
        result?;
        let state = self.kernel.state(set.mode, rules).await?;
        self.kernel.verify(&set, rules, &state)?;
        Ok((set, state))
    }

    /// What works otherwise than the config asks for, in words.
    fn contradiction(&self, rules: &Rules) -> Option<String> {
        let is_other = rules.preference == Preference::Nftables && self.status.masquerade == "iptables";
        let fallback = self.status.fallback.as_ref().filter(|_| is_other)?;
        Some(format!("EnableNFTables is true, and {fallback}"))
    }
}

fn count_repair(status: &mut RulesStatus) {
    warn!("another program has changed the packet rules; they are set again");
    status.repairs += 1;
}
