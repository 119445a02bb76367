//! Packet rules, with nftables and with iptables: who is seen as whom, whose rules win, and what is repaired and told.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    time::Duration,
};

use xtask::{
    lab::{Netns, PREFIX},
    progress::wait_for,
    transfer::tcp_transfer,
};

use crate::{
    sockets::socket_in,
    world::{SOON, World, agent, is_delivered},
};

pub const MASQUERADE: &[&str] = &["--ip-masq", "--iptables-resync=1"];
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 254);
const PORT: u16 = 7000;
/// What a user has translated otherwise than we would.
const USERS_PORT: u16 = 7001;
/// And into which source ports, outside of what a kernel chooses by itself for a program.
const USERS_SOURCES: std::ops::RangeInclusive<u16> = 20001..=20100;

/// A network config; `more` are further keys.
pub fn config(more: &str) -> String {
    format!(
        r#"{{"Network": "10.5.0.0/16", "SubnetMin": "10.5.128.0", "SubnetMax": "10.5.191.0", {more}
            "Backend": {{"Type": "vxlan"}}}}"#
    )
}

/// Its key for each of the two.
pub const BOTH: [&str; 2] = ["", r#""EnableNFTables": false,"#];

/// Hosts with agents, and an underlay that leads back to their pods, so that these are answered also by their own names.
pub fn world(hosts: u8, config: &str, arguments: &[&str]) -> World {
    let world = World::without_config(hosts);
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    let world = world.ready(arguments);
    for host in &world.hosts {
        let subnet = overlay_address(&host.pods[0].address);
        world.lab.underlay.ip(&format!("route add {subnet}/24 via {}", host.address)).unwrap();
    }
    if hosts > 1 {
        world.wait_connected(0, 1);
    }
    world
}

/// Ends a host's agent and starts another one, with a network config.
fn restart(world: &mut World, config: &str, arguments: &[&str]) {
    world.hosts[0].agent = None;
    fs::remove_file(world.hosts[0].run_dir().join("subnet.env")).unwrap();
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    world.start(0, arguments);
    world.hosts[0].wait_ready().unwrap();
}

/// The address of a host's `flannel.1`.
pub fn overlay_address(pod: &Ipv4Addr) -> Ipv4Addr {
    Ipv4Addr::from_bits(pod.to_bits() & 0xffff_ff00)
}

/// As whom `to` sees what `from` sends from an address; that it is answered, and by whom it asked.
pub fn seen_as(from: &Netns, source: Ipv4Addr, to: &Netns, asked: SocketAddrV4) -> Ipv4Addr {
    seen_exactly_as(from, source, to, asked).ip().to_owned()
}

fn seen_exactly_as(from: &Netns, source: Ipv4Addr, to: &Netns, asked: SocketAddrV4) -> SocketAddrV4 {
    let server = socket_in(to, asked);
    let client = socket_in(from, SocketAddrV4::new(source, 0));
    server.set_read_timeout(Some(SOON)).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.send_to(b"ask", asked).unwrap();
    let mut bytes = [0; 8];
    let (_, seen) = server.recv_from(&mut bytes).unwrap_or_else(|error| panic!("{asked} from {source}: {error}"));
    server.send_to(b"answer", seen).unwrap();
    let (_, answered_by) =
        client.recv_from(&mut bytes).unwrap_or_else(|error| panic!("answer to {source} by {asked}: {error}"));
    assert_eq!(answered_by, asked.into());
    let std::net::SocketAddr::V4(seen) = seen else { panic!("{seen}") };
    seen
}

/// The lines of `iptables-save` about us, and all of `nft list ruleset` about our tables.
pub fn ours(world: &World) -> (Vec<String>, String) {
    let netns = &world.hosts[0].netns;
    let saved = netns.exec("iptables-save").unwrap();
    let saved = saved.lines().filter(|line| line.to_lowercase().contains("flannel"));
    let saved = saved.map(|line| line.split(" [").next().unwrap().to_owned()).collect();
    let tables = netns.exec("nft list tables").unwrap();
    let tables: Vec<_> = tables.lines().filter(|table| table.contains("flannel")).collect();
    let rulesets: String = tables.iter().map(|table| netns.exec(&format!("nft list {table}")).unwrap()).collect();
    (saved, rulesets)
}

pub fn assert_nothing(world: &World) {
    assert_eq!(ours(world), (Vec::new(), String::new()));
}

#[test]
fn everybody_is_seen_as_flannels_users_expect() {
    for more in BOTH {
        let mut world = world(2, &config(more), MASQUERADE);
        let [one, two] = &world.hosts[..] else { panic!("two hosts") };
        let [local, remote] = [&one.pods[0], &two.pods[0]];
        let [to_local, to_remote] = [local, remote].map(|pod| SocketAddrV4::new(pod.address, PORT));
        let (outside, to_outside) = (&world.lab.underlay, SocketAddrV4::new(OUTSIDE, PORT));
        let any = Ipv4Addr::UNSPECIFIED;
        let gateway = one.subnet().unwrap().gateway;

        assert_eq!(seen_as(&local.netns, any, outside, to_outside), one.address, "pod to outside");
        assert_eq!(seen_as(&local.netns, any, &remote.netns, to_remote), local.address, "pod to remote pod");
        let overlay = overlay_address(&local.address);
        assert_eq!(seen_as(&one.netns, any, &remote.netns, to_remote), overlay, "host to remote pod");
        // What flannel's rules for nftables miss.
        assert_eq!(
            seen_as(&one.netns, one.address, &remote.netns, to_remote),
            overlay,
            "its own address to remote pod"
        );
        assert_eq!(seen_as(&one.netns, any, &local.netns, to_local), gateway, "host to its pod");
        assert_eq!(seen_as(outside, any, &local.netns, to_local), OUTSIDE, "outside to pod");

        // Masquerading does not keep pods from the fast path.
        let before = world.counter(0, "pod_encapsulated");
        tcp_transfer(&local.netns, &remote.netns, remote.address, 1, world.lab.directory()).unwrap();
        assert!(world.counter(0, "pod_encapsulated") > before + 100);

        // kube-proxy's mark, beside another bit.
        let mark = "iptables -t mangle -A FORWARD -d 192.168.64.254 -j MARK --set-xmark 0x4001/0x4001";
        one.netns.exec(mark).unwrap();
        assert_eq!(seen_as(&local.netns, any, outside, to_outside), local.address, "marked");
        one.netns.exec("iptables -t mangle -F").unwrap();

        restart(&mut world, &config(more), &["--iptables-forward-rules=false"]);
        assert_nothing(&world);
        let [local, outside] = [&world.hosts[0].pods[0].netns, &world.lab.underlay];
        assert_eq!(seen_as(local, any, outside, to_outside), world.hosts[0].pods[0].address, "without --ip-masq");
    }
}

#[test]
fn what_another_program_takes_away_is_set_again_and_told() {
    for (more, damages) in [
        (
            "",
            &["nft flush ruleset", "nft delete table ip flannel-ipv4", "nft flush chain ip flannel-ipv4 postrtg-late"]
                [..],
        ),
        (
            BOTH[1],
            &["nft flush ruleset", "iptables -t nat -F", "iptables -F FORWARD", "iptables -t nat -D FLANNEL-POSTRTG 2"],
        ),
    ] {
        let world = world(1, &config(more), MASQUERADE);
        let right = ours(&world);
        assert_ne!(right, (Vec::new(), String::new()));
        for (number, damage) in damages.iter().enumerate() {
            world.hosts[0].netns.exec(damage).unwrap();
            let repaired = wait_for("the repair", SOON, || ours(&world) == right);
            let took = repaired.unwrap_or_else(|_| panic!("after {damage}: {:#?}, not {right:#?}", ours(&world)));
            assert!(took < Duration::from_secs(3), "{took:?} for {damage}, looked at once per second");
            world.wait_status(0, "the repair in the status", |status| status["rules"]["repairs"] == number + 1);
        }
        world.wait_log(0, "another program has changed the packet rules");
    }
}

#[test]
fn rules_of_a_flannel_beside_it_stay() {
    const OTHERS: &str = "table ip flannel-ipv4 { chain postrtg { ip saddr 10.9.0.0/16 return; }; }
        table ip6 flannel-ipv6 { chain postrtg { ip6 saddr fd09::/48 return; }; }
";
    let mut world = World::without_config(1);
    let with_vni = config("").replace("\"vxlan\"", "\"vxlan\", \"VNI\": 7");
    world.store.put(&format!("{PREFIX}/config"), &with_vni).unwrap();
    world.hosts[0].netns.feed("nft -f -", OTHERS).unwrap();
    let before = ours(&world);
    world.start(0, MASQUERADE);
    world.hosts[0].wait_ready().unwrap();
    let (_, with_ours) = ours(&world);
    assert!(with_ours.contains("flannel-ipv4-7"), "{with_ours}");
    world.hosts[0].agent = None;
    assert!(world.agent_on(0).arg("cleanup").status().unwrap().success());
    assert_eq!(ours(&world), before);
}

#[test]
fn users_rules_win() {
    for more in BOTH {
        let mut world = world(1, &config(more), MASQUERADE);
        let exactly = |world: &World| {
            let asked = SocketAddrV4::new(OUTSIDE, USERS_PORT);
            seen_exactly_as(&world.hosts[0].pods[0].netns, Ipv4Addr::UNSPECIFIED, &world.lab.underlay, asked)
        };
        let sources = format!("192.168.64.1:{}-{}", USERS_SOURCES.start(), USERS_SOURCES.end());
        let rule = if more.is_empty() {
            format!(
                "table ip users {{ chain out {{ type nat hook postrouting priority srcnat; udp dport {USERS_PORT} snat to \
                 {sources}; }}; }}"
            )
        } else {
            format!("*nat\n-I POSTROUTING -p udp --dport {USERS_PORT} -j SNAT --to-source {sources}\nCOMMIT\n")
        };
        world.hosts[0]
            .netns
            .feed(if more.is_empty() { "nft -f -" } else { "iptables-restore --noflush" }, &rule)
            .unwrap();
        let seen = exactly(&world);
        assert!(USERS_SOURCES.contains(&seen.port()), "{seen}");
        // Whoever comes last.
        restart(&mut world, &config(more), MASQUERADE);
        let seen = exactly(&world);
        assert!(USERS_SOURCES.contains(&seen.port()), "{seen}");
    }
}

/// A program in the agent's place that starts it where some files are others: for each, its path and what is there.
fn agent_with(world: &World, files: &[(&str, &str)]) -> PathBuf {
    let mounts: String = files.iter().map(|(path, other)| format!("mount --bind {other} {path} && ")).collect();
    let path = world.lab.directory().join("agent");
    let agent = agent();
    let script = format!("#!/bin/sh\nexec unshare --mount sh -c '{mounts}exec {} \"$@\"' sh \"$@\"\n", agent.display());
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// All of iptables, of which the others are links.
const IPTABLES: &str = "/usr/sbin/xtables-nft-multi";

#[test]
fn what_is_not_installed_is_done_without_or_named() {
    let masquerade_with = |files: &[(&str, &str)], more: &str| {
        let mut world = World::without_config(1);
        world.store.put(&format!("{PREFIX}/config"), &config(more)).unwrap();
        let agent = agent_with(&world, files);
        let store = &world.store;
        world.hosts[0].start_agent(&agent, store, MASQUERADE).unwrap();
        world.hosts[0].wait_ready().unwrap();
        world
    };
    let (no_nft, no_iptables) = (("/usr/sbin/nft", "/dev/null"), (IPTABLES, "/dev/null"));
    let world = masquerade_with(&[no_nft], "");
    world.wait_status(0, "iptables", |status| status["rules"]["masquerade"] == "iptables");
    let world = masquerade_with(&[no_iptables], "");
    world.wait_status(0, "nftables", |status| status["rules"]["masquerade"] == "nftables");

    for (files, more, problem) in [
        (
            &[no_nft, no_iptables][..],
            "",
            "packets are to be masqueraded, and nft is not installed: install nftables, or say --ip-masq=false",
        ),
        (
            &[no_iptables],
            BOTH[1],
            "EnableNFTables is false, and iptables is not installed: install iptables, or remove that key from the network \
             config",
        ),
    ] {
        let mut world = masquerade_with(files, more);
        world.wait_log(0, &format!("packet rules: {problem}; trying again"));
        world.wait_status(0, problem, |status| status["rules"]["problem"] == problem);
        let status = world.agent_on(0).arg("status").output().unwrap();
        assert_eq!(status.status.code(), Some(3), "{status:?}");
        // Everything else is there.
        world.hosts[0].add_pod().unwrap();
        assert!(is_delivered(&world.hosts[0].netns, &world.hosts[0].pods[0].address.to_string()));
    }
}

#[test]
fn a_refusal_is_told_once_and_healed() {
    let mut world = World::new(1);
    let directory = world.lab.directory().to_owned();
    let [real, refusing, permit] = ["nft.real", "nft.refusing", "permit"].map(|name| directory.join(name));
    fs::copy("/usr/sbin/nft", &real).unwrap();
    let script = format!(
        "#!/bin/sh\n[ -e {} ] && exec {} \"$@\"\necho 'Error: Could not process rule' >&2\nexit 1\n",
        permit.display(),
        real.display()
    );
    fs::write(&refusing, script).unwrap();
    fs::set_permissions(&refusing, fs::Permissions::from_mode(0o755)).unwrap();
    // With iptables it would be used.
    let agent = agent_with(&world, &[("/usr/sbin/nft", refusing.to_str().unwrap()), (IPTABLES, "/dev/null")]);
    world.hosts[0].start_agent(&agent, &world.store, MASQUERADE).unwrap();
    world.hosts[0].wait_ready().unwrap();
    let problem = "nft: Error: Could not process rule";
    world.wait_status(0, problem, |status| status["rules"]["problem"] == problem);
    fs::write(&permit, "").unwrap();
    world.wait_log(0, "the packet rules are set");
    world.wait_status(0, "healed", |status| {
        status["rules"]["problem"].is_null() && status["rules"]["masquerade"] == "nftables"
    });
    let log = world.hosts[0].agent.as_ref().unwrap().log();
    assert_eq!(log.matches(&format!("packet rules: {problem}")).count(), 1, "{log}");
}
