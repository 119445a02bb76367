//! Packet rules among those of others that refuse what they do not know: before the start and after it, flushed and
//! loaded again, in iptables of either kind; and with an `nft` that fails.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use xtask::{
    lab::{Netns, PREFIX},
    progress::wait_for,
};

use crate::{
    netfilter::{BOTH, MASQUERADE, OUTSIDE, config, seen_as, world},
    sockets::socket_in,
    world::{SOON, World, agent, is_answered},
};

const LOOKED_AT_OFTEN: &[&str] = &["--iptables-resync=1"];
/// Long enough that the agent does nothing meanwhile.
const LOOKED_AT_NEVER: &[&str] = &["--iptables-resync=86400"];
/// As the service of RHEL has it in its file.
const REJECT: &str = "-A FORWARD -j REJECT --reject-with icmp-host-prohibited";
const ESTABLISHED: &str = "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT";
const OURS: &str = "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD";
/// Refuses pods on one port.
const BLOCKED: &str = "-A FORWARD -p udp -m udp --dport 7001 -j DROP";
const BLOCKED_PORT: u16 = 7001;
const PORT: u16 = 7000;

/// The rules of each host's `FORWARD`, by a program.
fn forward(world: &World, iptables: &str) -> Vec<Vec<String>> {
    let of = |netns: &Netns| {
        let listing = netns.exec(&format!("{iptables} -S FORWARD")).unwrap();
        listing.lines().filter(|line| line.starts_with("-A ")).map(str::to_owned).collect()
    };
    world.hosts.iter().map(|host| of(&host.netns)).collect()
}

/// Loads a saved table, in the place of all that is there, on all hosts.
fn load(world: &World, iptables: &str, rules: &[&str]) {
    let text = format!("*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n{}\nCOMMIT\n", rules.join("\n"));
    for host in &world.hosts {
        host.netns.feed(&format!("{iptables}-restore"), &text).unwrap();
    }
}

fn wait_forward(world: &World, iptables: &str, expected: &[&str]) {
    let waited = wait_for("the rules", SOON, || forward(world, iptables).iter().all(|rules| rules == expected));
    let logs: Vec<_> = world.hosts.iter().filter_map(|host| Some(host.agent.as_ref()?.log())).collect();
    assert!(waited.is_ok(), "{:#?}, not {expected:#?}; the agents said: {logs:#?}", forward(world, iptables));
}

fn assert_cut_off(world: &World) {
    let (pod, remote) = (&world.hosts[0].pods[0].netns, world.hosts[1].pods[0].address.to_string());
    assert!(!is_answered(pod, &remote), "{:#?}", forward(world, "iptables"));
}

