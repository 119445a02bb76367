//! `flannel-agent status`: what the kernel has, with an agent and without.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xtask::{
    lab::{
        PREFIX,
        services::{Service, ServiceRules},
    },
    progress::wait_for,
};

use crate::{
    bad_input::end_of,
    frames::{FROM_TWO, POD_ONE, POD_TWO, inner, udp, vxlan},
    short_frames::send,
    sockets::socket_in,
    world::{CONFIG, SOON, World, lease_value},
};

/// Program, interface and state of each hook.
fn hooks(status: &Value) -> Vec<[String; 3]> {
    let word = |hook: &Value, key: &str| hook[key].as_str().unwrap_or_default().to_owned();
    let hooks = status["dataplane"]["hooks"].as_array().unwrap_or_else(|| panic!("{status:#}"));
    hooks.iter().map(|hook| ["program", "interface", "state"].map(|key| word(hook, key))).collect()
}

#[test]
fn what_is_attached_and_what_was_dropped_is_shown_also_when_the_agent_is_dead() {
    let mut world = World::with_agents(1);
    let wanted = |underlay: &str| {
        [
            ["from_underlay", "eth0", underlay],
            ["from_overlay", "flannel.1", "attached"],
            ["to_overlay", "flannel.1", "attached"],
            ["from_pod", "pod1", "attached"],
            ["to_pod", "pod1", "attached"],
        ]
        .map(|row| row.map(str::to_owned))
    };
    wait_for("the pod's programs", SOON, || hooks(&world.status(0)).len() == 5).unwrap();
    wait_for("the store", SOON, || world.status(0)["troubles"] == json!([])).unwrap();
    let status = world.status(0);
    assert_eq!(hooks(&status), wanted("attached"));
    assert_eq!(status["dataplane"]["xdp"], json!("off"));
    assert_eq!(status["status"]["features"]["tcx"], json!(true));
    assert_eq!(status["dataplane"]["drops"], json!([]));
    assert_eq!(world.agent_on(0).arg("status").output().unwrap().status.code(), Some(0));

    let links = world.hosts[0].netns.ip_json("link show eth0").unwrap();
    let mut frame = FROM_TWO.around(&vxlan(8, 1), &inner(&udp(POD_TWO, POD_ONE)));
    for (byte, octet) in frame.iter_mut().zip(links[0]["address"].as_str().unwrap().split(':')) {
        *byte = u8::from_str_radix(octet, 16).unwrap();
    }
    send(&world.lab.underlay, "node1", &[&frame]);
    wait_for("the drop", SOON, || world.counter(0, "unknown_vtep") == 1).unwrap();

    world.assert_shown(0, "unknown_vtep", &[]);
    // It sends from a pod that another host leases by now.
    world
        .store
        .put(&format!("{PREFIX}/subnets/10.5.2.0-24"), &lease_value("192.168.64.22", "0a:00:00:00:00:22"))
        .unwrap();
    world.assert_shown(0, "duplicate --public-ip?", &[("192.168.65.2", "192.168.64.2")]);

    let agent = world.hosts[0].agent.as_mut().unwrap();
    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait(SOON).unwrap();
    let overlay = world.hosts[0].pin_dir().join("1");
    let pins = std::fs::read_dir(&overlay).unwrap().flatten().map(|pin| pin.path());
    let pin = pins.into_iter().find(|pin| pin.to_string_lossy().contains("from_underlay-")).unwrap();
    std::fs::remove_file(pin).unwrap();

    // The kernel takes the link away a moment after its last pin.
    wait_for("the hook to be free", SOON, || hooks(&world.status(0)) == wanted("missing")).unwrap();
    let output = world.agent_on(0).arg("status").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(3), "{text}");
    for line in [
        "no agent is running; this is from ",
        "from_underlay is not attached to eth0",
        "from_underlay at eth0: MISSING",
        "1 unknown_vtep, last ",
        "192.168.64.2 > 192.168.64.1 VNI 1: 10.5.2.2 > 10.5.1.2 UDP 40000 > 53",
    ] {
        assert!(text.contains(line), "{line}:\n{text}");
    }

    world.assert_shown(0, "no agent is running; this is from", &[]);

    world.start(0, &[]);
    wait_for("the repair", SOON, || hooks(&world.status(0)) == wanted("attached")).unwrap();
}

