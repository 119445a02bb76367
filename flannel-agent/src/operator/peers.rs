//! `flannel-agent peers`: each peer, how it is reached, and what is wrong with it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::Ipv4Addr,
    time::Duration,
};

use bytesize::ByteSize;
use flannel_common::{maps::Counter, vxlan::Vni};
use ipnet::Ipv4Net;
use serde::Serialize;
use serde_json::json;

use super::{OperatorError, agent_note, drops::age, interface_name, is_running, pinned_peers, rows};
use crate::{
    backend::has_datapath,
    cli::{Cli, Output},
    dataplane::{PeerWay, PinDirectory, Way},
    device::{Netlink, next_hop::NextHop},
    lease::MacAddress,
    status::{API_VERSION, HeldPeer, Status, now, time},
};

/// A peer that has sent nothing for so long is shown as silent. It may have nothing to send.
const SILENT: Duration = Duration::from_secs(60);

/// How it stands with a peer; what is worst comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum State {
    /// The underlay has no route to it.
    NoRoute,
    /// It is behind a router, and there is no tunnel.
    NotOnLink,
    /// Its next hop does not answer the kernel.
    Unresolved,
    /// The store no longer names it.
    Held,
    /// Nothing has come from it for [`SILENT`], or what is sent to it is not answered.
    Silent,
    /// It is sent packets as they are, and sends.
    Direct,
    /// It is sent packets, and sends.
    Ok,
}

impl State {
    /// The worst first.
    pub(super) const ALL: [Self; 7] =
        [Self::NoRoute, Self::NotOnLink, Self::Unresolved, Self::Held, Self::Silent, Self::Direct, Self::Ok];

    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::NoRoute => "no route",
            Self::NotOnLink => "not on link",
            Self::Unresolved => "unresolved",
            Self::Held => "held",
            Self::Silent => "silent",
            Self::Direct => "direct",
            Self::Ok => "ok",
        }
    }
}

/// A peer, for who looks.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Peer {
    pub(super) state: State,
    /// Why, in words; empty where all is well.
    reason: String,
    pub(super) subnet: Ipv4Net,
    /// Its VTEP address.
    pub(super) address: Ipv4Addr,
    vtep_mac: MacAddress,
    way: Way,
    /// [`None`] where the kernel chooses one for each packet, and where there is none.
    next_hop: Option<Ipv4Addr>,
    /// The device towards the next hop.
    interface: Option<String>,
    /// What the kernel knows of the next hop, as `ip neighbour` has it; [`None`] for nothing.
    neighbour: Option<&'static str>,
    /// [`None`] for never.
    pub(super) last_heard_ms: Option<u64>,
    /// To it, of the pods' packets; [`None`] beyond the peers that are counted.
    pub(super) sent: Option<Count>,
    /// From it.
    pub(super) received: Option<Count>,
    /// In bytes, where it is less than the overlay's.
    smaller_mtu: Option<u16>,
}

impl Peer {
    /// How it is reached.
    pub(super) fn way_in_words(&self) -> String {
        match (self.way, self.next_hop_in_words()) {
            (Way::NoRoute | Way::NotOnLink, _) => self.way.label().to_owned(),
            (way, next_hop) => format!("{} by {next_hop}", way.label()),
        }
    }

    fn next_hop_in_words(&self) -> String {
        match (self.next_hop, &self.interface) {
            (_, None) => "none".to_owned(),
            (None, Some(interface)) => format!("by flow, {interface}"),
            (Some(address), Some(interface)) => {
                format!("{address} {interface} {}", self.neighbour.unwrap_or_default()).trim_end().to_owned()
            }
        }
    }
}

/// How much went one way.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Count {
    /// What the kernel is still to segment counts once.
    pub(super) packets: u64,
    /// Of IPv4.
    pub(super) bytes: u64,
}

impl From<Counter> for Count {
    fn from(Counter { packets, bytes }: Counter) -> Self {
        Self { packets, bytes }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.packets, ByteSize(self.bytes))
    }
}

/// What peers are judged by.
struct Known<'a> {
    neighbours: &'a HashMap<NextHop, &'static str>,
    held: BTreeMap<Ipv4Net, &'a HeldPeer>,
    /// Since when what is sent to them is not answered, in seconds since 1970.
    unanswered: BTreeMap<Ipv4Net, u64>,
    /// The size of packets that do not reach them, in bytes of IPv4.
    too_large: BTreeMap<Ipv4Net, u32>,
    /// By their numbers.
    interfaces: BTreeMap<u32, String>,
}

