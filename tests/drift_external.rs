//! What changes about the external interface: agent, programs, device, lease and peers follow.

use std::time::Instant;

use xtask::{lab::PREFIX, progress::wait_for};

use crate::{
    drift::Talk,
    world::{SOON, World},
};

/// Makes the cable of the first host anew, as the lab made it.
fn plug_in(world: &World, address: &str) {
    let host = &world.hosts[0];
    let (underlay, netns) = (&world.lab.underlay, &host.netns);
    underlay.ip(&format!("link add node1 type veth peer name eth0 netns {}", netns.name())).unwrap();
    underlay.ip("link set node1 master br0 up").unwrap();
    netns.ip(&format!("address add {address}/24 dev eth0")).unwrap();
    netns.ip("link set eth0 up").unwrap();
    netns.ip("route add default via 192.168.64.254").unwrap();
}

/// The address that a lease names.
pub fn public_ip(world: &World, key: &str) -> String {
    let lease: serde_json::Value =
        serde_json::from_str(&world.store.get(&format!("{PREFIX}/subnets/{key}")).unwrap()).unwrap();
    lease["PublicIP"].as_str().unwrap().to_owned()
}

/// The rules by which it can be chosen.
pub const RULES: [&[&str]; 3] = [&[], &["--iface=eth0"], &["--iface-regex=^eth"]];

#[test]
fn down_and_up() {
    let talk = Talk::start(&[]);
    let netns = &talk.world.hosts[0].netns;
    netns.ip("link set eth0 down").unwrap();
    talk.world.wait_log(0, "nothing can be sent to the peer 192.168.64.2");
    // Nothing of ours was changed, so nothing is counted that is not repaired: the routes are the operator's.
    let before = talk.repaired();
    let up = |_: &World| {
        netns.ip("link set eth0 up").unwrap();
        netns.ip("route replace default via 192.168.64.254").unwrap();
    };
    let since = Instant::now();
    talk.flows_again("up", up, || talk.has_flowed(since));
    assert_eq!(talk.repaired(), before);
    assert!(talk.world.status(0)["troubles"].as_array().unwrap().is_empty(), "{:#}", talk.world.status(0));
}

#[test]
fn another_address() {
    for rule in RULES {
        let talk = Talk::start(rule);
        let key = talk.world.lease_of(0).0;
        talk.heals("another address", "external_interface", &[], |world| {
            let netns = &world.hosts[0].netns;
            netns.ip("address add 192.168.64.11/24 dev eth0").unwrap();
            // The second goes with the first, unless it is promoted.
            netns.exec("sysctl -qw net.ipv4.conf.all.promote_secondaries=1").unwrap();
            netns.ip("address delete 192.168.64.1/24 dev eth0").unwrap();
            netns.ip("route replace default via 192.168.64.254").unwrap();
        });
        assert_eq!(public_ip(&talk.world, &key), "192.168.64.11");
        let link = &talk.world.hosts[0].netns.ip_json("-d link show flannel.1").unwrap()[0];
        assert_eq!(link["linkinfo"]["info_data"]["local"], "192.168.64.11");
        let status = talk.world.status(0);
        assert_eq!(status["status"]["publicIp"], "192.168.64.11");
        assert_eq!(status["status"]["lease"]["losses"], 0);
        assert!(status["troubles"].as_array().unwrap().is_empty(), "{status:#}");
    }
}

#[test]
fn another_mtu() {
    let mut talk = Talk::start(&[]);
    for (mtu, overlay) in [(1400, 1350), (1500, 1450)] {
        talk.heals("another MTU", "external_interface", &[], |world| {
            world.hosts[0].netns.ip(&format!("link set eth0 mtu {mtu}")).unwrap();
        });
        assert_eq!(talk.world.hosts[0].subnet().unwrap().mtu, overlay);
        assert_eq!(talk.world.hosts[0].netns.ip_json("link show flannel.1").unwrap()[0]["mtu"], overlay);
        assert_eq!(talk.world.status(0)["status"]["mtu"], overlay);
        let other = talk.world.hosts[1].pods[0].address;
        let pod = talk.world.hosts[0].add_pod().unwrap();
        assert_eq!(pod.netns.ip_json("link show eth0").unwrap()[0]["mtu"], overlay);
        // One that fits passes, and one that does not is refused, past the stack too.
        let is_answered = |size| pod.netns.exec(&format!("ping -M do -c 1 -W 1 -s {size} {other}")).is_ok();
        // The pod is new to its bridge.
        wait_for("an answer", SOON, || is_answered(overlay - 28)).unwrap();
        assert!(!is_answered(overlay - 27), "{overlay}");
    }
}

#[test]
fn another_mac_of_ours() {
    let talk = Talk::start(&[]);
    talk.heals("another MAC", "external_interface", &["next_hop"], |world| {
        world.hosts[0].netns.ip("link set eth0 address 0a:00:00:00:00:11").unwrap();
    });
}

#[test]
fn another_mac_of_the_next_hop() {
    let talk = Talk::start(&[]);
    talk.heals("the peer's MAC", "next_hop", &[], |world| {
        world.hosts[1].netns.ip("link set eth0 address 0a:00:00:00:00:22").unwrap();
    });
}

#[test]
fn gone_and_there_again() {
    for rule in RULES {
        let talk = Talk::start(rule);
        let key = talk.world.lease_of(0).0;
        talk.world.hosts[0].netns.ip("link delete eth0").unwrap();
        talk.world.wait_log(0, "the external interface eth0 is away, waiting for it");
        talk.world
            .wait_status(0, "it to be shown", |status| !status["drift"]["waiting"]["external interface"].is_null());
        talk.heals("eth0 again", "external_interface", &[], |world| plug_in(world, "192.168.64.1"));
        assert_eq!(public_ip(&talk.world, &key), "192.168.64.1");
        talk.world
            .wait_status(0, "nothing to wait for", |status| status["drift"]["waiting"].as_object().unwrap().is_empty());
        let index = talk.world.hosts[0].netns.ip_json("link show eth0").unwrap()[0]["ifindex"].to_string();
        let links = talk.world.links("from_underlay");
        assert!(matches!(&links[..], [link] if link.ends_with(format!("from_underlay-{index}"))), "{links:?}");
        wait_for("etcd", SOON, || talk.world.status(0)["status"]["store"]["following"] == true).unwrap();
    }
}
