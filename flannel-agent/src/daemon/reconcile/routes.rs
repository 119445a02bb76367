//! The routes into the overlay: which there are to be, by what the host needs, and keeping them so.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use tokio::{net::lookup_host, sync::mpsc, time::timeout};
use tracing::{info, warn};

use super::Reconciler;
use crate::{
    cli::Cli,
    config::NetworkConfig,
    daemon::DaemonError,
    device::{
        DeviceError, Link, Netlink,
        host_routes::{HostRoutes, Interest},
        link_route::LinkRoutes,
        overlay_route::{ForeignNextHops, KernelPeer, OverlayRoutes},
    },
    lease::{LeaseTable, PeerChange},
    registry::StoreKind,
    repair::Repair,
    routes::{self, Choice, Obstacle, RoutesFlag, Routing},
    status::RoutesStatus,
};

const RESOLVERS: &str = "/etc/resolv.conf";
/// For how long the name of a store's server is asked for.
const NAME_LIMIT: Duration = Duration::from_secs(1);
/// How often everything is asked for that events tell of anyway, route by route.
pub(super) const ROUTES_PERIOD: Duration = Duration::from_secs(60);
/// How much longer it rests than the host's routes took to read.
const IDLE_FOR_EACH: u32 = 9;
const TAKEN: &str = "routes of leases";
const NOT_ON_LINK: &str = "peers on the link";
/// Of these no more are put into words.
const MOST_NAMED: usize = 5;

/// What was read of the host.
pub(in crate::daemon) struct Scan {
    routes: Result<HostRoutes, DeviceError>,
    store: Vec<Ipv4Addr>,
    took: Duration,
}

/// How the store is reached.
pub(super) struct Endpoints {
    pub(super) store_kind: StoreKind,
    pub(super) urls: Vec<String>,
}

/// What is known of routes, and what was made of it.
pub(super) struct RouteState {
    flag: RoutesFlag,
    endpoints: Endpoints,
    prefixes: Vec<Ipv4Net>,
    /// Addresses of the endpoints.
    store: Vec<Ipv4Addr>,
    pub(super) host: HostRoutes,
    choice: Option<Choice>,
    /// What there is, and the link that it leads into.
    made: Option<(Link, OverlayRoutes)>,
    /// The same where the backend makes no link.
    on_link: Option<LinkRoutes>,
    pub(super) foreign: ForeignNextHops,
    /// Next hops of others' routes into the overlay, also where they are none of a lease's.
    foreign_gateways: BTreeSet<Ipv4Addr>,
    pub(super) scanning: Scanning,
}

/// Reading the host's routes beside the agent's own work.
pub(super) struct Scanning {
    is_under_way: bool,
    is_due: bool,
    last_took: Duration,
    sender: mpsc::Sender<Scan>,
    scans: mpsc::Receiver<Scan>,
}

impl Scanning {
    fn new() -> Self {
        let (sender, scans) = mpsc::channel(1);
        Self { is_under_way: false, is_due: false, last_took: Duration::ZERO, sender, scans }
    }

    /// What was read.
    pub(super) async fn next(&mut self) -> Scan {
        match self.scans.recv().await {
            Some(scan) => scan,
            // It has a sender itself.
            None => std::future::pending().await,
        }
    }
}

impl RouteState {
    pub(super) fn new(cli: &Cli, endpoints: Endpoints, network: &NetworkConfig) -> Self {
        Self {
            flag: cli.routes,
            endpoints,
            prefixes: routes::shared_prefixes(network),
            store: Vec::new(),
            host: HostRoutes::default(),
            choice: None,
            made: None,
            on_link: None,
            foreign: ForeignNextHops::new(),
            foreign_gateways: BTreeSet::new(),
            scanning: Scanning::new(),
        }
    }

    /// The MTU of a lease's own route, where it has one.
    fn made_mtu(&self, lease: &Ipv4Net) -> Option<u16> {
        self.made.as_ref()?.1.leases.get(lease).copied().flatten()
    }

