//! What pods are used for, as in a cluster: a pod is called by its address, by a name that leads to a service, and through a
//! port of any host, with the rules that kube-proxy sets in both their forms. `curl` asks, `dnsmasq` knows the names, and
//! tshark shows what is on the wire.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
};

use xtask::lab::{
    Host, Netns, Pod,
    capture::{Capture, Tunnelled},
    cni::Runtime,
    servers::{Answer, DOMAIN, DnsServer, WebServer, curl, resolv_conf},
    services::{Service, ServiceRules},
};

use crate::{
    netfilter::MASQUERADE,
    world::{World, agent},
};

const DNS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 53);
const WEB: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 20), 80);
const NODE_PORT: u16 = 30002;
const SERVER_PORT: u16 = 8080;
/// With two servers, that one of them is never chosen happens once in 2^49 times.
const ASKED: usize = 50;

/// A client on the first host, a web server each on the other two, and a DNS server beside the first of these.
struct Cluster {
    dns: DnsServer,
    _web: [WebServer; 2],
    resolver: PathBuf,
    world: World,
}

impl Cluster {
    fn new() -> Self {
        let mut world = World::new(3).with_ready_agents(MASQUERADE);
        for (host, pods) in [1, 2, 1].into_iter().enumerate() {
            let host = &mut world.hosts[host];
            let runtime = Runtime::new(host, agent().parent().unwrap()).unwrap();
            for _ in 0..pods {
                host.attach_pod(&runtime).unwrap();
            }
        }
        for peer in [1, 2] {
            world.wait_connected(0, peer);
        }
        let directory = world.lab.directory().to_owned();
        let web = [1, 2].map(|host| {
            let pod = &world.hosts[host].pods[0];
            WebServer::start(pod, SERVER_PORT, &format!("web{host}")).unwrap()
        });
        let records = [("test", *WEB.ip()), ("headless", world.hosts[1].pods[0].address)];
        let dns = DnsServer::start(&world.hosts[1].pods[1], &records, &directory).unwrap();
        let resolver = directory.join("resolv.conf");
        fs::write(&resolver, resolv_conf(*DNS.ip())).unwrap();
        Self { dns, _web: web, resolver, world }
    }

    fn client(&self) -> &Pod {
        &self.world.hosts[0].pods[0]
    }

    /// The pod behind a name of a web server.
    fn server(&self, name: &str) -> &Pod {
        &self.world.hosts[self.host_of(name)].pods[0]
    }

    fn host_of(&self, name: &str) -> usize {
        name.strip_prefix("web").unwrap().parse().unwrap()
    }

    fn set(&self, rules: ServiceRules) {
        let port = |pod: &Pod, port| SocketAddrV4::new(pod.address, port);
        let hosts = &self.world.hosts;
        let services = [
            Service {
                name: "dns",
                protocol: "udp",
                address: DNS,
                node_port: None,
                endpoints: vec![port(&hosts[1].pods[1], 53)],
            },
            Service {
                name: "test",
                protocol: "tcp",
                address: WEB,
                node_port: Some(NODE_PORT),
                endpoints: [1, 2].map(|host| port(&hosts[host].pods[0], SERVER_PORT)).to_vec(),
            },
        ];
        for host in hosts {
            rules.set(host, &services).unwrap();
        }
    }

    /// What is in the tunnel on the first host until an HTTP answer has come.
    fn captured(&self, filter: &str, ask: impl FnOnce() -> Answer) -> (Answer, Vec<Tunnelled>) {
        let mut capture =
            Capture::start(&self.world.hosts[0].netns, "eth0", "udp port 8472", self.world.lab.directory()).unwrap();
        let answer = ask();
        capture.end_with("HTTP/1.1 200 OK").unwrap();
        (answer, capture.tunnelled(filter).unwrap())
    }

    /// That these are the packets: between which hosts and pods, and what they say.
    #[track_caller]
    fn assert_packets(&self, packets: &[Tunnelled], expected: &[([usize; 2], [Ipv4Addr; 2], &str)]) {
        assert_eq!(packets.len(), expected.len(), "{packets:#?}");
        for (packet, (hosts, inner, says)) in packets.iter().zip(expected) {
            let outer = hosts.map(|host| self.world.hosts[host].address.to_string());
            let inner = inner.map(|address| address.to_string());
            assert_eq!((&packet.outer, packet.vni.as_str(), &packet.inner), (&outer, "1", &inner), "{packet}");
            assert!(packet.info.contains(says), "{packet}, not {says}");
        }
    }

    /// Asks until all servers have answered, and looks at each answer.
    fn ask_until_all_answer(&self, ask: impl Fn() -> Answer, look: impl Fn(&Answer)) {
        let mut servers = BTreeSet::new();
        for _ in 0..ASKED {
            let answer = ask();
            look(&answer);
            servers.insert(answer.server);
            if servers.len() == 2 {
                return;
            }
        }
        panic!("asked {ASKED} times: {servers:?}");
    }
}

fn overlay_address(host: &Host) -> Ipv4Addr {
    Ipv4Addr::from_bits(host.subnet().unwrap().gateway.to_bits() - 1)
}

#[test]
fn a_pod_is_called_by_its_address() {
    let cluster = Cluster::new();
    let (client, server) = (cluster.client(), cluster.server("web1"));
    let asked = SocketAddrV4::new(server.address, SERVER_PORT);
    for rules in ServiceRules::FORMS {
        cluster.set(rules);
        let ask = || curl(&client.netns, &format!("http://{asked}/"), None).unwrap();
        let (answer, packets) = cluster.captured("http", ask);
        assert_eq!(answer, Answer { from: asked, server: "web1".to_owned(), seen_as: client.address });
        cluster.assert_packets(
            &packets,
            &[
                ([0, 1], [client.address, server.address], "GET /"),
                ([1, 0], [server.address, client.address], "200 OK"),
            ],
        );
    }
}

