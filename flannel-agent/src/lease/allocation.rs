//! Which subnet a host gets (flannel: pkg/subnet/etcd/local_manager.go).

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;
use rand::{Rng, RngExt as _};

use crate::config::NetworkConfig;

/// Whether a subnet could have been allocated under this configuration.
pub fn is_allocatable(config: &NetworkConfig, subnet: Ipv4Net) -> bool {
    subnet.prefix_len() == config.subnet_len
        && (config.subnet_min..=config.subnet_max).contains(&subnet.network())
        && config.network.contains(&subnet)
}

/// How many free subnets a choice is made from, as in flannel: enough that hosts starting at once rarely collide.
const CANDIDATES: usize = 100;

/// Chooses a free subnet at random among the first hundred. [`None`] where all are taken.
pub fn allocate(
    config: &NetworkConfig,
    taken: impl IntoIterator<Item = Ipv4Net>,
    rng: &mut impl Rng,
) -> Option<Ipv4Net> {
    let size = 1u64 << (32 - config.subnet_len);
    // Leases as long as ours or longer block one subnet each, shorter ones a range.
    let (blocks, ranges): (Vec<_>, Vec<_>) =
        taken.into_iter().partition(|lease| lease.prefix_len() >= config.subnet_len);
    let blocked: BTreeSet<u64> = blocks.iter().map(|lease| u64::from(lease.network().to_bits()) / size).collect();
    let is_free = |slot: u64| {
        let address = Ipv4Addr::from_bits((slot * size) as u32);
        !blocked.contains(&slot) && !ranges.iter().any(|lease| lease.contains(&address))
    };
    let first = u64::from(config.subnet_min.to_bits()) / size;
    let last = u64::from(config.subnet_max.to_bits()) / size;
    let candidates: Vec<_> = (first..=last).filter(|slot| is_free(*slot)).take(CANDIDATES).collect();
    let slot = match candidates.len() {
        0 => return None,
        count => candidates[rng.random_range(0..count)],
    };
    Ipv4Net::new(Ipv4Addr::from_bits((slot * size) as u32), config.subnet_len).ok()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use rand::{SeedableRng as _, rngs::SmallRng};

    use super::*;

    fn config(network: &str, len: u8) -> NetworkConfig {
        NetworkConfig::parse(&format!(
            r#"{{"Network": "{network}", "SubnetLen": {len}, "Backend": {{"Type": "vxlan"}}}}"#
        ))
        .expect("valid")
    }

    prop_compose! {
        fn any_net()(bits: u32, len in 8u8..=30) -> Ipv4Net {
            // Within 10.0.0.0/12, where the allocations are.
            let address = 0x0a00_0000 | (bits & 0x000f_ffff);
            Ipv4Net::new(address.into(), len).expect("length").trunc()
        }
    }

    proptest! {
        #[test]
        fn allocation_finds_a_free_subnet_if_there_is_any(
            network_len in 16u8..=24, extra in 2u8..=6, taken in vec(any_net(), 0..40), seed: u64,
        ) {
            let config = config(&format!("10.0.0.0/{network_len}"), (network_len + extra).min(30));
            let free = |subnet: &Ipv4Net| !taken.iter().any(|t| t.contains(subnet) || subnet.contains(t));
            let any_free = config.network.subnets(config.subnet_len).expect("lengths")
                .any(|subnet| is_allocatable(&config, subnet) && free(&subnet));
            match allocate(&config, taken.clone(), &mut SmallRng::seed_from_u64(seed)) {
                Some(subnet) => prop_assert!(is_allocatable(&config, subnet) && free(&subnet)),
                None => prop_assert!(!any_free),
            }
        }
    }
}
