//! The backend udp as an agent drives it: a network of its hosts, beside a host of flannel's, and what becomes of it when agents,
//! peers, devices and backends change.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::SocketAddrV4,
    thread,
};

use nix::sys::signal::Signal;
use xtask::{
    lab::{Host, LeaseStore as _, PREFIX},
    process::{Process, output},
    progress::wait_for,
    transfer::tcp_transfer,
};

use super::{MTU, PORT, engines::add_pod, forwarder::Forwarder};
use crate::{
    sockets::{connection, listener_in, socket_in},
    stream::Stream,
    world::{SOON, World, agent, is_answered, is_delivered},
};

const UDP: &str = r#"{"Type": "udp"}"#;
/// The third octet of the subnet of flannel's host.
const FLANNELS: u8 = 200;
const FLANNELS_KEY: &str = "subnets/10.5.200.0-24";

fn config(backend: Option<&str>) -> String {
    let subnets = r#""SubnetMin": "10.5.128.0", "SubnetMax": "10.5.191.0""#;
    let backend = backend.map(|backend| format!(r#", "Backend": {backend}"#)).unwrap_or_default();
    format!(r#"{{"Network": "10.5.0.0/16", {subnets}{backend}}}"#)
}

/// Hosts in such a network, without an agent.
fn network(hosts: u8, backend: Option<&str>) -> World {
    let world = World::without_config(hosts);
    world.store.put(&format!("{PREFIX}/config"), &config(backend)).unwrap();
    world
}

/// With a ready agent and a pod each, which reach each other.
fn connected(backend: Option<&str>, arguments: &[&str]) -> World {
    let mut world = network(2, backend).with_ready_agents(arguments);
    for host in &mut world.hosts {
        host.add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    world
}

fn stop(world: &mut World, host: usize, signal: Signal) {
    let mut agent = world.hosts[host].agent.take().unwrap();
    agent.signal(signal).unwrap();
    agent.wait(SOON).unwrap();
}

/// Starts the agent, and waits until it is done: `subnet.env` may be there already.
fn start(world: &mut World, host: usize, arguments: &[&str]) {
    world.start(host, arguments);
    let process = world.hosts[host].agent.as_ref().unwrap().id();
    let waited = wait_for("the agent", SOON, || world.status(host)["status"]["pid"] == process);
    assert!(waited.is_ok(), "{}", world.hosts[host].agent.as_ref().unwrap().log());
    world.hosts[host].wait_ready().unwrap();
}

/// Number, address and route of a host's TUN device.
fn device(host: &Host) -> (u64, String, String) {
    let link = host.netns.ip_json("address show dev flannel0").unwrap()[0].take();
    let addresses = host.netns.ip("-4 -o address show dev flannel0").unwrap();
    let address = addresses.split_whitespace().nth(3).unwrap_or_default().to_owned();
    (link["ifindex"].as_u64().unwrap(), address, host.netns.ip("route show dev flannel0").unwrap())
}

/// All that agents make in the kernel.
fn kernel(host: &Host) -> String {
    let all = [
        "ip -o link",
        "ip -o -4 address",
        "ip route",
        "ip neigh show nud permanent",
        "iptables-save",
        "nft list ruleset",
    ];
    let all = all.map(|line| host.netns.exec(line).unwrap_or_default()).concat();
    // Comments of iptables-save, with the time.
    all.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect()
}

fn octet(host: &Host) -> u8 {
    host.subnet().unwrap().gateway.octets()[2]
}

#[test]
fn two_agents_carry_a_network() {
    let world = connected(Some(r#"{"Type": "udp", "Port": 9285}"#), &["--ip-masq", "--ip-blackhole-route"]);
    let (one, two) = (&world.hosts[0], &world.hosts[1]);
    let (_, value) = world.lease_of(0);
    assert_eq!(value, r#"{"PublicIP":"192.168.64.1","PublicIPv6":null}"#);
    assert_eq!(one.subnet().unwrap().mtu, MTU);
    let (_, address, routes) = device(one);
    assert_eq!(address, format!("10.5.{}.0/32", octet(one)));
    assert!(routes.starts_with("10.5.0.0/16 proto 72"), "{routes}");
    assert_eq!(one.netns.exec("sysctl -n net.ipv4.ip_forward").unwrap().trim(), "1");
    let made = kernel(one);
    let blackhole = format!("blackhole 10.5.{}.0/24", octet(one));
    assert!(made.contains(&blackhole) && made.contains("masquerade") && made.contains("FLANNEL-FWD"), "{made}");
    assert!(!made.contains(" flannel.1:") && !one.pin_dir().exists(), "{made}");
    let env = std::fs::read_to_string(one.run_dir().join("subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_IPMASQ=true"), "{env}");

    for [from, to] in [[one, two], [two, one]] {
        let (from, to) = (&from.pods[0], &to.pods[0]);
        let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
        assert!(transfer.is_flowing(), "{} Gb/s", transfer.gbits);
        let ping = from.netns.exec(&format!("ping -c 3 -i 0.05 -W 2 -M do -s {} {}", MTU - 28, to.address)).unwrap();
        assert!(ping.contains("3 received"), "{ping}");
    }

    world.wait_status(0, "counters", |status| {
        status["tunnel"]["packets"]["udp_sent"].as_u64() > Some(100)
            && status["tunnel"]["packets"]["udp_received"].as_u64() > Some(100)
    });
    let status = output(world.agent_on(0).arg("status")).unwrap();
    for words in
        ["udp  ", "flannel0, UDP port 9285, in user space: the slow road; vxlan is faster", "1, of which 0 held"]
    {
        assert!(status.contains(words), "{status}");
    }
    assert!(status.contains("all is well") && status.contains("dropped: "), "{status}");
    let counters = output(world.agent_on(0).arg("counters")).unwrap();
    assert!(counters.contains("udp_spoofed_inner_source") && counters.contains("flannel0, VNI 1"), "{counters}");
    let metrics = output(world.agent_on(0).arg("metrics")).unwrap();
    assert!(metrics.contains(r#"flannel_packets_total{vni="1",event="udp_sent",outcome="forward"}"#), "{metrics}");
}

#[test]
fn a_network_without_a_backend_is_flannels_udp() {
    let world = connected(None, &[]);
    assert_eq!(world.status(0)["status"]["backend"], "udp");
    assert_eq!(world.lease_of(1).1, r#"{"PublicIP":"192.168.64.2","PublicIPv6":null}"#);
    world.wait_log(0, "there is no Backend, and flannel's default is udp");
}

#[test]
fn peers_come_change_and_go_beside_a_host_of_flannels() {
    let mut world = network(3, Some(UDP));
    (0..2).for_each(|host| world.start(host, &[]));
    for host in &mut world.hosts[..2] {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    add_pod(&mut world.hosts[2], FLANNELS);
    let peers = world.hosts[..2].iter().map(|host| (octet(host), host.address)).collect();
    let forwarder = Forwarder::start(&world.hosts[2], FLANNELS, MTU, PORT, peers);
    let pods = [0, 1, 2].map(|host: usize| world.hosts[host].pods[0].address.to_string());
    let unreachable = || {
        let said = world.hosts[0].pods[0].netns.exec(&format!("ping -c 1 -W 2 {}", pods[2]));
        said.is_err_and(|error| error.to_string().contains("Destination Net Unreachable"))
    };
    wait_for("no peer", SOON, unreachable).unwrap();

    let key = format!("{PREFIX}/{FLANNELS_KEY}");
    for _ in 0..2 {
        // A host with another backend takes none of these datagrams.
        let other = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}"#;
        world.store.put(&key, other).unwrap();
        world.wait_status(0, "the lease", |status| status["otherBackends"]["host-gw"] == 1);
        wait_for("no peer", SOON, unreachable).unwrap();
        world.wait_connected(0, 1);
        world.store.put(&key, r#"{"PublicIP":"192.168.64.3","PublicIPv6":null}"#).unwrap();
        for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
            let (netns, to) = (&world.hosts[from].pods[0].netns, &pods[to]);
            let waited = wait_for("an answer", SOON, || is_answered(netns, to));
            assert!(waited.is_ok(), "{from} to {to}: {:#}", world.status(0));
        }
    }
    for (one, two) in [(0, 2), (2, 0)] {
        let (from, to) = (&world.hosts[one].pods[0], &world.hosts[two].pods[0]);
        let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 1, world.lab.directory()).unwrap();
        assert!(transfer.is_flowing(), "{} Gb/s", transfer.gbits);
    }
    // Whoever is heard is held, until it is silent.
    world.store.etcdctl(&["del", &key]).unwrap();
    world.wait_status(0, "a held peer", |status| status["held"][0]["reason"] == "still_sends");
    drop(forwarder);
    output(world.agent_on(0).args(["lease", "release-guard"])).unwrap();
    wait_for("no peer", SOON, unreachable).unwrap();
}

#[test]
fn a_restart_costs_what_is_sent_meanwhile_and_no_connection() {
    let mut world = connected(Some(UDP), &[]);
    let before = device(&world.hosts[0]);
    let lease = world.lease_of(0);
    let [client, server] = [0, 1].map(|host: usize| world.hosts[host].pods[0].address);
    let listener = listener_in(&world.hosts[1].pods[0].netns, server, 8080);
    let (mut one, mut two) = connection(&world.hosts[0].pods[0].netns, SocketAddrV4::new(server, 8080), &listener);
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let signals = [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGTERM];
    let mut gaps = 0;
    for (host, signal) in [0, 1, 0].into_iter().zip(signals) {
        wait_for("datagrams", SOON, || !stream.silence().is_zero() && stream.silence().as_millis() < 100).unwrap();
        stop(&mut world, host, signal);
        // Nobody reads its queues; the route still leads into it.
        assert!(device(&world.hosts[host]).2.contains("10.5.0.0/16"));
        start(&mut world, host, &[]);
        gaps += 1;
        let sender = thread::spawn(move || {
            one.write_all(b"still there").unwrap();
            one
        });
        let mut said = [0; 11];
        two.read_exact(&mut said).unwrap();
        one = sender.join().unwrap();
        assert_eq!(&said, b"still there");
    }
    assert_eq!((device(&world.hosts[0]), world.lease_of(0)), (before, lease));
    assert!(is_delivered(&world.hosts[1].pods[0].netns, &client.to_string()));
    let (sent, arrived) = stream.end();
    let arrived: BTreeSet<_> = arrived.into_iter().collect();
    let lost: Vec<_> = (0..sent).filter(|number| !arrived.contains(number)).collect();
    // Each restart is one gap: before and after it, nothing is lost.
    let begun = lost.iter().filter(|number| **number == 0 || arrived.contains(&(**number - 1))).count();
    assert!(begun <= gaps, "{begun} gaps with {gaps} restarts: {} of {sent} are lost", lost.len());
}

#[test]
fn what_others_change_is_made_right_again() {
    let world = connected(Some(UDP), &["--iptables-resync=1"]);
    let host = &world.hosts[0];
    let netns = &host.netns;
    let (_, address, _) = device(host);
    let repaired = |label: &str| world.status(0)["status"]["drift"]["repaired"][label]["count"].as_u64().unwrap_or(0);
    let cases = [
        ("link delete flannel0", "device"),
        ("route delete 10.5.0.0/16 dev flannel0", "route"),
        ("address flush dev flannel0", "device_address"),
        ("link set flannel0 mtu 1300", "device_settings"),
        ("link set flannel0 down", "device_settings"),
        ("link set flannel0 alias other", "device_settings"),
    ];
    for (command, label) in cases {
        let before = repaired(label);
        netns.ip(command).unwrap();
        let waited = wait_for(command, SOON, || repaired(label) > before);
        assert!(waited.is_ok(), "{command}: {:#}\n{}", world.status(0), kernel(host));
        world.wait_connected(0, 1);
        let (_, now, routes) = device(host);
        assert!(now == address && routes.contains("10.5.0.0/16"), "{command}: {now} {routes}");
        let link = netns.ip_json("link show dev flannel0").unwrap();
        assert_eq!((&link[0]["mtu"], &link[0]["ifalias"]), (&MTU.into(), &"flannel-agent 1".into()), "{command}");
    }
    netns.exec("sysctl -qw net.ipv4.ip_forward=0").unwrap();
    wait_for("forwarding", SOON, || repaired("ip_forward") > 0).unwrap();
    std::fs::remove_file(host.run_dir().join("subnet.env")).unwrap();
    wait_for("subnet.env", SOON, || repaired("subnet_env") > 0).unwrap();

    // A narrower interface.
    netns.ip("link set eth0 mtu 1400").unwrap();
    wait_for("the MTU", SOON, || {
        let link = netns.ip_json("link show dev flannel0").unwrap();
        link[0]["mtu"] == 1372 && host.subnet().unwrap().mtu == 1372
    })
    .unwrap();
    // A route of somebody else's is left, and said.
    netns.ip("route delete 10.5.0.0/16 dev flannel0").unwrap();
    let is_taken = || netns.ip("route replace 10.5.0.0/16 via 192.168.64.2 dev eth0").is_ok();
    wait_for("another route", SOON, || is_taken() && !device(host).2.contains("10.5.0.0/16")).unwrap();
    world.wait_status(0, "another route", |status| {
        let said = status["drift"]["waiting"]["route into the overlay"].as_str().unwrap_or_default();
        said.contains("leads 10.5.0.0/16 elsewhere")
    });
    netns.ip("route delete 10.5.0.0/16 dev eth0").unwrap();
    world.wait_status(0, "the route", |status| status["drift"]["waiting"]["route into the overlay"].is_null());
    world.wait_connected(0, 1);
}

#[test]
fn a_network_changes_its_backend_and_nothing_of_the_old_one_stays() {
    let mut world = connected(Some(UDP), &["--ip-masq"]);
    let vxlan = r#"{"Type": "vxlan"}"#;
    let backends = [
        vxlan,
        UDP,
        r#"{"Type": "host-gw"}"#,
        UDP,
        r#"{"Type": "host-gw", "KernelRoutes": true}"#,
        UDP,
        r#"{"Type": "alloc"}"#,
        UDP,
        vxlan,
    ];
    for backend in backends {
        world.store.put(&format!("{PREFIX}/config"), &config(Some(backend))).unwrap();
        for host in 0..2 {
            stop(&mut world, host, Signal::SIGTERM);
            start(&mut world, host, &["--ip-masq"]);
        }
        let state = || kernel(&world.hosts[0]);
        let is_settled = |now: &str| {
            let there = ["flannel0", "dev flannel.1", "169.254.1.1 dev eth0", "proto 72", "masquerade"];
            let there = there.map(|what| now.contains(what));
            let by_host = now.contains("via 192.168.64.2 ");
            match backend {
                UDP => there == [true, false, false, true, true] && !by_host,
                _ if backend.contains("vxlan") => !there[0] && there[1] && there[3] && !by_host,
                _ if backend.contains("alloc") => there == [false; 5] && !by_host,
                _ if backend.contains("Kernel") => !there[0] && !there[1] && !there[2] && by_host,
                _ => !there[0] && !there[1] && there[2] && !by_host,
            }
        };
        let waited = wait_for("the backend", SOON, || is_settled(&state()));
        assert!(waited.is_ok(), "{backend}: {}\n{}", state(), world.hosts[0].agent.as_ref().unwrap().log());
        assert_eq!(world.hosts[0].pin_dir().exists(), backend.contains("vxlan") || backend.contains("gw"), "{backend}");
        if !world.hosts[0].pin_dir().exists() {
            let liberal = world.hosts[0].netns.exec("sysctl -n net.netfilter.nf_conntrack_tcp_be_liberal").unwrap();
            assert_eq!(liberal.trim(), "0", "{backend}");
        }
        if !backend.contains("alloc") {
            world.wait_connected(0, 1);
        }
    }
}

#[test]
fn cleanup_takes_everything_away() {
    let mut world = network(1, Some(UDP));
    let host = &world.hosts[0];
    host.netns.exec("iptables -L").unwrap();
    let before = host.netns.exec("ip route").unwrap();
    start(&mut world, 0, &["--ip-masq", "--ip-blackhole-route"]);
    let cleanup = |world: &World| output(world.agent_on(0).arg("cleanup"));
    assert!(cleanup(&world).is_err(), "an agent is running");
    let host = &world.hosts[0];
    assert!(kernel(host).contains("flannel0") && host.run_dir().join("subnet.env").exists());
    stop(&mut world, 0, Signal::SIGTERM);
    cleanup(&world).unwrap();
    let host = &world.hosts[0];
    let left = kernel(host).to_lowercase();
    assert!(!left.contains("flannel") && !left.contains("blackhole"), "{left}");
    assert_eq!(host.netns.exec("ip route").unwrap(), before);
    assert!(!host.run_dir().exists());

    // Also where nothing else is left of the agent than the device.
    start(&mut world, 0, &[]);
    stop(&mut world, 0, Signal::SIGKILL);
    std::fs::remove_dir_all(world.hosts[0].run_dir()).unwrap();
    cleanup(&world).unwrap();
    let left = kernel(&world.hosts[0]).to_lowercase();
    assert!(!left.contains("flannel"), "{left}");
}

/// The exit code for what the host lacks.
const LACKS: i32 = 77;

/// That an agent ends with a code and these words, and leaves a host as it was.
fn assert_refused(world: &World, command: &mut std::process::Command, expected: i32, words: &[&str]) {
    let host = &world.hosts[0];
    let before = (kernel(host), host.run_dir().join("subnet.env").exists());
    let mut process = Process::start(command, &world.lab.directory().join("refused.log")).unwrap();
    let code = process.wait(SOON).unwrap().code();
    let log = process.log();
    assert!(code == Some(expected) && words.iter().all(|word| log.contains(word)), "{code:?} {log}");
    assert_eq!((kernel(host), host.run_dir().join("subnet.env").exists()), before, "{log}");
}

#[test]
fn what_stands_in_the_way_is_said_and_nothing_is_half_made() {
    let mut world = network(1, Some(UDP));
    let host = &world.hosts[0];
    // Asked for before, so that what these make is there.
    kernel(host);
    let command = |world: &World, run_dir: &str| {
        let host = &world.hosts[0];
        let mut command = host.netns.command(&agent().to_string_lossy());
        command.arg("--run-dir").arg(host.directory().join(run_dir)).arg("--bpf-pin-dir").arg(host.pin_dir());
        world.store.configure(host, &mut command);
        command
    };
    std::fs::create_dir_all(host.directory()).unwrap();
    let taken = socket_in(&host.netns, SocketAddrV4::new(host.address, PORT));
    let words = ["UDP port 8285 of 192.168.64.1 is taken", "ss -lunp"];
    assert_refused(&world, &mut command(&world, "run"), LACKS, &words);
    drop(taken);

    let host = &world.hosts[0];
    let mut without = host.netns.command("unshare");
    let script = r#"mount -t tmpfs none /dev/net && exec "$@""#;
    without.args(["--mount", "sh", "-c", script, "sh"]).arg(agent());
    without.arg("--run-dir").arg(host.run_dir()).arg("--bpf-pin-dir").arg(host.pin_dir());
    world.store.configure(host, &mut without);
    assert_refused(&world, &mut without, LACKS, &["open /dev/net/tun", "modprobe tun"]);

    // Another agent, of the same number, and of another on the same port.
    start(&mut world, 0, &["--ip-masq"]);
    let of_same = ["serves flannel.1 on this host, with another --run-dir"];
    assert_refused(&world, &mut command(&world, "other"), 1, &of_same);
    world.store.put(&format!("{PREFIX}/config"), &config(Some(r#"{"Type": "udp", "VNI": 2}"#))).unwrap();
    assert_refused(&world, &mut command(&world, "other"), LACKS, &words);
    // Where the network had another backend, that one goes on.
    world.store.put(&format!("{PREFIX}/config"), &config(Some(r#"{"Type": "vxlan"}"#))).unwrap();
    stop(&mut world, 0, Signal::SIGTERM);
    start(&mut world, 0, &["--ip-masq"]);
    wait_for("the backend", SOON, || !kernel(&world.hosts[0]).contains("flannel0")).unwrap();
    stop(&mut world, 0, Signal::SIGTERM);
    world.store.put(&format!("{PREFIX}/config"), &config(Some(UDP))).unwrap();
    let host = &world.hosts[0];
    let _taken = socket_in(&host.netns, SocketAddrV4::new(host.address, PORT));
    assert_refused(&world, &mut command(&world, "run"), LACKS, &words);
    assert!(world.hosts[0].pin_dir().exists() && kernel(&world.hosts[0]).contains(" flannel.1:"));
}

#[test]
fn the_tunnel_follows_the_hosts_address_and_its_lease() {
    let world = connected(Some(UDP), &[]);
    let (host, netns) = (&world.hosts[0], &world.hosts[0].netns);
    let index = device(host).0;
    netns.ip("address delete 192.168.64.1/24 dev eth0").unwrap();
    netns.ip("address add 192.168.64.77/24 dev eth0").unwrap();
    netns.ip("route replace default via 192.168.64.254 dev eth0").unwrap();
    world.wait_status(0, "the address", |status| status["publicIp"] == "192.168.64.77");
    let listens = || netns.exec("ss -lun").unwrap().contains("192.168.64.77:8285");
    wait_for("the port", SOON, listens).unwrap();
    world.wait_connected(0, 1);

    // Another host has its lease.
    let subnet = format!("10.5.{}.0", octet(host));
    let value = r#"{"PublicIP":"192.168.64.50","PublicIPv6":null}"#;
    world.store.put(&format!("{PREFIX}/subnets/{subnet}-24"), value).unwrap();
    world.wait_status(0, "another lease", |status| {
        status["lease"]["state"] == "held" && status["lease"]["subnet"] != format!("{subnet}/24")
    });
    wait_for("subnet.env", SOON, || format!("10.5.{}.0", octet(host)) != subnet).unwrap();
    let own = format!("10.5.{}.0/32", octet(host));
    wait_for("the address", SOON, || device(host).1 == own).unwrap();
    assert_eq!(device(host).0, index, "the device is the same");
    let other = world.hosts[1].pods[0].address;
    wait_for("the other host's pod", SOON, || is_answered(netns, &other.to_string())).unwrap();
}