/// Whether a datagram from a pod of the first host gets to a pod of the second.
fn arrives(world: &World, port: u16) -> bool {
    let [from, to] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let asked = SocketAddrV4::new(to.address, port);
    let server = socket_in(&to.netns, asked);
    server.set_read_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
    let client = socket_in(&from.netns, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    client.send_to(b"ask", asked).unwrap();
    server.recv_from(&mut [0; 8]).is_ok()
}

#[test]
fn a_refusal_after_the_start_cuts_nobody_off() {
    for more in BOTH {
        let mut world = world(2, &config(more), LOOKED_AT_NEVER);
        for host in &world.hosts {
            host.netns.exec(&format!("iptables {REJECT}")).unwrap();
        }
        world.wait_connected(0, 1);
        assert!(arrives(&world, PORT));
        assert_eq!(forward(&world, "iptables"), [[OURS, REJECT], [OURS, REJECT]]);

        // Nor does another start go behind it.
        for host in 0..2 {
            world.hosts[host].agent = None;
            world.start(host, &["--ip-masq", LOOKED_AT_NEVER[0]]);
            world.wait_log(host, "leases in etcd");
        }
        world.wait_connected(0, 1);
        assert_eq!(forward(&world, "iptables"), [[OURS, REJECT], [OURS, REJECT]]);
        for host in &world.hosts {
            host.netns.exec("iptables -D FORWARD 1").unwrap();
        }
        assert_cut_off(&world);
    }
}

#[test]
fn flushes_and_reloads_cut_nobody_off() {
    for more in BOTH {
        let world = world(2, &config(more), LOOKED_AT_OFTEN);
        let flush = |then: &str| {
            for host in &world.hosts {
                host.netns.feed("sh", &format!("iptables -F; iptables -X; {then}")).unwrap();
            }
        };
        flush("");
        wait_forward(&world, "iptables", &[OURS]);
        flush(&format!("iptables {REJECT}"));
        wait_forward(&world, "iptables", &[OURS, REJECT]);
        world.wait_connected(0, 1);
        // A rule that says what it refuses is meant so; flannel would come behind both.
        load(&world, "iptables", &[ESTABLISHED, BLOCKED, REJECT]);
        wait_forward(&world, "iptables", &[ESTABLISHED, BLOCKED, OURS, REJECT]);
        world.wait_connected(0, 1);
        assert!(arrives(&world, PORT) && !arrives(&world, BLOCKED_PORT));

        // Chains of a firewall's own, at whose end all is refused.
        const ZONE: [&str; 7] = [
            ":zone - [0:0]",
            ":refuse - [0:0]",
            "-A FORWARD -j zone",
            "-A zone -p icmp -j RETURN",
            "-A zone -j refuse",
            "-A refuse -p tcp -j REJECT --reject-with tcp-reset",
            "-A refuse -j REJECT",
        ];
        load(&world, "iptables", &ZONE);
        wait_forward(&world, "iptables", &[OURS, "-A FORWARD -j zone"]);
        assert!(arrives(&world, PORT));

        for host in &world.hosts {
            host.netns.exec("nft flush ruleset").unwrap();
            host.netns.exec("iptables -P FORWARD DROP").unwrap();
        }
        world.wait_connected(0, 1);
        // Docker's, which puts its own in front.
        for host in &world.hosts {
            host.netns.exec("iptables -N DOCKER-USER").unwrap();
            host.netns.exec("iptables -I FORWARD -j DOCKER-USER").unwrap();
        }
        wait_forward(&world, "iptables", &["-A FORWARD -j DOCKER-USER", OURS]);
        world.wait_connected(0, 1);
        world.wait_status(0, "repairs", |status| status["rules"]["repairs"].as_u64() >= Some(4));
    }
}

#[test]
fn what_is_refused_before_the_start_stays_refused() {
    let mut world = World::without_config(2);
    world.store.put(&format!("{PREFIX}/config"), &config("")).unwrap();
    load(&world, "iptables", &[BLOCKED]);
    world = world.ready(LOOKED_AT_OFTEN);
    world.wait_connected(0, 1);
    wait_forward(&world, "iptables", &[BLOCKED, OURS]);
    assert!(arrives(&world, PORT) && !arrives(&world, BLOCKED_PORT));
    // Also after a reload, and where everything else is refused then.
    load(&world, "iptables", &[BLOCKED, REJECT]);
    wait_forward(&world, "iptables", &[BLOCKED, OURS, REJECT]);
    world.wait_connected(0, 1);
    assert!(arrives(&world, PORT) && !arrives(&world, BLOCKED_PORT));

    // One that refused all before the agent came is obeyed, as flannel obeys it.
    for host in &mut world.hosts {
        host.agent = None;
    }
    load(&world, "iptables", &[REJECT]);
    for host in 0..2 {
        world.start(host, LOOKED_AT_OFTEN);
    }
    wait_forward(&world, "iptables", &[REJECT, OURS]);
    assert_cut_off(&world);
    load(&world, "iptables", &[REJECT]);
    wait_forward(&world, "iptables", &[REJECT, OURS]);
    assert_cut_off(&world);
}

/// How many warnings there are of others than the one who can't read others' rules by such a program either.
fn warnings(log: &str) -> usize {
    // Who reads others' rules by the same program has his own.
    let of_reading = ["others' packet rules", "reading this host's packet rules"];
    log.lines().filter(|line| line.contains("WARN") && !of_reading.iter().any(|text| line.contains(text))).count()
}

/// The agent with a folder in front of its `PATH`.
pub fn agent_with_programs(world: &World, programs: &Path) -> PathBuf {
    let path = programs.join("agent");
    let script = format!("#!/bin/sh\nPATH={}:$PATH exec {} \"$@\"\n", programs.display(), agent().display());
    write_program(&path, &script);
    assert!(path.starts_with(world.lab.directory()));
    path
}

pub fn write_program(path: &Path, script: &str) {
    // In one step, and another file than before.
    let new = path.with_extension("new");
    fs::write(&new, script).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&new, path).unwrap();
}

