//! Which routes lead into the overlay, and why. Pure.
//!
//! The fewest that can be: one for the Network, or where SubnetMin or SubnetMax are given, those that cover exactly what
//! lies between. That is wrong where such a route would take what is somebody else's: a foreign route has the same prefix,
//! or an address that this host itself needs lies inside and is reached by nothing more specific. Then each lease has a
//! route of its own, as flannel's hosts have (pkg/backend/vxlan/vxlan_network.go).

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::{Ipv4Net, Ipv4Subnets};

use crate::config::NetworkConfig;

/// More than these are not named one by one.
const MOST_NAMED: usize = 4;

/// What the operator asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum RoutesFlag {
    /// One for the Network, unless that would take what is not the overlay's
    #[default]
    Auto,
    /// One for the Network, or the fewest from SubnetMin to SubnetMax
    Network,
    /// One per lease, as flannel does
    Leases,
}

/// Which routes there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// Few, shared by all leases.
    Shared,
    /// One for each lease.
    PerLease,
}

impl Routing {
    /// Its name in `status`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Shared => "network",
            Self::PerLease => "leases",
        }
    }
}

/// What is done, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What is done.
    pub routing: Routing,
    /// Why, in words.
    pub reason: String,
    /// Why it is not right, where the operator asked for it nevertheless.
    pub problem: Option<String>,
}

/// Why shared routes would take what is not the overlay's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// A foreign route has one of their prefixes.
    ForeignRoute {
        /// Which.
        prefix: Ipv4Net,
        /// Where to, in words.
        to: String,
    },
    /// An address inside them that this host needs is reached by nothing more specific.
    Needed {
        /// Which.
        address: Ipv4Addr,
        /// What has it, in words.
        what: String,
        /// In which of the prefixes it lies.
        prefix: Ipv4Net,
        /// How it is reached, in words.
        by: String,
    },
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ForeignRoute { prefix, to } => write!(f, "{prefix} has a route of somebody else's, {to}"),
            Self::Needed { address, what, prefix, by } => {
                write!(f, "{address} ({what}) lies in {prefix} and is reached by {by}")
            }
        }
    }
}

/// The prefixes of shared routes.
pub fn shared_prefixes(config: &NetworkConfig) -> Vec<Ipv4Net> {
    if !config.has_subnet_range {
        return vec![config.network];
    }
    let last = config.subnet_max.to_bits() | (u32::MAX >> config.subnet_len);
    Ipv4Subnets::new(config.subnet_min, Ipv4Addr::from_bits(last), 0).collect()
}

/// Decides.
pub fn choose(flag: RoutesFlag, prefixes: &[Ipv4Net], obstacle: Option<&Obstacle>) -> Choice {
    let shared = || {
        let named: Vec<_> = prefixes.iter().take(MOST_NAMED).map(Ipv4Net::to_string).collect();
        match prefixes.len().saturating_sub(MOST_NAMED) {
            0 => named.join(", "),
            more => format!("{} and {more} more", named.join(", ")),
        }
    };
    match (flag, obstacle) {
        (RoutesFlag::Leases, _) => {
            Choice { routing: Routing::PerLease, reason: "one per lease, as asked for".to_owned(), problem: None }
        }
        (RoutesFlag::Auto, Some(obstacle)) => {
            Choice { routing: Routing::PerLease, reason: format!("one per lease, since {obstacle}"), problem: None }
        }
        (RoutesFlag::Auto, None) => Choice { routing: Routing::Shared, reason: shared(), problem: None },
        (RoutesFlag::Network, obstacle) => Choice {
            routing: Routing::Shared,
            reason: format!("{}, as asked for", shared()),
            problem: obstacle.map(|obstacle| format!("--routes=network is wrong here, since {obstacle}; use auto")),
        },
    }
}

/// The leases that have a route of their own: all of them, or those that no shared route covers.
pub fn of_their_own<'a>(
    routing: Routing,
    prefixes: &[Ipv4Net],
    leases: impl Iterator<Item = &'a Ipv4Net>,
) -> BTreeSet<Ipv4Net> {
    leases.filter(|lease| has_its_own(routing, prefixes, **lease)).copied().collect()
}

/// Whether a lease is one of these.
pub fn has_its_own(routing: Routing, prefixes: &[Ipv4Net], lease: Ipv4Net) -> bool {
    routing == Routing::PerLease || !prefixes.iter().any(|prefix| prefix.contains(&lease))
}

/// The host of an endpoint's URL, or of an address with a port.
pub fn host_of(endpoint: &str) -> &str {
    let rest = endpoint.trim().split_once("://").map_or(endpoint.trim(), |(_, rest)| rest);
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => host,
        _ => authority,
    }
}

