//! Network policy by others on hosts that flannel connects: their packet rules, set, changed and removed under live flows,
//! hold as they do with flannel's vxlan device, and what they allow goes on past the stack.
//!
//! The rules are templates: `{VETH}` and `{POD}` are the pod's, `{PORTS}` those that the policy allows.

mod calico;
mod flow;
mod kube_network_policies;
mod kube_router;
mod queue;

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    thread,
    time::{Duration, Instant},
};

use xtask::{
    lab::{Host, Pod, Subnet, services::ServiceRules},
    progress::wait_for,
};

use self::flow::{Flow, echo_server};
use crate::{
    calls::SERVER_PORT,
    counted::Counted,
    services::{SERVICE, service},
    sockets::{socket_in, within},
    world::{SOON, World, is_answered},
};

const ONE_WAY: u16 = 7001;
const TCP: u16 = 7002;
const BACK: u16 = 7003;
/// What is asked only once there is a policy.
const OTHER: u16 = 9090;
/// Within which a flow stops.
const PROMPT: Duration = Duration::from_secs(2);
/// Who has heard nothing for this long, a thousand datagrams in a second otherwise, hears nothing more.
const SILENCE: Duration = Duration::from_millis(500);

/// Something that sets packet rules for network policies.
trait Enforcer: Sized {
    /// Whether what is established stays so, whatever a policy says later.
    const KEEPS_ESTABLISHED: bool;
    /// Whose form its rules have, which kube-proxy's have then, too.
    const RULES: ServiceRules = ServiceRules::Iptables;

    /// Makes a pod of its kind.
    fn add_pod(host: &mut Host, subnet: &Subnet) {
        host.add_pod_in(subnet).unwrap();
    }

    /// Sets what it has on a host with a pod that no policy is for.
    fn install(host: &Host, pod: &Pod) -> Self;

    /// Has a policy allow only these ports of the pod, or no policy be there for it.
    fn allow(&self, host: &Host, pod: &Pod, ports: Option<&[u16]>);
}

/// What carries packets from host to host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    Agent,
    KernelVxlan,
}

/// Plays it through with both carriers, which must do the same at each step.
fn assert_holds_as_with_flannel<E: Enforcer>() {
    thread::scope(|scope| {
        let runs = [Carrier::Agent, Carrier::KernelVxlan].map(|carrier| scope.spawn(move || run::<E>(carrier)));
        runs.into_iter().for_each(|run| run.join().unwrap());
    });
}

/// Two hosts with a pod each.
fn world<E: Enforcer>(carrier: Carrier) -> World {
    let mut world = World::new(2);
    let subnets = match carrier {
        Carrier::Agent => {
            world = world.with_ready_agents(&[]);
            [0, 1].map(|host| world.hosts[host].subnet().unwrap())
        }
        Carrier::KernelVxlan => {
            let World { hosts, store, .. } = &mut world;
            let subnets = [0, 1].map(|host| hosts[host].become_kernel_vxlan(store, 70 + host as u8).unwrap().subnet);
            for (host, peer) in [(0, 71), (1, 70)] {
                hosts[host].add_kernel_peer_from(store, peer).unwrap();
            }
            subnets
        }
    };
    for (host, subnet) in world.hosts.iter_mut().zip(&subnets) {
        E::add_pod(host, subnet);
    }
    let [client, server] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    wait_for("pods", SOON, || is_answered(&client.netns, &server.address.to_string())).unwrap();
    world
}

