//! What the kernel has of a host's agent, read from outside by `bpftool`: the peers in the pinned maps, and what is pinned.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::history::{Subnet, Vtep};
use crate::{
    lab::{Backend, Host},
    process::output,
};

/// An entry that nothing refers to is not used again for a second: what is read within half of that fits together.
const CONSISTENT: Duration = Duration::from_millis(500);
const TRIES: usize = 20;

/// The network of the run, and how long its leases are.
pub(super) const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 5, 0, 0);
/// See [`NETWORK`].
pub(super) const SUBNET_LEN: u8 = 24;

/// The peers in a host's maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Peers {
    /// By subnet.
    pub by_subnet: BTreeMap<Subnet, Vtep>,
    /// The addresses that tunnel packets are taken from.
    pub addresses: BTreeSet<Ipv4Addr>,
}

impl Peers {
    /// Reads the maps of a host.
    ///
    /// # Errors
    /// Where `bpftool` can't.
    pub(super) fn read(pin_dir: &Path) -> Result<Self> {
        let maps = maps_folder(pin_dir)?;
        for _ in 0..TRIES {
            let start = Instant::now();
            let dumps = ["SUBNETS", "PREFIXES", "VTEPS", "VTEP_ADDRESSES"].map(|map| dump(&maps.join(map)));
            let took = start.elapsed();
            let [subnets, prefixes, vteps, addresses] = dumps;
            if took < CONSISTENT {
                return Self::decode(&subnets?, &prefixes?, &vteps?, &addresses?);
            }
        }
        anyhow::bail!("the maps in {maps:?} can't be read within {CONSISTENT:?}")
    }

    fn decode(subnets: &Entries, prefixes: &Entries, vteps: &Entries, addresses: &Entries) -> Result<Self> {
        let vteps: BTreeMap<u32, &Vec<u8>> =
            vteps.iter().filter_map(|(key, value)| Some((native(key)?, value))).collect();
        let mut by_subnet = BTreeMap::new();
        let mut add = |subnet: Subnet, id: u32| -> Result<()> {
            if id != 0 {
                let vtep = vteps.get(&id).with_context(|| format!("{subnet:?} has the VTEP {id}, which is none"))?;
                by_subnet.insert(subnet, vtep_of(vtep).context("a VTEP is shorter than it should be")?);
            }
            Ok(())
        };
        for (key, value) in subnets {
            let (slot, id) = native(key).zip(native(value)).context("SUBNETS has another layout")?;
            let address = Ipv4Addr::from_bits(NETWORK.to_bits() + (slot << (32 - SUBNET_LEN)));
            add((address, SUBNET_LEN), id)?;
        }
        for (key, value) in prefixes {
            let (len, id) = native(key).zip(native(value)).context("PREFIXES has another layout")?;
            let address = key.get(4..).and_then(wire).context("PREFIXES has another layout")?;
            add((address, u8::try_from(len)?), id)?;
        }
        Ok(Self { by_subnet, addresses: addresses.iter().filter_map(|(key, _)| wire(key)).collect() })
    }
}

type Entries = Vec<(Vec<u8>, Vec<u8>)>;

fn native(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn wire(bytes: &[u8]) -> Option<Ipv4Addr> {
    bytes.first_chunk().map(|bytes: &[u8; 4]| Ipv4Addr::from(*bytes))
}

/// The outer header of 64 bytes ends in the inner Ethernet header, which begins with the VTEP's MAC. Its address follows.
fn vtep_of(value: &[u8]) -> Option<Vtep> {
    Some(Vtep { address: Ipv4Addr::from_bits(native(value.get(64..)?)?), mac: *value.get(50..)?.first_chunk()? })
}

/// The folder for the maps' layout. There is one once the agent is up.
fn maps_folder(pin_dir: &Path) -> Result<PathBuf> {
    let overlay = pin_dir.join("1");
    let entries = fs::read_dir(&overlay).with_context(|| format!("list {overlay:?}"))?;
    let is_version = |path: &PathBuf| path.is_dir();
    let folders: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_version).collect();
    let [folder] = &folders[..] else { anyhow::bail!("not one layout of maps in {overlay:?}, but {folders:?}") };
    Ok(folder.clone())
}

fn dump(map: &Path) -> Result<Entries> {
    let text = output(Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(map))?;
    let entries: Value = serde_json::from_str(&text).with_context(|| format!("bpftool's words of {map:?}"))?;
    let entries = entries.as_array().context("no entries")?;
    entries.iter().map(|entry| Ok((bytes(&entry["key"])?, bytes(&entry["value"])?))).collect()
}