/// The IPv4 resolvers of a `resolv.conf` (resolv.conf(5)).
pub fn resolvers(text: &str) -> Vec<Ipv4Addr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    };
    text.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefixes(fields: &str) -> Vec<String> {
        let json = format!(r#"{{{fields}, "Backend": {{"Type": "vxlan"}}}}"#);
        let config = NetworkConfig::parse(&json).expect("valid");
        shared_prefixes(&config).iter().map(Ipv4Net::to_string).collect()
    }

    #[test]
    fn the_network_or_what_lies_between() {
        assert_eq!(prefixes(r#""Network": "10.5.0.0/16""#), ["10.5.0.0/16"]);
        assert_eq!(
            prefixes(r#""Network": "10.5.0.0/16", "SubnetMin": "10.5.128.0", "SubnetMax": "10.5.191.0""#),
            ["10.5.128.0/18"]
        );
        assert_eq!(prefixes(r#""Network": "10.5.0.0/16", "SubnetMin": "10.5.0.0""#), ["10.5.0.0/16"]);
        assert_eq!(
            prefixes(r#""Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0""#),
            [
                "10.10.0.0/15",
                "10.12.0.0/14",
                "10.16.0.0/12",
                "10.32.0.0/11",
                "10.64.0.0/11",
                "10.96.0.0/15",
                "10.98.0.0/16",
                "10.99.0.0/20"
            ]
        );
    }

    proptest! {
        #[test]
        fn exactly_what_lies_between_and_no_two_make_one(subnet_len in 18_u8..=30, one: u16, other: u16) {
            let size = 1_u32 << (32 - subnet_len);
            let base = u32::from_be_bytes([10, 5, 0, 0]);
            let address = |at: u16| Ipv4Addr::from_bits(base + u32::from(at) / size * size);
            let (min, max) = (address(one.min(other)), address(one.max(other)));
            let json = format!(
                r#"{{"Network": "10.5.0.0/16", "SubnetLen": {subnet_len}, "SubnetMin": "{min}", "SubnetMax": "{max}",
                    "Backend": {{"Type": "vxlan"}}}}"#
            );
            let prefixes = shared_prefixes(&NetworkConfig::parse(&json).expect("valid"));
            // One after the other, from the first address to the last.
            let mut next = min.to_bits();
            for prefix in &prefixes {
                prop_assert_eq!(prefix.network().to_bits(), next);
                next = prefix.broadcast().to_bits() + 1;
            }
            prop_assert_eq!(next, max.to_bits() + size);
            for pair in prefixes.windows(2) {
                let is_half = pair[0].prefix_len() == pair[1].prefix_len();
                prop_assert!(!is_half || pair[0].supernet() != pair[1].supernet(), "{:?}", pair);
            }
        }
    }

    fn net(text: &str) -> Ipv4Net {
        text.parse().expect("a prefix")
    }

    #[test]
    fn auto_shares_until_something_is_in_the_way() {
        let prefixes = [net("10.0.0.0/8")];
        let choice = choose(RoutesFlag::Auto, &prefixes, None);
        assert_eq!((choice.routing, choice.reason.as_str()), (Routing::Shared, "10.0.0.0/8"));
        let obstacle = Obstacle::Needed {
            address: [10, 0, 0, 2].into(),
            what: "etcd".to_owned(),
            prefix: prefixes[0],
            by: "the default route".to_owned(),
        };
        let choice = choose(RoutesFlag::Auto, &prefixes, Some(&obstacle));
        assert_eq!(choice.routing, Routing::PerLease);
        let reason = "one per lease, since 10.0.0.2 (etcd) lies in 10.0.0.0/8 and is reached by the default route";
        assert_eq!((choice.reason.as_str(), choice.problem), (reason, None));
        let choice = choose(RoutesFlag::Network, &prefixes, Some(&obstacle));
        assert_eq!(choice.routing, Routing::Shared);
        assert!(choice.problem.is_some());
        assert_eq!(choose(RoutesFlag::Leases, &prefixes, None).routing, Routing::PerLease);
    }

    #[test]
    fn a_lease_beside_the_shared_routes_has_its_own() {
        let (inside, outside) = (net("10.5.130.0/24"), net("10.5.7.0/24"));
        let leases = [inside, outside];
        let of = |routing| of_their_own(routing, &[net("10.5.128.0/18")], leases.iter());
        assert_eq!(of(Routing::Shared), BTreeSet::from([outside]));
        assert_eq!(of(Routing::PerLease), BTreeSet::from(leases));
        // One that is larger than what is shared is not covered by it.
        assert!(has_its_own(Routing::Shared, &[net("10.5.128.0/18")], net("10.5.128.0/17")));
    }

    #[test]
    fn hosts_of_endpoints() {
        for endpoint in ["http://10.0.0.2:2379", "10.0.0.2:2379", "https://u:p@10.0.0.2:2379/path", " 10.0.0.2 "] {
            assert_eq!(host_of(endpoint), "10.0.0.2", "{endpoint}");
        }
        assert_eq!(host_of("https://[fd00::1]:2379"), "[fd00::1]");
        assert_eq!(host_of("https://[fd00::1]"), "[fd00::1]");
    }

    #[test]
    fn resolvers_are_read() {
        let text =
            "# a comment\nsearch example.com\nnameserver 10.0.0.53\n nameserver\tfd00::1\nnameserver 1.1.1.1 # x\n";
        assert_eq!(resolvers(text), [Ipv4Addr::new(10, 0, 0, 53), Ipv4Addr::new(1, 1, 1, 1)]);
    }
}
