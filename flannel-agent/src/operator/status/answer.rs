//! What the running agent answers when it is asked how it is.

use std::{io, time::Duration};

use flannel_common::vxlan::Vni;

use crate::{
    cli::Cli,
    control::{self, Condition, ControlError, Reply, Request},
};

/// For so long an agent that has much to do may take. One that has just begun listens by then.
const LIMIT: Duration = Duration::from_secs(2);

/// What became of asking.
pub(super) enum Answer {
    /// How it is.
    Condition(Condition),
    /// It answers something else, as one of another version does.
    Other,
    /// It has the overlay's lock, does not listen yet, and says by a file of its own what it waits for.
    Waits,
    /// It takes requests and does not answer.
    None,
    /// It can't be asked, in words.
    Failed(String),
}

impl Answer {
    pub(super) async fn ask(cli: &Cli, vni: Vni, one_waits: bool) -> Self {
        let begins = if one_waits { Duration::ZERO } else { LIMIT };
        match control::ask(&control::path(&cli.run_dir, vni), Request::Condition, begins, LIMIT).await {
            Ok(Reply::Condition(condition)) => Self::Condition(condition),
            Ok(Reply::Released { .. } | Reply::Refused { .. }) => Self::Other,
            Err(ControlError::Ask { source, .. } | ControlError::Listen { source, .. }) => match source.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::None,
                _ if one_waits => Self::Waits,
                _ => Self::Failed(source.to_string()),
            },
        }
    }

    /// Why it does not do its work.
    pub(super) fn hangs(&self) -> Option<String> {
        match self {
            Self::Condition(Condition { silent: Some((name, seconds)), .. }) => Some(format!(
                "the agent hangs: its loop {name:?} was not heard for {seconds} s; restart it (pods go on meanwhile)"
            )),
            Self::None => Some(format!(
                "the agent runs and does not answer within {LIMIT:?}: it was stopped (SIGSTOP, a frozen cgroup, a debugger) or hangs; \
                 let it go on or restart it (pods go on meanwhile)"
            )),
            Self::Failed(problem) => {
                Some(format!("the agent runs and can't be asked how it is: {problem}; restart it"))
            }
            Self::Condition(_) | Self::Other | Self::Waits => None,
        }
    }

    pub(super) fn is_not_ready(&self) -> Option<String> {
        match self {
            Self::Condition(Condition { is_ready: false, .. }) | Self::Waits => {
                Some("the agent has not made the datapath yet".to_owned())
            }
            _ => None,
        }
    }

    /// What is wrong with it, or with what it writes.
    pub(super) fn problem(&self) -> Option<String> {
        self.hangs().or_else(|| match self {
            Self::Condition(Condition { unwritten: Some(problem), .. }) => {
                Some(format!("the agent can't write its status: {problem}"))
            }
            _ => None,
        })
    }
}
