//! What is set in the kernel now, and setting it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use flannel_common::vxlan::Vni;
use tracing::info;

use super::{
    Masquerade, Names, NetfilterError, Preference, Rules,
    iptables::{self, Found, Ours, Place},
    nft::{self, Form},
    order::Order,
    programs::{Iptables, Kind, Programs},
    tool::{Identity, Tool},
};

/// The table that a flannel of nftables makes for IPv6, which this agent does not carry.
const FLANNELS_IPV6_TABLE: &str = "ip6 flannel-ipv6";
/// How long an `nft` that failed is left alone, unless it becomes another file.
const NFT_PAUSE: Duration = Duration::from_secs(600);

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
    nat: Option<Ours>,
    /// By the iptables that have something that could drop.
    filter: BTreeMap<Kind, Ours>,
}

impl State {
    /// In which iptables forwarding is to be accepted by rules of ours.
    pub(super) fn forward(&self) -> BTreeSet<Kind> {
        self.filter.keys().copied().collect()
    }

    /// Whether rules are otherwise than they were in an iptables that is in use as before.
    pub(super) fn is_changed_from(&self, left: &Self) -> bool {
        let differs = |(kind, ours)| self.filter.get(kind).is_some_and(|now| now != ours);
        self.table != left.table || self.nat != left.nat || left.filter.iter().any(differs)
    }

    /// Whether it is: somebody may have begun to use one meanwhile.
    pub(super) fn is_settled(&self) -> bool {
        self.filter.values().all(Ours::is_set)
    }
}

/// How it was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) mode: Mode,
    /// Why not as it would be by itself.
    pub(super) fallback: Option<String>,
}

/// Nothing that masquerades is there.
const NO_NFT: NetfilterError = NetfilterError::Missing {
    wanted: "packets are to be masqueraded",
    program: "nft",
    package: "nftables",
    otherwise: "say --ip-masq=false",
};

/// An `nft` that failed.
#[derive(Debug)]
struct Failed {
    file: Option<Identity>,
    since: Instant,
    reason: String,
}

/// The host's rules, and what is known of them from before.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    programs: Programs,
    /// Where our jumps were last.
    orders: HashMap<(Kind, Place), Order>,
    failed: Option<Failed>,
    /// What could not be taken away, as it was said.
    left: Option<String>,
}

impl Kernel {
    /// Which of the two is to masquerade. Programs may have come and gone.
    pub(super) fn mode(&mut self, rules: &Rules) -> Result<Mode, NetfilterError> {
        self.programs.find();
        let is_needed = rules.masquerade != Masquerade::Off;
        let has_nft = self.programs.nft.is_some();
        let file = self.nft_file();
        self.failed.take_if(|failed| failed.file != file || failed.since.elapsed() >= NFT_PAUSE);
        let mode = match rules.preference {
            Preference::Iptables => Mode::Iptables,
            _ if self.programs.has_iptables() && (!has_nft || self.failed.is_some()) => Mode::Iptables,
            _ => Mode::Nftables,
        };
        match mode {
            Mode::Nftables if is_needed && !has_nft => Err(NO_NFT),
            Mode::Iptables if (is_needed || rules.forward) && !self.programs.has_iptables() => {
                Err(NetfilterError::Missing {
                    wanted: "EnableNFTables is false",
                    program: "iptables",
                    package: "iptables",
                    otherwise: "remove that key from the network config",
                })
            }
            mode => Ok(mode),
        }
    }

    fn nft_file(&self) -> Option<Identity> {
        self.programs.nft.as_ref().map(Tool::identity)
    }

    /// What is set of what the rules are about.
    pub(super) async fn state(&mut self, mode: Mode, rules: &Rules) -> Result<State, NetfilterError> {
        let names = Names::of(rules.vni);
        let masquerades = rules.masquerade != Masquerade::Off;
        let mut state = State::default();
        if masquerades && mode == Mode::Nftables {
            state.table = self.list_table(&names).await?;
        }
        for iptables in self.programs.iptables().await? {
            if masquerades && mode == Mode::Iptables && iptables.is_own {
                let found = self.look(&iptables, Place::Postrouting, &[&names], Some(rules), true).await?;
                state.nat = found.map(|found| found.ours);
            }
            if rules.forward
                && let Some(found) = self.look(&iptables, Place::Forward, &[&names], Some(rules), true).await?
                && is_in_use(&iptables, &found)
            {
                state.filter.insert(iptables.kind, found.ours);
            }
        }
        Ok(state)
    }

