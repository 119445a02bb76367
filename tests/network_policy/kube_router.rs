//! kube-router as a firewall only (`--run-firewall`; cloudnativelabs/kube-router: pkg/controllers/netpol/pod.go, policy.go
//! and network_policy_controller.go): pods on a bridge, a chain for each pod and one for each policy, marks, and a log of
//! what is refused, so many a minute.

use xtask::lab::{Host, Pod};

use super::{Enforcer, assert_holds_as_with_flannel, filled};

struct KubeRouter;

impl Enforcer for KubeRouter {
    const KEEPS_ESTABLISHED: bool = true;

    fn install(host: &Host, pod: &Pod) -> Self {
        host.netns.feed("ipset restore", &filled(include_str!("kube-router.ipset"), pod, &[])).unwrap();
        host.netns.feed("iptables-restore --noflush", include_str!("kube-router.rules")).unwrap();
        Self.allow(host, pod, None);
        Self
    }

    fn allow(&self, host: &Host, pod: &Pod, ports: Option<&[u16]>) {
        let text = match ports {
            None => filled(include_str!("kube-router-open.rules"), pod, &[]),
            Some(ports) => filled(include_str!("kube-router-policy.rules"), pod, ports),
        };
        host.netns.feed("iptables-restore --noflush", &text).unwrap();
    }
}

#[test]
fn kube_routers_policy_holds() {
    assert_holds_as_with_flannel::<KubeRouter>();
}
