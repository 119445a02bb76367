//! Back to flannel's daemon, which plain commands play: what it keeps of ours, what cleanup leaves to it, and which packets
//! that costs.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::SocketAddrV4,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Instant,
};

use nix::sys::signal::Signal;
use xtask::{
    lab::Host,
    process::{Process, output},
    progress::wait_for,
};

use crate::{
    bypass::DROP_INVALID,
    numbered::BothWays,
    sockets::{connection, listener_in},
    stream::Stream,
    upgrade::Kernel,
    world::{SOON, World, is_delivered},
};

/// Ends a host's agent as a service manager does.
fn stop(world: &mut World, host: usize) {
    let agent = world.hosts[host].agent.as_mut().unwrap();
    agent.signal(Signal::SIGTERM).unwrap();
    assert!(agent.wait(SOON).unwrap().success());
}

/// Runs cleanup, which succeeds; what it said.
fn cleanup(world: &World, host: usize) -> String {
    let result = world.agent_on(host).arg("cleanup").output().unwrap();
    let said = String::from_utf8(result.stderr).unwrap();
    assert!(result.status.success(), "{said}");
    said
}

fn device(host: &Host) -> serde_json::Value {
    let link = host.netns.ip_json("address show dev flannel.1").unwrap()[0].take();
    serde_json::json!([link["ifindex"], link["address"], link["addr_info"][0]["local"]])
}

/// That nothing is there that only the agent can have made.
fn assert_none_of_ours(host: &Host) {
    let filters = host.netns.exec("bpftool net show").unwrap_or_default();
    assert!(["from_", "to_", "xdp_decap"].iter().all(|program| !filters.contains(program)), "{filters}");
    assert!(!host.pin_dir().join("1").exists());
    let tables = format!("{:?}", host.overlay_tables().unwrap());
    assert!(!tables.contains("169.254.1.1") && !tables.contains("02:00:00:00:00:01"), "{tables}");
    assert!(!host.run_dir().join("flannel.1.status.json").exists());
}

/// That a host is flannel's daemon's as before: the device with its peers, and `subnet.env`.
fn assert_is_flannels(host: &Host, before: &serde_json::Value, peers: usize) {
    assert_eq!(device(host), *before);
    let [routes, neighbours, forwarding] = host.overlay_tables().unwrap().map(|(_, lines)| lines);
    assert_eq!((routes.len(), neighbours.len(), forwarding.len()), (peers, peers, peers), "{routes:?}");
    assert!(host.subnet().is_ok());
}

fn late_cleanup_under_a_flood(kernel: Kernel, arguments: &[&str]) {
    let mut world = kernel.two_hosts_with(arguments);
    (0..2).for_each(|host| world.wait_pods(host));
    world.wait_connected(0, 1);
    let streams = BothWays::start(&world);
    streams.assert_ways(&world);
    for host in 0..2 {
        stop(&mut world, host);
        world.hosts[host].take_over_by_flannel(&world.store).unwrap();
        streams.wait_for_more(5000);
    }
    // Both ends of what the streams do not do: answers.
    let traffic = world.traffic(1, 0);
    let before = [0, 1].map(|host| device(&world.hosts[host]));
    for host in [1, 0] {
        let said = cleanup(&world, host);
        assert!(said.contains("left flannel.1") && said.contains("routes 10.5."), "{said}");
        assert_none_of_ours(&world.hosts[host]);
        assert_is_flannels(&world.hosts[host], &before[host], 1);
        streams.wait_for_more(5000);
        // Again there is nothing to do.
        let said = cleanup(&world, host);
        assert!(said.contains("nothing of an agent is left"), "{said}");
        assert_is_flannels(&world.hosts[host], &before[host], 1);
        streams.wait_for_more(5000);
    }
    traffic.assert_nothing_was_lost();
    streams.end_whole(&format!("late cleanups under flannel's daemon, {kernel:?} {arguments:?}"));
}

#[test]
fn a_late_cleanup_loses_no_packet_of_flannels_daemon() {
    late_cleanup_under_a_flood(Kernel::This, &[]);
}