    fn routing(&self) -> Option<Routing> {
        self.choice.as_ref().map(|choice| choice.routing)
    }
}

impl Reconciler<'_> {
    /// Reads the host's routes, before anything depends on them.
    pub(super) async fn read_routes(&mut self, table: &LeaseTable) -> Result<(), DaemonError> {
        self.find_own_device().await?;
        let interest = self.interest(table);
        self.netlink.set_interest(interest.clone());
        let scan = scan(self.netlink.clone(), interest, self.routes.endpoints.urls.clone()).await;
        (self.routes.host, self.routes.store, self.routes.scanning.last_took) = (scan.routes?, scan.store, scan.took);
        self.underlay.set_several(self.routes.host.has_several);
        Ok(())
    }

    /// Takes note of the device of an agent before this one.
    pub(super) async fn find_own_device(&mut self) -> Result<(), DaemonError> {
        if let Some(name) = self.target.backend.own_device_name()
            && let Some(existing) = self.netlink.link_by_name(name).await?
        {
            self.underlay.set_overlay(existing.header.index);
        }
        Ok(())
    }

    /// Reads them again, beside the agent's own work.
    pub(super) fn scan_routes(&mut self, table: &LeaseTable) {
        if std::mem::replace(&mut self.routes.scanning.is_under_way, true) {
            self.routes.scanning.is_due = true;
            return;
        }
        let (netlink, interest, endpoints) =
            (self.netlink.clone(), self.interest(table), self.routes.endpoints.urls.clone());
        let (sender, rest) =
            (self.routes.scanning.sender.clone(), std::mem::take(&mut self.routes.scanning.last_took) * IDLE_FOR_EACH);
        tokio::spawn(async move {
            tokio::time::sleep(rest).await;
            let _gone = sender.send(scan(netlink, interest, endpoints).await).await;
        });
    }

    /// Takes in what was read. Whether something is another than before.
    pub(super) fn take_scan(&mut self, Scan { routes, store, took }: Scan, table: &LeaseTable) -> bool {
        self.routes.scanning.is_under_way = false;
        if std::mem::take(&mut self.routes.scanning.is_due) {
            self.routes.scanning.last_took = took;
            self.scan_routes(table);
        }
        match routes {
            Ok(host) => {
                let is_other = host != self.routes.host || store != self.routes.store;
                self.underlay.set_several(host.has_several);
                (self.routes.host, self.routes.store) = (host, store);
                is_other
            }
            Err(error) => {
                warn!("{error}");
                false
            }
        }
    }

    /// Says what changes of routes matter.
    pub(super) fn follow_routes(&self, table: &LeaseTable) {
        self.netlink.set_interest(self.interest(table));
    }

    fn interest(&self, table: &LeaseTable) -> Interest {
        let mut addresses: Vec<_> = table.iter().map(|(_, peer)| peer.public_ip).collect();
        addresses.extend(self.other_needs().map(|(address, _)| address));
        addresses.sort_unstable();
        addresses.dedup();
        let has_device = self.target.backend.own_device_name().is_some();
        Interest {
            overlay: if has_device { self.underlay.overlay() } else { self.uplink.external.link.index },
            is_shared: !has_device,
            prefixes: self.routes.prefixes.clone(),
            subnet: self.target.lease.key.subnet,
            addresses,
        }
    }

    /// What this host needs besides its peers.
    fn other_needs(&self) -> impl Iterator<Item = (Ipv4Addr, &'static str)> {
        let resolvers = routes::resolvers(&std::fs::read_to_string(RESOLVERS).unwrap_or_default());
        let of = |addresses: Vec<Ipv4Addr>, what| addresses.into_iter().map(move |address| (address, what));
        of(self.routes.store.clone(), self.routes.endpoints.store_kind.name())
            .chain(of(self.routes.host.gateways.clone(), "the default gateway"))
            .chain(of(resolvers, "a resolver"))
    }

    /// Decides which routes there are to be.
    async fn choose_routes(&mut self, table: &LeaseTable) -> Result<Routing, DaemonError> {
        let flag = if self.target.backend.has_kernel_routes() { RoutesFlag::Leases } else { self.routes.flag };
        let obstacle = match flag {
            RoutesFlag::Leases => None,
            RoutesFlag::Auto | RoutesFlag::Network => self.obstacle(table).await?,
        };
        let choice = routes::choose(flag, &self.routes.prefixes, obstacle.as_ref());
        if self.routes.choice.as_ref() != Some(&choice) {
            info!("routes into the overlay: {}", choice.reason);
        }
        self.status.routes(RoutesStatus::of(&choice));
        let routing = choice.routing;
        self.routes.choice = Some(choice);
        Ok(routing)
    }

    /// Decides again, and looks at the routes only where that comes out otherwise.
    pub(super) async fn choose_routes_again(&mut self, table: &LeaseTable) {
        let before = self.routes.routing();
        match self.choose_routes(table).await {
            Ok(routing) if before == Some(routing) => {}
            Ok(_) => self.ensure_or_say(table).await,
            Err(error) => warn!("{error}; comparing again later"),
        }
    }

    async fn obstacle(&self, table: &LeaseTable) -> Result<Option<Obstacle>, DeviceError> {
        if let Some((prefix, to)) = self.routes.host.foreign.clone() {
            return Ok(Some(Obstacle::ForeignRoute { prefix, to }));
        }
        let peers: BTreeSet<_> = table.iter().map(|(_, peer)| peer.public_ip).collect();
        let needs = self.other_needs().chain(peers.into_iter().map(|address| (address, "a peer")));
        for (address, what) in needs {
            if let Some(obstacle) = self.obstacle_to(address, what).await? {
                return Ok(Some(obstacle));
            }
        }
        Ok(None)
    }

    async fn obstacle_to(&self, address: Ipv4Addr, what: &str) -> Result<Option<Obstacle>, DeviceError> {
        let Some(prefix) = self.routes.prefixes.iter().find(|prefix| prefix.contains(&address)).copied() else {
            return Ok(None);
        };
        let by = match self.netlink.route_match(address).await? {
            Some(found) if found.is_ours => "nothing more specific".to_owned(),
            Some(found) if found.prefix.prefix_len() > prefix.prefix_len() => return Ok(None),
            Some(found) if found.prefix.prefix_len() == 0 => "the default route".to_owned(),
            Some(found) => format!("the route to {}", found.prefix),
            None => "no other route".to_owned(),
        };
        Ok(Some(Obstacle::Needed { address, what: what.to_owned(), prefix, by }))
    }

    /// Has the routes be as they should. What somebody else had changed.
    pub(super) async fn ensure_routes(&mut self, link: &Link, table: &LeaseTable) -> Result<Vec<Repair>, DaemonError> {
        let routing = self.choose_routes(table).await?;
        if self.target.backend.own_device_name().is_none() {
            let wanted = self.wanted_link_routes(routing, table);
            return self.ensure_link_routes(routing, wanted, table).await;
        }
        let leases = table.iter().map(|(subnet, _)| subnet);
        let own = routes::of_their_own(routing, &self.routes.prefixes, leases);
        let mut leases: BTreeMap<_, _> = own.into_iter().map(|lease| (lease, None)).collect();
        let smaller = self.underlay.smaller_paths(table, |lease| self.routes.made_mtu(lease));
        leases.extend(smaller.into_iter().map(|(lease, mtu)| (lease, Some(mtu))));
        let wanted = OverlayRoutes {
            source: self.target.lease.key.subnet.network(),
            shared: if routing == Routing::Shared { self.routes.prefixes.clone() } else { Vec::new() },
            leases,
        };
        let peers: HashMap<Ipv4Addr, KernelPeer> =
            table.iter().map(|(subnet, peer)| (subnet.network(), (peer.vtep_mac.0, peer.public_ip))).collect();
        let state = &mut self.routes;
        let peer = |address| peers.get(&address).copied();
        let ensured =
            self.netlink.ensure_routes(link, self.uplink.external.address, &wanted, peer, &mut state.foreign).await?;
        state.foreign_gateways = ensured.foreign_gateways;
        let made = Some((link.clone(), wanted));
        let is_repair = state.made == made;
        state.made = made;
        let mut elsewhere = ensured.taken;
        if routing == Routing::Shared {
            elsewhere.extend(self.led_elsewhere(table));
        }
        self.status.waiting(TAKEN, taken(&elsewhere));
        Ok(if is_repair { ensured.repairs } else { Vec::new() })
    }

    /// Brings the routes of peers up that not all packets fit on the way to. Asks the kernel only where they are others than before.
    pub(super) async fn follow_smaller_paths(&mut self, table: &LeaseTable) {
        let Some((_, made)) = &self.routes.made else { return };
        let before = made.leases.iter().filter_map(|(lease, mtu)| Some((*lease, (*mtu)?)));
        if !before.eq(self.underlay.smaller_paths(table, |lease| self.routes.made_mtu(lease))) {
            self.ensure_or_say(table).await;
        }
    }

    /// Brings the routes over the link up, as they were decided on. Asks the kernel only where others are wanted than there were.
    pub(super) async fn follow_link_routes(&mut self, table: &LeaseTable) {
        let Some(routing) = self.routes.routing() else { return };
        let wanted = self.wanted_link_routes(routing, table);
        if self.routes.on_link.as_ref() == Some(&wanted) {
            return;
        }
        if let Err(error) = self.ensure_link_routes(routing, wanted, table).await {
            warn!("{error}; comparing again later");
        }
    }

    /// The routes where the peers are on the link of the external interface, and there is no device. Says who is not on it.
    fn wanted_link_routes(&mut self, routing: Routing, table: &LeaseTable) -> LinkRoutes {
        let own = routes::of_their_own(routing, &self.routes.prefixes, table.iter().map(|(subnet, _)| subnet));
        let mut leases = BTreeMap::new();
        let mut elsewhere = Vec::new();
        for (subnet, peer) in table.iter() {
            // Of whom the way is asked for again it is as it was.
            let was_on_link = || self.routes.on_link.as_ref().is_none_or(|before| before.leases.contains_key(subnet));
            let is_on_link = self.underlay.is_on_link(peer.public_ip);
            if is_on_link == Some(false) {
                elsewhere.push((*subnet, peer.public_ip));
            } else if own.contains(subnet) && (is_on_link.is_some() || was_on_link()) {
                leases.insert(*subnet, peer.public_ip);
            }
        }
        self.status.waiting(NOT_ON_LINK, not_on_link(&elsewhere, &self.uplink.external.link.name));
        LinkRoutes {
            source: self.uplink.external.address,
            shared: if routing == Routing::Shared { self.routes.prefixes.clone() } else { Vec::new() },
            leases,
        }
    }

    async fn ensure_link_routes(
        &mut self,
        routing: Routing,
        wanted: LinkRoutes,
        table: &LeaseTable,
    ) -> Result<Vec<Repair>, DaemonError> {
        let ensured =
            self.netlink.ensure_link_routes(&self.uplink.external.link, self.target.network.network, &wanted).await?;
        let is_repair = self.routes.on_link.as_ref() == Some(&wanted);
        self.routes.on_link = Some(wanted);
        let mut taken_ones = ensured.taken;
        if routing == Routing::Shared {
            taken_ones.extend(self.led_elsewhere(table));
        }
        self.status.waiting(TAKEN, taken(&taken_ones));
        Ok(if is_repair { ensured.repairs } else { Vec::new() })
    }

    /// The leases that a route of somebody else's leads elsewhere, since it is more specific than the shared ones.
    fn led_elsewhere(&self, table: &LeaseTable) -> impl Iterator<Item = Ipv4Net> {
        let within = &self.routes.host.within;
        let is_led = |lease: &Ipv4Net| within.iter().any(|route| route.contains(lease) || lease.contains(route));
        table.iter().map(|(lease, _)| *lease).filter(move |lease| is_led(lease))
    }

    /// Brings the routes up by one change of the peers.
    pub(super) async fn route_peer(&mut self, change: &PeerChange, table: &LeaseTable) {
        let (subnet, address) = match change {
            PeerChange::Set(subnet, peer) => (*subnet, Some(peer.public_ip)),
            PeerChange::Remove(subnet) => (*subnet, None),
        };
        let Some(routing) = self.routes.routing() else { return };
        let is_obstacle = match address {
            Some(address) if routing == Routing::Shared => {
                self.obstacle_to(address, "a peer").await.is_ok_and(|obstacle| obstacle.is_some())
            }
            _ => false,
        };
        if is_obstacle || self.routes.foreign_gateways.contains(&subnet.network()) {
            return self.ensure_or_say(table).await;
        }
        let mtu = address.and_then(|address| self.underlay.smaller_mtu(address));
        let made_mtu = self.routes.made_mtu(&subnet);
        let is_made = self.routes.made.as_ref().is_some_and(|(_, made)| made.leases.contains_key(&subnet));
        if is_made && address.is_some() && made_mtu != mtu {
            return self.ensure_or_say(table).await;
        }
        let is_smaller = mtu.is_some() || made_mtu.is_some();
        let has_its_own = routes::has_its_own(routing, &self.routes.prefixes, subnet) || is_smaller;
        let Some((link, made)) = self.routes.made.as_mut().filter(|_| has_its_own) else { return };
        let result = match address {
            Some(_) if made.leases.insert(subnet, mtu).is_none() => {
                self.netlink.add_lease_route(link, subnet, made.source, mtu).await
            }
            None if made.leases.remove(&subnet).is_some() => {
                self.netlink.remove_lease_route(link, subnet, made.source, made_mtu).await.map(|()| true)
            }
            _ => Ok(true),
        };
        match result {
            Ok(true) => {}
            Ok(false) => self.status.waiting(TAKEN, taken(&[subnet])),
            Err(error) => warn!("{error}; comparing again later"),
        }
    }
}

