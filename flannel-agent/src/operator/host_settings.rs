//! What of the host's settings stops the overlay's packets.

use std::{fs, path::Path};

use nix::net::if_::if_nametoindex;

use super::named;

/// From so many hundredths of its limit on, conntrack's table is called full: a burst of connections takes the rest.
const FULL: u64 = 95;

/// What is to be looked at, in words. `interfaces` are those that the overlay's packets come in by.
pub(super) fn troubles(interfaces: &[String]) -> Vec<String> {
    let conntrack = conntrack().and_then(|(count, max)| full(count, max));
    not_forwarding_among(interfaces)
        .into_iter()
        .chain(conntrack)
        .map(|(found, advice)| format!("{found}; {advice}"))
        .collect()
}

/// Which of these interfaces do not forward, and what to do.
pub(super) fn not_forwarding_among(interfaces: &[String]) -> Option<(String, String)> {
    let conf = Path::new("/proc/sys/net/ipv4/conf");
    // One that is gone stops nothing.
    let is_off = |name: &&String| number(&conf.join(name.as_str()).join("forwarding")) == Some(0);
    let off: Vec<_> = interfaces.iter().filter(is_off).map(String::as_str).collect();
    not_forwarding(&off)
}

/// How many connections are in conntrack's table, and how many fit; 0 for no limit. [`None`] where there is no conntrack.
pub(super) fn conntrack() -> Option<(u64, u64)> {
    let netfilter = Path::new("/proc/sys/net/netfilter");
    let count = number(&netfilter.join("nf_conntrack_count"))?;
    Some((count, number(&netfilter.join("nf_conntrack_max"))?))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// `ip_forward` sets those of all interfaces, but only where it changes itself; so it may be on and theirs off.
fn not_forwarding(interfaces: &[&str]) -> Option<(String, String)> {
    let first = interfaces.first()?;
    let named = named(interfaces);
    let found = format!("packets that come in by {named} are not forwarded: net.ipv4.conf.{first}.forwarding is 0");
    let advice = format!(
        "turn it on with `sysctl -w net/ipv4/conf/{first}/forwarding=1`, or for all with net.ipv4.ip_forward, from 0 to 1"
    );
    Some((found, advice))
}

/// Whether conntrack's table is, and what to do.
pub(super) fn full(count: u64, max: u64) -> Option<(String, String)> {
    // 0 is no limit.
    (max > 0 && count.saturating_mul(100) >= max.saturating_mul(FULL)).then(|| {
        let found = format!(
            "conntrack has {count} of at most {max} connections, and drops the packets of new ones without a trace but in the kernel's log"
        );
        (found, "raise net.netfilter.nf_conntrack_max".to_owned())
    })
}

/// The value of a setting.
pub(super) fn setting(name: &str) -> Option<u64> {
    number(&Path::new("/proc/sys").join(name))
}

/// The interface's `rp_filter`, as the kernel takes it: the larger of its own and that of all.
pub(super) fn reverse_path_filter(interface: &str) -> u64 {
    let of = |interface: &str| setting(&format!("net/ipv4/conf/{interface}/rp_filter"));
    of("all").max(of(interface)).unwrap_or_default()
}

/// `rp_filter` that takes only what comes in by the interface that the way back leads out of (RFC 3704 section 2.2).
const STRICT: u64 = 1;

/// Whether peers that are reached by other interfaces may send to this one in vain, and what to do.
pub(super) fn strict(interface: &str, value: u64, elsewhere: usize) -> Option<(String, String)> {
    (value == STRICT && elsewhere > 0).then(|| {
        let peers = match elsewhere {
            1 => "1 peer is reached by another interface: what it sends".to_owned(),
            _ => format!("{elsewhere} peers are reached by other interfaces: what they send"),
        };
        (
            format!("net.ipv4.conf.{interface}.rp_filter is 1: it is strict on {interface}, and {peers} to {interface} is dropped"),
            format!("loosen it with `sysctl -w net/ipv4/conf/{interface}/rp_filter=2`"),
        )
    })
}

/// On which of these interfaces peers may send in vain, and what to do, in words. `ways` are the numbers of the interfaces by which
/// peers are reached, or 0.
pub(super) fn strict_among(interfaces: &[String], ways: &[u32]) -> Vec<String> {
    let of = |interface: &String| {
        let number = if_nametoindex(interface.as_str()).ok()?;
        let elsewhere = ways.iter().filter(|way| ![0, number].contains(way)).count();
        let (found, advice) = strict(interface, reverse_path_filter(interface), elsewhere)?;
        Some(format!("{found}; {advice}"))
    };
    interfaces.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_full_a_little_before_its_limit() {
        assert_eq!(full(94, 100), None);
        assert!(full(95, 100).unwrap().0.starts_with("conntrack has 95 of at most 100 connections"));
        assert_eq!(full(95, 0), None);
        assert_eq!(full(0, 262_144), None);
    }

    #[test]
    fn many_interfaces_are_counted() {
        assert_eq!(not_forwarding(&[]), None);
        let (said, _) = not_forwarding(&["cni0", "flannel.1"]).unwrap();
        assert!(said.starts_with("packets that come in by cni0, flannel.1 are not forwarded"), "{said}");
        let names: Vec<_> = (0..10).map(|number| format!("pod{number}")).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        assert!(not_forwarding(&names).unwrap().0.contains("pod7 and 2 more are"));
    }

    #[test]
    fn a_strict_reverse_path_matters_where_ways_differ() {
        let found = |value, elsewhere| strict("eth0", value, elsewhere).map(|(found, _)| found);
        assert_eq!([found(0, 3), found(1, 0), found(2, 3)], [None, None, None]);
        assert!(found(1, 1).unwrap().contains("1 peer is reached by another interface"));
        assert!(found(1, 3).unwrap().contains("3 peers are reached by other interfaces"));
    }
}
