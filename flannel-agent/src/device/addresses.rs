//! The host's addresses, and which one of a link the host goes by.
//!
//! That is flannel's choice (pkg/ip/iface.go): global before link-local, permanent before dynamic, else the kernel's order. But
//! an address that moves from host to host (keepalived, kube-vip) is permanent, too, and so comes before the own one that DHCP
//! gave. Such an address is a /32, or secondary in the prefix of another: one of that kind is only taken where the link has
//! nothing else that the host can go by.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::Ipv4Net;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};

use super::{DeviceError, Netlink, host_routes::DefaultRoute};

/// How an address stands on its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressKind {
    /// Whether it has no lifetime: nobody leased it to the host.
    pub is_permanent: bool,
    /// Whether it has the link's prefix to itself, as that of the host itself has: it is neither a /32 nor secondary.
    pub is_primary_of_prefix: bool,
}

impl AddressKind {
    /// Whether an address in the place of one of this kind, which is gone, may be one that moves from host to host.
    pub const fn may_be_floating(self, successor: Self) -> bool {
        let is_leased = !self.is_permanent;
        successor.is_permanent && (is_leased || self.is_primary_of_prefix && !successor.is_primary_of_prefix)
    }
}

/// An IPv4 address of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostAddress {
    pub(super) link: u32,
    pub(super) address: Ipv4Addr,
    pub(super) kind: AddressKind,
    /// What the kernel takes for on the link; of a point-to-point address, the other end.
    prefix: Ipv4Net,
    is_global: bool,
    is_deprecated: bool,
}

impl HostAddress {
    fn from_message(message: &AddressMessage) -> Option<Self> {
        let (mut local, mut on_link, mut flags) = (None, None, AddressFlags::empty());
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(IpAddr::V4(address)) => local = Some(*address),
                AddressAttribute::Address(IpAddr::V4(address)) => on_link = Some(*address),
                AddressAttribute::Flags(value) => flags = *value,
                _ => {}
            }
        }
        let (address, len) = (local?, message.header.prefix_len);
        Some(Self {
            link: message.header.index,
            address,
            kind: AddressKind {
                is_permanent: flags.contains(AddressFlags::Permanent),
                is_primary_of_prefix: len < 32 && !flags.contains(AddressFlags::Secondary),
            },
            prefix: Ipv4Net::new(on_link.unwrap_or(address), len).ok()?,
            is_global: message.header.scope == AddressScope::Universe && !address.is_link_local(),
            is_deprecated: flags.contains(AddressFlags::Deprecated),
        })
    }

    /// Whether a host can go by it (`GetInterfaceIP4Addrs`).
    const fn is_usable(&self) -> bool {
        !self.is_deprecated && !self.address.is_loopback()
    }

    /// Less is better.
    const fn rank(&self) -> (bool, bool) {
        (!self.is_global, !self.kind.is_permanent)
    }
}

/// All addresses, link by link, of each link the best first.
#[derive(Debug)]
pub(super) struct HostAddresses {
    addresses: Vec<HostAddress>,
    /// The default routes, where these were read.
    routes: Vec<DefaultRoute>,
}

impl HostAddresses {
    fn new(mut addresses: Vec<HostAddress>) -> Self {
        addresses.sort_by_key(|address| (address.link, address.rank()));
        Self { addresses, routes: Vec::new() }
    }

    /// The same with the default routes, by which of two addresses the own one is known where nothing else tells them apart.
    pub(super) fn with_routes(self, routes: Vec<DefaultRoute>) -> Self {
        Self { routes, ..self }
    }

    /// The link of the first default route.
    pub(super) fn default_link(&self) -> Option<u32> {
        self.routes.first().map(|route| route.link)
    }

