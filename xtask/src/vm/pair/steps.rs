//! What checks are made of: agents and pods, traffic between the pods, and what has counted it.

use anyhow::{Context as _, Result, bail};

use super::{
    PORT, Pair,
    protocol::{Place, Request},
};
use crate::lab::PREFIX;

const TUNNEL: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
const NO_TUNNEL: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
/// How much TCP sends there, and back.
pub(super) const BULK: usize = 8 << 20;
/// How many datagrams of a size.
pub(super) const DATAGRAMS: usize = 20;
/// Both ways.
pub(super) const WAYS: [[usize; 2]; 2] = [[0, 1], [1, 0]];
/// What a driver is told to leave to the stack, or to take from it again.
const OFFLOADS: [&str; 4] = ["tx", "tso", "gso", "gro"];

impl Pair<'_> {
    /// Starts etcd, and the agents with a pod each.
    pub(super) fn prepare(&mut self) -> Result<()> {
        self.machines[0].ask(&Request::StartStore)?;
        self.configure(TUNNEL)?;
        for number in 0..2 {
            self.start_agent(number, "")?;
        }
        (0..2).try_for_each(|number| self.wait_held(number))?;
        (0..2).try_for_each(|number| self.add_pod(number))
    }

    fn configure(&mut self, config: &str) -> Result<()> {
        self.machines[0].ask(&Request::Put(format!("{PREFIX}/config"), config.to_owned())).map(drop)
    }

    pub(super) fn start_agent(&mut self, number: usize, arguments: &str) -> Result<()> {
        self.machines[number].ask(&Request::StartAgent(arguments.to_owned())).map(drop)
    }

    /// Waits until an agent has confirmed its lease and knows the other's.
    pub(super) fn wait_held(&mut self, number: usize) -> Result<()> {
        self.wait(number, "the lease and the peer", |status| {
            let status = &status["status"];
            status["lease"]["state"] == "held" && status["store"]["following"] == true && status["peers"] == 1
        })
    }

    /// Makes the pod of a machine, and waits for its programs.
    pub(super) fn add_pod(&mut self, number: usize) -> Result<()> {
        let address = self.machines[number].ask(&Request::AddPod(PORT))?;
        self.pods[number].set_ip(address.parse().with_context(|| format!("the pod's address {address:?}"))?);
        self.wait_until(number, "the pod's programs", |machine| {
            // Where links can't be pinned, they are filters.
            let status = machine.status()?;
            if status["status"]["features"]["tcx"] == false {
                return Ok(machine.exec(Place::Host, "tc filter show dev pod1 egress")?.contains("to_pod"));
            }
            let hooks = status["dataplane"]["hooks"].as_array().cloned().unwrap_or_default();
            let is_attached = |program| {
                hooks
                    .iter()
                    .any(|hook| [&hook["interface"], &hook["program"], &hook["state"]] == ["pod1", program, "attached"])
            };
            Ok(is_attached("from_pod") && is_attached("to_pod"))
        })
    }

    fn set_offloads(&mut self, state: &str) -> Result<()> {
        let options = OFFLOADS.map(|offload| format!("{offload} {state}")).join(" ");
        for machine in &mut self.machines {
            machine.exec(Place::Host, &format!("ethtool -K eth0 {options}"))?;
        }
        Ok(())
    }

    /// Bulk TCP from each pod to the other. Some of its counters must have seen half of it: the first packets and one in a
    /// second are the stack's.
    pub(super) fn bulk(&mut self, sent_by: &str, received_by: &str) -> Result<String> {
        let mut rates = Vec::new();
        for [from, to] in WAYS {
            let counters = [(from, sent_by), (to, received_by), (to, sent_by), (from, received_by)];
            let resent = self.resent()?;
            let call = Request::Tcp(self.pods[to], BULK);
            rates.push(self.counted(counters, BULK / 2, |pair| pair.machines[from].ask(&call))?);
            let resent = self.resent()? - resent;
            // Each of at most 1,398 bytes. Where large ones are lost, all are sent again; the ring of an emulated NIC, before a
            // processor as slow, overflows now and then as well.
            let segments = 2 * BULK as u64 / 1398;
            if resent >= segments / 2 {
                bail!("{resent} of {segments} segments were sent again:\n{}", self.statistics()?);
            }
        }
        Ok(rates.join("; "))
    }

    /// Does something of which each of these counters must see more than so many bytes.
    pub(super) fn counted<T>(
        &mut self,
        counters: [(usize, &str); 4],
        least: usize,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let mut before = [0; 4];
        for (before, (number, label)) in before.iter_mut().zip(counters) {
            *before = self.machines[number].counter(label)?[1];
        }
        let result = work(self)?;
        for (before, (number, label)) in before.into_iter().zip(counters) {
            let bytes = self.machines[number].counter(label)?[1] - before;
            if bytes <= least as u64 {
                let all = self.machines[number].ask(&Request::Agent("counters".to_owned()))?;
                let statistics = self.statistics()?;
                bail!("{label} of machine {} saw {bytes} bytes, not more than {least}:\n{all}{statistics}", number + 1);
            }
        }
        Ok(result)
    }

    /// Segments that pods sent again so far.
    fn resent(&mut self) -> Result<u64> {
        let counts = self.machines.iter_mut().map(|machine| {
            let table = machine.exec(Place::Pod, "nstat -asz TcpRetransSegs")?;
            Ok(numbers(&table)?.into_iter().map(|(_, count)| count).sum::<u64>())
        });
        counts.sum()
    }

    /// What the NICs, the stacks and the wire between them count.
    fn statistics(&mut self) -> Result<String> {
        let mut shown = self.machines[0].wire()?;
        for machine in &mut self.machines {
            let lines =
                [(Place::Host, "ip -s link show eth0"), (Place::Host, "ethtool -S eth0"), (Place::Pod, "nstat -as")];
            for (place, line) in lines {
                let text = machine.exec(place, line)?;
                shown += &format!("machine {}, {place:?}$ {line}\n{text}", machine.number);
            }
        }
        Ok(shown)
    }

    pub(super) fn datagrams(&mut self, sizes: &[usize]) -> Result<()> {
        for [from, to] in WAYS {
            for size in sizes {
                let asked = self.machines[from].ask(&Request::Udp(self.pods[to], *size, DATAGRAMS));
                asked.with_context(|| format!("{size} bytes"))?;
            }
        }
        Ok(())
    }

    /// That no kernel found a checksum wrong, or complained, so far.
    pub(super) fn ensure_no_complaints(&mut self) -> Result<()> {
        for machine in &mut self.machines {
            for place in [Place::Host, Place::Pod] {
                let table = machine.exec(place, "nstat -asz TcpInCsumErrors UdpInCsumErrors IcmpInCsumErrors")?;
                let wrong: Vec<_> = numbers(&table)?.into_iter().filter(|(_, count)| *count > 0).collect();
                anyhow::ensure!(wrong.is_empty(), "machine {}, {place:?}: {wrong:?}", machine.number);
            }
            let complaints = machine.complaints()?;
            anyhow::ensure!(
                complaints.is_empty(),
                "the kernel of machine {} complains:\n{}",
                machine.number,
                complaints.join("\n")
            );
        }
        Ok(())
    }

    pub(super) fn with_offloads_off<T>(&mut self, check: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.set_offloads("off")?;
        let result = check(self);
        self.set_offloads("on")?;
        result
    }

    /// With agents that were started anew with another config, and after it with the usual one again.
    pub(super) fn without_tunnel<T>(&mut self, check: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.restart_with(NO_TUNNEL, "direct")?;
        let result = check(self);
        self.restart_with(TUNNEL, "encapsulated")?;
        result
    }

    fn restart_with(&mut self, config: &str, way: &str) -> Result<()> {
        self.configure(config)?;
        (0..2).try_for_each(|number| self.start_agent(number, ""))?;
        (0..2).try_for_each(|number| {
            self.wait(number, way, |status| status["dataplane"]["peers"][0]["way"] == way)?;
            self.wait_held(number)
        })
    }
}

/// What `nstat` prints: a heading, then a name and a number in each line.
fn numbers(table: &str) -> Result<Vec<(String, u64)>> {
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    let rows: Option<Vec<_>> = table.lines().skip(1).map(row).collect();
    rows.filter(|rows| !rows.is_empty()).with_context(|| format!("no table of nstat's: {table}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_nstat_is_read() {
        let table = "#kernel\nTcpInCsumErrors                 0                  0.0\nUdpInCsumErrors                 7                  0.0\n";
        let expected = [("TcpInCsumErrors".to_owned(), 0), ("UdpInCsumErrors".to_owned(), 7)];
        assert_eq!(numbers(table).unwrap(), expected);
        assert!(numbers("#kernel\n").is_err());
    }
}
