//! Which routes lead into the overlay: beside those of others, where addresses of others are in the way, where the host needs
//! something inside the Network; and others' routes through it.

use std::{
    fs,
    net::Ipv4Addr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use xtask::{
    lab::{Netns, PREFIX, servers::WebServer},
    process::{Process, output},
    progress::wait_for,
};

use crate::world::{SOON, World, agent, is_answered, is_delivered, lease_value};

const VXLAN: &str = r#""Backend": {"Type": "vxlan"}"#;
/// As in flannel's documentation (Documentation/configuration.md).
const DOCUMENTED: &str =
    r#""Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0""#;

impl World {
    /// Hosts without an agent, and a config.
    fn configured(hosts: u8, fields: &str) -> Self {
        let world = Self::without_config(hosts);
        world.store.put(&format!("{PREFIX}/config"), &format!("{{{fields}, {VXLAN}}}")).unwrap();
        world
    }

    /// What there is through the device, and what is said of it.
    fn routes(&self, host: usize) -> (String, String) {
        let status = self.status(host);
        let routes = self.hosts[host].netns.exec("ip route show dev flannel.1").unwrap();
        (routes, status["status"]["routes"]["reason"].as_str().unwrap_or_default().to_owned())
    }

    fn wait_mode(&self, host: usize, mode: &str) {
        self.wait_status(host, mode, |status| status["routes"]["mode"] == mode);
    }

    /// This host's address on the overlay.
    fn overlay_address(&self, host: usize) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.hosts[host].subnet().unwrap().gateway.to_bits() - 1)
    }

    fn restart(&mut self, host: usize, arguments: &[&str]) {
        self.start(host, arguments);
        self.wait_log(host, "carries");
    }

    fn cleanup(&mut self, host: usize) {
        self.hosts[host].agent = None;
        output(self.agent_on(host).arg("cleanup")).unwrap();
    }

    fn on_host(&self, host: usize, lines: &[&str]) {
        for line in lines {
            self.hosts[host].netns.exec(line).unwrap();
        }
    }
}