    /// All of them, with their links.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, Ipv4Addr)> {
        self.addresses.iter().map(|there| (there.link, there.address))
    }

    /// The same, as they were given: with the length of the prefix.
    pub(super) fn iter_with_len(&self) -> impl Iterator<Item = (u32, Ipv4Net)> {
        let with_len = |there: &HostAddress| Ipv4Net::new(there.address, there.prefix.prefix_len()).ok();
        self.addresses.iter().filter_map(move |there| Some((there.link, with_len(there)?)))
    }

    /// The links with an address of a prefix that is one of these, and has room for others' addresses.
    pub(super) fn links_with_neighbours(&self, is_one: impl Fn(Ipv4Addr) -> bool) -> HashSet<u32> {
        let such = |there: &&HostAddress| there.prefix.prefix_len() < 32 && is_one(there.address);
        self.addresses.iter().filter(such).map(|there| there.link).collect()
    }

    pub(super) fn has(&self, address: Ipv4Addr) -> bool {
        self.owner(address).is_some()
    }

    /// The link that has an address.
    pub(super) fn owner(&self, address: Ipv4Addr) -> Option<u32> {
        self.addresses.iter().find(|there| there.address == address).map(|there| there.link)
    }

    pub(super) fn on_link(&self, link: u32, address: Ipv4Addr) -> Option<&HostAddress> {
        self.addresses.iter().find(|there| there.link == link && there.address == address)
    }

    /// The address of a link that the host goes by.
    pub(super) fn own(&self, link: u32) -> Option<&HostAddress> {
        self.own_of(link, |_| true)
    }

    /// The first link with such an address, and of those that it has the one that the host goes by. A link-local one, which any link
    /// may have, only counts where there is no other.
    pub(super) fn first_own(&self, is_asked_for: impl Fn(Ipv4Addr) -> bool) -> Option<&HostAddress> {
        let such = || self.addresses.iter().filter(|there| there.is_usable() && is_asked_for(there.address));
        let first = such().find(|there| there.is_global).or_else(|| such().next())?;
        self.own_of(first.link, is_asked_for)
    }

    fn own_of(&self, link: u32, is_asked_for: impl Fn(Ipv4Addr) -> bool) -> Option<&HostAddress> {
        let such = |there: &&HostAddress| there.link == link && there.is_usable() && is_asked_for(there.address);
        let candidates: Vec<_> = self.addresses.iter().filter(such).collect();
        let first = *candidates.first()?;
        if first.kind.is_primary_of_prefix {
            return Some(first);
        }
        let find = |is_own: &dyn Fn(&HostAddress) -> bool| candidates.iter().copied().find(|there| is_own(there));
        let is_holder =
            |there: &HostAddress, address| there.kind.is_primary_of_prefix && there.prefix.contains(&address);
        let is_leased = |there: &HostAddress| !there.kind.is_permanent && there.is_global;
        find(&|there| is_holder(there, first.address))
            // Of several /32s, as clouds give them.
            .or_else(|| find(&|there| is_leased(there) && !there.kind.is_primary_of_prefix))
            // What the kernel sends from by the default route (`fib_result_prefsrc`).
            .or_else(|| {
                let route = self.routes.iter().find(|route| route.link == link)?;
                let by_gateway = || find(&|there| route.gateway.is_some_and(|gateway| is_holder(there, gateway)));
                route.source.map_or_else(by_gateway, |source| find(&|there| there.address == source))
            })
            .or_else(|| find(&is_leased))
            .or(Some(first))
    }
}

