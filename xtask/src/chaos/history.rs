//! Everything that etcd ever said of leases, by a watch of etcd's own client that is with the store and meets no fault.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::Value;

use crate::{
    lab::{Netns, PREFIX, Store},
    process::Process,
};

/// It goes on by itself when etcd comes back.
const MOST_STARTS: u32 = 20;

/// Address and prefix length.
pub(super) type Subnet = (Ipv4Addr, u8);

/// The host behind a subnet, as a lease or a map says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Vtep {
    /// Address on the underlay.
    pub address: Ipv4Addr,
    /// MAC of its vxlan device.
    pub mac: [u8; 6],
}

/// A change of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// A lease was taken or changed.
    Put(Subnet, Vtep),
    /// It ended.
    Deleted(Subnet),
}

/// A subnet was put over a living lease of another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stolen {
    /// Which.
    pub subnet: Subnet,
    /// Whose it was.
    pub from: Ipv4Addr,
    /// Who has it.
    pub by: Ipv4Addr,
}

/// The table now and ever.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Who leases each subnet, and since when, from the run's beginning.
    pub now: BTreeMap<Subnet, (Vtep, Duration)>,
    /// Every VTEP that was ever named for a subnet.
    ever: BTreeSet<(Subnet, Vtep)>,
}

impl Table {
    /// Takes in a change, and says where it takes a subnet from a host that has it.
    pub(super) fn take(&mut self, change: Change, at: Duration) -> Option<Stolen> {
        match change {
            Change::Put(subnet, vtep) => {
                self.ever.insert((subnet, vtep));
                let before = self.now.get(&subnet).copied();
                let since = before.map_or(at, |(_, since)| since);
                self.now.insert(subnet, (vtep, since));
                let (before, _) = before?;
                (before.address != vtep.address).then_some(Stolen { subnet, from: before.address, by: vtep.address })
            }
            Change::Deleted(subnet) => {
                self.now.remove(&subnet);
                None
            }
        }
    }

    /// Whether the store ever named this VTEP for this subnet.
    pub(super) fn has_named(&self, subnet: Subnet, vtep: Vtep) -> bool {
        self.ever.contains(&(subnet, vtep))
    }

    /// Whether the store ever named a VTEP with this address.
    pub(super) fn has_named_address(&self, address: Ipv4Addr) -> bool {
        self.ever.iter().any(|(_, vtep)| vtep.address == address)
    }
}

/// The watch.
pub(super) struct History {
    process: Process,
    netns: String,
    endpoint: String,
    directory: PathBuf,
    files: u32,
    reader: BufReader<File>,
    line: String,
    /// Of the last change.
    pub revision: i64,
    /// What it says.
    pub table: Table,
}

impl History {
    /// From the store's beginning.
    ///
    /// # Errors
    /// Where `etcdctl` can't be started.
    pub(super) fn watch(netns: &Netns, store: &Store, directory: &Path) -> Result<Self> {
        let (netns, endpoint) = (netns.name().to_owned(), store.endpoint().to_owned());
        let (process, reader) = start(&netns, &endpoint, &directory.join("history-0.json"), 1)?;
        let directory = directory.to_owned();
        let (line, table) = (String::new(), Table::default());
        Ok(Self { process, netns, endpoint, directory, files: 1, reader, line, revision: 0, table })
    }

    /// Takes in what came.
    ///
    /// # Errors
    /// Where it is not understood, or `etcdctl` can't be started again.
    pub(super) fn read(&mut self, now: Duration) -> Result<Vec<Stolen>> {
        let mut stolen = Vec::new();
        while self.reader.read_line(&mut self.line)? > 0 {
            // The rest of a line that is being written comes later.
            if !self.line.ends_with('\n') {
                break;
            }
            let line = std::mem::take(&mut self.line);
            if line.starts_with('{') {
                let (revision, changes) = parse(&line).with_context(|| format!("etcdctl watch: {line}"))?;
                self.revision = self.revision.max(revision);
                stolen.extend(changes.into_iter().filter_map(|change| self.table.take(change, now)));
            }
        }
        if self.process.status()?.is_some() {
            anyhow::ensure!(self.files < MOST_STARTS, "etcdctl watch ends again and again: {}", self.process.log());
            let file = self.directory.join(format!("history-{}.json", self.files));
            (self.process, self.reader) = start(&self.netns, &self.endpoint, &file, self.revision + 1)?;
            self.files += 1;
            self.line.clear();
        }
        Ok(stolen)
    }
}

