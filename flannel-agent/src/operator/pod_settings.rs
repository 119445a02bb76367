//! What of the pods' own network keeps packets of the overlay from them.

use ipnet::Ipv4Net;

use super::named;
use crate::device::PodNetwork;

/// What is to be looked at, in words. `mtu` is the overlay's, where packets of that size are the largest that other hosts are sent.
pub(super) fn troubles(network: &PodNetwork, lease: Ipv4Net, mtu: Option<u32>) -> Vec<String> {
    let elsewhere = network.bridges_elsewhere.iter().map(|(bridge, address)| outside(bridge, *address, lease));
    elsewhere.chain(mtu.and_then(|mtu| larger(&network.mtus, mtu))).collect()
}

fn outside(bridge: &str, address: Ipv4Net, lease: Ipv4Net) -> String {
    format!(
        "the bridge {bridge} has {address}, and this host's lease is {lease}: other hosts do not send here what is for its pods; \
         remove it with `ip link delete {bridge}` and restart its pods, so that they are made from subnet.env"
    )
}

/// Pods with a smaller MTU lose nothing.
fn larger(mtus: &[(String, u32)], overlay: u32) -> Option<String> {
    let mut larger: Vec<_> = mtus.iter().filter(|(_, mtu)| *mtu > overlay).collect();
    larger.sort();
    let pods: Vec<_> = larger.iter().map(|(name, mtu)| format!("{name} {mtu}")).collect();
    (!pods.is_empty()).then(|| {
        let pods = named(&pods);
        format!(
            "the overlay's MTU is {overlay}, and that of pods is larger: {pods}; what they send to other hosts in larger packets is \
             fragmented or has to be sent again; restart these pods, with FLANNEL_MTU of subnet.env in the CNI plugin's or Docker's \
             config"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_values_are_said() {
        let lease = "10.5.1.0/24".parse().unwrap();
        let mut network = PodNetwork { mtus: vec![("pod1".to_owned(), 1450)], ..PodNetwork::default() };
        assert!(troubles(&network, lease, Some(1450)).is_empty());
        network.mtus.push(("pod2".to_owned(), 1400));
        assert!(troubles(&network, lease, Some(1450)).is_empty());
        network.mtus.push(("pod3".to_owned(), 1500));
        assert!(troubles(&network, lease, None).is_empty());
        let said = troubles(&network, lease, Some(1450));
        assert!(said[0].starts_with("the overlay's MTU is 1450, and that of pods is larger: pod3 1500; "), "{said:?}");
        network.mtus = (1..=10).map(|number| (format!("pod{number:02}"), 1500)).collect();
        let said = troubles(&network, lease, Some(1450));
        assert!(said[0].contains("pod08 1500 and 2 more; "), "{said:?}");
        let network = PodNetwork {
            bridges_elsewhere: vec![("cni0".to_owned(), "10.5.9.1/24".parse().unwrap())],
            ..PodNetwork::default()
        };
        let said = troubles(&network, lease, Some(1450));
        assert!(
            said[0].starts_with("the bridge cni0 has 10.5.9.1/24, and this host's lease is 10.5.1.0/24: "),
            "{said:?}"
        );
    }
}