/// Prints the peers of every overlay, those with trouble first. Works without the agent.
///
/// # Errors
/// [`OperatorError::Status`] where no agent has run, [`OperatorError::Dataplane`] or [`OperatorError::Device`].
pub async fn print(cli: &Cli, output: Output) -> Result<(), OperatorError> {
    let (netlink, _events, _connection) = Netlink::open()?;
    let neighbours = netlink.neighbour_states().await?;
    let mut overlays = Vec::new();
    for (vni, status) in Status::read_all(&cli.run_dir)? {
        let peers = match has_datapath(status.backend_type()) {
            true => Some(peers(&PinDirectory::new(&cli.bpf_pin_dir, vni), &status, &neighbours)?),
            false => None,
        };
        let running = is_running(cli, vni);
        match output {
            Output::Table => print!("{}", table(&status.name(), running, peers.as_deref())),
            Output::Json => overlays.push(overlay(vni, running, peers.as_deref())),
        }
    }
    if output == Output::Json {
        println!("{:#}", json!({ "apiVersion": API_VERSION, "overlays": overlays }));
    }
    Ok(())
}

fn overlay(vni: Vni, running: Option<bool>, peers: Option<&[Peer]>) -> serde_json::Value {
    json!({ "vni": vni.get(), "running": running, "peers": peers })
}

/// The peers in the maps, those with trouble first.
///
/// # Errors
/// [`OperatorError::Dataplane`].
pub(super) fn peers(
    pins: &PinDirectory,
    status: &Status,
    neighbours: &HashMap<NextHop, &'static str>,
) -> Result<Vec<Peer>, OperatorError> {
    let ways = pinned_peers(pins, status).read()?;
    Ok(judged(&ways, status, neighbours))
}

/// The same, of what was read of the maps.
pub(super) fn judged(ways: &[PeerWay], status: &Status, neighbours: &HashMap<NextHop, &'static str>) -> Vec<Peer> {
    let held = status.held.iter().map(|held| (held.subnet, held)).collect();
    let numbers: BTreeSet<_> = ways.iter().map(|way| way.ifindex).collect();
    let interfaces = numbers.into_iter().filter_map(|number| Some((number, interface_name(number)?))).collect();
    let unanswered = status.evidence.silent.iter().map(|silent| (silent.subnet, silent.since)).collect();
    let too_large = status.evidence.narrow.iter().map(|narrow| (narrow.subnet, narrow.size)).collect();
    let known = Known { neighbours, held, unanswered, too_large, interfaces };
    let mut peers: Vec<_> = ways.iter().map(|way| known.judge(way)).collect();
    peers.sort_by_key(|peer| (peer.state, peer.reason.is_empty(), peer.subnet));
    peers
}

impl Known<'_> {
    fn judge(&self, peer: &PeerWay) -> Peer {
        let PeerWay { subnet, address, way, next_hop, smaller_mtu, vtep_mac, ifindex, heard, traffic } = *peer;
        let interface = self.interfaces.get(&ifindex).cloned();
        let next_hop = (!next_hop.is_unspecified()).then_some(next_hop);
        let neighbour = next_hop.and_then(|address| self.neighbours.get(&NextHop { ifindex, address }).copied());
        let on = || interface.as_deref().unwrap_or("an interface that is gone");
        let silent = || match heard {
            None => "nothing has come from it yet".to_owned(),
            Some(ago) => format!("nothing has come from it for {}", age(ago)),
        };
        // What the agent said of it is over once something has come from it.
        let is_unanswered = self
            .unanswered
            .get(&subnet)
            .is_some_and(|since| heard.is_none_or(|ago| now().saturating_sub(ago.as_secs()) <= *since));
        let (state, mut reason) = match (way, neighbour, self.held.get(&subnet)) {
            (Way::NoRoute, ..) => {
                (State::NoRoute, format!("the underlay has no route to it; see `ip route get {address}`"))
            }
            (Way::NotOnLink, ..) => {
                (State::NotOnLink, "it is behind a router, which does not know its pods".to_owned())
            }
            (_, Some("failed" | "incomplete"), _) => {
                let next_hop = next_hop.unwrap_or(address);
                (State::Unresolved, format!("{next_hop} does not answer ARP on {}; {}", on(), silent()))
            }
            (.., Some(held)) => {
                let (label, since) = (held.reason.label(), time(held.since));
                (State::Held, format!("the store has not named it for {since} ({label}); still sent to"))
            }
            _ if is_unanswered => (State::Silent, format!("it does not answer: {}", silent())),
            _ if heard.is_none_or(|ago| ago >= SILENT) => (State::Silent, silent()),
            (Way::Direct, ..) => (State::Direct, String::new()),
            (Way::Encapsulated, ..) => (State::Ok, String::new()),
        };
        let smaller = smaller_mtu.map(|mtu| format!("packets of more than {mtu} bytes do not fit on the way to it"));
        let lost =
            self.too_large.get(&subnet).map(|size| format!("packets of {size} bytes do not reach it, small ones do"));
        for more in [smaller, lost].into_iter().flatten() {
            let separator = if reason.is_empty() { "" } else { "; " };
            reason += &format!("{separator}{more}");
        }
        let last_heard_ms = heard.map(|ago| ago.as_millis() as u64);
        let vtep_mac = MacAddress(vtep_mac);
        Peer {
            state,
            reason,
            subnet,
            address,
            vtep_mac,
            way,
            next_hop,
            interface,
            neighbour,
            last_heard_ms,
            sent: traffic.map(|traffic| traffic.sent.into()),
            received: traffic.map(|traffic| traffic.received.into()),
            smaller_mtu,
        }
    }
}

