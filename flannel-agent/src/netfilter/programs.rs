//! The programs that a host has for packet rules: `nft`, and iptables in one kind or in both.
//!
//! The kernel has two sets of iptables' rules, and a packet passes both: those that `iptables-nft` sets, as tables of
//! nf_tables, and those of `iptables-legacy`, as tables of x_tables. What one accepts the other may drop. `iptables` is
//! one of the two, as the distribution or the operator has chosen; it is the host's *own* here.

use std::{fs, io};

use super::{
    NetfilterError,
    iptables::Place,
    tool::{Identity, Tool},
};

/// For iptables-legacy's lock. iptables-nft has none, and takes the option.
const WAIT: &str = "--wait=5";
/// The first version whose `iptables-restore` takes it.
const RESTORE_WAITS: [u32; 3] = [1, 6, 2];
/// The tables of x_tables that are in use in this network namespace (net/netfilter/x_tables.c). `iptables-legacy` makes a
/// table, and loads its module, by merely looking at it; whoever reads this does not.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";

/// Whose rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    /// nf_tables'.
    Nft,
    /// x_tables'.
    Legacy,
}

impl Kind {
    /// As the programs are called.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }

    fn pair(self) -> Option<(Tool, Tool)> {
        match self {
            Self::Nft => Tool::find("iptables-nft").zip(Tool::find("iptables-nft-restore")),
            Self::Legacy => Tool::find("iptables-legacy").zip(Tool::find("iptables-legacy-restore")),
        }
    }

    const fn save(self, is_own: bool) -> &'static str {
        match (is_own, self) {
            (true, _) => "iptables-save",
            (false, Self::Nft) => "iptables-nft-save",
            (false, Self::Legacy) => "iptables-legacy-save",
        }
    }
}

/// What `iptables --version` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    kind: Kind,
    number: [u32; 3],
}

impl Version {
    /// Of `iptables v1.8.9 (nf_tables)`. Before 1.8 there was one kind.
    fn parse(text: &str) -> Self {
        let kind = if text.contains("(nf_tables)") { Kind::Nft } else { Kind::Legacy };
        let number = text.split(' ').find_map(|word| word.strip_prefix('v')).unwrap_or_default();
        let mut parts = number.trim().split('.').map(|part| part.parse().unwrap_or(0));
        Self { kind, number: std::array::from_fn(|_| parts.next().unwrap_or(0)) }
    }
}

/// iptables of one kind.
#[derive(Clone, Debug)]
pub(super) struct Iptables {
    pub(super) kind: Kind,
    /// Whether it is what `iptables` is on this host.
    pub(super) is_own: bool,
    list: Tool,
    restore: Tool,
    restore_waits: bool,
}

impl Iptables {
    /// Whether its table of a place may be looked at without making one that nobody has. What is *wanted* of the host's
    /// own may be made.
    pub(super) fn has_table(&self, place: Place, is_wanted: bool) -> bool {
        self.kind == Kind::Nft || self.is_own && is_wanted || self.is_in_use(place.table())
    }

    /// Whether somebody has this table of x_tables.
    pub(super) fn is_in_use(&self, table: &str) -> bool {
        self.kind == Kind::Legacy && legacy_tables().is_ok_and(|tables| tables.lines().any(|name| name == table))
    }

    /// A table in the form of `iptables-save`; [`None`] where there is no such program, or no such table.
    pub(super) async fn save(&self, table: &str) -> Result<Option<String>, NetfilterError> {
        match Tool::find(self.kind.save(self.is_own)) {
            Some(save) => save.list(&["-t", table]).await,
            None => Ok(None),
        }
    }

    /// The rules of a chain; [`None`] where there is no such chain.
    pub(super) async fn list(&self, place: Place, chain: &str) -> Result<Option<String>, NetfilterError> {
        self.list.list(&[WAIT, "-t", place.table(), "-S", chain]).await
    }

    /// The rules of a table.
    pub(super) async fn list_table(&self, place: Place) -> Result<String, NetfilterError> {
        self.list.run(&[WAIT, "-t", place.table(), "-S"], "").await
    }

    /// Does what a text says, all or nothing of each table.
    pub(super) async fn restore(&self, text: &str) -> Result<(), NetfilterError> {
        let arguments = if self.restore_waits { &["--noflush", WAIT][..] } else { &["--noflush"] };
        if text.is_empty() { Ok(()) } else { self.restore.run(arguments, text).await.map(drop) }
    }
}

/// Those that are installed.
#[derive(Debug, Default)]
pub(super) struct Programs {
    pub(super) nft: Option<Tool>,
    own: Option<(Tool, Tool)>,
    /// Of which file what was found out.
    identified: Option<(Identity, Version)>,
    has_said: bool,
}

impl Programs {
    /// Looks for them again.
    pub(super) fn find(&mut self) {
        self.nft = Tool::find("nft");
        self.own = Tool::find("iptables").zip(Tool::find("iptables-restore"));
    }

    pub(super) const fn has_iptables(&self) -> bool {
        self.own.is_some()
    }

    /// iptables of each kind that is installed, the host's own first.
    pub(super) async fn iptables(&mut self) -> Result<Vec<Iptables>, NetfilterError> {
        let Some((list, restore)) = self.own.clone() else { return Ok(Vec::new()) };
        let identity = list.identity();
        let version = match self.identified {
            Some((known, version)) if known == identity => version,
            _ => Version::parse(&list.run(&["--version"], "").await?),
        };
        self.identified = Some((identity, version));
        let restore_waits = version.number >= RESTORE_WAITS;
        let own = Iptables { kind: version.kind, is_own: true, list, restore, restore_waits };
        let kind = version.kind.other();
        let other = kind.pair().map(|(list, restore)| {
            // There are two since 1.8.
            Iptables { kind, is_own: false, list, restore, restore_waits: true }
        });
        self.say_what_is_hidden(other.as_ref());
        Ok(std::iter::once(own).chain(other).collect())
    }

    fn say_what_is_hidden(&mut self, other: Option<&Iptables>) {
        let is_hidden = || legacy_tables().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
        if !self.has_said && other.is_some_and(|other| other.kind == Kind::Legacy) && is_hidden() {
            tracing::info!("whether iptables-legacy is in use is root's to see; what its rules drop stays dropped");
            self.has_said = true;
        }
    }
}

/// The names of x_tables' tables, a line each; none where the kernel has none.
pub(crate) fn legacy_tables() -> io::Result<String> {
    match fs::read_to_string(LEGACY_TABLES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_their_kinds() {
        let version = |kind, number| Version { kind, number };
        assert_eq!(Version::parse("iptables v1.8.9 (nf_tables)\n"), version(Kind::Nft, [1, 8, 9]));
        assert_eq!(Version::parse("iptables v1.8.10 (legacy)\n"), version(Kind::Legacy, [1, 8, 10]));
        assert_eq!(Version::parse("iptables v1.6.1\n"), version(Kind::Legacy, [1, 6, 1]));
        assert_eq!(Version::parse("iptables v1.4.21"), version(Kind::Legacy, [1, 4, 21]));
        assert_eq!(Version::parse(""), version(Kind::Legacy, [0, 0, 0]));
        assert!([1, 6, 1] < RESTORE_WAITS && [1, 8, 0] >= RESTORE_WAITS);
    }
}