    /// Sets the rules, and takes away what else there is of this overlay's: of another subnet, in the other language or
    /// the other iptables, or flannel's. Each table changes in one step, and what is right is there before what is not
    /// goes. One part that fails keeps no other from being set.
    pub(super) async fn apply(&mut self, mode: Mode, rules: &Rules) -> (Set, Result<(), NetfilterError>) {
        let mut set = Set { mode, fallback: None };
        let is_needed = rules.masquerade != Masquerade::Off;
        let mut refused = None;
        if is_needed && mode == Mode::Nftables {
            match self.set_table(rules).await {
                Ok(fallback) => set.fallback = fallback,
                Err(error) if self.programs.has_iptables() => {
                    set.mode = Mode::Iptables;
                    let reason = error.to_string();
                    self.failed = Some(Failed { file: self.nft_file(), since: Instant::now(), reason });
                    refused = Some(error);
                }
                Err(error) => return (set, Err(error)),
            }
        }
        if is_needed && set.mode == Mode::Iptables {
            set.fallback = self.why_not_nftables(rules).map(|reason| format!("iptables masquerades, since {reason}"));
        }
        let result = self.apply_iptables(&mut set, rules).await;
        if self.failed.is_none() && (set.mode == Mode::Iptables || !is_needed) {
            self.remove_tables_or_say(rules).await;
        }
        let result = result.map_err(|error| match refused {
            Some(refused) => NetfilterError::Both(Box::new(refused), Box::new(error)),
            None => error,
        });
        (set, result)
    }

    fn why_not_nftables(&self, rules: &Rules) -> Option<String> {
        let missing = || self.programs.nft.is_none().then(|| "nft is not installed: install nftables".to_owned());
        match (rules.preference, &self.failed) {
            (Preference::Iptables, _) => None,
            (_, Some(failed)) => Some(failed.reason.clone()),
            (Preference::Nftables, None) => missing(),
            // Nobody asked for it.
            (Preference::Any, None) => None,
        }
    }

    /// Whether all is there, so far as programs are that can set it.
    pub(super) fn verify(&self, set: &Set, rules: &Rules, state: &State) -> Result<(), NetfilterError> {
        let is_set = |ours: Option<&Ours>| ours.is_some_and(Ours::is_set);
        let lacks_masquerade =
            rules.masquerade != Masquerade::Off && set.mode == Mode::Iptables && !is_set(state.nat.as_ref());
        let lacks_forward = rules.forward && self.programs.has_iptables() && !state.filter.values().any(Ours::is_set);
        if lacks_masquerade || lacks_forward {
            return Err(NetfilterError::WithoutEffect { program: "iptables" });
        }
        Ok(())
    }

    async fn apply_iptables(&mut self, set: &mut Set, rules: &Rules) -> Result<(), NetfilterError> {
        let mut result = Ok(());
        for iptables in self.programs.iptables().await? {
            let forward = self.set_forward(&iptables, rules).await;
            let masquerade = match set.mode {
                Mode::Iptables if iptables.is_own => self.set_masquerade(&iptables, set, rules).await,
                _ => self.bring(&iptables, Place::Postrouting, rules, &[]).await,
            };
            result = result.and(forward).and(masquerade);
        }
        result
    }

    async fn set_forward(&mut self, iptables: &Iptables, rules: &Rules) -> Result<(), NetfilterError> {
        let names = Names::of(rules.vni);
        let mut wanted = if rules.forward { Place::Forward.rules(rules) } else { Vec::new() };
        if !iptables.is_own
            && let Some(found) = self.look(iptables, Place::Forward, &[&names], Some(rules), false).await?
            && !is_in_use(iptables, &found)
        {
            wanted.clear();
        }
        self.bring(iptables, Place::Forward, rules, &wanted).await
    }