fn table(name: &str, running: Option<bool>, peers: Option<&[Peer]>) -> String {
    let agent = agent_note(running);
    let peers = match peers {
        None => return format!("{name}{agent}: the backend keeps no peers in the kernel's maps\n"),
        Some([]) => return format!("{name}{agent}: no peers\n"),
        Some(peers) => peers,
    };
    let header =
        ["state", "subnet", "VTEP", "MAC", "next hop", "last heard", "sent", "received", ""].map(str::to_owned);
    let count = |count: Option<Count>| count.map_or_else(String::new, |count| count.to_string());
    let lines = peers.iter().map(|peer| {
        [
            peer.state.label().to_owned(),
            peer.subnet.to_string(),
            peer.address.to_string(),
            peer.vtep_mac.to_string(),
            peer.next_hop_in_words(),
            peer.last_heard_ms.map_or_else(|| "never".to_owned(), |ago| age(Duration::from_millis(ago)) + " ago"),
            count(peer.sent),
            count(peer.received),
            peer.reason.clone(),
        ]
    });
    format!("{name}{agent}\n") + &rows([header].into_iter().chain(lines))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::HoldReason;

    fn way(way: Way) -> PeerWay {
        PeerWay {
            subnet: "10.5.2.0/24".parse().unwrap(),
            address: [192, 0, 2, 2].into(),
            way,
            next_hop: [192, 0, 2, 1].into(),
            smaller_mtu: None,
            vtep_mac: [2, 0, 0, 0, 0, 2],
            ifindex: 7,
            heard: Some(Duration::from_secs(1)),
            traffic: None,
        }
    }

    fn judged(peer: &PeerWay, neighbour: &'static str, held: Option<&HeldPeer>) -> (State, String) {
        let neighbours = [(NextHop { ifindex: 7, address: [192, 0, 2, 1].into() }, neighbour)].into();
        let held = held.map(|held| (held.subnet, held)).into_iter().collect();
        let interfaces = [(7, "eth0".to_owned())].into();
        let known = Known {
            neighbours: &neighbours,
            held,
            unanswered: BTreeMap::new(),
            too_large: BTreeMap::new(),
            interfaces,
        };
        let Peer { state, reason, .. } = known.judge(peer);
        (state, reason)
    }

    #[test]
    fn who_does_not_answer_is_silent_until_something_comes() {
        let state = |heard: u64, since: u64| {
            let unanswered = [("10.5.2.0/24".parse().unwrap(), now() - since)].into();
            let interfaces = BTreeMap::new();
            let known = Known {
                neighbours: &HashMap::new(),
                held: BTreeMap::new(),
                unanswered,
                too_large: BTreeMap::new(),
                interfaces,
            };
            let peer = known.judge(&PeerWay { heard: Some(Duration::from_secs(heard)), ..way(Way::Encapsulated) });
            (peer.state, peer.reason)
        };
        let said = "it does not answer: nothing has come from it for 20 s".to_owned();
        assert_eq!(state(20, 15), (State::Silent, said));
        assert_eq!(state(5, 15), (State::Ok, String::new()));
    }

    #[test]
    fn the_worst_that_is_known_of_a_peer_is_its_state() {
        let (reachable, direct) = (way(Way::Encapsulated), way(Way::Direct));
        assert_eq!(judged(&reachable, "reachable", None), (State::Ok, String::new()));
        assert_eq!(judged(&direct, "stale", None), (State::Direct, String::new()));
        let silent = PeerWay { heard: Some(SILENT), ..reachable.clone() };
        assert_eq!(judged(&silent, "reachable", None), (State::Silent, "nothing has come from it for 60 s".to_owned()));
        let unheard = PeerWay { heard: None, ..reachable.clone() };
        assert_eq!(judged(&unheard, "reachable", None), (State::Silent, "nothing has come from it yet".to_owned()));
        let held = HeldPeer {
            subnet: reachable.subnet,
            public_ip: reachable.address,
            reason: HoldReason::StillSends,
            since: 0,
        };
        assert_eq!(judged(&reachable, "reachable", Some(&held)).0, State::Held);
        let (state, reason) = judged(&unheard, "failed", Some(&held));
        assert_eq!(state, State::Unresolved);
        assert!(reason.starts_with("192.0.2.1 does not answer ARP on eth0; "), "{reason}");
        assert_eq!(judged(&way(Way::NoRoute), "failed", None).0, State::NoRoute);
        assert_eq!(judged(&way(Way::NotOnLink), "reachable", None).0, State::NotOnLink);
        let smaller = PeerWay { smaller_mtu: Some(1350), ..reachable };
        let said = "packets of more than 1350 bytes do not fit on the way to it";
        assert_eq!(judged(&smaller, "reachable", None), (State::Ok, said.to_owned()));
    }
}
