//! What is set in the kernel now, and setting it.

use flannel_common::vxlan::Vni;

use super::{
    Masquerade, Names, NetfilterError, Preference, Rules,
    iptables::{self, Found, Place},
    nft,
    tool::Tool,
};

/// For iptables-legacy's lock. iptables-nft has none, and takes the option.
const WAIT: &str = "--wait=5";
/// The table that a flannel of nftables makes for IPv6, which this agent does not carry.
const FLANNELS_IPV6_TABLE: &str = "ip6 flannel-ipv6";

/// Who holds the rules that masquerade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Nftables,
    Iptables,
}

/// What the host has of our rules, as its own programs list it: equal where nobody has changed anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    table: Option<String>,
    nat: Option<Found>,
    pub(super) filter: Option<Found>,
}

impl State {
    /// Whether forwarding is accepted by rules of ours.
    pub(super) fn has_forward(&self) -> bool {
        self.filter.as_ref().is_some_and(|found| !found.jumps.is_empty())
    }

    /// Whether both differ in nothing but what FORWARD does with what no rule decides on.
    pub(super) fn differs_in_policy_only(&self, other: &Self) -> bool {
        let rules = |state: &Self| {
            let filter = state.filter.clone().map(|found| Found { policy: String::new(), ..found });
            Self { filter, ..state.clone() }
        };
        self != other && rules(self) == rules(other)
    }
}

/// The programs that the host has.
pub(super) struct Kernel {
    nft: Option<Tool>,
    iptables: Option<(Tool, Tool)>,
}

impl Kernel {
    pub(super) fn find() -> Self {
        let iptables = Tool::find("iptables").zip(Tool::find("iptables-restore"));
        Self { nft: Tool::find("nft"), iptables }
    }

    /// Which of the two masquerades.
    pub(super) fn mode(&self, rules: &Rules) -> Result<Mode, NetfilterError> {
        let is_needed = rules.masquerade != Masquerade::Off;
        let mode = match (rules.preference, &self.nft, &self.iptables) {
            (Preference::Iptables, ..) => Mode::Iptables,
            (Preference::Any, None, Some(_)) => Mode::Iptables,
            _ => Mode::Nftables,
        };
        match mode {
            Mode::Nftables if is_needed && self.nft.is_none() => Err(NetfilterError::Missing {
                wanted: "packets are to be masqueraded",
                program: "nft",
                package: "nftables",
                otherwise: "say --ip-masq=false",
            }),
            Mode::Iptables if (is_needed || rules.forward) && self.iptables.is_none() => Err(NetfilterError::Missing {
                wanted: "EnableNFTables is false",
                program: "iptables",
                package: "iptables",
                otherwise: "remove that key from the network config",
            }),
            mode => Ok(mode),
        }
    }

    /// What is set of what the rules are about.
    pub(super) async fn state(&self, mode: Mode, rules: &Rules) -> Result<State, NetfilterError> {
        let names = Names::of(rules.vni);
        let masquerades = rules.masquerade != Masquerade::Off;
        let mut state = State::default();
        if let Some(nft) = self.nft.as_ref().filter(|_| masquerades && mode == Mode::Nftables) {
            state.table = nft.list(&["--stateless", "list", "table", "ip", &names.table]).await?;
        }
        let chains = |place: Place| [place.chain(&names).to_owned()];
        if masquerades && mode == Mode::Iptables {
            state.nat = self.look(Place::Postrouting, &chains(Place::Postrouting), Some(rules)).await?;
        }
        if rules.forward {
            state.filter = self.look(Place::Forward, &chains(Place::Forward), Some(rules)).await?;
        }
        Ok(state)
    }

    /// Sets the rules, and takes away what else there is of this overlay's: of another subnet, in the other language, or
    /// flannel's. Each table changes in one step.
    pub(super) async fn apply(&self, mode: Mode, rules: &Rules) -> Result<(), NetfilterError> {
        let names = Names::of(rules.vni);
        let table = nft::table(rules).filter(|_| mode == Mode::Nftables);
        self.replace_table(&names, table.as_deref(), Some(rules)).await?;

        let (masquerade, forward) = (Place::Postrouting, Place::Forward);
        let nat = if mode == Mode::Iptables { masquerade.rules(rules) } else { Vec::new() };
        let nat = self.replacement(masquerade, &names, Some(rules), |_| nat).await?;
        let filter = self.replacement(forward, &names, Some(rules), |found| {
            let is_wanted = rules.forward && (mode == Mode::Iptables || !found.accepts());
            if is_wanted { forward.rules(rules) } else { Vec::new() }
        });
        self.restore(&(nat + &filter.await?)).await
    }

    /// Takes all away that an overlay has.
    async fn clear(&self, vni: Vni) -> Result<(), NetfilterError> {
        let names = Names::of(vni);
        self.replace_table(&names, None, None).await?;
        let mut text = String::new();
        for place in [Place::Postrouting, Place::Forward] {
            text += &self.replacement(place, &names, None, |_| Vec::new()).await?;
        }
        self.restore(&text).await
    }