#[test]
fn flows_past_the_stack_are_counted_plain_and_translated() {
    const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 53);
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let backend = SocketAddrV4::new(server.address, 5353);
    let service =
        Service { name: "echo", protocol: "udp", address: SERVICE, node_port: None, endpoints: vec![backend] };
    ServiceRules::Nftables.set(&world.hosts[0], &[service]).unwrap();
    let server = socket_in(&server.netns, backend);
    let client = socket_in(&client.netns, SocketAddrV4::new(client.address, 0));
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(SOON)).unwrap();
    }
    let exchange = |asked| {
        let mut byte = [0];
        client.send_to(&byte, asked).unwrap();
        let (_, from) = server.recv_from(&mut byte).unwrap();
        server.send_to(&byte, from).unwrap();
        client.recv_from(&mut byte).unwrap();
    };
    let flows = |host| world.status(host)["dataplane"]["flows"].clone();
    let counted = |plain: u64, translated: u64| {
        json!({
            "plain": { "egress": plain, "ingress": plain },
            "translated": { "egress": translated, "ingress": translated },
        })
    };
    // The server's host sees two flows between pods, of two ports of the client.
    for (asked, here, there) in [(backend, counted(1, 0), counted(1, 0)), (SERVICE, counted(1, 1), counted(2, 0))] {
        wait_for("the flows", SOON, || {
            exchange(backend);
            exchange(asked);
            flows(0) == here && flows(1) == there
        })
        .unwrap_or_else(|error| panic!("{error}: {} {}", flows(0), flows(1)));
        let table = world.agent_on(0).arg("status").output().unwrap().stdout;
        let table = String::from_utf8_lossy(&table);
        let row = format!("{0} from pods, {0} to pods", here["translated"]["egress"]);
        assert!(table.contains(&format!("flows      1 from pods, 1 to pods; translated: {row}")), "{table}");
    }
    wait_for("the end of the flows", SOON, || flows(0) == counted(0, 0) && flows(1) == counted(0, 0)).unwrap();
}

#[test]
fn interfaces_that_do_not_forward_are_named() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let troubles = || world.status(0)["troubles"].to_string();
    wait_for("no troubles", SOON, || troubles() == "[]").unwrap();
    for interface in ["cni0", "flannel.1"] {
        let set = |value| {
            let setting = format!("sysctl -qw net/ipv4/conf/{interface}/forwarding={value}");
            world.hosts[0].netns.exec(&setting).unwrap();
        };
        set(0);
        let said = troubles();
        assert!(said.contains(&format!("packets that come in by {interface} are not forwarded")), "{said}");
        world.assert_shown(0, "packets that come in by cni0 are not forwarded", &[("cni0", interface)]);
        set(1);
        assert_eq!(troubles(), "[]");
    }
}