pub fn folder(world: &World, name: &str) -> PathBuf {
    let path = world.lab.directory().join(name);
    fs::create_dir(&path).unwrap();
    path
}

fn legacy_tables(netns: &Netns) -> String {
    netns.exec("cat /proc/net/ip_tables_names").unwrap()
}

#[test]
fn refusals_of_the_other_iptables_are_defeated_too() {
    // The host's own is iptables-nft.
    let world = world(2, &config(""), &["--ip-masq", "--iptables-resync=1"]);
    world.wait_status(0, "nft", |status| status["rules"]["forwardIn"] == serde_json::json!(["nft"]));
    assert_eq!(legacy_tables(&world.hosts[0].netns), "", "made by looking at them");
    for host in &world.hosts {
        host.netns.exec(&format!("iptables-legacy {REJECT}")).unwrap();
    }
    wait_forward(&world, "iptables-legacy", &[OURS, REJECT]);
    world.wait_connected(0, 1);
    world.wait_status(0, "both", |status| {
        status["rules"]["forwardIn"] == serde_json::json!(["nft", "legacy"]) && status["rules"]["repairs"] == 0
    });
    load(&world, "iptables-legacy", &[ESTABLISHED, REJECT]);
    wait_forward(&world, "iptables-legacy", &[ESTABLISHED, OURS, REJECT]);
    world.wait_connected(0, 1);
    assert_eq!(legacy_tables(&world.hosts[0].netns), "filter\n");
    cleanup_leaves_nothing(world);
}