    async fn set_masquerade(
        &mut self,
        iptables: &Iptables,
        set: &mut Set,
        rules: &Rules,
    ) -> Result<(), NetfilterError> {
        let place = Place::Postrouting;
        match self.bring(iptables, place, rules, &place.rules(rules)).await {
            Err(error) if error.is_refusal() && rules.masquerade == Masquerade::FullyRandom => {
                let plain = Rules { masquerade: Masquerade::Plain, ..rules.clone() };
                // Where that is not the reason, the first refusal is the one to be told of.
                let is_reason = self.bring(iptables, place, rules, &place.rules(&plain)).await.is_ok();
                if !is_reason {
                    return Err(error);
                }
                let before = set.fallback.take().map(|fallback| format!("{fallback}; ")).unwrap_or_default();
                set.fallback = Some(format!("{before}iptables masquerades without --random-fully, since {error}"));
                Ok(())
            }
            result => result,
        }
    }

    /// Takes all away that an overlay has.
    async fn clear(&mut self, vni: Vni) -> Result<(), NetfilterError> {
        self.programs.find();
        let mut result = self.replace_table(&Names::of(vni), None, None).await;
        for iptables in self.programs.iptables().await? {
            for place in [Place::Postrouting, Place::Forward] {
                let removed = self.remove(&iptables, place, vni).await;
                result = result.and(removed);
            }
        }
        result
    }

    async fn remove(&mut self, iptables: &Iptables, place: Place, vni: Vni) -> Result<(), NetfilterError> {
        let names = Names::of(vni);
        let Some(found) = self.look(iptables, place, &[&names], None, false).await? else { return Ok(()) };
        iptables.restore(&iptables::replace(place, place.chain(&names), &[], &found, None)).await
    }

    async fn list_table(&self, names: &Names) -> Result<Option<String>, NetfilterError> {
        match &self.programs.nft {
            Some(nft) => nft.list(&["--stateless", "list", "table", "ip", &names.table]).await,
            None => Ok(None),
        }
    }

