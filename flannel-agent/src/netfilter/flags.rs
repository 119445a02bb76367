//! flannel's flags for packet rules (flannel: main.go).

use std::time::Duration;

use clap::ArgAction;
use ipnet::Ipv4Net;

use super::{Masquerade, Preference, Rules};
use crate::{config::NetworkConfig, go_values};

/// As Go's flags are, a switch may stand alone or have a value behind `=`.
#[derive(Clone, Debug, clap::Args)]
pub struct Flags {
    /// Masquerade what leaves the overlay, and what enters it with a source outside the Network
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    pub ip_masq: bool,
    /// Masquerade with the packet's own source port where it is free, instead of a random one
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    ip_masq_fully_random_disable: bool,
    /// Accept what is forwarded to and from the Network, where iptables would drop it by policy
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    iptables_forward_rules: bool,
    /// How often it is looked whether the packet rules are still there
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = go_values::number::<u32>(1..=u32::MAX.into()))]
    iptables_resync: u32,
    /// Drop what is sent to addresses of this host's subnet while no route leads to its pods
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    pub ip_blackhole_route: bool,
}

impl Flags {
    /// How often the rules are looked at.
    pub fn resync(&self) -> Duration {
        Duration::from_secs(self.iptables_resync.into())
    }

    /// Whether what is forwarded to and from the Network is accepted.
    pub const fn accepts_forwarded(&self) -> bool {
        self.iptables_forward_rules
    }

    /// The rules for a host's subnet.
    pub fn rules(&self, network: &NetworkConfig, subnet: Ipv4Net) -> Rules {
        Rules {
            vni: network.backend.vni(),
            network: network.network,
            subnet,
            masquerade: match (self.ip_masq, self.ip_masq_fully_random_disable) {
                (false, _) => Masquerade::Off,
                (true, true) => Masquerade::Plain,
                (true, false) => Masquerade::FullyRandom,
            },
            forward: self.iptables_forward_rules,
            preference: Preference::of(network.enable_nftables),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }

    fn flags(args: &[&str]) -> Result<Flags, clap::Error> {
        Line::try_parse_from(std::iter::once(&"flannel-agent").chain(args)).map(|line| line.flags)
    }

    #[test]
    fn defaults_and_forms_are_flannels() {
        let network = |more: &str| {
            NetworkConfig::parse(&format!(r#"{{"Network": "10.5.0.0/16", {more} "Backend": {{"Type": "vxlan"}}}}"#))
        };
        let rules = |args: &[&str], more: &str| {
            let network = network(more).expect("valid");
            let rules = flags(args).expect("valid").rules(&network, "10.5.1.0/24".parse().expect("CIDR"));
            (rules.masquerade, rules.forward, rules.preference)
        };
        assert_eq!(rules(&[], ""), (Masquerade::Off, true, Preference::Any));
        assert_eq!(rules(&["--ip-masq"], "").0, Masquerade::FullyRandom);
        assert_eq!(rules(&["--ip-masq=true", "--ip-masq-fully-random-disable"], "").0, Masquerade::Plain);
        assert_eq!(rules(&["--ip-masq=false"], "").0, Masquerade::Off);
        assert!(!rules(&["--iptables-forward-rules=false"], "").1);
        assert_eq!(rules(&[], r#""EnableNFTables": false,"#).2, Preference::Iptables);
        assert_eq!(rules(&[], r#""EnableNFTables": true,"#).2, Preference::Nftables);
        assert_eq!(flags(&[]).expect("valid").resync(), Duration::from_secs(5));
        assert!(flags(&["--iptables-resync=0"]).is_err() && flags(&["--ip-masq=maybe"]).is_err());
        assert!(flags(&["--ip-masq=yes"]).is_err(), "Go's words only");
    }
}
