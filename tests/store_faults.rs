//! A store in trouble. In each of these the pods of two untouched hosts talk all the time, and no packet is lost.

use std::{fs, io::Write as _, path::Path, process::Command};

use flannel_common::maps::{ABI_VERSION, VTEP_ADDRESSES};
use nix::sys::signal::Signal;
use xtask::{
    lab::{PREFIX, Store, address},
    process::output,
    progress::wait_for,
};

use crate::{
    loaded::enter,
    world::{CONFIG, SOON, World, lease_value},
};

fn put_peer(world: &World, octet: u8) {
    let value = lease_value(&format!("192.168.64.{octet}"), &format!("0a:00:00:00:00:{octet:x}"));
    world.store.put(&format!("{PREFIX}/subnets/10.5.{octet}.0-24"), &value).unwrap();
}

fn wait_peers(world: &World, host: usize, count: usize) {
    world.wait_status(host, &format!("{count} peers"), |status| status["peers"] == count);
}

/// Whether a host's maps have the VTEP 192.168.64.x, x in hexadecimal digits.
fn knows_vtep(world: &World, host: usize, last: &str) -> bool {
    let map = world.hosts[host].pin_dir().join(format!("1/v{ABI_VERSION}/{VTEP_ADDRESSES}"));
    let dump = output(Command::new("bpftool").args(["map", "dump", "pinned"]).arg(map)).unwrap();
    dump.contains(&format!("c0 a8 40 {last}"))
}

/// Two hosts that talk, and `fault`, after which both see what the store says.
fn with_traffic(fault: impl FnOnce(&mut World)) {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let wait_followed = |world: &World, host| {
        world.wait_status(host, "to be followed", |status| status["store"]["following"] == true);
    };
    (0..2).for_each(|host| wait_followed(&world, host));
    let traffic = [world.traffic(0, 1), world.traffic(1, 0)];
    fault(&mut world);
    for host in 0..2 {
        wait_followed(&world, host);
        assert!(world.status(host)["running"] == true);
    }
    traffic.into_iter().for_each(|traffic| traffic.assert_nothing_was_lost());
}

#[test]
fn etcd_is_killed_and_comes_back() {
    with_traffic(|world| {
        for round in 0..3 {
            world.store.kill().unwrap();
            world.wait_status(0, "to be away", |status| status["store"]["following"] == false);
            let troubles = world.status(0)["troubles"].to_string();
            assert!(troubles.contains("etcd is not being followed since"), "{troubles}");
            world.store.resume().unwrap();
            world.wait_resync(0, "connection");
            put_peer(world, 200 + round);
            wait_peers(world, 0, 2 + usize::from(round));
        }
    });
}

#[test]
fn etcd_stops_answering_with_its_connections_open() {
    with_traffic(|world| {
        world.store.pause().unwrap();
        // Noticed by the pings on the connection, after ten and five seconds.
        world.wait_log(0, "the watch on the leases ended");
        world.store.unpause().unwrap();
        world.wait_resync(0, "connection");
        put_peer(world, 200);
        wait_peers(world, 0, 2);
    });
}

#[test]
fn the_network_to_etcd_is_cut() {
    with_traffic(|world| {
        put_peer(world, 210);
        wait_peers(world, 0, 2);
        let host = &world.hosts[0].netns;
        // One way only: requests leave, answers are dropped.
        host.exec("iptables -A INPUT -p tcp --sport 2379 -j DROP").unwrap();
        world.wait_log(0, "the watch on the leases ended");
        put_peer(world, 200);
        // The same subnet, another host.
        let key = format!("{PREFIX}/subnets/10.5.210.0-24");
        world.store.put(&key, &lease_value("192.168.64.211", "0a:00:00:00:00:d3")).unwrap();
        wait_peers(world, 1, 3);
        assert!(knows_vtep(world, 0, "d2") && !knows_vtep(world, 0, "d3"));
        world.hosts[0].netns.exec("iptables -F INPUT").unwrap();
        world.wait_resync(0, "connection");
        wait_peers(world, 0, 3);
        assert!(!knows_vtep(world, 0, "d2") && knows_vtep(world, 0, "d3"));
    });
}