fn run<E: Enforcer>(carrier: Carrier) {
    let world = world::<E>(carrier);
    let [client, server] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    E::RULES.set(&world.hosts[0], &service(SERVICE, &[server])).unwrap();
    let [_of_client, enforcer] = [0, 1].map(|host| E::install(&world.hosts[host], &world.hosts[host].pods[0]));
    let play = Play { world: &world, carrier };
    let policy = |ports: Option<&[u16]>| {
        enforcer.allow(&world.hosts[1], server, ports);
        Instant::now()
    };
    let direct = |port| SocketAddrV4::new(server.address, port);
    let _servers = [SERVER_PORT, OTHER].map(|port| echo_server(server, port));
    let one_way = Flow::one_way("to the server", client, server, ONE_WAY);
    let back = Flow::one_way("from the server", server, client, BACK);
    let tcp = Flow::tcp(client, server, TCP);
    let by_service = Flow::udp("by the service", client, SERVICE);
    play.assert_fast("without a policy", &[&one_way, &tcp, &by_service], &[&back, &tcp, &by_service]);

    let set = policy(Some(&[OTHER]));
    let mut stopped = vec![one_way.assert_stops(set)];
    let mut kept = vec![];
    if E::KEEPS_ESTABLISHED {
        kept.extend([&tcp, &by_service]);
    } else {
        stopped.extend([&tcp, &by_service].map(|flow| flow.assert_stops(set)));
    }
    assert!(!is_echoed(client, SERVICE), "{carrier:?}: a new flow to the service");
    assert!(!connects(client, direct(TCP)), "{carrier:?}: a new connection");
    let other = Flow::udp("to what is allowed", client, direct(OTHER));
    let answered = [&[&other], kept.as_slice()].concat();
    // What is sent in vain passes the stack of the first host by as well, whose count of what leaves says little here.
    play.assert_fast("with a policy", &answered, &[&[&back], answered.as_slice()].concat());
    play.assert_unrestricted();
    stopped.into_iter().for_each(|stopped| stopped.assert());

    let changed = policy(Some(&[ONE_WAY, TCP, SERVER_PORT]));
    let stopped = (!E::KEEPS_ESTABLISHED).then(|| other.assert_stops(changed));
    [&one_way, &tcp, &by_service, &back].into_iter().for_each(Flow::assert_passes);
    assert!(is_echoed(client, SERVICE) && connects(client, direct(TCP)), "{carrier:?}: what is allowed now");
    assert!(!is_echoed(client, direct(OTHER)), "{carrier:?}: what is no longer");
    stopped.into_iter().for_each(|stopped| stopped.assert());

    policy(None);
    assert!(is_echoed(client, direct(OTHER)), "{carrier:?}: after the policy");
    play.assert_fast("after it", &[&one_way, &tcp, &by_service, &other], &[&back, &tcp, &by_service, &other]);
}

struct Play<'a> {
    world: &'a World,
    carrier: Carrier,
}

impl Play<'_> {
    /// That these flows pass, from the first host to the second and back, and nearly all of their packets past the stacks of
    /// both.
    fn assert_fast(&self, what: &str, forth: &[&Flow], back: &[&Flow]) {
        const OUT: [&str; 2] = ["pod_encapsulated", "pod_translated"];
        const IN: [&str; 2] = ["delivered", "delivered_translated"];
        for flow in forth.iter().chain(back) {
            flow.assert_passes();
        }
        if self.carrier != Carrier::Agent {
            return;
        }
        let labels = |host| OUT.into_iter().chain(IN).map(move |label| (host, label));
        let count = |flows: &[&Flow]| flows.iter().map(|flow| flow.count()).sum::<u64>();
        let mut seen = String::new();
        let waited = wait_for("the bypass", SOON, || {
            let counted = [0, 1].map(|host| Counted::since_now(self.world, labels(host)));
            let before = [count(forth), count(back)];
            forth.iter().chain(back).for_each(|flow| flow.wait_for_more(200));
            let [forth, back] = [count(forth) - before[0], count(back) - before[1]];
            let [one, two] = counted.map(|counted| counted.packets()).map(|row| [row[0] + row[1], row[2] + row[3]]);
            seen =
                format!("{forth} forth, past the stacks {}, {}; {back} back, {}, {}", one[0], two[1], two[0], one[1]);
            let is_most = |packets: u64, of: u64| packets * 10 >= of * 9;
            [one[0], two[1]].into_iter().all(|packets| is_most(packets, forth))
                && [two[0], one[1]].into_iter().all(|packets| is_most(packets, back))
        });
        assert!(waited.is_ok(), "{what}: {seen}");
        println!("{what}: {seen}");
    }

    /// That nothing takes the stack because of one of the rules. One that queues is named all the same: of a flow that nobody
    /// answers it sees less than with flannel.
    fn assert_unrestricted(&self) {
        if self.carrier != Carrier::Agent {
            return;
        }
        for host in [0, 1] {
            let status = self.world.status(host);
            let restrictions = status["status"]["bypass"]["restrictions"].as_array().unwrap();
            let is_free = |one: &serde_json::Value| one["kind"] != "rule" || one["scope"] == "nothing";
            assert!(restrictions.iter().all(is_free), "{restrictions:#?}");
        }
    }
}

/// Whether an address answers to who has not asked it before.
fn is_echoed(client: &Pod, asked: SocketAddrV4) -> bool {
    let socket = socket_in(&client.netns, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    socket.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    (0..3).any(|_| {
        // A send may be told that the one before was refused.
        let _refused = socket.send_to(&[7; 8], asked);
        socket.recv(&mut [0; 8]).is_ok()
    })
}

/// Whether an address takes a new connection.
fn connects(client: &Pod, asked: SocketAddrV4) -> bool {
    let limit = Duration::from_millis(400);
    within(&client.netns, || std::net::TcpStream::connect_timeout(&asked.into(), limit).is_ok())
}

/// A template with what is this host's.
fn filled(template: &str, pod: &Pod, ports: &[u16]) -> String {
    let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
    template
        .replace("{VETH}", calico::VETH)
        .replace("{POD}", &pod.address.to_string())
        .replace("{PORTS}", &ports.join(","))
}