#[test]
fn one_route_for_the_network_and_the_fewest_for_a_range() {
    let range = r#""Network": "10.5.0.0/16", "SubnetMin": "10.5.16.0", "SubnetMax": "10.5.40.0""#;
    for (fields, expected) in [
        (r#""Network": "10.5.0.0/16""#, &["10.5.0.0/16"][..]),
        (range, &["10.5.16.0/20", "10.5.32.0/21", "10.5.40.0/24"]),
    ] {
        let world = World::configured(2, fields).ready(&[]);
        world.wait_connected(0, 1);
        let source = world.overlay_address(0);
        let expected: Vec<_> = expected
            .iter()
            .map(|prefix| format!("{prefix} via 169.254.1.1 proto 72 src {source} metric 8472 onlink"))
            .collect();
        let (routes, reason) = world.routes(0);
        assert_eq!(routes.lines().map(str::trim).collect::<Vec<_>>(), expected, "{reason}");
        // A lease of an earlier config's, beside them, is reached all the same.
        if fields == range {
            let key = format!("{PREFIX}/subnets/10.5.7.0-24");
            world.store.put(&key, &lease_value("192.168.64.9", "0a:00:00:00:00:09")).unwrap();
            let own = format!("10.5.7.0/24 via 10.5.7.0 proto 72 src {source} onlink");
            wait_for("its route", SOON, || world.routes(0).0.contains(&own)).unwrap();
            world.store.etcdctl(&["del", &key]).unwrap();
            wait_for("no route", SOON, || !world.routes(0).0.contains("10.5.7.0")).unwrap();
            assert!(!world.hosts[0].netns.exec("ip neigh show dev flannel.1").unwrap().contains("10.5.7.0"));
        }
    }
}

#[test]
fn a_bridge_with_the_networks_prefix_stays_and_so_do_its_containers() {
    let mut world = World::configured(2, r#""Network": "172.17.0.0/16""#);
    let container = Netns::create(&format!("{}-container", world.hosts[0].netns.name())).unwrap();
    world.on_host(
        0,
        &[
            "ip link add docker0 type bridge",
            "ip address add 172.17.0.1/16 dev docker0",
            "ip link set docker0 up",
            &format!("ip link add c0 type veth peer name eth0 netns {}", container.name()),
            "ip link set c0 master docker0 up",
        ],
    );
    container.ip("address add 172.17.0.2/16 dev eth0").unwrap();
    container.ip("link set eth0 up").unwrap();
    container.ip("route add default via 172.17.0.1").unwrap();
    let before = world.hosts[0].netns.exec("ip route").unwrap();

    world = world.ready(&[]);
    for _restart in 0..2 {
        world.wait_connected(0, 1);
        let (routes, reason) = world.routes(0);
        let said = "one per lease, since 172.17.0.0/16 has a route of somebody else's, dev docker0";
        assert_eq!(reason, said, "{routes}");
        let all = world.hosts[0].netns.exec("ip route").unwrap();
        assert!(before.lines().all(|line| all.contains(line)), "{all}\nbefore:\n{before}");
        assert!(is_delivered(&world.hosts[0].netns, "172.17.0.2"), "host to container");
        world.restart(0, &[]);
    }
    world.cleanup(0);
    world.on_host(0, &["ip link delete cni0"]);
    assert_eq!(world.hosts[0].netns.exec("ip route").unwrap(), before);
}

#[test]
fn an_administrators_route_is_respected_whenever_it_comes() {
    let mut world = World::configured(2, r#""Network": "10.5.0.0/16""#);
    let route = "10.5.0.0/16 via 192.168.64.254 dev eth0";
    world.on_host(0, &[&format!("ip route add {route}")]);
    world = world.ready(&[]);
    world.wait_connected(0, 1);
    let has = |world: &World| world.hosts[0].netns.exec("ip route").unwrap().contains(route);
    assert!(has(&world) && world.status(0)["status"]["routes"]["mode"] == "leases");
    world.on_host(0, &[&format!("ip route delete {route}")]);
    world.wait_mode(0, "network");
    world.wait_connected(0, 1);
    // As with flannel, it can simply be added.
    world.on_host(0, &[&format!("ip route add {route}")]);
    world.wait_mode(0, "leases");
    world.wait_connected(0, 1);
    world.cleanup(0);
    assert!(has(&world), "cleanup took it");
}

/// One that is more specific, which the kernel prefers.
#[test]
fn a_route_of_others_within_the_shared_one_is_told_of() {
    let mut world = World::configured(2, r#""Network": "10.5.0.0/16""#).ready(&[]);
    world.wait_connected(0, 1);
    let subnet = world.overlay_address(1);
    world.on_host(0, &[&format!("ip route add {subnet}/24 via 192.168.64.254 dev eth0")]);
    // What is told by no event is found at the start, and once a minute.
    world.hosts[0].agent = None;
    world.start(0, &[]);
    let expected = format!("1 of the leases is led elsewhere by a route of somebody else's, which stays: {subnet}/24");
    let told =
        wait_for("the route to be told of", SOON, || world.status(0)["troubles"].to_string().contains(&expected));
    assert!(told.is_ok(), "{:#}", world.status(0));
    assert_eq!(world.status(0)["status"]["routes"]["mode"], "network");
}

#[test]
fn routes_are_switched_both_ways_without_a_loss() {
    let world = World::configured(2, r#""Network": "10.5.0.0/16""#).ready(&[]);
    world.wait_connected(0, 1);
    let traffic = [world.traffic(0, 1), world.traffic(1, 0)];
    let shared = "10.5.0.0/16 via 169.254.1.1";
    for _round in 0..3 {
        // Worse than ours, so that only the agent can lose something by it.
        world.on_host(0, &["ip route add 10.5.0.0/16 via 192.168.64.254 metric 20000"]);
        world.wait_mode(0, "leases");
        let peer = world.overlay_address(1);
        let (routes, _) = world.routes(0);
        assert!(!routes.contains(shared) && routes.contains(&format!("{peer}/24 via {peer} proto 72")), "{routes}");
        world.on_host(0, &["ip route delete 10.5.0.0/16 via 192.168.64.254 metric 20000"]);
        world.wait_mode(0, "network");
        let (routes, _) = world.routes(0);
        assert!(routes.contains(shared) && !routes.contains(&format!("via {peer}")), "{routes}");
    }
    traffic.into_iter().for_each(crate::world::Traffic::assert_nothing_was_lost);
}

#[test]
fn addresses_of_others_on_the_device_and_on_lo_change_nothing() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let server = world.hosts[1].pods[0].address;
    let _web = WebServer::start(&world.hosts[1].pods[0], 80, "server").unwrap();
    let source = world.overlay_address(0);
    world.on_host(
        0,
        &[
            &format!("iptables -t nat -A PREROUTING -p tcp --dport 30080 -j DNAT --to-destination {server}:80"),
            "iptables -t nat -A POSTROUTING -o flannel.1 -j MASQUERADE",
        ],
    );
    let works = |world: &World| {
        let node_port = world.lab.underlay.exec("curl -s --max-time 2 http://192.168.64.1:30080").unwrap_or_default();
        let expired = format!("ping -c 1 -W 1 -t 2 {}", world.hosts[0].pods[0].address);
        let expired = world.hosts[1].pods[0].netns.command("sh").args(["-c", &expired]).output().unwrap();
        let expired = String::from_utf8_lossy(&expired.stdout).into_owned();
        let state =
            [&node_port, &expired, &world.hosts[0].netns.exec("ip route").unwrap()].map(String::as_str).concat();
        let is_well = is_answered(&world.hosts[0].netns, &server.to_string())
            && node_port.contains(&format!("server {source}"))
            && expired.contains(&format!("From {source} "));
        if is_well { Ok(()) } else { Err(state) }
    };
    let expect = |world: &World, what: &str| {
        let waited = wait_for(what, SOON, || works(world).is_ok());
        assert!(waited.is_ok(), "{what}: {:?}", works(world));
    };
    expect(&world, "nothing of others");
    for addition in ["169.254.77.7/16 dev flannel.1", "169.254.1.1/32 dev lo"] {
        world.on_host(0, &[&format!("ip address add {addition}")]);
        expect(&world, addition);
        world.restart(0, &[]);
        expect(&world, &format!("{addition}, and a restart"));
        world.on_host(0, &["ip link set flannel.1 down"]);
        expect(&world, &format!("{addition}, and a flap"));
    }
    world.on_host(0, &["ip address delete 169.254.1.1/32 dev lo", "ip address delete 169.254.77.7/16 dev flannel.1"]);
    wait_for("the usual next hop", SOON, || world.routes(0).0.contains("via 169.254.1.1 ")).unwrap();
    expect(&world, "nothing of others any more");
}

/// Hosts in 10.201.0.0/24 and 10.202.0.0/24 behind their gateways, and whatever else in 10/8 is asked for behind these. None of
/// it is in the first hundred subnets, which leases are taken from.
fn routed(world: &mut World, etcd: &str, others: &[&str]) -> Vec<String> {
    let underlay = &world.lab.underlay;
    underlay.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
    for address in others.iter().chain([&etcd]) {
        underlay.ip(&format!("address add {address}/32 dev lo")).unwrap();
    }
    let (_, port) = world.store.endpoint().rsplit_once(':').unwrap();
    let to_store = format!("-d {etcd} -p tcp --dport {port} -j DNAT --to-destination 192.168.64.254:{port}");
    underlay.exec(&format!("iptables -t nat -A PREROUTING {to_store}")).unwrap();
    for (number, host) in (201..).zip(&world.hosts) {
        underlay.ip(&format!("address add 10.{number}.0.254/24 dev br0")).unwrap();
        host.netns.ip("address flush dev eth0").unwrap();
        host.netns.ip(&format!("address add 10.{number}.0.1/24 dev eth0")).unwrap();
        host.netns.ip(&format!("route add default via 10.{number}.0.254")).unwrap();
    }
    vec![format!("--etcd-endpoints=http://{etcd}:{port}")]
}

/// Starts the agent with a resolver and exactly these arguments, and gives the host a pod.
fn start_with(world: &mut World, host: usize, resolver: &str, arguments: &[String]) {
    let directory = world.hosts[host].directory().to_owned();
    fs::create_dir_all(&directory).unwrap();
    let file = directory.join("resolv.conf");
    fs::write(&file, format!("nameserver {resolver}\n")).unwrap();
    let mut command = world.hosts[host].netns.command("unshare");
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", file.display());
    command.args(["--mount", "sh", "-c", &script, "sh"]).arg(agent());
    command.arg("--run-dir").arg(world.hosts[host].run_dir());
    command.arg("--bpf-pin-dir").arg(world.hosts[host].pin_dir()).args(arguments);
    world.hosts[host].agent = Some(Process::start(&mut command, &directory.join("agent.log")).unwrap());
    world.hosts[host].wait_ready().unwrap();
    world.hosts[host].add_pod().unwrap();
}

#[test]
fn the_documented_config_with_all_that_a_host_needs_behind_the_default_gateway() {
    // Where etcd and the resolver are, and what is done about it: nothing, where they are beside what is leased.
    for (network, etcd, resolver, reason) in [
        (DOCUMENTED, "10.0.0.2", "10.0.0.53", "10.10.0.0/15, 10.12.0.0/14, 10.16.0.0/12, 10.32.0.0/11 and 4 more"),
        (
            DOCUMENTED,
            "10.20.0.2",
            "10.0.0.53",
            "one per lease, since 10.20.0.2 (etcd) lies in 10.16.0.0/12 and is reached by the default route",
        ),
        (
            DOCUMENTED,
            "10.0.0.2",
            "10.40.0.53",
            "one per lease, since 10.40.0.53 (a resolver) lies in 10.32.0.0/11 and is reached by the default route",
        ),
        (
            r#""Network": "10.0.0.0/8", "SubnetLen": 20"#,
            "10.0.0.2",
            "10.0.0.53",
            "one per lease, since 10.0.0.2 (etcd) lies in 10.0.0.0/8 and is reached by the default route",
        ),
    ] {
        let mut world = World::configured(2, network);
        let arguments = routed(&mut world, etcd, &[resolver]);
        for host in 0..2 {
            start_with(&mut world, host, resolver, &arguments);
        }
        world.wait_connected(0, 1);
        assert_eq!(world.routes(0).1, reason);
        for needed in [etcd, resolver, "10.202.0.1", "10.201.0.254"] {
            assert!(is_delivered(&world.hosts[0].netns, needed), "{needed}: {reason}");
        }
    }
}

#[test]
fn vagrants_two_interfaces() {
    let mut world = World::configured(2, DOCUMENTED);
    let mut outside = Vec::new();
    for host in &world.hosts {
        let nat = Netns::create(&format!("{}-nat", host.netns.name())).unwrap();
        host.netns.ip(&format!("link add nat0 type veth peer name eth0 netns {}", nat.name())).unwrap();
        for (netns, device, address) in [(&host.netns, "nat0", "10.0.2.15/24"), (&nat, "eth0", "10.0.2.2/24")] {
            netns.ip(&format!("address add {address} dev {device}")).unwrap();
            netns.ip(&format!("link set {device} up")).unwrap();
        }
        nat.ip("link set lo up").unwrap();
        nat.ip("address add 10.0.2.3/32 dev lo").unwrap();
        nat.ip("address add 10.200.0.9/32 dev lo").unwrap();
        host.netns.ip("route replace default via 10.0.2.2").unwrap();
        outside.push(nat);
    }
    for host in 0..2 {
        let arguments = ["--iface=eth0".to_owned(), format!("--etcd-endpoints={}", world.store.endpoint())];
        start_with(&mut world, host, "10.0.2.3", &arguments);
    }
    world.wait_connected(0, 1);
    assert_eq!(world.status(0)["status"]["routes"]["mode"], "network");
    for address in ["10.0.2.2", "10.0.2.3", "10.200.0.9"] {
        assert!(is_delivered(&world.hosts[0].netns, address), "{address}");
    }
}

#[test]
fn a_route_of_others_through_the_device_carries_packets() {
    let mut world = World::with_any_subnet(1).ready(&[]);
    let far = world.lab.host("node2", 2).unwrap();
    world.hosts.push(far);
    let [octet, _] = world.free_octets();
    let kernel = world.hosts[1].become_kernel_vxlan(&world.store, octet).unwrap();
    // A site behind it.
    world.on_host(1, &["ip address add 172.30.7.7/32 dev lo", "iptables -A INPUT -d 172.30.7.7 -p icmp -j DROP"]);
    world.on_host(0, &[&format!("ip route add 172.30.0.0/16 via 10.5.{octet}.0 dev flannel.1 onlink")]);
    let arrived = |world: &World| {
        let rules = world.hosts[1].netns.exec("iptables -nvxL INPUT").unwrap();
        let rule = rules.lines().find(|line| line.contains("172.30.7.7")).unwrap();
        rule.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let carries = |world: &World, what: &str| {
        let waited = wait_for(what, SOON, || {
            let before = arrived(world);
            is_answered(&world.hosts[0].pods[0].netns, "172.30.7.7");
            is_answered(&world.hosts[0].netns, "172.30.7.7");
            arrived(world) >= before + 2
        });
        let tables = || world.hosts[0].overlay_tables().unwrap();
        assert!(waited.is_ok(), "{what}: {:?}", tables());
    };
    carries(&world, "the route before a restart");
    assert!(world.counter(0, "encap_other_next_hop") > 0);
    world.restart(0, &[]);
    world.wait_status(0, "a status", |status| status["routes"]["mode"] == "network");
    carries(&world, "after a restart");
    world.restart(0, &["--routes=leases"]);
    world.wait_mode(0, "leases");
    carries(&world, "with a route per lease");
    // That to the lease itself stays the programs': what they admit by it is told from what another daemon's routes let in.
    let (routes, _) = world.routes(0);
    assert!(routes.contains(&format!("10.5.{octet}.0/24 via 169.254.1.1 proto 72")), "{routes}");
    world.restart(0, &[]);
    carries(&world, "and without again");
    let tables = || {
        let [_, (_, neighbours), (_, forwarding)] = world.hosts[0].overlay_tables().unwrap();
        (neighbours, forwarding)
    };
    let (neighbours, forwarding) = tables();
    assert!(neighbours.contains(&format!("10.5.{octet}.0 lladdr {} PERMANENT", kernel.mac)), "{neighbours:?}");
    assert!(forwarding.contains(&format!("{} dst 192.168.64.2 self permanent", kernel.mac)), "{forwarding:?}");
    // What is for the lease itself is the programs' all the while.
    world.hosts[1].netns.ip(&format!("address add 10.5.{octet}.9/32 dev lo")).unwrap();
    world.on_host(0, &["ip route delete 172.30.0.0/16"]);
    let waited = wait_for("nothing to be left", SOON, || tables().0.len() == 1 && tables().1.len() == 1);
    assert!(waited.is_ok(), "{:?}\n{}", tables(), world.hosts[0].agent.as_ref().unwrap().log());
}

#[test]
fn the_start_sweeps_what_flannel_made_and_nothing_else() {
    let mut world = World::with_any_subnet(2);
    let kernel = world.hosts[0].become_kernel_vxlan(&world.store, 201).unwrap();
    let peer = world.hosts[1].become_kernel_vxlan(&world.store, 202).unwrap();
    world.hosts[0].add_pod_in(&kernel.subnet).unwrap();
    world.hosts[1].add_pod_in(&peer.subnet).unwrap();
    world.hosts[0].add_kernel_peer_from(&world.store, 202).unwrap();
    world.hosts[1].add_kernel_peer_from(&world.store, 201).unwrap();
    world.on_host(
        0,
        &[
            "ip route add 172.30.0.0/16 via 10.5.202.0 dev flannel.1 onlink",
            "ip route add 172.31.0.0/16 via 10.9.9.9 dev flannel.1 onlink",
            "ip neigh add 10.9.9.9 lladdr 0a:00:00:00:09:09 dev flannel.1 nud permanent",
            "bridge fdb add 0a:00:00:00:09:09 dev flannel.1 dst 192.168.64.99 self permanent",
            "ip route add 10.5.66.0/24 via 10.5.66.0 dev flannel.1 onlink",
            "ip neigh add 10.5.66.0 lladdr 0a:00:00:00:66:66 dev flannel.1 nud permanent",
            "bridge fdb add 0a:00:00:00:66:66 dev flannel.1 dst 192.168.64.98 self permanent",
        ],
    );
    world.restart(0, &[]);
    world.wait_connected(0, 1);
    let [(_, mut routes), (_, mut neighbours), (_, mut forwarding)] = world.hosts[0].overlay_tables().unwrap();
    for table in [&mut routes, &mut neighbours, &mut forwarding] {
        table.sort();
    }
    assert_eq!(
        routes,
        [
            "10.5.0.0/16 via 169.254.1.1 proto 72 src 10.5.201.0 metric 8472 onlink",
            "172.30.0.0/16 via 10.5.202.0 onlink",
            "172.31.0.0/16 via 10.9.9.9 onlink",
        ]
    );
    let mac = &peer.mac;
    let expected = [
        format!("10.5.202.0 lladdr {mac} PERMANENT"),
        "10.9.9.9 lladdr 0a:00:00:00:09:09 PERMANENT".to_owned(),
        "169.254.1.1 lladdr 02:00:00:00:00:01 PERMANENT".to_owned(),
    ];
    assert_eq!(neighbours, expected);
    let mut expected = [
        "02:00:00:00:00:01 dst 192.168.64.1 self permanent".to_owned(),
        "0a:00:00:00:09:09 dst 192.168.64.99 self permanent".to_owned(),
        format!("{mac} dst 192.168.64.2 self permanent"),
    ];
    expected.sort();
    assert_eq!(forwarding, expected, "{}", world.hosts[0].agent.as_ref().unwrap().log());
}

#[test]
fn a_route_per_lease_with_hosts_of_flannels() {
    let mut world = World::with_any_subnet(3);
    for (host, third_octet) in [(1, 201), (2, 202)] {
        let kernel = world.hosts[host].become_kernel_vxlan(&world.store, third_octet).unwrap();
        world.hosts[host].add_pod_in(&kernel.subnet).unwrap();
    }
    world.start(0, &["--routes=leases"]);
    world.hosts[0].wait_ready().unwrap();
    world.hosts[0].add_pod().unwrap();
    let own = world.overlay_address(0);
    for host in [1, 2] {
        world.hosts[host].add_kernel_peer_from(&world.store, own.octets()[2]).unwrap();
        world.wait_connected(0, host);
    }
    let (routes, reason) = world.routes(0);
    assert_eq!(reason, "one per lease, as asked for");
    let expected = [201, 202].map(|at| format!("10.5.{at}.0/24 via 10.5.{at}.0 proto 72 src {own} onlink"));
    assert_eq!(routes.lines().map(str::trim).collect::<Vec<_>>(), expected);
    // One more, and one less.
    let subnet = format!("10.5.{}.0", world.free_octets()[0]);
    let (key, route) = (format!("{PREFIX}/subnets/{subnet}-24"), format!("{subnet}/24 via {subnet} "));
    world.store.put(&key, &lease_value("192.168.64.9", "0a:00:00:00:00:09")).unwrap();
    wait_for("a route", SOON, || world.routes(0).0.contains(&route)).unwrap();
    world.store.etcdctl(&["del", &key]).unwrap();
    wait_for("no route", SOON, || !world.routes(0).0.contains(&route)).unwrap();
    assert!(world.counter(0, "encapsulated") > 0);
    assert_eq!(world.counter(0, "encap_other_next_hop"), 0);
}

#[test]
fn a_way_that_comes_and_goes_decides_again_at_once() {
    const ROUNDS: u32 = 3;
    let world = World::with_any_subnet(1).ready(&[]);
    let [leased, another] = world.free_octets();
    let (key, peer) = (format!("{PREFIX}/subnets/10.5.{leased}.0-24"), format!("10.5.{another}.9"));
    world.store.put(&key, &lease_value(&peer, "0a:00:00:00:00:09")).unwrap();
    world.wait_mode(0, "leases");
    // The periodic comparison would see each change too: ten seconds after the last.
    let begun = Instant::now();
    for _round in 0..ROUNDS {
        world.on_host(0, &[&format!("ip route add {peer}/32 via 192.168.64.254")]);
        world.wait_mode(0, "network");
        world.on_host(0, &[&format!("ip route delete {peer}/32")]);
        world.wait_mode(0, "leases");
    }
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

/// The CPU time that `ip` uses to list all routes so many times: a measure that is as fast as the machine.
fn cpu_time_of_dumps(netns: &Netns, count: u32) -> Duration {
    let script = format!(
        "TIMEFORMAT='%3U %3S'; time for _ in $(seq {count}); do ip -n {} route show > /dev/null; done",
        netns.name()
    );
    let result = Command::new("bash").args(["-c", &script]).output().unwrap();
    let seconds = String::from_utf8(result.stderr).unwrap();
    Duration::from_secs_f64(seconds.split_whitespace().map(|seconds| seconds.parse::<f64>().unwrap()).sum())
}

#[test]
fn routes_of_others_that_come_and_go_cost_nothing() {
    /// More would take longer to load than all the rest.
    const ROUTES: u32 = 20_000;
    let mut world = World::with_agents(1);
    let route =
        |number: u32| format!("route add {}/24 via 192.168.64.254", Ipv4Addr::from_bits((100 << 24) + (number << 8)));
    let batch: Vec<_> = (0..ROUTES).map(route).collect();
    let file = world.lab.directory().join("routes");
    fs::write(&file, batch.join("\n")).unwrap();
    output(Command::new("ip").args(["-n", world.hosts[0].netns.name(), "-batch"]).arg(&file)).unwrap();
    let pid = world.hosts[0].agent.as_ref().unwrap().id();
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().map(str::to_owned).collect();
        [11, 12].iter().map(|field| fields[*field].parse::<u64>().unwrap()).sum::<u64>()
    };
    let one_dump = cpu_time_of_dumps(&world.hosts[0].netns, 10) / 10;
    let used = |before: u64| Duration::from_millis((ticks() - before) * 10);
    let before = ticks();
    let mut took = Duration::ZERO;
    for round in 0..100u32 {
        world.hosts[0].netns.ip(&format!("route add 101.0.{round}.0/24 via 192.168.64.254")).unwrap();
        if round == 50 {
            let put = Instant::now();
            let key = format!("{PREFIX}/subnets/10.5.7.0-24");
            world.store.put(&key, &lease_value("192.168.64.9", "0a:00:00:00:00:09")).unwrap();
            let own = "10.5.7.0/24 via 10.5.7.0";
            wait_for("the peer", SOON, || world.hosts[0].netns.ip("route show dev flannel.1").unwrap().contains(own))
                .unwrap();
            took = put.elapsed();
        }
        thread::sleep(Duration::from_millis(50));
    }
    let of_others = used(before);
    // One of them is the way to the peer.
    let before = ticks();
    for round in 0..60 {
        let what = if round % 2 == 0 { "add" } else { "delete" };
        world.hosts[0].netns.ip(&format!("route {what} 192.168.64.9/32 via 192.168.64.254")).unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    let of_the_way = used(before);
    println!("{of_others:?} and {of_the_way:?} of CPU time, a dump {one_dump:?}, a peer in {took:?}");
    // A dump for each change would be a hundred, and sixty. What the agent does all the time is in it, for some seconds.
    assert!(of_others < 30 * one_dump, "{of_others:?} for 100 changes, a dump {one_dump:?}");
    assert!(of_the_way < 40 * one_dump, "{of_the_way:?} for 60 changes of a peer's way, a dump {one_dump:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    world.hosts[0].agent = None;
}