#[test]
fn a_watcher_that_reads_too_slowly_meets_a_compaction() {
    with_traffic(|world| {
        let signal = |signal| world.hosts[0].agent.as_ref().unwrap().signal(signal).unwrap();
        signal(Signal::SIGSTOP);
        fill(world);
        put_peer(world, 200);
        world.store.etcdctl(&["compact", &world.store.revision().unwrap().to_string()]).unwrap();
        signal(Signal::SIGCONT);
        world.wait_resync(0, "compacted");
        wait_peers(world, 0, 2);
    });
}

#[test]
fn a_lease_that_is_deleted_behind_a_compaction_is_revoked() {
    let mut world = World::with_agents(1);
    let (name, _) = world.lease_of(0);
    let agent = world.hosts[0].agent.as_ref().unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    fill(&world);
    world.store.etcdctl(&["del", &format!("{PREFIX}/subnets/{name}")]).unwrap();
    world.store.etcdctl(&["compact", &world.store.revision().unwrap().to_string()]).unwrap();
    agent.signal(Signal::SIGCONT).unwrap();
    let agent = world.hosts[0].agent.as_mut().unwrap();
    assert!(agent.wait(SOON).unwrap().success());
    assert!(agent.log().contains("are compacted away"), "{}", agent.log());
    assert!(agent.log().contains("Lease has been revoked. Shutting down daemon."), "{}", agent.log());
}

/// Makes more changes than etcd keeps in its hands for a watcher that does not read (1,024 beyond what the connection
/// takes up), so that it has to look them up in its history later.
fn fill(world: &World) {
    let netns = format!("/run/netns/{}", world.lab.underlay.name());
    let endpoint = world.store.endpoint().to_owned();
    let put_all = async move {
        let client = etcd_client::Client::connect([endpoint], None).await.unwrap();
        let value = "x".repeat(20_000);
        let puts = (0..2000).map(|number| {
            let (mut client, key, value) =
                (client.clone(), format!("{PREFIX}/subnets/filler-{}", number % 50), value.clone());
            async move { client.put(key, value, None).await.map(drop) }
        });
        futures_util::future::try_join_all(puts).await.unwrap();
    };
    let fill = move || {
        enter(Path::new(&netns));
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(put_all);
    };
    std::thread::spawn(fill).join().unwrap();
}

#[test]
fn an_older_backup_is_restored() {
    with_traffic(|world| {
        put_peer(world, 200);
        wait_peers(world, 0, 2);
        let backup = world.lab.directory().join("backup");
        world.store.etcdctl(&["snapshot", "save", &backup.display().to_string()]).unwrap();
        world.store.etcdctl(&["del", &format!("{PREFIX}/subnets/10.5.200.0-24")]).unwrap();
        put_peer(world, 201);
        put_peer(world, 202);
        wait_peers(world, 0, 3);
        world.store.restore(&backup).unwrap();
        for host in 0..2 {
            world.wait_log(host, "etcd went back from revision");
            world.wait_resync(host, "rolled_back");
            // What the backup has comes back; what it lacks is few enough to be believed.
            wait_peers(world, host, 2);
        }
        // Both are still known by it, and hold what they held.
        assert_eq!(world.status(0)["status"]["lease"]["state"], "held");
        assert_eq!(world.status(0)["status"]["lease"]["losses"], 0);
    });
}

#[test]
fn another_cluster_answers() {
    with_traffic(|world| {
        world.store.stop();
        let elsewhere = world.lab.directory().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let token = ["--initial-cluster-token", "another", "--initial-cluster", "default=http://127.0.0.1:2399"];
        let peer = ["--initial-advertise-peer-urls", "http://127.0.0.1:2399"];
        let arguments = [&token[..], &peer].concat();
        let endpoint = world.store.endpoint().to_owned();
        world.store = Store::start_with(&world.lab.underlay, &endpoint, &elsewhere, &arguments).unwrap();
        world.wait_log(0, "another etcd cluster answers");
        world.wait_resync(0, "other_cluster");
        world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
        for host in 0..2 {
            world.wait_log(host, "is held again");
        }
    });
}

