//! What the agent makes, what stays when it ends, and what cleanup takes away.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use nix::sys::signal::Signal;
use xtask::{
    lab::PREFIX,
    process::{Process, output},
    progress::wait_for,
};

use crate::world::{SOON, World, is_delivered};

#[test]
fn the_device_the_lease_and_subnet_env_are_flannels() {
    let world = World::with_agents(1);
    let (key, value) = world.lease_of(0);
    let (subnet, len) = key.split_once('-').unwrap();
    assert_eq!(len, "24");

    let netns = &world.hosts[0].netns;
    let link = &netns.ip_json("-d link show flannel.1").unwrap()[0];
    let mac = link["address"].as_str().unwrap();
    assert_eq!(link["mtu"], 1450);
    let vxlan = &link["linkinfo"]["info_data"];
    assert_eq!((&vxlan["id"], &vxlan["port"]), (&1.into(), &8472.into()));
    assert_eq!((&vxlan["link"], &vxlan["local"]), (&"eth0".into(), &"192.168.64.1".into()));
    assert_eq!((&vxlan["learning"], &vxlan["udp_csum"]), (&false.into(), &true.into()));
    let addresses = netns.ip("-4 -o addr show flannel.1").unwrap();
    assert!(addresses.contains(&format!("inet {subnet}/32 ")), "{addresses}");

    assert_eq!(
        value,
        format!(
            r#"{{"PublicIP":"192.168.64.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    );
    let key = world.store.etcdctl(&["get", "-w", "json", &format!("{PREFIX}/subnets/{key}")]).unwrap();
    let lease = serde_json::from_str::<serde_json::Value>(&key).unwrap()["kvs"][0]["lease"].as_u64().unwrap();
    let lease = world.store.etcdctl(&["lease", "timetolive", &format!("{lease:x}")]).unwrap();
    assert!(lease.contains("granted with TTL(86400s)"), "{lease}");

    let file = world.hosts[0].run_dir().join("subnet.env");
    let prefix = subnet.trim_end_matches(".0");
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        format!("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={prefix}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n")
    );
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(netns.exec("sysctl -n net.ipv4.ip_forward").unwrap().trim(), "1");
}

#[test]
fn the_datapath_outlives_the_agent_and_is_adopted_by_the_next() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let lease = world.lease_of(0);
    let address = world.hosts[1].pods[0].address;

    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        let agent = world.hosts[0].agent.as_mut().unwrap();
        agent.signal(signal).unwrap();
        let status = agent.wait(Duration::from_secs(3)).unwrap();
        assert_eq!(status.success(), signal != Signal::SIGKILL, "{signal}: {status}");
        assert!(is_delivered(&world.hosts[0].pods[0].netns, &address.to_string()), "after {signal}");

        // Counters go on, so the maps are the same; and no ping is lost on the way.
        let encapsulated = |world: &World| world.counter(0, "encapsulated");
        let before = encapsulated(&world);
        assert!(before > 0);
        let mut ping = world.hosts[0].pods[0].netns.command("ping");
        ping.args(["-i", "0.01", "-c", "300", &address.to_string()]);
        let log = world.lab.directory().join(format!("ping-{signal}.log"));
        let mut ping = Process::start(&mut ping, &log).unwrap();
        world.start(0, &[]);
        world.wait_log(0, "carries");
        ping.wait(SOON).unwrap();
        assert!(ping.log().contains(" 0% packet loss"), "{}", ping.log());
        let after = encapsulated(&world);
        assert!(after >= before + 300, "{before} and then {after}: {}", world.hosts[0].agent.as_ref().unwrap().log());
        assert_eq!(world.lease_of(0), lease);
    }
}

#[test]
fn what_is_gone_after_a_reboot_is_made_again_as_the_peers_know_it() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let lease = world.lease_of(0);
    world.hosts[0].agent = None;
    assert!(output(world.agent_on(0).arg("cleanup")).is_ok());
    world.assert_untouched(0);

    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    assert_eq!(world.lease_of(0), lease, "subnet and MAC");
    world.wait_connected(0, 1);
}