#[test]
fn the_same_without_tcx() {
    late_cleanup_under_a_flood(Kernel::WithoutTcx, &[]);
}

#[test]
fn the_same_where_xdp_takes_packets_out_of_the_tunnel() {
    late_cleanup_under_a_flood(Kernel::This, &["--xdp=generic"]);
}

#[test]
fn a_daemon_without_peers_keeps_device_and_file() {
    let mut world = World::new(1).with_ready_agents(&[]);
    stop(&mut world, 0);
    world.hosts[0].write_subnet_env_as_flannel().unwrap();
    let before = device(&world.hosts[0]);
    let said = cleanup(&world, 0);
    assert!(said.contains("somebody else has written") && said.contains("left flannel.1"), "{said}");
    assert_none_of_ours(&world.hosts[0]);
    assert_is_flannels(&world.hosts[0], &before, 0);
}

#[test]
fn lines_that_somebody_added_are_no_daemon() {
    let mut world = World::new(1).with_ready_agents(&[]);
    stop(&mut world, 0);
    let mut file = fs::File::options().append(true).open(world.hosts[0].run_dir().join("subnet.env")).unwrap();
    file.write_all(b"FLANNEL_OPTIONS=1\n").unwrap();
    let said = cleanup(&world, 0);
    assert!(said.contains("removed flannel.1") && said.contains("removed everything"), "{said}");
    world.assert_untouched(0);
    assert!(!world.hosts[0].run_dir().exists());
}

#[test]
fn a_device_that_somebody_else_made_anew_stays() {
    let mut world = World::new(1).with_ready_agents(&[]);
    stop(&mut world, 0);
    let netns = &world.hosts[0].netns;
    let own = world.hosts[0].subnet().unwrap().gateway;
    let mac = netns.ip_json("link show flannel.1").unwrap()[0]["address"].as_str().unwrap().to_owned();
    netns.ip("link delete flannel.1").unwrap();
    let own = std::net::Ipv4Addr::from_bits(own.to_bits() - 1);
    world.hosts[0].add_kernel_vxlan(own).unwrap();
    // As in Kubernetes, where flannel's daemon gives it the MAC that it had.
    netns.ip(&format!("link set flannel.1 address {mac}")).unwrap();
    let before = device(&world.hosts[0]);
    let said = cleanup(&world, 0);
    assert!(said.contains("made flannel.1 anew"), "{said}");
    assert_is_flannels(&world.hosts[0], &before, 0);
}

#[test]
fn a_daemon_that_has_just_begun_keeps_what_it_finds() {
    let mut world = World::new(1).with_ready_agents(&[]);
    stop(&mut world, 0);
    // By this name it is known, before it has left any other trace.
    let daemon = world.lab.directory().join("flanneld");
    fs::copy("/bin/sleep", &daemon).unwrap();
    let mut command = world.hosts[0].netns.command(daemon.to_str().unwrap());
    let process = Process::start(command.arg("60"), &world.lab.directory().join("flanneld.log")).unwrap();
    wait_for("flanneld", SOON, || {
        fs::read_to_string(format!("/proc/{}/comm", process.id())).is_ok_and(|comm| comm == "flanneld\n")
    })
    .unwrap();
    let before = device(&world.hosts[0]);
    let said = cleanup(&world, 0);
    assert!(said.contains(&format!("flanneld runs here as process {}", process.id())), "{said}");
    assert_none_of_ours(&world.hosts[0]);
    assert_is_flannels(&world.hosts[0], &before, 0);
}

#[test]
fn where_no_agent_ever_ran_nothing_is_touched() {
    let mut world = World::new(1);
    let kernel = world.hosts[0].become_kernel_vxlan(&world.store, 200).unwrap();
    fs::create_dir_all(world.hosts[0].run_dir()).unwrap();
    let env = format!(
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={}/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
        kernel.subnet.gateway
    );
    fs::write(world.hosts[0].run_dir().join("subnet.env"), env).unwrap();
    let before = device(&world.hosts[0]);
    let said = cleanup(&world, 0);
    assert!(said.contains("nothing of an agent is left on this host"), "{said}");
    assert_is_flannels(&world.hosts[0], &before, 0);
    assert_eq!(fs::read_dir(world.hosts[0].run_dir()).unwrap().count(), 1);
}

