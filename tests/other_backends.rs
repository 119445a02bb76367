//! Leases of hosts that have another backend: kept, shown as such, and no trouble.

use serde_json::json;
use xtask::{lab::PREFIX, process::output, progress::wait_for};

use crate::world::{SOON, World, is_answered, lease_value};

#[test]
fn leases_of_other_backends_are_kept_and_shown_and_no_trouble() {
    let world = World::without_config(1);
    // Two subnets are left.
    let config =
        r#"{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.7.0", "Backend": {"Type": "vxlan"}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    let leases = [
        r#","BackendType":"host-gw"}"#,
        r#","BackendType":"ipip"}"#,
        r#","BackendType":"wireguard","BackendData":{"PublicKey":"x","Port":51820}}"#,
        r#","BackendType":"extension","BackendData":"said by a command"}"#,
        // As alloc and udp.
        "}",
    ];
    for (octet, rest) in (1..).zip(leases) {
        let value = format!(r#"{{"PublicIP":"192.168.64.1{octet}","PublicIPv6":null{rest}"#);
        world.store.put(&format!("{PREFIX}/subnets/10.5.{octet}.0-24"), &value).unwrap();
    }
    let world = world.ready(&[]);
    let subnet = world.hosts[0].subnet().unwrap();
    assert!([6, 7].contains(&subnet.gateway.octets()[2]), "{subnet:?}");
    let expected = json!({ "host-gw": 1, "ipip": 1, "wireguard": 1, "extension": 1, "none": 1 });
    world.wait_status(0, "the leases of others", |status| status["otherBackends"] == expected && status["peers"] == 0);
    world.wait_status(0, "nothing passed over", |status| status["store"]["passedOver"] == json!({}));
    let status = output(world.agent_on(0).arg("status")).unwrap();
    assert!(status.contains("all is well") && status.contains("host-gw 1") && status.contains("none 1"), "{status}");
    assert!(!world.hosts[0].agent.as_ref().unwrap().log().contains("passed over"));
    // They come and go.
    world.store.etcdctl(&["del", &format!("{PREFIX}/subnets/10.5.1.0-24")]).unwrap();
    world.wait_status(0, "one less", |status| status["otherBackends"]["host-gw"].is_null());
    world
        .store
        .put(&format!("{PREFIX}/subnets/10.5.2.0-24"), &lease_value("192.168.64.12", "0a:00:00:00:00:12"))
        .unwrap();
    world.wait_status(0, "a peer", |status| status["otherBackends"]["ipip"].is_null() && status["peers"] == 1);
}

#[test]
fn a_host_that_changes_its_backend_is_dropped_at_once_and_comes_back() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let (key, value) = world.lease_of(1);
    let key = format!("{PREFIX}/subnets/{key}");
    // Its agent is away, and would answer else.
    world.hosts[1].agent = None;
    let (from, to) = (&world.hosts[0].pods[0].netns, world.hosts[1].pods[0].address.to_string());
    for other in [r#"{"PublicIP":"192.168.64.2","BackendType":"host-gw"}"#, r#"{"PublicIP":"192.168.64.2"}"#] {
        world.store.put(&key, other).unwrap();
        world.wait_status(0, "no peer", |status| status["peers"] == 0 && status["held"] == json!([]));
        wait_for("no answer", SOON, || !is_answered(from, &to)).unwrap();
        let status = output(world.agent_on(0).arg("status")).unwrap();
        assert!(status.contains("all is well"), "{status}");
        world.store.put(&key, &value).unwrap();
        world.wait_status(0, "the peer", |status| status["peers"] == 1 && status["otherBackends"] == json!({}));
        wait_for("an answer", SOON, || is_answered(from, &to)).unwrap();
    }
    world.wait_log(0, r#"is no peer any more: the backend of 192.168.64.2 is "host-gw", not vxlan"#);
    // Nor does it come back as one that the agent before knew.
    world.wait_last_known(0);
    world.store.put(&key, r#"{"PublicIP":"192.168.64.2","BackendType":"host-gw"}"#).unwrap();
    world.wait_status(0, "no peer", |status| status["peers"] == 0);
    world.start(0, &[]);
    world.wait_log(0, "carries");
    world.wait_status(0, "no peer", |status| status["store"]["following"] == true && status["peers"] == 0);
    assert!(!is_answered(&world.hosts[0].pods[0].netns, &to));
}

#[test]
fn a_backend_that_changes_under_a_running_agent_is_said_and_nothing_half_made() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let tables = world.hosts[0].overlay_tables().unwrap();
    let vxlan = r#"{"Type": "vxlan"}"#;
    let config = |backend: &str| crate::world::CONFIG.replace(vxlan, backend);
    let traffic = world.traffic(0, 1);
    for (backend, said) in [
        (r#"{"Type": "host-gw"}"#, "Type"),
        (r#"{"Type": "udp"}"#, "Type"),
        (r#"{"Type": "alloc"}"#, "Type"),
        (r#"{"Type": "vxlan", "VNI": 2}"#, "VNI"),
        (r#"{"Type": "vxlan", "DirectRouting": true}"#, "DirectRouting"),
        (
            r#"{"Type": "wireguard"}"#,
            "unknown backend type: wireguard (Backend.Type; wireguard is flannel's, and this agent does not have it; this agent has vxlan",
        ),
    ] {
        world.store.put(&format!("{PREFIX}/config"), &config(backend)).unwrap();
        world
            .wait_status(0, backend, |status| status["configDiffers"].as_str().is_some_and(|text| text.contains(said)));
        assert_eq!(world.status(0)["status"]["backend"], "vxlan");
        assert_eq!(world.hosts[0].overlay_tables().unwrap(), tables);
        assert!(world.hosts[0].netns.ip("link show flannel.2").is_err());
    }
    world.store.put(&format!("{PREFIX}/config"), &config(vxlan)).unwrap();
    world.wait_status(0, "nothing to be said", |status| status["configDiffers"].is_null());
    traffic.assert_nothing_was_lost();
}
