//! Who leases which subnet, for each packet.

use std::{
    collections::{BTreeSet, HashMap},
    net::Ipv4Addr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use flannel_common::packet::is_unicast;
use ipnet::Ipv4Net;

use super::Event;

/// When a host was heard last, in milliseconds since [`BEGINNING`]; 0 where it never was.
type Heard = Arc<AtomicU64>;

static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The peers at one time. It is replaced as a whole.
#[derive(Clone, Debug)]
pub struct Peers {
    subnet: Ipv4Net,
    address: Ipv4Addr,
    /// What the operator names beside the leases.
    accepted: Vec<Ipv4Net>,
    owners: HashMap<(u8, u32), Ipv4Addr>,
    /// The prefix lengths that leases have, the longest first. It is one, where the Network was never configured anew.
    lens: Vec<u8>,
    hosts: HashMap<Ipv4Addr, Heard>,
}

impl Peers {
    /// From this host's own lease, the prefixes that the operator names, and the leases of others: subnets and the public
    /// addresses of their hosts. A lease within this host's own subnet is nobody's.
    pub fn new(
        (subnet, address): (Ipv4Net, Ipv4Addr),
        accepted: Vec<Ipv4Net>,
        leases: impl IntoIterator<Item = (Ipv4Net, Ipv4Addr)>,
    ) -> Self {
        let owners: HashMap<_, _> = leases
            .into_iter()
            .filter(|(lease, _)| !subnet.contains(lease))
            .map(|(lease, host)| ((lease.prefix_len(), lease.network().to_bits()), host))
            .collect();
        let lens: BTreeSet<u8> = owners.keys().map(|(len, _)| *len).collect();
        let hosts = owners.values().map(|host| (*host, Heard::default())).collect();
        Self { subnet, address, accepted, owners, lens: lens.into_iter().rev().collect(), hosts }
    }

    /// With what is known of the hosts that were peers before, too.
    pub(super) fn after(mut self, before: &Self) -> Self {
        for (host, heard) in &mut self.hosts {
            if let Some(known) = before.hosts.get(host) {
                *heard = Arc::clone(known);
            }
        }
        self
    }

    /// A packet from a host was let in.
    pub(super) fn hear(&self, host: Ipv4Addr) {
        if let Some(heard) = self.hosts.get(&host) {
            let now = BEGINNING.elapsed().as_millis() as u64;
            heard.store(now.max(1), Ordering::Relaxed);
        }
    }

    /// As [`Tunnel::silence_of`](super::Tunnel::silence_of).
    pub(super) fn silence_of(&self, subnet: Ipv4Net) -> Option<Duration> {
        let host = self.owners.get(&(subnet.prefix_len(), subnet.network().to_bits()))?;
        let heard = self.hosts.get(host)?.load(Ordering::Relaxed);
        (heard > 0).then(|| BEGINNING.elapsed().saturating_sub(Duration::from_millis(heard)))
    }

    /// The host that leases the subnet of an address.
    pub fn owner_of(&self, address: Ipv4Addr) -> Option<Ipv4Addr> {
        let address = address.to_bits();
        let subnet = |len: u8| address & (u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0));
        self.lens.iter().find_map(|len| self.owners.get(&(*len, subnet(*len))).copied())
    }

    /// Whether a host may send this host a packet with these inner addresses: the rules of
    /// [`flannel_common::admission`], without what only VXLAN has.
    ///
    /// # Errors
    /// The event that it is dropped with.
    pub fn admit(&self, host: Ipv4Addr, source: Ipv4Addr, destination: Ipv4Addr) -> Result<(), Event> {
        let is_broadcast = destination == self.subnet.broadcast() && self.subnet.prefix_len() < 31;
        if !is_unicast(source.to_bits()) || !is_unicast(destination.to_bits()) || is_broadcast {
            return Err(Event::NotUnicast);
        }
        let is_local = self.subnet.contains(&source);
        match self.owner_of(source) {
            Some(owner) if owner == host && !is_local => {}
            _ if !self.hosts.contains_key(&host) => return Err(Event::UnknownPeer),
            None if !is_local && (source == host || self.accepts(source)) => {}
            _ => return Err(Event::SpoofedInnerSource),
        }
        let is_for_host =
            self.subnet.contains(&destination) || self.accepts(destination) && self.owner_of(destination).is_none();
        if is_for_host { Ok(()) } else { Err(Event::ForeignInnerDestination) }
    }

    /// Whether the operator names an address, and it is no host's own.
    fn accepts(&self, address: Ipv4Addr) -> bool {
        let is_host = address == self.address || self.hosts.contains_key(&address);
        !is_host && self.accepted.iter().any(|prefix| prefix.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);
    const TWO: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 2);
    /// This host: its address is in a prefix that the operator names.
    const NINE: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 9);
    const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 99);

    fn prefix(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn peers() -> Peers {
        let leases = [("10.5.1.0/24", ONE), ("10.5.2.0/24", TWO), ("10.5.2.64/26", ONE), ("10.5.9.0/28", TWO)];
        let leases = leases.map(|(lease, host)| (prefix(lease), host));
        Peers::new((prefix("10.5.9.0/24"), NINE), vec![prefix("10.20.0.0/16")], leases)
    }

    #[test]
    fn the_most_specific_lease_decides() {
        let owner = |address: [u8; 4]| peers().owner_of(address.into());
        assert_eq!(owner([10, 5, 1, 7]), Some(ONE));
        assert_eq!(owner([10, 5, 2, 63]), Some(TWO));
        assert_eq!(owner([10, 5, 2, 64]), Some(ONE));
        assert_eq!(owner([10, 5, 3, 1]), None);
        assert_eq!(owner([10, 5, 9, 1]), None, "within this host's subnet");
        let everywhere = Peers::new((prefix("10.5.9.0/24"), NINE), Vec::new(), [(prefix("0.0.0.0/0"), ONE)]);
        assert_eq!(everywhere.owner_of([8, 8, 8, 8].into()), Some(ONE));
    }

    #[test]
    fn who_was_heard_is_known_as_long_as_it_is_a_peer() {
        let first = peers();
        first.hear(ONE);
        first.hear(STRANGER);
        let subnets = ["10.5.1.0/24", "10.5.2.64/26", "10.5.2.0/24", "10.5.3.0/24", "10.5.9.0/28"].map(prefix);
        let heard = |peers: &Peers| subnets.map(|subnet| peers.silence_of(subnet).is_some());
        assert_eq!(heard(&first), [true, true, false, false, false]);
        let second = peers().after(&first);
        assert_eq!(heard(&second), heard(&first));
        // By a thread that has still the ones before.
        first.hear(TWO);
        assert_eq!(heard(&second), [true, true, true, false, false]);
        let none = Peers::new((prefix("10.5.9.0/24"), NINE), Vec::new(), []).after(&second);
        assert_eq!(heard(&peers().after(&none)), [false; 5]);
    }

    #[test]
    fn a_host_speaks_for_its_lease_and_itself() {
        use Event::{ForeignInnerDestination, NotUnicast, SpoofedInnerSource, UnknownPeer};
        let pod = [10, 5, 9, 2];
        let cases = [
            (ONE, [10, 5, 1, 2], pod, Ok(())),
            (ONE, ONE.octets(), pod, Ok(())),
            (ONE, [10, 20, 0, 7], pod, Ok(())),
            (ONE, [10, 5, 1, 2], [10, 20, 0, 7], Ok(())),
            (TWO, [10, 5, 1, 2], pod, Err(SpoofedInnerSource)),
            (ONE, TWO.octets(), pod, Err(SpoofedInnerSource)),
            (ONE, [10, 5, 9, 3], pod, Err(SpoofedInnerSource)),
            (ONE, [10, 5, 3, 3], pod, Err(SpoofedInnerSource)),
            (ONE, [8, 8, 8, 8], pod, Err(SpoofedInnerSource)),
            (ONE, NINE.octets(), pod, Err(SpoofedInnerSource)),
            (ONE, [10, 5, 1, 2], NINE.octets(), Err(ForeignInnerDestination)),
            (STRANGER, [10, 5, 1, 2], pod, Err(UnknownPeer)),
            (STRANGER, STRANGER.octets(), pod, Err(UnknownPeer)),
            (STRANGER, [10, 20, 0, 7], pod, Err(UnknownPeer)),
            (ONE, [10, 5, 1, 2], [10, 5, 2, 2], Err(ForeignInnerDestination)),
            (ONE, [10, 5, 1, 2], [8, 8, 8, 8], Err(ForeignInnerDestination)),
            (ONE, [10, 5, 1, 2], [10, 5, 9, 255], Err(NotUnicast)),
            (ONE, [10, 5, 1, 2], [224, 0, 0, 1], Err(NotUnicast)),
            (ONE, [127, 0, 0, 1], pod, Err(NotUnicast)),
            (ONE, [0; 4], pod, Err(NotUnicast)),
        ];
        for (host, source, destination, verdict) in cases {
            let admitted = peers().admit(host, source.into(), destination.into());
            assert_eq!(admitted, verdict, "{host}: {source:?} > {destination:?}");
        }
    }
}