#[test]
fn the_hosts_own_iptables_may_be_legacy() {
    let mut world = World::without_config(2);
    world.store.put(&format!("{PREFIX}/config"), &config(BOTH[1])).unwrap();
    let programs = folder(&world, "programs");
    for name in ["iptables", "iptables-restore"] {
        symlink("/usr/sbin/xtables-legacy-multi", programs.join(name)).unwrap();
    }
    let agent = agent_with_programs(&world, &programs);
    // What an agent left whose iptables was the other.
    for host in 0..2 {
        world.start(host, MASQUERADE);
        world.wait_log(host, "carries");
        world.hosts[host].agent = None;
        assert!(world.hosts[host].netns.exec("iptables-nft -t nat -S FLANNEL-POSTRTG").is_ok());
        let World { hosts, store, .. } = &mut world;
        hosts[host].start_agent(&agent, store, MASQUERADE).unwrap();
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    wait_forward(&world, "iptables-legacy", &[OURS]);
    let left = world.hosts[0].netns.exec("iptables-nft-save").unwrap();
    assert!(!left.contains("FLANNEL"), "{left}");
    let pod = &world.hosts[0].pods[0].netns;
    let seen = seen_as(pod, Ipv4Addr::UNSPECIFIED, &world.lab.underlay, SocketAddrV4::new(OUTSIDE, PORT));
    assert_eq!(seen, world.hosts[0].address);
    for host in &world.hosts {
        host.netns.exec(&format!("iptables-legacy {REJECT}")).unwrap();
        host.netns.exec(&format!("iptables-nft {REJECT}")).unwrap();
    }
    wait_forward(&world, "iptables-nft", &[OURS, REJECT]);
    wait_forward(&world, "iptables-legacy", &[OURS, REJECT]);
    world.wait_connected(0, 1);
    cleanup_leaves_nothing(world);
}

fn cleanup_leaves_nothing(mut world: World) {
    world.hosts[0].agent = None;
    assert!(world.agent_on(0).arg("cleanup").status().unwrap().success());
    for save in ["iptables-nft-save", "iptables-legacy-save"] {
        let left = world.hosts[0].netns.exec(save).unwrap();
        assert!(!left.contains("FLANNEL"), "{save}: {left}");
    }
}

/// What `nft` does that is not as it should be, and what is said of it.
const BROKEN: [(&str, &str); 5] = [
    // As one before 0.9.7.
    (
        "grep -q 'comment \"rules' /dev/fd/3 && { echo '/dev/stdin:2:2-8: Error: syntax error, unexpected comment' >&2; \
         exit 1; }",
        "nft: /dev/stdin:2:2-8: Error: syntax error, unexpected comment",
    ),
    (
        "grep -q fully-random /dev/fd/3 && { echo 'Error: Could not process rule: Operation not supported' >&2; exit 1; }",
        "nft: Error: Could not process rule: Operation not supported",
    ),
    ("kill -SEGV $$", "nft was ended by SIGSEGV; the program is broken: install another version"),
    ("sleep 1000 & wait", "nft did not end within 10s; another program may hold the lock of the packet rules"),
    ("exit 0", "nft reports success, and the rules that it was given are not there; install another version"),
];
const OLD: usize = 0;
const PLAIN: usize = 1;
const CRASHES: usize = 2;

/// A folder with an `nft` that does something else first where it is given rules, or always.
fn programs_with_nft(world: &World, host: usize, instead: &str) -> PathBuf {
    let programs = folder(world, &format!("programs-{host}"));
    let input = programs.join("input");
    let input = input.display();
    let reads = format!("case \"$*\" in *-f*) cat > {input} ;; *) : > {input} ;; esac; exec 3< {input}");
    let script = format!("#!/bin/sh\n{reads}\n{instead}\nexec /usr/sbin/nft \"$@\" < {input}\n");
    write_program(&programs.join("nft"), &script);
    programs
}

#[test]
fn iptables_stands_in_for_an_nft_that_fails() {
    let mut world = World::without_config(5);
    world.store.put(&format!("{PREFIX}/config"), &config("")).unwrap();
    let mut programs = Vec::new();
    for (host, (instead, _)) in BROKEN.iter().enumerate() {
        let folder = programs_with_nft(&world, host, instead);
        let agent = agent_with_programs(&world, &folder);
        let World { hosts, store, .. } = &mut world;
        hosts[host].start_agent(&agent, store, MASQUERADE).unwrap();
        programs.push(folder);
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    for (host, (_, words)) in BROKEN.iter().enumerate() {
        let expected = format!("iptables masquerades, since {words}");
        world.wait_status(host, words, |status| {
            let rules = &status["rules"];
            rules["masquerade"] == "iptables" && rules["fallback"] == expected && rules["problem"].is_null()
        });
        let of = &world.hosts[host];
        let seen = seen_as(
            &of.pods[0].netns,
            Ipv4Addr::UNSPECIFIED,
            &world.lab.underlay,
            SocketAddrV4::new(OUTSIDE, PORT + host as u16),
        );
        assert_eq!(seen, of.address, "{words}");
        let log = of.agent.as_ref().unwrap().log();
        assert_eq!(log.matches(&format!("packet rules: {expected}")).count(), 1, "{log}");
        assert_eq!(warnings(&log), 1, "{log}");
        let status = world.agent_on(host).arg("status").output().unwrap();
        let shown = String::from_utf8(status.stdout).unwrap();
        assert!(shown.contains(&expected) && status.status.success(), "{shown}");
    }
    // Another version is tried at once.
    write_program(&programs[CRASHES].join("nft"), "#!/bin/sh\nexec /usr/sbin/nft \"$@\"\n");
    world.wait_status(CRASHES, "nftables", |status| {
        status["rules"]["masquerade"] == "nftables" && status["rules"]["fallback"].is_null()
    });
    let saved = world.hosts[CRASHES].netns.exec("iptables-save").unwrap();
    assert!(!saved.contains("FLANNEL-POSTRTG") && saved.contains("FLANNEL-FWD"), "{saved}");
}

#[test]
fn an_nft_that_is_asked_for_is_asked_for_less_first() {
    let mut world = World::without_config(3);
    world.store.put(&format!("{PREFIX}/config"), &config(r#""EnableNFTables": true,"#)).unwrap();
    let cases = [
        (OLD, "nftables", "nftables masquerades without a comment on the table, since "),
        (PLAIN, "nftables", "nftables masquerades without fully-random or a comment on the table, since "),
        (CRASHES, "iptables", "iptables masquerades, since "),
    ];
    for (host, (broken, ..)) in cases.iter().enumerate() {
        let folder = programs_with_nft(&world, host, BROKEN[*broken].0);
        let agent = agent_with_programs(&world, &folder);
        let World { hosts, store, .. } = &mut world;
        hosts[host].start_agent(&agent, store, MASQUERADE).unwrap();
    }
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    for (host, (broken, masquerades, words)) in cases.into_iter().enumerate() {
        let expected = format!("{words}{}", BROKEN[broken].1);
        let contradicts = masquerades == "iptables";
        world.wait_status(host, words, |status| {
            let rules = &status["rules"];
            let problem = format!("EnableNFTables is true, and {expected}");
            let is_told = if contradicts { rules["problem"] == problem } else { rules["problem"].is_null() };
            rules["masquerade"] == masquerades && rules["fallback"] == expected && is_told
        });
        let of = &world.hosts[host];
        let asked = SocketAddrV4::new(OUTSIDE, PORT + host as u16);
        let seen = seen_as(&of.pods[0].netns, Ipv4Addr::UNSPECIFIED, &world.lab.underlay, asked);
        assert_eq!(seen, of.address, "{words}");
        let log = of.agent.as_ref().unwrap().log();
        assert_eq!(warnings(&log), 1, "{log}");
        let status = world.agent_on(host).arg("status").output().unwrap();
        assert_eq!(status.status.success(), !contradicts, "{status:?}");
    }
}

#[test]
fn an_iptables_without_random_ports_masquerades_without() {
    let mut world = World::without_config(1);
    world.store.put(&format!("{PREFIX}/config"), &config(BOTH[1])).unwrap();
    // As 1.6.1, which had neither that nor a restore that waits.
    let programs = folder(&world, "programs");
    let iptables =
        "#!/bin/sh\n[ \"$1\" = --version ] && { echo iptables v1.6.1; exit; }\nexec iptables-legacy \"$@\"\n";
    write_program(&programs.join("iptables"), iptables);
    let input = programs.join("input");
    let input = input.display();
    let restore = format!(
        "#!/bin/sh\ncat > {input}\n\
         case \"$*\" in *--wait*) echo \"iptables-restore: unrecognized option '--wait=5'\" >&2; exit 1 ;; esac\n\
         grep -q random-fully {input} && {{ echo 'iptables-restore v1.6.1: unknown option \"--random-fully\"' >&2; exit 2; }}\n\
         exec iptables-legacy-restore \"$@\" < {input}\n"
    );
    write_program(&programs.join("iptables-restore"), &restore);
    let agent = agent_with_programs(&world, &programs);
    let World { hosts, store, .. } = &mut world;
    hosts[0].start_agent(&agent, store, MASQUERADE).unwrap();
    hosts[0].wait_ready().unwrap();
    let expected = "iptables masquerades without --random-fully, since iptables-restore: iptables-restore v1.6.1: unknown \
                    option \"--random-fully\"";
    world.wait_status(0, "plain", |status| {
        status["rules"]["fallback"] == expected && status["rules"]["problem"].is_null()
    });
    world.hosts[0].add_pod().unwrap();
    let pod = &world.hosts[0].pods[0].netns;
    let seen = seen_as(pod, Ipv4Addr::UNSPECIFIED, &world.lab.underlay, SocketAddrV4::new(OUTSIDE, PORT));
    assert_eq!(seen, world.hosts[0].address);
}