/// `["0x0a","0x00"]`.
fn bytes(value: &Value) -> Result<Vec<u8>> {
    let bytes = value.as_array().context("no bytes")?;
    let byte = |byte: &Value| u8::from_str_radix(byte.as_str()?.strip_prefix("0x")?, 16).ok();
    bytes.iter().map(|value| byte(value).context("no byte")).collect()
}

/// What is pinned of a host's programs and should not be, or the other way round; [`None`] where that is as it should be. A
/// TCX link is attached as long as it is pinned, so that this is what is attached as well.
///
/// # Errors
/// Where it can't be listed.
pub(super) fn surplus_or_missing(host: &Host, backend: Backend) -> Result<Option<String>> {
    let overlay = host.pin_dir().join("1");
    let names = fs::read_dir(&overlay).with_context(|| format!("list {overlay:?}"))?.flatten();
    let pins: BTreeSet<String> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let links = host.netns.ip_json("link show")?;
    let links = links.as_array().into_iter().flatten();
    let links = links.filter_map(|link| Some((link["ifname"].as_str()?.to_owned(), link["ifindex"].as_u64()?)));
    Ok(compare_pins(&pins, &links.collect::<Vec<_>>(), backend))
}

fn compare_pins(pins: &BTreeSet<String>, links: &[(String, u64)], backend: Backend) -> Option<String> {
    let programs = |link: &str| -> &[&str] {
        match link {
            "flannel.1" => &["to_overlay", "from_overlay"],
            "eth0" if backend.has_device() => &["from_underlay"],
            "eth0" => &["from_underlay", "to_underlay"],
            name if name.starts_with("pod") => &["from_pod", "to_pod"],
            _ => &[],
        }
    };
    let expected: BTreeSet<String> = links
        .iter()
        .flat_map(|(name, index)| programs(name).iter().map(move |program| format!("{program}-{index}")))
        .collect();
    // The folder of the maps is the one that is no link.
    let pins: BTreeSet<String> = pins.iter().filter(|pin| pin.contains('-')).cloned().collect();
    (pins != expected).then(|| format!("pinned are {pins:?}, and not {expected:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vtep(last: u8) -> Vec<u8> {
        let mut value = vec![0; 80];
        value[50..56].copy_from_slice(&[2, 0, 0, 0, 0, last]);
        value[64..68].copy_from_slice(&u32::from_be_bytes([192, 168, 64, last]).to_ne_bytes());
        value
    }

    #[test]
    fn maps_are_read_as_programs_read_them() {
        let number = |number: u32| number.to_ne_bytes().to_vec();
        let subnets = vec![(number(0), number(0)), (number(7), number(2))];
        let prefixes = vec![([&number(26)[..], &[10, 9, 8, 64]].concat(), number(1))];
        let vteps = vec![(number(0), vec![0; 80]), (number(1), vtep(11)), (number(2), vtep(12))];
        let addresses = vec![(vec![192, 168, 64, 11], number(1))];
        let peers = Peers::decode(&subnets, &prefixes, &vteps, &addresses).unwrap();
        let vtep = |last: u8| Vtep { address: [192, 168, 64, last].into(), mac: [2, 0, 0, 0, 0, last] };
        let expected = [(([10, 5, 7, 0].into(), 24), vtep(12)), (([10, 9, 8, 64].into(), 26), vtep(11))];
        assert_eq!(peers.by_subnet, expected.into());
        assert_eq!(peers.addresses, [[192, 168, 64, 11].into()].into());
        let dangling = vec![(number(7), number(9))];
        assert!(Peers::decode(&dangling, &prefixes, &vteps, &addresses).is_err());
    }

    #[test]
    fn what_is_left_over_is_noticed() {
        let links = [("lo", 1), ("eth0", 2), ("flannel.1", 3), ("cni0", 4), ("pod1", 7)];
        let links = links.map(|(name, index)| (name.to_owned(), index));
        let pins = ["v4", "to_overlay-3", "from_overlay-3", "from_underlay-2", "from_pod-7", "to_pod-7"];
        let pins: BTreeSet<_> = pins.map(str::to_owned).into();
        assert_eq!(compare_pins(&pins, &links, Backend::Vxlan), None);
        assert!(compare_pins(&pins, &links, Backend::HostGw).unwrap().contains("to_underlay-2"), "without a tunnel");
        let mut stale = pins.clone();
        stale.insert("from_pod-5".to_owned());
        assert!(compare_pins(&stale, &links, Backend::Vxlan).unwrap().contains("from_pod-5"), "of a pod that went");
        let mut missing = pins;
        missing.remove("to_pod-7");
        assert!(compare_pins(&missing, &links, Backend::Vxlan).is_some(), "a pod without a program");
    }
}