#[test]
fn what_is_left_is_found_by_each_part_of_it() {
    let mut world = World::new(1).with_ready_agents(&[]);
    for (what, has_file) in [("pins", true), ("files", false), ("both", false)] {
        stop(&mut world, 0);
        if what != "files" {
            fs::remove_dir_all(world.hosts[0].pin_dir().join("1")).unwrap();
        }
        if !has_file {
            fs::remove_dir_all(world.hosts[0].run_dir()).unwrap();
        }
        let said = cleanup(&world, 0);
        assert!(said.contains("removed flannel.1"), "without {what}: {said}");
        world.assert_untouched(0);
        assert!(!world.hosts[0].run_dir().exists(), "without {what}");
        world.start(0, &[]);
        world.hosts[0].wait_ready().unwrap();
    }
}

#[test]
fn an_overlay_whose_agent_runs_is_left_and_the_other_is_cleaned() {
    let world = World::with_agents(1);
    let config = r#"{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}"#;
    world.store.put("/other/network/config", config).unwrap();
    let file = world.hosts[0].run_dir().join("other.env");
    let mut command = world.agent_on(0);
    command.arg(format!("--etcd-endpoints={}", world.store.endpoint()));
    command.arg("--etcd-prefix=/other/network").arg(format!("--subnet-file={}", file.display()));
    let mut other = Process::start(&mut command, &world.lab.directory().join("other.log")).unwrap();
    wait_for("the other subnet.env", SOON, || file.exists()).unwrap();
    wait_for("its record", SOON, || world.hosts[0].run_dir().join("flannel.2.subnet-env").exists()).unwrap();
    other.signal(Signal::SIGTERM).unwrap();
    assert!(other.wait(SOON).unwrap().success());

    // The one that runs is said, with the failure; the file of the other is known by its agent's word alone.
    let refused = output(world.agent_on(0).arg("cleanup")).unwrap_err().to_string();
    assert!(refused.contains("another agent serves flannel.1"), "{refused}");
    let netns = &world.hosts[0].netns;
    assert!(netns.ip("link show flannel.2").is_err() && !file.exists());
    assert!(!world.hosts[0].pin_dir().join("2").exists());
    assert!(netns.ip("link show flannel.1").is_ok() && world.hosts[0].subnet().is_ok());
    assert!(is_delivered(netns, &world.hosts[0].pods[0].address.to_string()));
    wait_for("all to be well", SOON, || output(world.agent_on(0).arg("status")).is_ok()).unwrap();
}

/// The way that docs/compatibility.md names, with a daemon whose new MAC the store tells to the others.
#[test]
fn stop_cleanup_and_flannels_daemon_cost_a_moment() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let stream = Stream::start(from, to);
    wait_for("the stream", SOON, || stream.count() > 500).unwrap();
    let third_octet = world.hosts[0].subnet().unwrap().gateway.octets()[2];
    let (env, peers) = (world.hosts[0].run_dir().join("subnet.env"), world.hosts[1].subnet().unwrap());
    let content = fs::read(&env).unwrap();
    stop(&mut world, 0);
    let before = stream.count();
    wait_for("packets without an agent", SOON, || stream.count() > before + 500).unwrap();
    let begun = Instant::now();
    let said = cleanup(&world, 0);
    assert!(said.contains("removed everything that the agent of flannel.1 made"), "{said}");
    world.assert_untouched(0);
    world.hosts[0].become_kernel_vxlan(&world.store, third_octet).unwrap();
    fs::create_dir_all(env.parent().unwrap()).unwrap();
    fs::write(&env, content).unwrap();
    world.hosts[0].add_kernel_peer_from(&world.store, peers.gateway.octets()[2]).unwrap();
    let before = stream.count();
    wait_for("packets again", SOON, || stream.count() > before + 500).unwrap();
    let took = begun.elapsed();
    let (_, arrived) = stream.end_each();
    let gap = arrived[0].windows(2).map(|two| two[1].1 - two[0].1).max().unwrap();
    // How long depends on the commands that play the daemon; that packets come again was waited for.
    println!("stop, cleanup, flannel's daemon: {gap:?} without packets, of {took:?}");
}