impl Netlink {
    /// The host's addresses.
    pub(super) async fn addresses(&self) -> Result<HostAddresses, DeviceError> {
        let messages = self.dump("addresses", || self.handle.address().get().execute()).await?;
        let addresses = messages.iter().filter_map(HostAddress::from_message).collect();
        Ok(HostAddresses::new(addresses))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const LINK: u32 = 2;

    /// Addresses as `ip address show` says them, in the kernel's order.
    pub(in super::super) fn host(addresses: &[(u32, &str)], routes: &[DefaultRoute]) -> HostAddresses {
        let parse = |(link, text): &(u32, &str)| {
            let mut words = text.split(' ');
            let prefix: Ipv4Net = words.next().and_then(|prefix| prefix.parse().ok()).expect("prefix");
            let flags: Vec<_> = words.collect();
            HostAddress {
                link: *link,
                address: prefix.addr(),
                kind: AddressKind {
                    is_permanent: !flags.contains(&"dynamic"),
                    is_primary_of_prefix: prefix.prefix_len() < 32 && !flags.contains(&"secondary"),
                },
                prefix,
                is_global: !prefix.addr().is_link_local() && !prefix.addr().is_loopback(),
                is_deprecated: flags.contains(&"deprecated"),
            }
        };
        HostAddresses::new(addresses.iter().map(parse).collect()).with_routes(routes.to_vec())
    }

    fn own(addresses: &[&str], routes: &[DefaultRoute]) -> Option<String> {
        let addresses: Vec<_> = addresses.iter().map(|text| (LINK, *text)).collect();
        host(&addresses, routes).own(LINK).map(|own| own.address.to_string())
    }

    fn by(gateway: &str, source: Option<&str>) -> DefaultRoute {
        let parse = |text: &str| text.parse().ok();
        DefaultRoute { link: LINK, gateway: parse(gateway), source: source.and_then(parse) }
    }

    #[test]
    fn the_choice_is_flannels() {
        for (addresses, chosen) in [
            (&["169.254.7.7/16", "10.0.0.5/24 dynamic"][..], "10.0.0.5"),
            (&["10.0.0.5/24 dynamic", "10.1.0.5/24"], "10.1.0.5"),
            (&["10.1.0.5/24", "10.0.0.5/24"], "10.1.0.5"),
            (&["10.0.0.4/24 deprecated", "10.0.0.5/24 secondary"], "10.0.0.5"),
            (&["169.254.7.7/16"], "169.254.7.7"),
            (&["10.0.0.5/32"], "10.0.0.5"),
            // A host's own public one, and a private network on the same wire.
            (&["192.0.2.5/32", "10.0.0.5/24"], "192.0.2.5"),
        ] {
            assert_eq!(own(addresses, &[]).as_deref(), Some(chosen), "{addresses:?}");
        }
        assert_eq!(own(&["127.0.0.1/8", "10.0.0.5/24 deprecated"], &[]), None);
    }

    #[test]
    fn a_floating_address_is_not_the_hosts_own() {
        let gateway = || by("10.0.0.1", None);
        for (addresses, routes) in [
            (&["10.0.0.5/24 dynamic", "10.0.0.100/32"][..], vec![]),
            (&["10.0.0.5/24 dynamic", "10.0.0.100/24 secondary"], vec![]),
            (&["10.0.0.100/32", "10.0.0.5/24"], vec![]),
            (&["10.0.0.100/32 dynamic", "10.0.0.5/24 dynamic"], vec![]),
            (&["10.0.0.5/24 dynamic", "192.0.2.100/32"], vec![]),
            (&["192.0.2.100/32", "10.0.0.5/24"], vec![gateway()]),
            // As keepalived's `virtual_routes` have it.
            (&["10.0.0.5/24 dynamic", "10.0.0.100/32"], vec![by("10.0.0.1", Some("10.0.0.100"))]),
            (&["10.0.0.100/32", "10.0.0.5/32 dynamic"], vec![gateway()]),
            (&["10.0.0.100/32", "10.0.0.5/32"], vec![by("10.0.0.1", Some("10.0.0.5"))]),
        ] {
            assert_eq!(own(addresses, &routes).as_deref(), Some("10.0.0.5"), "{addresses:?} {routes:?}");
        }
    }

    #[test]
    fn a_pattern_finds_links_in_their_order() {
        let there = host(&[(3, "10.0.1.5/24"), (LINK, "10.0.0.5/24 dynamic"), (LINK, "10.0.0.100/32")], &[]);
        let first = |prefix: &str| {
            let found = there.first_own(|address| address.to_string().starts_with(prefix))?;
            Some((found.link, found.address.to_string()))
        };
        assert_eq!(first("10."), Some((LINK, "10.0.0.5".to_owned())));
        assert_eq!(first("10.0.0.100"), Some((LINK, "10.0.0.100".to_owned())));
        assert_eq!(first("10.0.1"), Some((3, "10.0.1.5".to_owned())));
        assert_eq!(first("172."), None);
        let there = host(&[(1, "169.254.7.7/16"), (LINK, "192.0.2.1/24")], &[]);
        assert_eq!(there.first_own(|_| true).map(|own| own.link), Some(LINK));
        assert_eq!(there.first_own(|address| address.is_link_local()).map(|own| own.link), Some(1));
    }

    #[test]
    fn what_comes_in_the_place_of_another_may_float() {
        let kind = |is_permanent, is_primary_of_prefix| AddressKind { is_permanent, is_primary_of_prefix };
        let (leased, fixed, floating) = (kind(false, true), kind(true, true), kind(true, false));
        assert!(leased.may_be_floating(floating) && fixed.may_be_floating(floating) && leased.may_be_floating(fixed));
        assert!(!leased.may_be_floating(leased) && !fixed.may_be_floating(fixed) && !fixed.may_be_floating(leased));
        assert!(!floating.may_be_floating(floating) && !fixed.may_be_floating(kind(false, false)));
    }
}