#[test]
fn etcd_is_full() {
    let mut world = World::new(3);
    world.store.stop();
    let directory = world.lab.directory().to_owned();
    let endpoint = world.store.endpoint().to_owned();
    let quota = ["--quota-backend-bytes", "2097152"];
    world.store = Store::start_with(&world.lab.underlay, &endpoint, &directory, &quota).unwrap();
    for host in 0..2 {
        world.start(host, &["--subnet-lease-ttl=6"]);
        world.hosts[host].wait_ready().unwrap();
        world.hosts[host].add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    let traffic = world.traffic(0, 1);
    let mut filler = 0;
    let value = "x".repeat(100_000);
    wait_for("etcd to be full", SOON, || {
        filler += 1;
        world.store.put(&format!("/filler/{filler}"), &value).is_err()
    })
    .unwrap();
    world.start(2, &[]);
    world.wait_log(
        2,
        "etcd is full: its database has reached its quota; compact and defragment it, then `etcdctl alarm disarm`",
    );
    world.assert_untouched(2);
    // Renewals go on: they write nothing.
    let renewals = |world: &World| world.status(0)["status"]["lease"]["renewals"].as_u64().unwrap();
    let before = renewals(&world);
    world.wait_status(0, "renewals", |status| status["lease"]["renewals"].as_u64().unwrap() > before + 3);
    assert_eq!(world.status(0)["status"]["lease"]["losses"], 0);

    world.store.etcdctl(&["del", "--prefix", "/filler/"]).unwrap();
    world.store.etcdctl(&["compact", &world.store.revision().unwrap().to_string()]).unwrap();
    world.store.etcdctl(&["defrag"]).unwrap();
    world.store.etcdctl(&["alarm", "disarm"]).unwrap();
    world.hosts[2].wait_ready().unwrap();
    traffic.assert_nothing_was_lost();
}

/// Starts three members in the place of the one.
fn three_members(world: &mut World) -> Vec<Store> {
    world.store.stop();
    let host = address(254);
    let peers: Vec<_> = (0..3).map(|member| format!("http://127.0.0.1:{}", 2400 + member)).collect();
    let cluster: Vec<_> = peers.iter().enumerate().map(|(member, url)| format!("m{member}={url}")).collect();
    let cluster = cluster.join(",");
    let start = |member: usize| {
        let directory = world.lab.directory().join(format!("member{member}"));
        fs::create_dir(&directory).unwrap();
        let (name, url) = (format!("m{member}"), &peers[member]);
        let arguments = ["--name", &name, "--initial-cluster", &cluster, "--initial-advertise-peer-urls", url]
            .into_iter()
            .chain(["--listen-peer-urls", url])
            .collect::<Vec<_>>();
        let endpoint = format!("http://{host}:{}", 2500 + member);
        Store::start_with(&world.lab.underlay, &endpoint, &directory, &arguments).unwrap()
    };
    let members: Vec<_> = (0..3).map(start).collect();
    wait_for("a leader", SOON, || members[0].put(&format!("{PREFIX}/config"), CONFIG).is_ok()).unwrap();
    members
}

#[test]
fn the_leader_of_three_is_stopped() {
    let mut world = World::new(2);
    let mut members = three_members(&mut world);
    let endpoints: Vec<_> = members.iter().map(|member| member.endpoint().to_owned()).collect();
    for host in 0..2 {
        // Each is connected to one member; the last named counts.
        world.start(host, &[&format!("--etcd-endpoints={}", endpoints.join(","))]);
        world.hosts[host].wait_ready().unwrap();
        world.hosts[host].add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    let traffic = world.traffic(0, 1);
    for octet in 200..203u8 {
        let leader = members.iter().position(|member| member.is_leader().unwrap()).unwrap();
        members[leader].stop();
        let other = &members[(leader + 1) % 3];
        let value = lease_value(&format!("192.168.64.{octet}"), &format!("0a:00:00:00:00:{octet:x}"));
        let key = format!("{PREFIX}/subnets/10.5.{octet}.0-24");
        wait_for("another leader", SOON, || other.put(&key, &value).is_ok()).unwrap();
        for host in 0..2 {
            wait_peers(&world, host, usize::from(octet) - 198);
            assert_eq!(world.status(host)["running"], true);
        }
        members[leader].resume().unwrap();
        let all_led = || members.iter().filter(|member| member.is_leader().is_ok_and(|leads| leads)).count() == 1;
        wait_for("the member to be back", SOON, all_led).unwrap();
    }
    // Two of three gone: no leader, which a watch on the third is told.
    let third = members.remove(0);
    members.iter_mut().for_each(Store::stop);
    for host in 0..2 {
        world.wait_status(host, "to be away", |status| status["store"]["following"] == false);
    }
    members.iter_mut().for_each(|member| member.resume().unwrap());
    for host in 0..2 {
        world.wait_status(host, "to be followed", |status| status["store"]["following"] == true);
    }
    drop(third);
    traffic.assert_nothing_was_lost();
}

#[test]
fn a_token_expires() {
    let mut world = World::new(1);
    world.store.stop();
    let directory = world.lab.directory().to_owned();
    let endpoint = world.store.endpoint().to_owned();
    let short = ["--auth-token-ttl", "1"];
    world.store = Store::start_with(&world.lab.underlay, &endpoint, &directory, &short).unwrap();
    for command in [
        &["role", "add", "root"][..],
        &["user", "add", "root:right"],
        &["user", "grant-role", "root", "root"],
        &["auth", "enable"],
    ] {
        world.store.etcdctl(command).unwrap();
    }
    world.start(0, &["--etcd-username=root", "--etcd-password=right", "--subnet-lease-ttl=6"]);
    world.hosts[0].wait_ready().unwrap();
    // Each comes long after the token's end.
    world.wait_status(0, "renewals", |status| status["lease"]["renewals"].as_u64().unwrap() > 3);
    assert_eq!(world.status(0)["status"]["lease"]["losses"], 0);
    let user = "--user=root:right";
    let value = lease_value("192.168.64.200", "0a:00:00:00:00:c8");
    world.store.etcdctl(&[user, "put", &format!("{PREFIX}/subnets/10.5.200.0-24"), &value]).unwrap();
    wait_peers(&world, 0, 1);
    // A password that is no longer right: said, and waited out.
    let set_password = |user: &str, password: &str| {
        let command = [user, "user", "passwd", "root", "--interactive=false"];
        world.store.etcdctl_with_input(&command, password).unwrap();
    };
    set_password(user, "other");
    world.wait_log(0, "check --etcd-username and --etcd-password");
    set_password("--user=root:other", "right");
    let renewals = world.status(0)["status"]["lease"]["renewals"].as_u64().unwrap();
    world.wait_status(0, "renewals again", |status| {
        status["lease"]["state"] == "held" && status["lease"]["renewals"].as_u64().unwrap() > renewals
    });
}

#[test]
fn a_store_that_is_away_at_the_start_costs_nothing() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let subnet = world.hosts[0].subnet().unwrap();
    for host in 0..2 {
        wait_peers(&world, host, 1);
        world.wait_last_known(host);
    }
    let traffic = world.traffic(1, 0);
    world.store.stop();
    world.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGKILL).unwrap();
    world.hosts[0].agent = None;
    world.start(0, &[]);
    world.wait_log(0, "going on with the lease");
    world.wait_status(0, "the last known lease", |status| status["lease"]["state"] == "last_known");
    traffic.assert_nothing_was_lost();

    // Also where all that the dead agent left is gone, as after a cleanup that spared the run directory.
    world.hosts[0].agent = None;
    world.hosts[0].netns.ip("link delete flannel.1").unwrap();
    fs::remove_dir_all(world.hosts[0].pin_dir()).unwrap();
    world.start(0, &[]);
    world.wait_log(0, "carries");
    world.wait_connected(0, 1);
    assert_eq!(world.hosts[0].subnet().unwrap(), subnet);
    let troubles = world.status(0)["troubles"].to_string();
    assert!(troubles.contains("is the last known, and not confirmed by etcd"), "{troubles}");

    world.store.resume().unwrap();
    world.wait_status(0, "the lease to be confirmed", |status| {
        status["lease"]["state"] == "held" && status["store"]["following"] == true
    });
    put_peer(&world, 200);
    wait_peers(&world, 0, 2);
    assert_eq!(world.hosts[0].subnet().unwrap(), subnet);
}