    /// Sets our table of nftables, in the fullest form that is taken. Returns why it is not the first. An `nft` that can't
    /// say all is asked for less only where nothing else is there, or it is what was asked for.
    async fn set_table(&self, rules: &Rules) -> Result<Option<String>, NetfilterError> {
        let names = Names::of(rules.vni);
        let is_bound = rules.preference == Preference::Nftables || !self.programs.has_iptables();
        let mut refusal: Option<NetfilterError> = None;
        for form in if is_bound { &Form::ALL[..] } else { &Form::ALL[..1] } {
            match self.replace_table(&names, nft::table(rules, *form).as_deref(), Some(rules)).await {
                Ok(()) if self.list_table(&names).await?.is_some_and(|listing| nft::is_complete(&listing)) => {
                    let lacks = if *form == Form::Plain { "fully-random or " } else { "" };
                    let with =
                        |error| format!("nftables masquerades without {lacks}a comment on the table, since {error}");
                    return Ok(refusal.map(with));
                }
                Ok(()) => return Err(NetfilterError::WithoutEffect { program: "nft" }),
                Err(error) if error.is_refusal() => refusal = refusal.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        Err(refusal.unwrap_or(NO_NFT))
    }

    /// What is of no more use keeps nothing from working, and is said once.
    async fn remove_tables_or_say(&mut self, rules: &Rules) {
        let result = self.replace_table(&Names::of(rules.vni), None, Some(rules)).await;
        let left = result.err().map(|error| error.to_string());
        if let Some(error) = left.as_ref().filter(|_| left != self.left) {
            info!("whether nftables has rules of ours can't be told: {error}");
        }
        self.left = left;
    }

    /// Takes away what no flannel can have made. Its daemon uses the same table and chains; of the table only our chain is
    /// ours then.
    async fn clear_own(&mut self, vni: Vni) -> Result<(), NetfilterError> {
        if vni != Vni::DEFAULT {
            return self.clear(vni).await;
        }
        self.programs.find();
        let Some(nft) = &self.programs.nft else { return Ok(()) };
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
        let Some(nft) = &self.programs.nft else { return Ok(()) };
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

    /// Sets the rules of our chain in one place, or takes it away, and with it flannel's of the same Network.
    async fn bring(
        &mut self,
        iptables: &Iptables,
        place: Place,
        rules: &Rules,
        wanted: &[String],
    ) -> Result<(), NetfilterError> {
        let (own, flannels) = (Names::of(rules.vni), Names::flannels());
        let is_wanted = !wanted.is_empty();
        if !iptables.has_table(place, is_wanted) {
            return Ok(());
        }
        let mut names = vec![&own];
        if own != flannels
            && let Some(listing) = iptables.list(place, place.chain(&flannels)).await?
            && listing.contains(&rules.network.to_string())
        {
            names.push(&flannels);
        }
        let found = self.look(iptables, place, &names, Some(rules), is_wanted).await?.unwrap_or_default();
        let chain = place.chain(&own);
        let key = (iptables.kind, place);
        let known = self.orders.get(&key).cloned();
        // What is behind a jump of others' counts only where ours has to find its place again.
        let is_gone = is_wanted && known.is_some() && found.order().is_none() && !found.is_empty();
        let table = if is_gone { iptables.list_table(place).await? } else { String::new() };
        let behind = found.place(chain, known.as_ref(), &table);
        iptables.restore(&iptables::replace(place, chain, wanted, &found, behind)).await?;
        let Some(known) = known.filter(|_| is_wanted && behind.is_some() && found.order().is_none()) else {
            return Ok(());
        };
        // Others may have loaded theirs since it was looked where ours goes.
        let now = self.look(iptables, place, &names, Some(rules), is_wanted).await?.unwrap_or_default();
        if now.others() == found.others() {
            return Ok(());
        }
        let table = iptables.list_table(place).await?;
        if let Some(behind) = now.place_again(&known, &table) {
            iptables.restore(&iptables::replace(place, chain, wanted, &now, Some(behind))).await?;
        }
        Ok(())
    }

    /// What iptables has in one place; [`None`] where nobody uses that table. Remembers where our jump is.
    async fn look(
        &mut self,
        iptables: &Iptables,
        place: Place,
        names: &[&Names],
        rules: Option<&Rules>,
        is_wanted: bool,
    ) -> Result<Option<Found>, NetfilterError> {
        let mut found = None;
        if iptables.has_table(place, is_wanted)
            && let Some(hook) = iptables.list(place, place.hook()).await?
        {
            let names: Vec<_> = names.iter().map(|names| place.chain(names)).collect();
            let mut chains = Vec::new();
            for name in &names {
                if let Some(rules) = iptables.list(place, name).await? {
                    chains.push(((*name).to_owned(), rules));
                }
            }
            found = Some(Found::parse(place, &hook, &names, chains, rules.map(|rules| rules.network)));
        }
        let key = (iptables.kind, place);
        match found.as_ref().map(|found| (found.order(), found.is_empty())) {
            Some((Some(order), _)) => {
                self.orders.insert(key, order);
            }
            // Whatever comes, comes after us.
            None | Some((None, true)) => {
                self.orders.entry(key).or_default();
            }
            Some((None, false)) => {}
        }
        Ok(found)
    }
}

/// Whether forwarding is to be accepted there: always in what is `iptables` on this host, and in the other kind where it
/// has something. That of x_tables is not even looked at where its table is not there.
fn is_in_use(iptables: &Iptables, found: &Found) -> bool {
    iptables.is_own || iptables.kind == Kind::Legacy || found.may_drop()
}

/// Takes away all rules of an overlay, in both languages.
///
/// # Errors
/// [`NetfilterError`].
pub async fn remove(vni: Vni) -> Result<(), NetfilterError> {
    Kernel::default().clear(vni).await
}

/// Takes away those rules of an overlay that a daemon of flannel's, which has taken over, does not take for its own.
///
/// # Errors
/// [`NetfilterError`].
pub async fn remove_own(vni: Vni) -> Result<(), NetfilterError> {
    Kernel::default().clear_own(vni).await
}
