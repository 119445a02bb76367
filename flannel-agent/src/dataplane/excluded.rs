//! The addresses and ports whose flows the programs leave to the stack.

use aya::{
    Ebpf,
    maps::{Array, MapData},
};
use flannel_common::maps::{EXCLUDED, EXCLUDED_PORTS, EXCLUDED_WORDS, excluded_port};

use super::{
    DataplaneError,
    accepted::{Prefixes, bring_to},
    take_map,
};
use crate::bypass::{Plan, Protocol};

/// The maps of them.
pub(super) struct Excluded {
    addresses: Prefixes,
    ports: Array<MapData, u64>,
}

impl Excluded {
    /// Takes them out of the object.
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        let addresses = take_map(ebpf, EXCLUDED)?.try_into().map_err(DataplaneError::map("open", EXCLUDED))?;
        let ports = take_map(ebpf, EXCLUDED_PORTS)?.try_into();
        Ok(Self { addresses, ports: ports.map_err(DataplaneError::map("open", EXCLUDED_PORTS))? })
    }

    /// Brings them to what a plan says. What is there is read each time: an agent before this one may have had another plan, and
    /// somebody else may have written it.
    pub(super) fn bring_to(&mut self, plan: &Plan) -> Result<(), DataplaneError> {
        bring_to(&mut self.addresses, EXCLUDED, &plan.addresses)?;
        for (word, wanted) in (0..).zip(words(plan)) {
            let is = self.ports.get(&word, 0).map_err(DataplaneError::map("read", EXCLUDED_PORTS))?;
            if is != wanted {
                self.ports.set(word, wanted, 0).map_err(DataplaneError::map("write", EXCLUDED_PORTS))?;
            }
        }
        Ok(())
    }
}

/// The bits of a plan's ports.
fn words(plan: &Plan) -> Vec<u64> {
    let mut words = vec![0; EXCLUDED_WORDS as usize];
    for ports in &plan.ports {
        for port in ports.first..=ports.last {
            let (word, bit) = excluded_port(ports.protocol == Protocol::Udp, port);
            words[word as usize] |= bit;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bypass::Ports;

    #[test]
    fn each_range_has_its_bits() {
        let ports = [
            Ports::new(Protocol::Tcp, &(20..=21)),
            Ports::new(Protocol::Udp, &(69..=69)),
            Ports::new(Protocol::Udp, &(65_500..=65_535)),
        ];
        let words = words(&Plan { ports: ports.into(), ..Plan::default() });
        assert_eq!(words[0], 0b11 << 20);
        assert_eq!(words[1025], 1 << 5);
        assert_eq!(words[2047], !0 << 28);
        assert_eq!(words.iter().map(|word| word.count_ones()).sum::<u32>(), 2 + 1 + 36);
    }
}