#[test]
fn a_name_leads_through_a_service_to_pods_of_other_hosts() {
    let cluster = Cluster::new();
    let (client, dns) = (cluster.client(), &cluster.world.hosts[1].pods[1]);
    let name = format!("test.{DOMAIN}");
    for rules in ServiceRules::FORMS {
        cluster.set(rules);
        let ask = || curl(&client.netns, "http://test/", Some(&cluster.resolver)).unwrap();
        let (answer, packets) = cluster.captured("http or (dns and dns.qry.type == 1)", ask);
        let server = cluster.server(&answer.server);
        assert_eq!((answer.from, answer.seen_as), (WEB, client.address), "{}", rules.name());
        // What is asked is the service's address, what is on the wire are pods' own.
        let host = cluster.host_of(&answer.server);
        cluster.assert_packets(
            &packets,
            &[
                ([0, 1], [client.address, dns.address], &format!("A {name}")),
                ([1, 0], [dns.address, client.address], &format!("A {name} A {}", WEB.ip())),
                ([0, host], [client.address, server.address], "GET /"),
                ([host, 0], [server.address, client.address], "200 OK"),
            ],
        );
        cluster.ask_until_all_answer(ask, |answer| {
            assert_eq!((answer.from, answer.seen_as), (WEB, client.address), "{}", rules.name());
        });
        // A service without an address of its own has its pods'.
        let asked = format!("http://headless:{SERVER_PORT}/");
        let answer = curl(&client.netns, &asked, Some(&cluster.resolver)).unwrap();
        assert_eq!(answer.from, SocketAddrV4::new(cluster.server("web1").address, SERVER_PORT));
        assert_eq!(answer.seen_as, client.address);
    }
    let from = client.address.to_string();
    assert!(cluster.dns.queries().contains(&(name, from.clone())), "{:?}", cluster.dns.queries());
    assert!(cluster.dns.queries().iter().all(|(_, asker)| *asker == from), "{:?}", cluster.dns.queries());
}

#[test]
fn a_port_of_any_host_leads_to_pods() {
    let cluster = Cluster::new();
    let world = &cluster.world;
    for rules in ServiceRules::FORMS {
        cluster.set(rules);
        for (number, host) in world.hosts.iter().enumerate() {
            let own = SocketAddrV4::new(host.address, NODE_PORT);
            let local = SocketAddrV4::new(Ipv4Addr::LOCALHOST, NODE_PORT);
            let [outside, itself]: [&Netns; 2] = [&world.lab.underlay, &host.netns];
            for (asker, asked) in [(outside, own), (itself, own), (itself, local)] {
                let what = format!("{}: {} asks {asked}", rules.name(), asker.name());
                let ask = || curl(asker, &format!("http://{asked}/"), None);
                if asked == local && !rules.serves_localhost() {
                    assert!(ask().is_err(), "{what}: kube-proxy does not serve it");
                    continue;
                }
                cluster.ask_until_all_answer(
                    || ask().unwrap_or_else(|error| panic!("{what}: {error:#}")),
                    |answer| {
                        assert_eq!(answer.from, asked, "{what}");
                        // Masqueraded as the device by which it leaves, so that the answer comes back by this host.
                        let is_here = cluster.host_of(&answer.server) == number;
                        let gateway = host.subnet().unwrap().gateway;
                        let seen_as = if is_here { gateway } else { overlay_address(host) };
                        assert_eq!(answer.seen_as, seen_as, "{what}");
                    },
                );
            }
        }
        let ask =
            || curl(&world.lab.underlay, &format!("http://{}:{NODE_PORT}/", world.hosts[0].address), None).unwrap();
        let (answer, packets) = cluster.captured("http", ask);
        let (server, host) = (cluster.server(&answer.server).address, cluster.host_of(&answer.server));
        let overlay = overlay_address(&world.hosts[0]);
        cluster.assert_packets(
            &packets,
            &[([0, host], [overlay, server], "GET /"), ([host, 0], [server, overlay], "200 OK")],
        );
    }
}

/// The hosts have one entry of each kind, and flannel's for the same leases one for each peer.
#[test]
fn the_kernel_has_no_entry_of_a_peer_where_flannel_makes_three() {
    let cluster = Cluster::new();
    let world = &cluster.world;
    for host in &world.hosts {
        let imitation = world.lab.host(&format!("{}-flannel", host.name), host.address.octets()[3] + 100).unwrap();
        imitation.imitate_by_flannel(host, &world.store).unwrap();
        let peers: Vec<_> = world.hosts.iter().filter(|peer| peer.name != host.name).collect();
        for ((command, ours), (_, flannels)) in
            host.overlay_tables().unwrap().into_iter().zip(imitation.overlay_tables().unwrap())
        {
            assert_eq!((ours.len(), flannels.len()), (1, peers.len()), "{command}: {ours:#?} {flannels:#?}");
            for peer in &peers {
                let addresses = [overlay_address(peer), peer.address].map(|address| address.to_string());
                let names_peer = |line: &String| addresses.iter().any(|address| line.contains(address.as_str()));
                assert!(flannels.iter().any(names_peer), "{command}: {flannels:#?}");
                assert!(!ours.iter().any(names_peer), "{command}: {ours:#?}");
            }
        }
    }
}