fn not_on_link(hosts: &[(Ipv4Net, Ipv4Addr)], link: &str) -> Option<String> {
    let named: Vec<_> = hosts.iter().take(MOST_NAMED).map(|(subnet, host)| format!("{host} ({subnet})")).collect();
    (!named.is_empty()).then(|| {
        format!(
            "{} peers are not on the link of {link}, and host-gw reaches no others: {}; use vxlan with DirectRouting",
            hosts.len(),
            named.join(", ")
        )
    })
}

fn taken(leases: &[Ipv4Net]) -> Option<String> {
    let named: Vec<_> = leases.iter().take(MOST_NAMED).map(Ipv4Net::to_string).collect();
    let are = if leases.len() == 1 { "is" } else { "are" };
    (!named.is_empty()).then(|| {
        let (count, named) = (leases.len(), named.join(", "));
        format!("{count} of the leases {are} led elsewhere by a route of somebody else's, which stays: {named}")
    })
}

async fn scan(netlink: Netlink, interest: Interest, endpoints: Vec<String>) -> Scan {
    let begun = Instant::now();
    let routes = netlink.host_routes(interest).await;
    let took = begun.elapsed();
    Scan { routes, store: resolve(&endpoints).await, took }
}

/// The IPv4 addresses of the store's endpoints. A name that can't be resolved now has none.
async fn resolve(endpoints: &[String]) -> Vec<Ipv4Addr> {
    let mut all = BTreeSet::new();
    for endpoint in endpoints {
        let host = routes::host_of(endpoint);
        if let Ok(address) = host.parse() {
            all.insert(address);
        } else if let Ok(Ok(found)) = timeout(NAME_LIMIT, lookup_host((host, 0))).await {
            all.extend(found.filter_map(|address| match address.ip() {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            }));
        }
    }
    all.into_iter().collect()
}
