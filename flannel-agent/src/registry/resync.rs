//! Why the whole table was read again.

/// Why the whole table was read: label of the counter, and row of docs/leases.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResyncCause {
    /// The agent started.
    Start,
    /// This host moved to another lease.
    Moved,
    /// The connection ended.
    Connection,
    /// The changes since the last one seen are gone.
    Compacted,
    /// The member that was asked has no leader.
    NoLeader,
    /// etcd does not take the token or the user any more.
    Unauthenticated,
    /// The store ended the watch, or refused an answer, for another reason.
    Cancelled,
    /// The store went back to an earlier revision.
    RolledBack,
    /// Another store answers under the same address.
    OtherCluster,
}

impl ResyncCause {
    /// Each of them.
    pub const ALL: [Self; 9] = [
        Self::Start,
        Self::Moved,
        Self::Connection,
        Self::Compacted,
        Self::NoLeader,
        Self::Unauthenticated,
        Self::Cancelled,
        Self::RolledBack,
        Self::OtherCluster,
    ];

    /// The cause behind an error message of etcd's, where it says one (etcd: api/v3rpc/rpctypes/error.go).
    pub(super) fn of_message(message: &str) -> Option<Self> {
        if message.contains("no leader") {
            Some(Self::NoLeader)
        } else if message.contains("invalid auth token") || message.contains("permission denied") {
            Some(Self::Unauthenticated)
        } else {
            None
        }
    }

    /// Its name in status and metrics.
    pub const fn label(self) -> &'static str {
        self.row().0
    }

    /// What happened.
    pub const fn description(self) -> &'static str {
        self.row().1
    }

    const fn row(self) -> (&'static str, &'static str) {
        match self {
            Self::Start => ("start", "The agent started."),
            Self::Moved => ("moved", "This host took another lease, since its own had ended and its subnet was taken."),
            Self::Connection => ("connection", "The connection ended: the store restarted, or the network was cut."),
            Self::Compacted => ("compacted", "The store no longer has the changes since the last one that was seen."),
            Self::NoLeader => ("no_leader", "The member of etcd that was asked has no leader."),
            Self::Unauthenticated => {
                ("unauthenticated", "The store does not take the token or the user, or not any more.")
            }
            Self::Cancelled => ("cancelled", "The store ended the watch, or refused an answer, for another reason."),
            Self::RolledBack => {
                ("rolled_back", "The store went back to an earlier revision: data lost, or a backup restored.")
            }
            Self::OtherCluster => ("other_cluster", "Another cluster answers under the same address."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_a_row_for_each() {
        let documentation = include_str!("../../docs/leases.md");
        for cause in ResyncCause::ALL {
            let row = format!("| `{}` | {} |", cause.label(), cause.description());
            assert!(documentation.contains(&row), "docs/leases.md lacks: {row}");
        }
    }

    #[test]
    fn etcds_messages_are_told_apart() {
        for (message, cause) in [
            ("etcdserver: no leader", Some(ResyncCause::NoLeader)),
            ("etcdserver: invalid auth token", Some(ResyncCause::Unauthenticated)),
            ("etcdserver: permission denied; give that user the prefix", Some(ResyncCause::Unauthenticated)),
            ("transport error: broken pipe", None),
        ] {
            assert_eq!(ResyncCause::of_message(message), cause, "{message}");
        }
    }
}