    /// Takes away what no flannel can have made. Its daemon uses the same table and chains; of the table only our chain is
    /// ours then.
    async fn clear_own(&self, vni: Vni) -> Result<(), NetfilterError> {
        if vni != Vni::DEFAULT {
            return self.clear(vni).await;
        }
        let Some(nft) = &self.nft else { return Ok(()) };
        let table = Names::of(vni).table;
        let Some(listing) = nft.list(&["--stateless", "list", "table", "ip", &table]).await? else { return Ok(()) };
        match nft::without_chain(&table, &listing) {
            text if text.is_empty() => Ok(()),
            text => nft.run(&["-f", "-"], &text).await.map(drop),
        }
    }

    /// Sets our table of nftables, or takes it away, and with it those of flannel's that are about the same Network.
    async fn replace_table(
        &self,
        names: &Names,
        wanted: Option<&str>,
        rules: Option<&Rules>,
    ) -> Result<(), NetfilterError> {
        let Some(nft) = &self.nft else { return Ok(()) };
        let tables = nft.run(&["list", "tables"], "").await?;
        let exists = |name: &str| tables.lines().any(|line| line.strip_prefix("table ") == Some(name));
        let [own, flannels] = [&names.table, &Names::flannels().table].map(|table| format!("ip {table}"));
        let mut unwanted = Vec::new();
        if exists(&own) {
            unwanted.push(own.as_str());
        }
        if own != flannels
            && exists(&flannels)
            && let Some(rules) = rules
            && nft
                .run(&["list", "table", "ip", &Names::flannels().table], "")
                .await?
                .contains(&rules.network.to_string())
        {
            unwanted.push(flannels.as_str());
        }
        // It does not say whose it is, and comes and goes with the one for IPv4.
        if exists(FLANNELS_IPV6_TABLE) && unwanted.contains(&flannels.as_str()) {
            unwanted.push(FLANNELS_IPV6_TABLE);
        }
        match nft::replace(&unwanted, wanted) {
            text if text.is_empty() => Ok(()),
            text => nft.run(&["-f", "-"], &text).await.map(drop),
        }
    }

    /// What `iptables-restore` is to read for one place.
    async fn replacement(
        &self,
        place: Place,
        names: &Names,
        rules: Option<&Rules>,
        wanted: impl FnOnce(&Found) -> Vec<String>,
    ) -> Result<String, NetfilterError> {
        let own = place.chain(names).to_owned();
        let mut chains = vec![own.clone()];
        let flannels = place.chain(&Names::flannels()).to_owned();
        if own != flannels
            && let Some(rules) = rules
            && let Some(listing) = self.list(place, &flannels).await?
            && listing.contains(&rules.network.to_string())
        {
            chains.push(flannels);
        }
        let found = self.look(place, &chains, rules).await?.unwrap_or_default();
        Ok(iptables::replace(place, &own, &wanted(&found), &found))
    }

    /// What iptables has in one place; [`None`] where there is no iptables.
    async fn look(
        &self,
        place: Place,
        chains: &[String],
        rules: Option<&Rules>,
    ) -> Result<Option<Found>, NetfilterError> {
        let Some(hook) = self.list(place, place.hook()).await? else { return Ok(None) };
        let names: Vec<_> = chains.iter().map(String::as_str).collect();
        let jumps = place.ours(&hook, &names, rules.map(|rules| rules.network));
        let mut found = Found { policy: iptables::policy(&hook), jumps, chains: Vec::new() };
        for chain in chains {
            if let Some(listing) = self.list(place, chain).await? {
                found.chains.push((chain.clone(), listing));
            }
        }
        Ok(Some(found))
    }

    async fn list(&self, place: Place, chain: &str) -> Result<Option<String>, NetfilterError> {
        let Some((iptables, _)) = &self.iptables else { return Ok(None) };
        iptables.list(&[WAIT, "-t", place.table(), "-S", chain]).await
    }

    async fn restore(&self, text: &str) -> Result<(), NetfilterError> {
        match &self.iptables {
            Some((_, restore)) if !text.is_empty() => restore.run(&["--noflush", WAIT], text).await.map(drop),
            _ => Ok(()),
        }
    }
}

/// Takes away all rules of an overlay, in both languages.
///
/// # Errors
/// [`NetfilterError`].
pub async fn remove(vni: Vni) -> Result<(), NetfilterError> {
    Kernel::find().clear(vni).await
}

/// Takes away those rules of an overlay that a daemon of flannel's, which has taken over, does not take for its own.
///
/// # Errors
/// [`NetfilterError`].
pub async fn remove_own(vni: Vni) -> Result<(), NetfilterError> {
    Kernel::find().clear_own(vni).await
}