/// The limit is the whole machine's: what is read of it is another here.
#[test]
fn a_full_table_of_connections_is_named() {
    let world = World::with_agents(1);
    let settings = Path::new("/proc/sys/net/netfilter");
    let mounts = [("nf_conntrack_count", "250"), ("nf_conntrack_max", "256")].map(|(name, value)| {
        let file = world.lab.directory().join(name);
        std::fs::write(&file, value).unwrap();
        format!("mount --bind {} {}", file.display(), settings.join(name).display())
    });
    let script = format!("{} && exec \"$@\"", mounts.join(" && "));
    world.assert_shown_by("of at most ... connections", &[], || {
        let agent = world.agent_on(0);
        let arguments = agent.get_args().skip_while(|argument| !argument.to_string_lossy().ends_with("flannel-agent"));
        let mut command = world.hosts[0].netns.command("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]).args(arguments);
        command
    });
}

#[test]
fn an_agent_without_a_lease_says_what_it_waits_for() {
    let mut world = World::without_config(1);
    let said = |world: &World| {
        let output = world.agent_on(0).args(["status", "-o", "json"]).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let waiting = status["waiting"].as_array().cloned().unwrap_or_default();
        let reasons: Vec<_> = waiting.iter().map(|waiting| waiting["reason"].as_str().unwrap().to_owned()).collect();
        (reasons.join("\n"), output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let waits_for = |world: &World, text: &str| {
        wait_for(text, SOON, || said(world).0.contains(text)).unwrap();
        assert_eq!(said(world).1, Some(3));
    };
    let no_agent = |world: &World| {
        let (reasons, code, error) = said(world);
        assert_eq!((reasons.as_str(), code), ("", Some(1)));
        assert!(error.contains("no agent has run"), "{error}");
    };
    no_agent(&world);
    world.start(0, &[]);
    waits_for(&world, "flannel config not found in etcd store");
    world.assert_shown(0, "flannel config not found in etcd store", &[]);
    let table = world.agent_on(0).arg("status").output().unwrap().stdout;
    let table = String::from_utf8_lossy(&table);
    let process = world.hosts[0].agent.as_ref().unwrap().id();
    assert!(table.contains(&format!("waiting  the agent (process {process}) has no lease yet, and has waited for ")));
    assert!(table.contains("look at  flannel config not found"), "{table}");
    // It is no overlay's.
    let metrics = world.agent_on(0).arg("metrics").output().unwrap().stdout;
    assert!(!String::from_utf8_lossy(&metrics).contains("vni="));
    assert_eq!(world.agent_on(0).arg("peers").output().unwrap().status.code(), Some(1));
    world.assert_untouched(0);

    // Another reason takes the place of the one before.
    world.store.stop();
    waits_for(&world, "check --etcd-endpoints, and that etcd runs");
    world.assert_shown(0, "check --etcd-endpoints, and that etcd runs", &[]);
    assert!(!said(&world).0.contains("config not found"));
    let files = |world: &World| std::fs::read_dir(world.hosts[0].run_dir()).unwrap().count();
    assert_eq!(files(&world), 1);
    // What a killed one left is not believed, and goes with the next one or with a cleanup.
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let agent = world.hosts[0].agent.as_mut().unwrap();
        agent.signal(signal).unwrap();
        agent.wait(SOON).unwrap();
        no_agent(&world);
        assert_eq!(files(&world), usize::from(signal == Signal::SIGKILL));
        world.start(0, &[]);
        waits_for(&world, "check --etcd-endpoints, and that etcd runs");
        assert_eq!(files(&world), 1);
    }

    world.store.resume().unwrap();
    waits_for(&world, "flannel config not found in etcd store");
    world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    world.hosts[0].wait_ready().unwrap();
    wait_for("no troubles", SOON, || world.status(0)["troubles"] == json!([]) && said(&world).1 == Some(0)).unwrap();
    assert_eq!(said(&world).0, "");
    let left: Vec<_> = std::fs::read_dir(world.hosts[0].run_dir()).unwrap().flatten().collect();
    assert!(left.iter().all(|file| !file.file_name().to_string_lossy().starts_with("waiting.")), "{left:?}");
}

fn is_well(world: &World) {
    let troubles = || world.status(0)["troubles"].to_string();
    wait_for("no troubles", SOON, || troubles() == "[]").unwrap_or_else(|error| panic!("{error}: {}", troubles()));
}

fn is_named(world: &World, words: &[&str]) {
    let troubles = || world.status(0)["troubles"].to_string();
    let waited = wait_for("the trouble", SOON, || words.iter().all(|words| troubles().contains(words)));
    assert!(waited.is_ok(), "{words:?}: {}", troubles());
}

/// Runs commands that plant a fault, and those that mend it once it is named.
fn is_named_until_mended(world: &World, words: &str, plant: &[&str], mend: &[&str], shown: impl FnOnce()) {
    let run = |commands: &[&str]| commands.iter().for_each(|command| drop(world.hosts[0].netns.exec(command).unwrap()));
    is_well(world);
    run(plant);
    is_named(world, &[words]);
    shown();
    run(mend);
    is_well(world);
}

#[test]
fn pods_that_are_not_as_the_lease_are_named_with_both_values() {
    let mut world = World::with_agents(1);
    world.hosts[0].add_pod().unwrap();
    let gateway = world.hosts[0].subnet().unwrap().gateway;
    let lease = world.lease_of(0).0.replace('-', "/");
    is_named_until_mended(
        &world,
        &format!("the bridge cni0 has 10.5.7.1/24, and this host's lease is {lease}"),
        &[&format!("ip address delete {gateway}/24 dev cni0"), "ip address add 10.5.7.1/24 dev cni0"],
        &["ip address delete 10.5.7.1/24 dev cni0", &format!("ip address add {gateway}/24 dev cni0")],
        || world.assert_shown(0, "the bridge cni0 has 10.5.7.1/24", &[]),
    );
    is_named_until_mended(
        &world,
        "the overlay's MTU is 1450, and that of pods is larger: pod2 1500; ",
        &["ip link set pod2 mtu 1500"],
        &["ip link set pod2 mtu 1450"],
        || world.assert_shown(0, "that of pods is larger: pod2 1500", &[]),
    );
    // Less is no trouble, nor is a bridge of others.
    for command in [
        "ip link set pod2 mtu 1400",
        "ip link add docker0 type bridge",
        "ip address add 172.17.0.1/16 dev docker0",
        "ip link set docker0 mtu 9000 up",
        "ip link set pod2 master docker0",
    ] {
        world.hosts[0].netns.exec(command).unwrap();
    }
    assert_eq!(world.status(0)["troubles"], json!([]));
}

#[test]
fn another_vxlan_device_in_the_place_of_ours_is_named() {
    let mut world = World::new(1);
    let other = |world: &World, kind: &str| {
        world.hosts[0].netns.ip(&format!("link add other type vxlan {kind} dstport 8472")).unwrap();
        world.hosts[0].netns.ip("link set dev other up")
    };
    // At the start: nothing is half-made.
    for kind in ["id 1", "external"] {
        other(&world, kind).unwrap();
        world.start(0, &[]);
        let (code, line) = end_of(&mut world, 0);
        assert_eq!(code, Some(1), "{line}");
        assert!(line.contains("the vxlan device other has the UDP port 8472"), "{line}");
        assert!(line.contains("remove it with `ip link delete other`"), "{line}");
        world.assert_untouched(0);
        world.hosts[0].netns.ip("link delete dev other").unwrap();
    }
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    // Those with another VNI, another port or of IPv6 have nothing of ours.
    for kind in ["id 2 dstport 8472", "id 1 dstport 4789", "id 1 local fe80::1 dev eth0 dstport 8472"] {
        world.hosts[0].netns.ip(&format!("link add beside type vxlan {kind}")).unwrap();
        world.hosts[0].netns.ip("link set dev beside up").unwrap();
        assert_eq!(world.status(0)["troubles"], json!([]), "{kind}");
        world.hosts[0].netns.ip("link delete dev beside").unwrap();
    }
    // While it runs: ours goes, and before it can be made again there is another.
    for kind in ["id 1", "external"] {
        let agent = world.hosts[0].agent.as_ref().unwrap();
        agent.signal(Signal::SIGSTOP).unwrap();
        world.hosts[0].netns.ip("link delete flannel.1").unwrap();
        other(&world, kind).unwrap();
        world.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGCONT).unwrap();
        is_named(&world, &["the vxlan device other has the UDP port 8472", "ip link delete other"]);
        world.assert_shown(0, "the vxlan device other has the UDP port 8472", &[]);
        world.hosts[0].netns.ip("link delete dev other").unwrap();
        is_well(&world);
        assert!(world.hosts[0].netns.ip("link show flannel.1").unwrap().contains("UP"));
    }
}