#[test]
fn the_same_subnet_is_asked_for_again_when_the_lease_is_lost() {
    let mut world = World::with_agents(1);
    let (key, _) = world.lease_of(0);
    // As flannel: a lease that is taken away ends the process, with success.
    world.store.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")]).unwrap();
    let status = world.hosts[0].agent.as_mut().unwrap().wait(SOON).unwrap();
    assert!(status.success(), "{status}");
    world.wait_log(0, "Lease has been revoked. Shutting down daemon.");
    world.start(0, &[]);
    wait_for("the lease", SOON, || !world.store.list(&format!("{PREFIX}/subnets/")).unwrap().is_empty()).unwrap();
    assert_eq!(world.lease_of(0).0, key);
}

#[test]
fn what_somebody_else_breaks_is_made_again() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let netns = &world.hosts[0].netns;
    let state = || {
        let link = netns.ip("-o link show flannel.1").unwrap_or_default();
        let link = link.split_once(": ").map(|(_index, rest)| rest.replace(['\\', '\n'], "")).unwrap_or_default();
        let routes = netns.ip("route show dev flannel.1").unwrap_or_default();
        let addresses = netns.ip("-4 -o addr show flannel.1").unwrap_or_default();
        let addresses = addresses.split_once("inet ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
        let neighbours = netns.ip("neigh show dev flannel.1").unwrap_or_default();
        let forwarding = netns.exec("bridge fdb show dev flannel.1").unwrap_or_default();
        [link, routes, addresses, neighbours, forwarding].join("\n")
    };
    let right = state();
    assert!(right.contains("10.5.128.0/18 via 169.254.1.1"), "{right}");
    let address = world.lease_of(0).0.replace("-24", "/32");
    for damage in [
        "ip link delete flannel.1",
        "ip link set flannel.1 down",
        "ip link set flannel.1 mtu 1300",
        "ip link set flannel.1 address 0a:00:00:00:00:77",
        "ip route delete 10.5.128.0/18",
        "ip neigh delete 169.254.1.1 dev flannel.1",
        "bridge fdb delete 02:00:00:00:00:01 dev flannel.1",
        &format!("ip address delete {address} dev flannel.1"),
    ] {
        netns.exec(damage).unwrap();
        let repaired = wait_for("the repair", SOON, || state() == right);
        assert!(repaired.is_ok(), "after {damage}:\n{}\ninstead of\n{right}", state());
        world.wait_connected(0, 1);
    }
}

#[test]
fn cleanup_takes_everything_away_and_only_when_no_agent_runs() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let running = output(world.agent_on(0).arg("cleanup")).unwrap_err().to_string();
    assert!(running.contains("another agent serves flannel.1"), "{running}");
    assert!(is_delivered(&world.hosts[0].pods[0].netns, &world.hosts[1].pods[0].address.to_string()));

    world.hosts[0].agent = None;
    output(world.agent_on(0).arg("cleanup")).unwrap();
    world.assert_untouched(0);
    assert!(!world.hosts[0].run_dir().exists());
    let filters = world.hosts[0].netns.exec("bpftool net show").unwrap_or_default();
    assert!(!filters.contains("from_underlay") && !filters.contains("to_overlay"), "{filters}");
    // Twice is as good as once.
    output(world.agent_on(0).arg("cleanup")).unwrap();
}

#[test]
fn two_agents_for_one_overlay_of_a_host_are_one_too_many() {
    let world = World::with_agents(1);
    let mut second = world.agent_on(0);
    let error = output(second.args(["--etcd-endpoints", world.store.endpoint()])).unwrap_err().to_string();
    assert!(error.contains("another agent serves flannel.1"), "{error}");
    assert!(world.hosts[0].netns.ip("link show flannel.1").is_ok());
}

#[test]
fn a_failure_half_way_leaves_nothing() {
    let mut world = World::new(1);
    // The last thing that is made can't be: the folder for subnet.env is a file.
    let blocked = world.lab.directory().join("blocked");
    fs::write(&blocked, "").unwrap();
    let file = format!("--subnet-file={}/subnet.env", blocked.display());
    world.start(0, &[&file]);
    let status = world.hosts[0].agent.as_mut().unwrap().wait(SOON).unwrap();
    assert_eq!(status.code(), Some(1));
    world.assert_untouched(0);
}
