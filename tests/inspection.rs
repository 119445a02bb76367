//! What others' packet rules do to each packet: found in real rule sets, as they change, and done to flows that would pass
//! the stack by.

use std::{
    collections::BTreeSet,
    fs::File,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
    time::Instant,
};

use flannel_agent::{
    bypass::{Restriction, Scope},
    inspection::{Pod, Surroundings, reader::Reader},
};
use nix::{
    sched::{CloneFlags, setns},
    sys::stat::Mode,
    unistd::mkfifo,
};
use xtask::{lab::Netns, progress::wait_for};

use crate::{
    firewalls::{agent_with_programs, folder, write_program},
    interoperation::mixed,
    stream::Stream,
    world::{SOON, World},
};

/// A hundred of the thousand in a second.
const LIMIT: &str = r#"table inet limits { chain forward { type filter hook forward priority 0; policy accept;
    oifname "flannel.1" limit rate over 100/second burst 5 packets drop
}; }"#;

/// What the rule sets of a namespace come to, as it changes.
struct Found {
    changes: Receiver<BTreeSet<Restriction>>,
    now: BTreeSet<Restriction>,
}

impl Found {
    /// For a host with a bridge of pods.
    fn on(netns: &Netns) -> Self {
        let around = Surroundings {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet: "10.5.28.0/24".parse().unwrap(),
            overlay: "flannel.1".to_owned(),
            underlay: ["eth0".to_owned()].into(),
            address: [192, 168, 64, 1].into(),
            port: 8472,
            bridges: ["cni0".to_owned()].into(),
            pods: [("veth1".to_owned(), Pod { index: 7, is_bridged: true })].into(),
            peers: Arc::new([[192, 168, 64, 2].into()].into()),
        };
        let (sender, changes) = channel();
        let netns = File::open(netns.path()).unwrap();
        thread::spawn(move || {
            setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut reader = Reader::new();
                reader.set(around);
                while sender.send(reader.changed().await.restrictions.into_iter().collect()).is_ok() {}
            });
        });
        Self { changes, now: BTreeSet::new() }
    }

    /// Waits until these are found, and nothing else.
    fn wait(&mut self, subjects: &[&str]) {
        let begun = Instant::now();
        while self.now.iter().map(|found| found.subject.as_str()).ne(subjects.iter().copied()) {
            let left = SOON.checked_sub(begun.elapsed()).unwrap_or_default();
            match self.changes.recv_timeout(left) {
                Ok(now) => self.now = now,
                Err(_) => panic!("{subjects:?} are not found: {:?}", self.now),
            }
        }
    }
}

#[test]
fn rules_are_found_as_they_come_and_go() {
    let world = World::without_config(1);
    let netns = &world.hosts[0].netns;
    let mut found = Found::on(netns);
    let nft = |text: &str| netns.feed("nft -f -", text).unwrap();
    nft(LIMIT);
    let limit = "nft inet limits forward handle 2: limit rate";
    found.wait(&[limit]);
    assert_eq!(found.now.first().unwrap().scope, Scope::Everything);
    // Of iptables-nft only once, and with what nftables does not say of it.
    netns
        .exec("iptables-nft -A FORWARD -s 10.5.28.7 -m hashlimit --hashlimit-above 1/s --hashlimit-name x -j DROP")
        .unwrap();
    let hashlimit = "iptables FORWARD rule 1: hashlimit";
    found.wait(&[hashlimit, limit]);
    assert_eq!(found.now.first().unwrap().scope, Scope::Addresses("10.5.28.7/32".parse().unwrap()));
    // x_tables tells of nothing.
    netns.exec("iptables-legacy -t mangle -A FORWARD -m quota --quota 5 -j DROP").unwrap();
    let quota = "iptables-legacy -t mangle FORWARD rule 1: quota";
    found.wait(&[hashlimit, quota, limit]);
    netns.exec("iptables-legacy -t mangle -F FORWARD").unwrap();
    netns.exec("iptables-nft -I FORWARD -s 10.5.0.0/16 -j ACCEPT").unwrap();
    found.wait(&[limit]);
    nft("delete table inet limits");
    found.wait(&[]);
    // By a jump, by a map's element, and by what no longer stands in front.
    nft("table ip t { map m { type ifname : verdict; }; chain x { ct state established accept; quota over 5 bytes drop; };
         chain f { type filter hook forward priority 0; iifname vmap @m; }; }");
    nft("add element ip t m { \"eth0\" : jump x, \"cni0\" : jump x }");
    let named = "nft ip t x handle 5: quota: sees one packet in a second of UDP that is not answered";
    found.wait(&[named]);
    nft("delete rule ip t x handle 4");
    found.wait(&["nft ip t x handle 5: quota"]);
    nft("insert rule ip t f oifname \"flannel.1\" accept");
    nft("insert rule ip t f iifname \"flannel.1\" accept");
    found.wait(&[]);
}

