//! Packet rules: what leaves the overlay is masqueraded, and what is forwarded to and from it is accepted, as flannel
//! sets them (flannel: pkg/trafficmngr).
//!
//! * [`Rules`] — what is wanted, as data; [`Flags`] — what is asked for
//! * `nft`, `iptables` — the same in the two languages; pure
//! * `order` — the place of our jumps among other people's rules; pure
//! * `kernel` — what is set now, and setting it
//! * [`keeper`] — the task that keeps it so
//! * `listing` — everybody's rules, for who looks them through
//! * `census` — how many are ours
//! * `programs` — which of `nft`, `iptables-nft` and `iptables-legacy` the host has
//! * `tool` — running them
//!
//! # Two languages
//!
//! Masquerading is one nftables table, replaced in one transaction, or iptables' `FLANNEL-POSTRTG`, replaced in one
//! commit of `iptables-restore`; the rules are the same. [`Preference`] says which. An overlay whose VNI is not 1 has
//! the number in its names, so that the agents of two overlays on one host do not write into each other's.
//!
//! The rules that accept are always iptables', and there wherever iptables is. An accept in a chain of nftables ends that
//! chain only: the packet goes on to `FORWARD`, where a REJECT or the policy DROP would stop it. So with nftables there is
//! no chain for it in our table. Of the two iptables of a host an accept in one does not count in the other either: it is
//! in `iptables`, and in the other kind as long as that has something that could drop. A base chain of somebody else's
//! that drops what it does not know is defeated by none of them. For where our jump stands, see `order`.
//!
//! # An `nft` that does not work
//!
//! One that refuses, crashes, hangs, or does nothing is left alone for ten minutes, or until it is another file, and
//! iptables masquerades, if there is one. Where there is none, or nftables is what the config asks for, one that refuses is
//! asked for less first (`nft::Form`). What its table still has stays: two that masquerade do what one does.
//!
//! # How the kernel is reached
//!
//! By `nft -f -` and `iptables-restore`, with fixed arguments and without a shell. The text that they read holds numbers
//! of ours and addresses that were parsed; nothing from the store gets there as it came. Both replace all or nothing.
//! The crates that speak nf_tables over netlink (`nftnl`, `rustables`) bind to C libraries or encode each expression by
//! themselves, and don't speak iptables'; the crate `nftables` writes JSON for the same `nft`, with three lines of types
//! for each word of a rule. The language of `nft` is what operators read and what flannel and kube-proxy feed to it.

mod census;
mod flags;
mod iptables;
pub mod keeper;
mod kernel;
mod listing;
mod nft;
mod order;
mod programs;
mod tool;

use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;

pub(crate) use self::programs::legacy_tables;
pub use self::{
    census::count,
    flags::Flags,
    kernel::{remove, remove_own},
    listing::{Lister, Listing, Saved},
    tool::NetfilterError,
};

/// kube-proxy's mark on what it masquerades itself (`--iptables-masquerade-bit=14`), and its mask.
const KUBE_MARK: &str = "0x4000";
/// IPv4 multicast (RFC 5771).
const MULTICAST: &str = "224.0.0.0/4";
/// flannel's comments. By these its rules are known, also those of versions that had no chains of their own.
const MASQUERADE_COMMENT: &str = "flanneld masq";
const FORWARD_COMMENT: &str = "flanneld forward";

/// Who holds the rules. `EnableNFTables` of the network config, which flannel takes for false where it is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// nftables where the host has `nft`, else iptables: the key is not there.
    #[default]
    Any,
    /// nftables: it is true. iptables only where nftables can't be had, which is a problem then.
    Nftables,
    /// iptables: it is false.
    Iptables,
}

impl Preference {
    /// What the key says.
    pub const fn of(enable_nftables: Option<bool>) -> Self {
        match enable_nftables {
            None => Self::Any,
            Some(true) => Self::Nftables,
            Some(false) => Self::Iptables,
        }
    }
}

/// The rules that a host should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The overlay.
    pub vni: Vni,
    /// Its Network.
    pub network: Ipv4Net,
    /// This host's subnet.
    pub subnet: Ipv4Net,
    /// Whether and how what leaves the overlay, and what enters it with another source, gets this host's address.
    pub masquerade: Masquerade,
    /// Whether forwarding to and from the Network is accepted.
    pub forward: bool,
    /// Who holds them.
    pub preference: Preference,
}

/// How source ports are chosen for what is masqueraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masquerade {
    /// Nothing is masqueraded.
    Off,
    /// The packet's own where it is free.
    Plain,
    /// At random, so that two CPUs rarely choose the same at once and lose one of the two packets.
    FullyRandom,
}

/// The names that an overlay's rules go by: flannel's, and for a VNI other than 1 with that number behind.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Names {
    table: String,
    masquerade: String,
    forward: String,
}

impl Names {
    fn of(vni: Vni) -> Self {
        let suffix = if vni == Vni::DEFAULT { String::new() } else { format!("-{vni}") };
        Self {
            table: format!("flannel-ipv4{suffix}"),
            masquerade: format!("FLANNEL-POSTRTG{suffix}"),
            forward: format!("FLANNEL-FWD{suffix}"),
        }
    }

    /// flannel's own.
    fn flannels() -> Self {
        Self::of(Vni::DEFAULT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest chain name that iptables takes (`XT_EXTENSION_MAXNAMELEN` less its end).
    const LONGEST_CHAIN: usize = 28;

    #[test]
    fn names_are_flannels_or_tell_overlays_apart() {
        assert_eq!(Names::of(Vni::DEFAULT).table, "flannel-ipv4");
        let names = Names::of(Vni::new_checked(9_999_999).expect("valid"));
        assert_eq!(names.masquerade, "FLANNEL-POSTRTG-9999999");
        assert!(names.masquerade.len() <= LONGEST_CHAIN && names.forward.len() <= LONGEST_CHAIN);
    }
}
