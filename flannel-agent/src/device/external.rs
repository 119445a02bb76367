//! The external interface: which of the host's links and addresses carries the tunnel
//! (flannel: pkg/ipmatch/match.go).

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;
use regex::Regex;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteAddress, RouteAttribute, RouteMessage},
};

use super::{
    DeviceError, Link, Netlink,
    addresses::{AddressKind, HostAddresses},
};

/// How the operator named the interface. The first of each list that matches is taken.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Addresses or names.
    pub interfaces: Vec<String>,
    /// Patterns for addresses, then for names.
    pub patterns: Vec<Regex>,
    /// An address that must be reached through it.
    pub can_reach: Option<Ipv4Addr>,
    /// The address to publish.
    pub public_ip: Option<Ipv4Addr>,
    /// The address that is published in its place, and says nothing of the interface.
    pub published: Option<Ipv4Addr>,
}

impl Selection {
    /// What is published of a host with this address.
    fn publish(&self, address: Ipv4Addr) -> Ipv4Addr {
        self.published.or(self.public_ip).unwrap_or(address)
    }

    /// Whether the operator named none.
    const fn is_default_route(&self) -> bool {
        self.interfaces.is_empty() && self.patterns.is_empty() && self.can_reach.is_none() && self.public_ip.is_none()
    }
}

/// The interface that carries the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct External {
    /// The link.
    pub link: Link,
    /// The tunnel's address on it: source of what is sent, destination of what is received.
    pub address: Ipv4Addr,
    /// The address that peers are told to send to.
    pub public_ip: Ipv4Addr,
}

/// No interface matches.
#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    /// The kernel was not to be asked.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Nothing that the operator named is there.
    #[error("failed to find any valid interface to use: {0}")]
    NoMatch(String),
}

impl Netlink {
    /// Chooses the external interface.
    ///
    /// # Errors
    /// [`SelectError`], with what was looked for.
    pub async fn external_interface(&self, selection: &Selection) -> Result<External, SelectError> {
        Ok(self.choose(selection).await?.0)
    }

    async fn choose(&self, selection: &Selection) -> Result<Found, SelectError> {
        let links = self.links().await?;
        let addresses = self.addresses().await?.with_routes(self.default_routes().await?);
        let choice = match selection {
            Selection { interfaces, patterns, can_reach, .. } if !interfaces.is_empty() || !patterns.is_empty() => {
                match (by_name(selection, &links, &addresses), can_reach) {
                    // The last of the three that is asked, as with flannel.
                    (Err(SelectError::NoMatch(_)), Some(destination)) => self.by_route(*destination).await?,
                    (choice, _) => choice?,
                }
            }
            Selection { can_reach: Some(destination), .. } => self.by_route(*destination).await?,
            Selection { public_ip: Some(ip), .. } if addresses.has(*ip) => {
                Choice { index: addresses.owner(*ip), address: Some(*ip) }
            }
            // A public IP that is no address of this host (NAT) says nothing about the interface.
            _ => Choice { index: Some(default_link(&addresses)?), address: None },
        };
        let index = choice.index.ok_or_else(|| SelectError::NoMatch("its link is gone".to_owned()))?;
        let link = links
            .into_iter()
            .find(|link| link.index == index)
            .ok_or_else(|| SelectError::NoMatch(format!("link {index} is gone")))?;
        // The published address is the tunnel's wherever it is one of this host's: peers know no other.
        let published = selection.public_ip.filter(|ip| addresses.has(*ip));
        let address =
            published.or(choice.address).or_else(|| addresses.own(index).map(|own| own.address)).ok_or_else(|| {
                SelectError::NoMatch(format!("{} has no IPv4 address; give it one or use --iface", link.name))
            })?;
        if link.mtu == 0 {
            return Err(SelectError::NoMatch(format!("{} has no MTU", link.name)));
        }
        let kind = addresses.on_link(index, address).map(|there| there.kind);
        Ok((External { public_ip: selection.publish(address), link, address }, kind))
    }

    /// Chooses again, where there was a choice before. The link stays chosen, by number or, made anew, by name, as long as it
    /// has the tunnel's address, which is `former` as soon as it has that again. Where it has another, the same rule says
    /// which; a default route that is gone, as it is when an interface goes down, is no reason to leave.
    ///
    /// # Errors
    /// [`SelectError`], with what was looked for.
    pub async fn external_interface_again(
        &self,
        selection: &Selection,
        before: &External,
        former: Option<Ipv4Addr>,
    ) -> Result<Found, SelectError> {
        let links = self.links().await?;
        let same = links.iter().find(|link| link.index == before.link.index);
        let same = same.or_else(|| links.iter().find(|link| link.name == before.link.name));
        let Some(link) = same.filter(|link| link.mtu > 0) else { return self.choose(selection).await };
        let addresses = self.addresses().await?;
        let of = |address: Ipv4Addr| {
            let kind = addresses.on_link(link.index, address).map(|there| there.kind);
            (External { public_ip: selection.publish(address), link: link.clone(), address }, kind)
        };
        if let Some(former) = former.filter(|former| addresses.on_link(link.index, *former).is_some()) {
            return Ok(of(former));
        }
        let has_published = selection.public_ip == Some(before.address) && addresses.has(before.address);
        let is_there = has_published || addresses.on_link(link.index, before.address).is_some();
        if is_there && former.is_none() {
            return Ok(of(before.address));
        }
        let by_rule = self.choose(selection).await;
        match (by_rule, addresses.own(link.index)) {
            (Err(SelectError::NoMatch(_)), Some(own)) if selection.is_default_route() => Ok(of(own.address)),
            (by_rule, _) => by_rule,
        }
    }