#[test]
fn damaged_last_known_leases_are_said_and_not_believed() {
    let mut world = World::with_agents(1);
    world.wait_last_known(0);
    world.hosts[0].agent = None;
    world.store.stop();
    let path = world.hosts[0].run_dir().join("flannel.1.leases");
    let damaged = fs::read_to_string(&path).unwrap().replace("10.5.", "10.6.");
    fs::File::create(&path).unwrap().write_all(damaged.as_bytes()).unwrap();
    world.start(0, &[]);
    world.wait_log(0, "its checksum does not fit its content");
    world.wait_log(0, "check --etcd-endpoints, and that etcd runs");
    world.store.resume().unwrap();
    world.wait_log(0, "carries");
}

#[test]
fn another_config_is_reported_and_the_old_one_goes_on() {
    with_traffic(|world| {
        let put = |config: &str| world.store.put(&format!("{PREFIX}/config"), config).unwrap();
        let differs = |status: &serde_json::Value, text: &str| {
            status["configDiffers"].as_str().is_some_and(|differs| differs.contains(text))
        };
        put(r#"{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7, "MTU": 1400}}"#);
        let text = "has changed (Network 10.6.0.0/16, not 10.5.0.0/16, SubnetMin 10.6.1.0, not 10.5.128.0, SubnetMax \
                    10.6.255.0, not 10.5.191.0, VNI 7, not 1, MTU 1400, not the interface's); start the agent again";
        world.wait_status(0, "the change", |status| differs(status, text));
        put("garbage");
        world.wait_status(0, "the garbage", |status| differs(status, "not a JSON object"));
        world.store.etcdctl(&["del", &format!("{PREFIX}/config")]).unwrap();
        world.wait_status(0, "the deletion", |status| differs(status, "is gone from etcd"));
        put(CONFIG);
        world.wait_status(0, "the old config", |status| status["configDiffers"].is_null());
    });
}

#[test]
fn entries_of_every_kind_of_nonsense_cost_only_themselves() {
    with_traffic(|world| {
        let nested = "[".repeat(100_000);
        let huge = format!(r#"{{"PublicIP":"192.168.64.9","Padding":"{}"}}"#, "x".repeat(1_000_000));
        let truncated = &lease_value("192.168.64.9", "0a:00:00:00:00:09")[..60];
        let values = [
            ("10.5.100.0-24", truncated),
            ("10.5.101.0-24", &nested),
            ("10.5.102.0-24", r#"{"PublicIP":42,"BackendType":[]}"#),
            ("10.5.103.0-24", r#"{"PublicIP":"192.168.64.9","BackendType":"vxlan","BackendData":{"VNI":"1"}}"#),
            (
                "10.5.104.0-24",
                r#"{"PublicIP":"192.168.64.9","BackendType":"vxlan","BackendData":{"VNI":2,"VtepMAC":"0a:00:00:00:00:09"}}"#,
            ),
            ("10.5.105.0-24", "\u{1b}[31m\u{7}"),
            ("10.5.1.0-32", "{}"),
            ("10.5.1.0-24x", "{}"),
            ("&FD00::-64", "{}"),
            ("10.5.1.0-24/../../config", "{}"),
            ("", "{}"),
        ];
        for (key, value) in values {
            world.store.put(&format!("{PREFIX}/subnets/{key}"), value).unwrap();
        }
        // Several of a size that together are more than a client takes by default.
        for octet in 110..115 {
            world.store.put_file(&format!("{PREFIX}/subnets/10.5.{octet}.0-24"), &huge).unwrap();
        }
        put_invalid_utf8(world);
        put_peer(world, 200);
        // What follows them is seen by the watch, and by a snapshot.
        for round in 0..2 {
            wait_peers(world, 0, 2);
            world.wait_status(0, "what is passed over", |status| {
                let others = status["otherBackends"].as_object().unwrap().values();
                // The huge ones name no backend, as a host of udp or alloc.
                let others: u64 = others.filter_map(serde_json::Value::as_u64).sum();
                status["store"]["passedOver"].as_object().unwrap().len() == values.len() + 1 && others == 5
            });
            if round == 0 {
                world.store.kill().unwrap();
                world.store.resume().unwrap();
                world.wait_resync(0, "connection");
            }
        }
        let log = world.hosts[0].agent.as_ref().unwrap().log();
        assert!(!log.contains('\u{1b}') && !log.contains('\u{7}'), "{log}");
        // A newcomer finds its way through them as well.
        let late = world.lab.host("node3", 3).unwrap();
        world.hosts.push(late);
        world.start(2, &[]);
        world.hosts[2].wait_ready().unwrap();
    });
}

/// A key and a value that are no text.
fn put_invalid_utf8(world: &World) {
    let script = format!(
        "printf '{PREFIX}/subnets/10.5.120.0-24\\377' > key; printf '\\377\\376' > value; \
         etcdctl --endpoints={} put -- \"$(cat key)\" \"$(cat value)\"",
        world.store.endpoint()
    );
    let mut command = world.lab.underlay.command("sh");
    command.env("ETCDCTL_API", "3").current_dir(world.lab.directory()).args(["-c", &script]);
    output(&mut command).unwrap();
}

/// A host whose agent starts again under a config that can't be used.
fn started_under(config: &str) -> World {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    wait_peers(&world, 0, 1);
    world.wait_last_known(0);
    world.hosts[0].agent = None;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    world.start(0, &[]);
    world.wait_log(0, "going on with the lease");
    world.wait_status(0, "the last known lease", |status| status["lease"]["state"] == "last_known");
    world
}

#[test]
fn a_config_that_is_corrected_is_gone_on_with() {
    let world = started_under("garbage");
    let lease = world.lease_of(0);
    let traffic = world.traffic(1, 0);
    world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    world.wait_status(0, "the lease to be confirmed", |status| {
        status["lease"]["state"] == "held" && status["configDiffers"].is_null()
    });
    assert_eq!(world.status(0)["status"]["lease"]["losses"], 0);
    assert_eq!(world.lease_of(0), lease);
    traffic.assert_nothing_was_lost();
}

#[test]
fn a_config_that_is_corrected_to_another_leaves_a_lease_that_is_there() {
    let mut world = started_under("garbage");
    let lease = world.lease_of(0);
    let traffic = world.traffic(1, 0);
    let other = r#"{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan"}}"#;
    world.store.put(&format!("{PREFIX}/config"), other).unwrap();
    world.wait_status(0, "the lease to be confirmed", |status| {
        let differs = status["configDiffers"].as_str().unwrap_or_default();
        status["lease"]["state"] == "held" && differs.contains("start the agent again to take it in")
    });
    assert_eq!(world.status(0)["status"]["lease"]["losses"], 0);
    assert_eq!(world.lease_of(0), lease);
    traffic.assert_nothing_was_lost();
    // Where it ends under that config, there is nothing to take for the datapath that there is.
    let key = format!("{PREFIX}/subnets/{}", lease.0);
    let value: serde_json::Value =
        serde_json::from_str(&world.store.etcdctl(&["get", "-w", "json", &key]).unwrap()).unwrap();
    let etcd_lease = format!("{:x}", value["kvs"][0]["lease"].as_i64().unwrap());
    world.store.etcdctl(&["lease", "revoke", &etcd_lease]).unwrap();
    let agent = world.hosts[0].agent.as_mut().unwrap();
    assert!(agent.wait(SOON).unwrap().success());
    let log = agent.log();
    assert!(log.contains("the network config is another one by now (Network 10.6.0.0/16, not 10.5.0.0/16"), "{log}");
}