/// What conntrack has not seen of a connection that bypassed the stack is not held against it.
#[test]
fn connections_that_passed_the_stack_by_go_on_after_a_late_cleanup() {
    let mut world = World::with_agents(2);
    for host in &world.hosts {
        host.netns.exec(DROP_INVALID).unwrap();
    }
    world.wait_connected(0, 1);
    let [client, server] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let listener = listener_in(&server.netns, server.address, 7900);
    let (mut client, mut server) = connection(&client.netns, SocketAddrV4::new(server.address, 7900), &listener);
    let (stop_sending, received) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop_sending.load(Ordering::Relaxed) {
                client.write_all(&[0; 16384]).unwrap();
            }
            let _ended = client.shutdown(std::net::Shutdown::Write);
        });
        scope.spawn(|| {
            let mut buffer = [0; 65536];
            while let Ok(1..) = server.read(&mut buffer).inspect(|len| {
                received.fetch_add(*len as u64, Ordering::Relaxed);
            }) {}
        });
        let more = |what: &str, bytes: u64| {
            let before = received.load(Ordering::Relaxed);
            wait_for(what, SOON, || received.load(Ordering::Relaxed) > before + bytes)
        };
        // More than any window.
        let passed = more("a connection that passes by", 200 << 20);
        for host in 0..2 {
            stop(&mut world, host);
            world.hosts[host].take_over_by_flannel(&world.store).unwrap();
        }
        let said = [0, 1].map(|host| cleanup(&world, host));
        assert!(said.iter().all(|said| said.contains("nf_conntrack_tcp_be_liberal")), "{said:?}");
        let goes_on = more("the connection", 20 << 20);
        stop_sending.store(true, Ordering::Relaxed);
        passed.unwrap();
        assert!(goes_on.is_ok(), "it stands still: {said:?}");
    });
}

/// What flannel's daemon has of nftables and ours go into one table, and of it cleanup takes ours.
#[test]
fn flannels_rules_can_be_made_beside_ours_and_stay() {
    let mut world = World::new(1).with_ready_agents(&["--ip-masq"]);
    let nft = |world: &World, text: &str| world.hosts[0].netns.feed("nft -f -", text).map(drop);
    let listed = |world: &World| world.hosts[0].netns.exec("nft list ruleset").unwrap();
    wait_for("the rules", SOON, || listed(&world).contains("flanneld masq")).unwrap();
    stop(&mut world, 0);
    // As knftables writes it (pkg/trafficmngr/nftables), a transaction for each.
    for text in [
        "add table ip flannel-ipv4 { comment \"rules for flannel-ipv4\"; }\n",
        "add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 100; }\n\
         flush chain ip flannel-ipv4 postrtg\n\
         add rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random\n",
    ] {
        nft(&world, text).unwrap();
    }
    world.hosts[0].write_subnet_env_as_flannel().unwrap();
    cleanup(&world, 0);
    let rules = listed(&world);
    assert!(rules.contains("chain postrtg {") && !rules.contains("flanneld masq"), "{rules}");

    // Where flannel has none there, nothing is left.
    world.start(0, &["--ip-masq"]);
    world.hosts[0].wait_ready().unwrap();
    wait_for("the rules", SOON, || listed(&world).contains("flanneld masq")).unwrap();
    stop(&mut world, 0);
    world.hosts[0].write_subnet_env_as_flannel().unwrap();
    cleanup(&world, 0);
    assert!(!listed(&world).contains("flanneld masq"), "{}", listed(&world));
}