    /// The way that a packet to `destination` would take.
    async fn by_route(&self, destination: Ipv4Addr) -> Result<Choice, SelectError> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(destination, 32).build();
        let route = self.handle.route().get(request).execute().try_next().await;
        let route = route.map_err(DeviceError::call("look up the route to", destination))?;
        let route = route.as_ref().ok_or_else(|| SelectError::NoMatch(format!("no route to {destination}")))?;
        let address = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        });
        Ok(Choice { index: output_interface(route), address })
    }
}

/// What was chosen, and how the address stands on the link, where it is that one's.
type Found = (External, Option<AddressKind>);

struct Choice {
    index: Option<u32>,
    /// The address, where the choice was made by it.
    address: Option<Ipv4Addr>,
}

/// The link of the first default route.
fn default_link(addresses: &HostAddresses) -> Result<u32, SelectError> {
    addresses
        .default_link()
        .ok_or_else(|| SelectError::NoMatch("there is no default route; name the interface with --iface".to_owned()))
}

fn by_name(selection: &Selection, links: &[Link], addresses: &HostAddresses) -> Result<Choice, SelectError> {
    for wanted in &selection.interfaces {
        match wanted.parse::<IpAddr>() {
            Ok(IpAddr::V4(ip)) => {
                if let Some(index) = addresses.owner(ip) {
                    return Ok(Choice { index: Some(index), address: Some(ip) });
                }
            }
            _ => {
                if let Some(link) = links.iter().find(|link| link.name == *wanted) {
                    return Ok(Choice { index: Some(link.index), address: None });
                }
            }
        }
    }
    for pattern in &selection.patterns {
        if let Some(own) = addresses.first_own(|address| pattern.is_match(&address.to_string())) {
            return Ok(Choice { index: Some(own.link), address: Some(own.address) });
        }
        if let Some(link) = links.iter().find(|link| pattern.is_match(&link.name)) {
            return Ok(Choice { index: Some(link.index), address: None });
        }
    }
    let wanted = selection.interfaces.iter().map(|name| format!("--iface={name}"));
    let wanted = wanted.chain(selection.patterns.iter().map(|pattern| format!("--iface-regex={pattern}")));
    let there: Vec<_> = links.iter().map(|link| link.name.as_str()).collect();
    Err(SelectError::NoMatch(format!(
        "nothing matches {}; there are {}",
        wanted.collect::<Vec<_>>().join(" "),
        there.join(" ")
    )))
}

pub(super) fn output_interface(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(next_hops) => next_hops.first().map(|next_hop| next_hop.interface_index),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::{super::addresses::tests::host, *};

    fn links() -> Vec<Link> {
        ["lo", "eth0", "eth1"]
            .iter()
            .zip(1..)
            .map(|(name, index)| Link { name: (*name).to_owned(), index, mtu: 1500, mac: None })
            .collect()
    }

    const ADDRESSES: [(u32, &str); 3] = [(1, "127.0.0.1/8"), (2, "10.0.0.1/24"), (3, "192.168.1.1/24")];

    fn choose(interfaces: &[&str], patterns: &[&str]) -> Result<(Option<u32>, Option<Ipv4Addr>), String> {
        let selection = Selection {
            interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(),
            patterns: patterns.iter().map(|pattern| Regex::new(pattern).expect("pattern")).collect(),
            ..Selection::default()
        };
        by_name(&selection, &links(), &host(&ADDRESSES, &[]))
            .map(|choice| (choice.index, choice.address))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_first_match_is_taken_names_before_patterns() {
        assert_eq!(choose(&["eth9", "eth1"], &["eth0"]), Ok((Some(3), None)));
        assert_eq!(choose(&["192.168.1.1"], &[]), Ok((Some(3), Some(Ipv4Addr::new(192, 168, 1, 1)))));
        assert_eq!(choose(&["eth9"], &["eth[01]"]), Ok((Some(2), None)));
    }

    #[test]
    fn a_pattern_is_tried_on_addresses_first() {
        assert_eq!(choose(&[], &["1"]), Ok((Some(2), Some(Ipv4Addr::new(10, 0, 0, 1)))));
        assert_eq!(choose(&[], &[r"^192\.168"]), Ok((Some(3), Some(Ipv4Addr::new(192, 168, 1, 1)))));
    }

    #[test]
    fn no_match_says_what_there_is() {
        let error = choose(&["eth9"], &["^wlan"]).expect_err("no match");
        assert!(error.contains("--iface=eth9 --iface-regex=^wlan; there are lo eth0 eth1"), "{error}");
    }
}