fn start(netns: &str, endpoint: &str, file: &Path, revision: i64) -> Result<(Process, BufReader<File>)> {
    let mut command = std::process::Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{netns}")).args(["--", "etcdctl", "--endpoints", endpoint, "watch"]);
    command.args(["--prefix", "-w", "json", "--rev", &revision.to_string(), &format!("{PREFIX}/subnets/")]);
    let process = Process::start(command.env("ETCDCTL_API", "3"), file)?;
    let reader = File::open(file).with_context(|| format!("open {file:?}"))?;
    Ok((process, BufReader::new(reader)))
}

/// A line of `etcdctl watch -w json`: the last revision in it, and changes of leases.
fn parse(line: &str) -> Result<(i64, Vec<Change>)> {
    let response: Value = serde_json::from_str(line)?;
    let mut revision = 0;
    let mut changes = Vec::new();
    for event in response["Events"].as_array().into_iter().flatten() {
        let kv = &event["kv"];
        revision = revision.max(kv["mod_revision"].as_i64().context("no revision")?);
        let Some(subnet) = subnet_of(&String::from_utf8(BASE64_STANDARD.decode(text(&kv["key"]))?)?) else { continue };
        if event["type"] == 1 {
            changes.push(Change::Deleted(subnet));
        } else if let Some(vtep) = vtep_of(&BASE64_STANDARD.decode(text(&kv["value"]))?) {
            changes.push(Change::Put(subnet, vtep));
        }
    }
    Ok((revision, changes))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The subnet of a lease's key: `10.5.1.0-24` behind the last slash.
pub(super) fn subnet_of(key: &str) -> Option<Subnet> {
    let (address, len) = key.rsplit('/').next()?.split_once('-')?;
    Some((address.parse().ok()?, len.parse().ok()?))
}

/// What stands for the MAC of a host that has no tunnel, in the agent's maps.
const NO_TUNNEL: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

/// The VTEP of a lease's value, as flannel writes it.
pub(super) fn vtep_of(value: &[u8]) -> Option<Vtep> {
    let value: Value = serde_json::from_slice(value).ok()?;
    let address = text(&value["PublicIP"]).parse().ok()?;
    if text(&value["BackendType"]) == "host-gw" {
        return Some(Vtep { address, mac: NO_TUNNEL });
    }
    let mut mac = [0; 6];
    let mut parts = text(&value["BackendData"]["VtepMAC"]).split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    Some(Vtep { address, mac })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBNET: Subnet = (Ipv4Addr::new(10, 5, 1, 0), 24);

    fn vtep(last: u8) -> Vtep {
        Vtep { address: [192, 168, 64, last].into(), mac: [2, 0, 0, 0, 0, last] }
    }

    #[test]
    fn etcds_words_are_understood() {
        let key = BASE64_STANDARD.encode("/coreos.com/network/subnets/10.5.1.0-24");
        let value = r#"{"PublicIP":"192.168.64.3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:03"}}"#;
        let value = BASE64_STANDARD.encode(value);
        let line = format!(
            r#"{{"Header":{{"revision":9}},"Events":[{{"kv":{{"key":"{key}","mod_revision":3,"value":"{value}"}}}},{{"type":1,"kv":{{"key":"{key}","mod_revision":4}}}}]}}"#
        );
        assert_eq!(parse(&line).unwrap(), (4, vec![Change::Put(SUBNET, vtep(3)), Change::Deleted(SUBNET)]));
    }

    #[test]
    fn a_subnet_with_two_owners_is_noticed() {
        let mut table = Table::default();
        let put = |last| Change::Put(SUBNET, vtep(last));
        let now = Duration::ZERO;
        assert_eq!(table.take(put(1), now), None);
        assert_eq!(table.take(put(1), now), None, "written again by its owner");
        let stolen = Stolen { subnet: SUBNET, from: vtep(1).address, by: vtep(2).address };
        assert_eq!(table.take(put(2), now), Some(stolen));
        assert_eq!(table.take(Change::Deleted(SUBNET), now), None);
        assert_eq!(table.take(put(1), now), None, "nobody had it");
    }

    #[test]
    fn what_was_never_named_is_told_from_what_was_once() {
        let mut table = Table::default();
        table.take(Change::Put(SUBNET, vtep(1)), Duration::ZERO);
        table.take(Change::Deleted(SUBNET), Duration::ZERO);
        assert!(table.has_named(SUBNET, vtep(1)) && table.has_named_address(vtep(1).address));
        assert!(!table.has_named(SUBNET, vtep(2)) && !table.has_named_address(vtep(2).address));
        assert!(!table.has_named((Ipv4Addr::new(10, 5, 2, 0), 24), vtep(1)), "for another subnet");
    }
}
