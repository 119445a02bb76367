//! kube-network-policies (kubernetes-sigs/kube-network-policies: pkg/dataplane/controller.go) in its strict mode: what is from
//! or to a pod that a policy is for waits for a verdict of a program, which labels the connections that it allows, so that it
//! sees no more of them. A policy that changes takes connections that it no longer allows back to the queue.
//!
//! Its rules are in an nftables table of its own; here they are iptables', in the same hook, as the kernels of test machines
//! have `NFQUEUE` more often than `queue`.

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};

use xtask::lab::{Host, Pod};

use super::{
    Enforcer, assert_holds_as_with_flannel,
    flow::Threads,
    queue::{Queue, Verdict},
};

/// Below are ports that servers have.
const FIRST_OF_CLIENTS: u16 = 32_768;

struct KubeNetworkPolicies {
    allowed: Arc<Mutex<Vec<u16>>>,
    _queue: Threads,
}

impl Enforcer for KubeNetworkPolicies {
    const KEEPS_ESTABLISHED: bool = false;

    fn install(host: &Host, pod: &Pod) -> Self {
        host.netns.feed("ipset restore", include_str!("kube-network-policies.ipset")).unwrap();
        host.netns.feed("iptables-restore --noflush", include_str!("kube-network-policies.rules")).unwrap();
        let allowed = Arc::<Mutex<Vec<u16>>>::default();
        let queue = Queue::open(&host.netns, 100);
        let mut threads = Threads::new();
        threads.spawn({
            let (allowed, pod) = (Arc::clone(&allowed), pod.address);
            move || queue.judge(|packet| judge(packet, pod, &allowed.lock().unwrap()))
        });
        Self { allowed, _queue: threads }
    }

    fn allow(&self, host: &Host, pod: &Pod, ports: Option<&[u16]>) {
        *self.allowed.lock().unwrap() = ports.unwrap_or_default().to_vec();
        let change = if ports.is_some() { "add -exist" } else { "del -exist" };
        host.netns.exec(&format!("ipset {change} podips-v4 {}", pod.address)).unwrap();
        // Those of before are judged again.
        if ports.is_some() {
            let _none = host.netns.exec(&format!("conntrack -D -d {}", pod.address));
        }
    }
}

/// Of a connection that is asked for at the pod, both ways; the pod itself may ask all.
fn judge(packet: &[u8], pod: Ipv4Addr, allowed: &[u16]) -> Verdict {
    let Ok(packet) = etherparse::SlicedPacket::from_ip(packet) else { return Verdict::Drop };
    let Some(etherparse::NetSlice::Ipv4(ip)) = &packet.net else { return Verdict::Drop };
    let (source, destination) = match &packet.transport {
        Some(etherparse::TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(etherparse::TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        _ => return Verdict::Accept,
    };
    let is_answer = ip.header().source_addr() == pod && source < FIRST_OF_CLIENTS;
    let is_asked = ip.header().destination_addr() == pod;
    let is_allowed = match (is_asked, is_answer) {
        (true, _) => allowed.contains(&destination),
        (false, true) => allowed.contains(&source),
        (false, false) => true,
    };
    if is_allowed { Verdict::Accept } else { Verdict::Drop }
}

#[test]
fn a_policy_by_a_queue_to_a_program_holds() {
    assert_holds_as_with_flannel::<KubeNetworkPolicies>();
}