/// Whether a limit is kept for what a pod sends from the first host to the second, once it is known where it is to be.
fn assert_limited(world: &World, is_named: bool) {
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    wait_for("the stream", SOON, || stream.count() > 1500).unwrap();
    world.hosts[0].netns.feed("nft -f -", LIMIT).unwrap();
    if is_named {
        let named = "nft inet limits forward handle 2: limit rate";
        world.wait_status(0, named, |status| status["bypass"]["restrictions"].to_string().contains(named));
        world.assert_shown(0, "by the stack ... limit", &[]);
    }
    let known = Instant::now();
    wait_for("three seconds", SOON, || known.elapsed().as_secs() >= 3).unwrap();
    let (_, arrived) = stream.end_each();
    // The second in which what is noted ends is not counted.
    let arrived = arrived[0].iter().filter(|(_, at)| *at > known).map(|(_, at)| (*at - known).as_secs());
    let in_second = arrived.filter(|second| *second == 1 || *second == 2).count();
    assert!((100..=300).contains(&in_second), "{in_second} of 2,000 arrived in two seconds");
}

#[test]
fn a_limit_on_pods_holds_as_with_flannel() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    assert_limited(&world, true);
    world.hosts[0].netns.exec("nft delete table inet limits").unwrap();
    world.hosts[0].agent = None;
    world.start(0, &["--bypass=off"]);
    world.hosts[0].wait_ready().unwrap();
    assert_limited(&world, false);
}

/// By an `nft` that takes its time.
#[test]
fn nothing_bypasses_the_stack_before_the_rules_were_read() {
    let mut world = World::new(2);
    let programs = folder(&world, "programs");
    let gate = programs.join("gate");
    mkfifo(&gate, Mode::S_IRWXU).unwrap();
    let waits = format!("case \"$*\" in '-j list chains') [ ! -p {0} ] || cat {0} ;; esac", gate.display());
    write_program(&programs.join("nft"), &format!("#!/bin/sh\n{waits}\nexec /usr/sbin/nft \"$@\"\n"));
    let agent = agent_with_programs(&world, &programs);
    let World { hosts, store, .. } = &mut world;
    hosts[0].start_agent(&agent, store, &[]).unwrap();
    world.start(1, &[]);
    for host in &mut world.hosts {
        host.wait_ready().unwrap();
        host.add_pod().unwrap();
    }
    (0..2).for_each(|host| world.wait_pods(host));
    world.wait_connected(0, 1);
    let unread = "packet rules that are not read yet";
    let is_unread = |status: &serde_json::Value| status["bypass"]["restrictions"].to_string().contains(unread);
    world.wait_status(0, unread, is_unread);
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    wait_for("the other host's bypass", SOON, || world.counter(1, "delivered") > 500).unwrap();
    let bypassed = world.counter(0, "pod_encapsulated");
    let writer = File::options().write(true).open(&gate).unwrap();
    std::fs::remove_file(&gate).unwrap();
    drop(writer);
    world.wait_status(0, "rules that were read", |status| !is_unread(status));
    wait_for("the bypass", SOON, || world.counter(0, "pod_encapsulated") > 500).unwrap();
    let (sent, arrived) = stream.end_each();
    assert_eq!((bypassed, arrived[0].len()), (0, sent as usize));
}

#[test]
fn a_limit_on_pods_of_flannels_holds() {
    let mut world = mixed();
    world.hosts.swap(0, 1);
    world.wait_connected(0, 1);
    assert_limited(&world, false);
}

/// A rule says which packets it is about; all others go on as fast as they were.
#[test]
fn a_limit_for_one_port_or_address_is_none_for_others() {
    let mut world = World::with_agents(2);
    world.hosts[0].add_pod().unwrap();
    world.wait_pods(0);
    world.wait_connected(0, 1);
    let [one, two] = [0, 1].map(|pod| &world.hosts[0].pods[pod]);
    let to = &world.hosts[1].pods[0];
    for (matched, named) in
        [(format!("udp dport {}", Stream::PORT + 1), "a port"), (format!("ip saddr {}", two.address), "an address")]
    {
        // The first of them is met by neither.
        let free = Stream::start(one, to);
        let limited = Stream::start_on(two, to, Stream::PORT + 1);
        wait_for("both streams", SOON, || free.count() > 1500 && limited.count() > 1500).unwrap();
        let rules = LIMIT.replace("oifname \"flannel.1\"", &format!("oifname \"flannel.1\" {matched}"));
        world.hosts[0].netns.feed("nft -f -", &rules).unwrap();
        let subject = "nft inet limits forward handle 2: limit rate";
        world.wait_status(0, subject, |status| status["bypass"]["restrictions"].to_string().contains(subject));
        let known = Instant::now();
        wait_for("a second", SOON, || known.elapsed().as_secs() >= 1).unwrap();
        let fast = world.counter(0, "pod_encapsulated");
        wait_for("three seconds", SOON, || known.elapsed().as_secs() >= 3).unwrap();
        let fast = world.counter(0, "pod_encapsulated") - fast;
        let in_two_seconds = |stream: Stream| {
            let (_, arrived) = stream.end_each();
            let second = arrived[0].iter().filter(|(_, at)| *at > known).map(|(_, at)| (*at - known).as_secs());
            second.filter(|second| *second == 1 || *second == 2).count()
        };
        let (free, limited) = (in_two_seconds(free), in_two_seconds(limited));
        assert!((100..=300).contains(&limited), "{named}: {limited} of 2,000");
        assert!(free > 1000 && fast > free as u64 / 2, "{named}: {free} arrived, {fast} past the stack");
        world.hosts[0].netns.exec("nft delete table inet limits").unwrap();
    }
}
