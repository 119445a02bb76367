//! Everybody's rules, as the host's programs list them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    NetfilterError,
    programs::{Iptables, Kind, Programs},
};

/// The tables of iptables that packets pass, but for `nat`: that is for the first packet of a connection only, and the one
/// that is large.
const TABLES: [&str; 4] = ["raw", "mangle", "filter", "security"];
/// The families of nftables that packets of IPv4 pass.
const FAMILIES: [&str; 4] = ["ip", "inet", "bridge", "netdev"];

/// Rules that can meet more than the first packet of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// A text of `nft -j` for each table, or one for all, with those of iptables-nft.
    pub nft: Vec<String>,
    /// Those of iptables.
    pub iptables: Vec<Saved>,
}

/// A table of iptables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// What the program is called on this host.
    pub program: &'static str,
    /// Whether it is a table of nf_tables.
    pub is_nf_tables: bool,
    /// In the form of `iptables-save`.
    pub text: String,
}

/// Reads them.
#[derive(Debug, Default)]
pub struct Lister {
    programs: Programs,
}

impl Lister {
    /// What there is now. Tables that have chains of type `nat` only are left out, and those of nftables that are
    /// iptables-nft's, which says more of them.
    ///
    /// # Errors
    /// Where a program that is there does not do what it should.
    pub async fn read(&mut self) -> Result<Listing, NetfilterError> {
        self.programs.find();
        let mut listing = Listing::default();
        let mut tables = match &self.programs.nft {
            Some(nft) => Some(tables(&nft.run(&["-j", "list", "chains"], "").await?)),
            None => None,
        };
        for iptables in self.programs.iptables().await? {
            for table in TABLES {
                let own = ("ip".to_owned(), table.to_owned());
                let is_there = match (iptables.kind, &tables) {
                    (Kind::Legacy, _) => iptables.is_in_use(table),
                    (Kind::Nft, Some(tables)) => tables.contains(&own),
                    (Kind::Nft, None) => true,
                };
                if !is_there {
                    continue;
                }
                let Some(text) = iptables.save(table).await? else { continue };
                // Of a table that somebody filled by `nft` it says that it is incompatible, and nothing else.
                if !text.lines().any(|line| line.strip_prefix('*') == Some(table)) {
                    continue;
                }
                if let (Kind::Nft, Some(tables)) = (iptables.kind, &mut tables) {
                    tables.remove(&own);
                }
                let is_nf_tables = iptables.kind == Kind::Nft;
                listing.iptables.push(Saved { program: name(&iptables), is_nf_tables, text });
            }
        }
        if let (Some(nft), Some(tables)) = (&self.programs.nft, &tables) {
            for (family, table) in tables {
                match nft.list(&["-j", "-a", "-s", "list", "table", family, table]).await? {
                    Some(text) => listing.nft.push(text),
                    // It is gone meanwhile, or its name is a word of the language, which only a file may have for a name.
                    None => {
                        listing.nft = vec![nft.run(&["-j", "-a", "-s", "list", "ruleset"], "").await?];
                        break;
                    }
                }
            }
        }
        Ok(listing)
    }
}

const fn name(iptables: &Iptables) -> &'static str {
    match (iptables.is_own, iptables.kind) {
        (true, _) => "iptables",
        (false, Kind::Nft) => "iptables-nft",
        (false, Kind::Legacy) => "iptables-legacy",
    }
}

/// The tables that the kernel calls for more than the first packet of a connection.
fn tables(chains: &str) -> BTreeSet<(String, String)> {
    let document: Value = serde_json::from_str(chains).unwrap_or_default();
    let objects = document.get("nftables").and_then(Value::as_array);
    let table = |object: &Value| {
        let chain = object.get("chain")?;
        let text = |key: &str| chain.get(key).and_then(Value::as_str);
        let is_called = text("hook").is_some() && text("type") != Some("nat");
        let (family, table) = (text("family")?, text("table")?);
        (is_called && FAMILIES.contains(&family)).then(|| (family.to_owned(), table.to_owned()))
    };
    objects.into_iter().flatten().filter_map(table).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_meet_more_than_a_first_packet() {
        let chains = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
            {"chain": {"family": "ip", "table": "nat", "name": "PREROUTING", "type": "nat", "hook": "prerouting"}},
            {"chain": {"family": "ip", "table": "nat", "name": "mine"}},
            {"chain": {"family": "ip6", "table": "six", "name": "f", "type": "filter", "hook": "forward"}},
            {"chain": {"family": "inet", "table": "t", "name": "f", "type": "filter", "hook": "forward"}}]}"#;
        assert_eq!(tables(chains), [("inet".to_owned(), "t".to_owned())].into());
        assert!(tables("").is_empty() && tables("[]").is_empty());
    }
}
