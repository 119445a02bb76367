//! What is dropped is counted by reason, and seen in samples: while the agent runs, and when it is gone.

use std::collections::BTreeMap;

use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{lab::PREFIX, process::Process, progress::wait_for};

use crate::{
    frames::*,
    short_frames::send,
    world::{SOON, World, lease_value},
};
use etherparse::EtherType;

/// Samples of one reason on one CPU at once, and in each second after that.
const PLACES: u64 = 8;

/// A host, and the MAC that its packets come to.
struct Attacked {
    world: World,
    mac: Mac,
    pod: [u8; 4],
}

impl Attacked {
    fn new() -> Self {
        let world = World::with_agents(1);
        let lease = lease_value("192.168.64.2", "0a:00:00:00:00:02");
        world.store.put(&format!("{PREFIX}/subnets/10.5.2.0-24"), &lease).unwrap();
        world.wait_status(0, "the peer", |status| status["peers"] == 1);
        let links = world.hosts[0].netns.ip_json("link show eth0").unwrap();
        let octets = links[0]["address"].as_str().unwrap().split(':').map(|octet| u8::from_str_radix(octet, 16));
        let mac = octets.collect::<Result<Vec<_>, _>>().unwrap().try_into().unwrap();
        let pod = world.hosts[0].pods[0].address.octets();
        Self { world, mac, pod }
    }

    fn tunnel(&self, source: [u8; 4]) -> Tunnel {
        Tunnel { destination_mac: self.mac, source, ..FROM_TWO }
    }

    /// A packet that fails for each of some reasons.
    fn bad_frames(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let vtep_mac = self.world.status(0)["status"]["lease"]["vtepMac"].as_str().unwrap().to_owned();
        let octets: Vec<u8> = vtep_mac.split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
        let to = |mac: Mac, packet: &[u8]| [&ethernet(VTEP_TWO_MAC, mac, EtherType::IPV4), packet].concat();
        let own: Mac = octets.try_into().unwrap();
        let whole = to(own, &udp(POD_TWO, self.pod));
        let arp = [&ethernet(VTEP_TWO_MAC, own, EtherType::ARP)[..], &[0, 1, 8, 0, 6, 4, 0, 1], &[0; 38]].concat();
        let around = |inner: &[u8]| self.tunnel(STRANGER).around(&vxlan(8, 1), inner);
        let from_two = |inner: &[u8]| self.tunnel(NODE_TWO).around(&vxlan(8, 1), inner);
        BTreeMap::from([
            ("unknown_vtep", around(&whole)),
            ("inner_not_ipv4", around(&arp)),
            ("inner_foreign_mac", from_two(&to(VTEP_THREE_MAC, &udp(POD_TWO, self.pod)))),
            ("inner_not_unicast", around(&to(own, &udp(POD_TWO, [127, 0, 0, 1])))),
            ("foreign_inner_destination", from_two(&to(own, &udp(POD_TWO, POD_THREE)))),
            ("spoofed_inner_source", from_two(&to(own, &udp(POD_THREE, self.pod)))),
            ("tunnel_truncated", around(&whole)[..95].to_vec()),
        ])
    }

    /// Sends frames to the host over the underlay.
    fn send(&self, frames: &[&[u8]]) {
        send(&self.world.lab.underlay, "node1", frames);
    }

    /// What `drops -o json` says of each reason.
    fn drops(&self) -> BTreeMap<String, Value> {
        self.drops_with(&[])
    }

    fn drops_with(&self, arguments: &[&str]) -> BTreeMap<String, Value> {
        let text =
            xtask::process::output(self.world.agent_on(0).args(["drops", "-o", "json"]).args(arguments)).unwrap();
        let mut json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["apiVersion"], "flannel-agent/v1");
        assert_eq!(json["overlays"][0]["running"], self.world.hosts[0].agent.is_some());
        let Value::Array(reasons) = json["overlays"][0]["reasons"].take() else { panic!("{text}") };
        reasons.into_iter().map(|reason| (reason["reason"].as_str().unwrap().to_owned(), reason)).collect()
    }

    fn wait_for(&self, reason: &str, packets: u64) {
        wait_for(reason, SOON, || self.world.counter(0, reason) >= packets).unwrap();
    }
}

fn hex(frame: &[u8]) -> String {
    frame.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn samples(reason: &Value) -> &[Value] {
    reason["samples"].as_array().unwrap()
}

#[test]
fn each_reason_has_its_packets_decoded_also_when_the_agent_is_dead() {
    let mut attacked = Attacked::new();
    let frames = attacked.bad_frames();
    for frame in frames.values() {
        attacked.send(&[frame]);
    }
    for reason in frames.keys() {
        attacked.wait_for(reason, 1);
    }
    let pod = std::net::Ipv4Addr::from(attacked.pod);
    let stranger = "192.168.64.99 > 192.168.64.1 VNI 1:";
    let two = "192.168.64.2 > 192.168.64.1 VNI 1:";
    let summaries = BTreeMap::from([
        ("unknown_vtep", format!("{stranger} 10.5.2.2 > {pod} UDP 40000 > 53")),
        ("inner_not_ipv4", format!("{stranger} ARP")),
        ("inner_foreign_mac", format!("{two} 10.5.2.2 > {pod} UDP 40000 > 53")),
        ("inner_not_unicast", format!("{stranger} 10.5.2.2 > 127.0.0.1 UDP 40000 > 53")),
        ("foreign_inner_destination", format!("{two} 10.5.2.2 > 10.5.3.2 UDP 40000 > 53")),
        ("spoofed_inner_source", format!("{two} 10.5.3.2 > {pod} UDP 40000 > 53")),
        ("tunnel_truncated", format!("{stranger} 10.5.2.2 > {pod} UDP 40000 > 53")),
    ]);
    let expect = |drops: &BTreeMap<String, Value>| {
        for (reason, frame) in &frames {
            let dropped = &drops[*reason];
            assert_eq!(dropped["packets"], 1, "{dropped:#}");
            let [sample] = samples(dropped) else { panic!("{dropped:#}") };
            assert_eq!(sample["summary"], summaries[reason], "{reason}");
            assert_eq!(sample["interface"], "eth0");
            assert_eq!(sample["length"], frame.len());
            assert_eq!(sample["bytes"], hex(&frame[..frame.len().min(128)]), "{reason}");
            assert!(sample["ageMs"].as_u64().unwrap() < 60_000, "{sample:#}");
        }
        let others: Vec<_> = drops.values().filter(|dropped| dropped["packets"] == 0).collect();
        assert_eq!(others.len() + frames.len(), drops.len());
        assert!(others.iter().all(|dropped| samples(dropped).is_empty()));
    };
    expect(&attacked.drops());

    let agent = attacked.world.hosts[0].agent.as_mut().unwrap();
    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait(SOON).unwrap();
    attacked.world.hosts[0].agent = None;
    expect(&attacked.drops());

    // The programs go on.
    attacked.send(&[&frames["unknown_vtep"]]);
    attacked.wait_for("unknown_vtep", 2);
    assert_eq!(samples(&attacked.drops()["unknown_vtep"]).len(), 2);
    let table = xtask::process::output(attacked.world.agent_on(0).arg("drops")).unwrap();
    assert!(table.contains("no agent is running"), "{table}");
    let row = |line: &str| line.contains("unknown_vtep") && line.contains(&summaries["unknown_vtep"]);
    assert_eq!(table.lines().filter(|line| row(line)).count(), 2, "{table}");
}

#[test]
fn a_flood_is_counted_whole_and_hides_nothing_else() {
    const FLOOD: usize = 40_000;
    let attacked = Attacked::new();
    let frames = attacked.bad_frames();
    let (lone, flood) = (&frames["inner_not_unicast"], &frames["unknown_vtep"]);
    attacked.send(&[lone]);
    let start = std::time::Instant::now();
    // The last differs, and comes when the others' samples are full.
    let mut all = vec![flood.as_slice(); FLOOD];
    all.push(&frames["inner_not_ipv4"]);
    attacked.send(&all);
    attacked.wait_for("unknown_vtep", FLOOD as u64);
    attacked.wait_for("inner_not_ipv4", 1);
    let seconds = start.elapsed().as_secs() + 1;

    let drops = attacked.drops_with(&["--samples", "100000"]);
    assert_eq!(drops["unknown_vtep"]["packets"], FLOOD);
    let seen = samples(&drops["unknown_vtep"]);
    let cpus = std::thread::available_parallelism().unwrap().get();
    assert!((1..=PLACES as usize * cpus).contains(&seen.len()), "{} samples", seen.len());
    for reason in ["inner_not_unicast", "inner_not_ipv4"] {
        assert_eq!(samples(&drops[reason]).len(), 1, "{reason}: {:#}", drops[reason]);
    }
    // As few were taken as may be, not only kept.
    let taken = taken(&attacked, "unknown_vtep");
    assert!(taken <= PLACES * (seconds + 1) * cpus as u64, "{taken} samples taken in {seconds} s");

    // What comes after the flood is seen.
    let after = std::time::Instant::now();
    wait_for("a sample", SOON, || {
        attacked.send(&[flood]);
        let age = samples(&attacked.drops()["unknown_vtep"])[0]["ageMs"].as_u64().unwrap();
        u128::from(age) < after.elapsed().as_millis()
    })
    .unwrap();
}

#[test]
fn a_drop_is_explained_by_the_lease_and_the_peer_that_it_concerns() {
    let mut attacked = Attacked::new();
    let frames = attacked.bad_frames();
    for frame in frames.values() {
        attacked.send(&[frame]);
    }
    for reason in frames.keys() {
        attacked.wait_for(reason, 1);
    }
    let own = attacked.drops();
    let explain = |arguments: &[&str]| {
        let mut command = attacked.world.agent_on(0);
        xtask::process::output(command.arg("explain").args(arguments)).map_err(|error| error.to_string())
    };
    let pod = std::net::Ipv4Addr::from(attacked.pod);
    let lease = attacked.world.lease_of(0).0.replace('-', "/");
    for (reason, because) in [
        (
            "unknown_vtep",
            "192.168.64.99 is no VTEP of the lease table, and uses 10.5.2.0/24, which 192.168.64.2 leases: is it another address of \
             that host (--iface, --public-ip), or a second host with that lease?"
                .to_owned(),
        ),
        (
            "spoofed_inner_source",
            "sent by 192.168.64.2 (which leases 10.5.2.0/24); its inner source 10.5.3.2 is in the Network 10.5.0.0/16, but in no lease".to_owned(),
        ),
        (
            "foreign_inner_destination",
            format!(
                "this host leases {lease}; its inner destination 10.5.3.2 is in the Network 10.5.0.0/16, but in no lease; sent by \
                 192.168.64.2 (which leases 10.5.2.0/24)"
            ),
        ),
    ] {
        let text = explain(&[reason]).unwrap();
        assert!(text.contains(&because) && text.contains("\nusual cause  "), "{reason}: {text}");
        let number = samples(&own[reason])[0]["number"].to_string();
        let json: Value = serde_json::from_str(&explain(&[reason, "--sample", &number, "-o", "json"]).unwrap()).unwrap();
        let sample = &json["overlays"][0]["samples"][0];
        assert_eq!((&sample["because"], &sample["number"].to_string()), (&Value::from(because), &number), "{json:#}");
        assert!(!json["mend"].as_str().unwrap().is_empty());
    }
    // Of what passes, of what there is no sample of, and of what is no reason.
    assert!(explain(&["received"]).unwrap().contains("nothing is to be mended"));
    let error = explain(&["unknown_vtep", "--sample", "987654321"]).unwrap_err();
    assert!(error.contains("no sample of unknown_vtep has the number 987654321 by now"), "{error}");
    let error = explain(&["unknwon_vtep"]).unwrap_err();
    assert!(error.contains("did you mean unknown_vtep?"), "{error}");

    // A pod's own tunnel, by the pod's veth; without an agent.
    attacked.world.hosts[0].agent = None;
    let netns = &attacked.world.hosts[0].pods[0].netns;
    let sender = crate::sockets::socket_in(netns, std::net::SocketAddrV4::new(pod, 0));
    sender.send_to(&[8; 60], ("192.168.64.2", 8472)).unwrap();
    attacked.wait_for("pod_tunnel", 1);
    let text = xtask::process::output(attacked.world.agent_on(0).args(["explain", "pod_tunnel"])).unwrap();
    let because = format!("sent by the pod at pod1 with the address {pod}, to 192.168.64.2 (which leases 10.5.2.0/24)");
    assert!(text.contains(&because), "{text}");
}

#[test]
fn drops_are_followed_one_line_each_and_the_rest_is_counted() {
    const FLOOD: usize = 20_000;
    let attacked = Attacked::new();
    let frames = attacked.bad_frames();
    let before = &frames["inner_not_ipv4"];
    attacked.send(&[before]);
    attacked.wait_for("inner_not_ipv4", 1);
    let log = attacked.world.lab.directory().join("follow.log");
    let mut command = attacked.world.agent_on(0);
    let mut follower = Process::start(command.args(["drops", "--follow", "-o", "json"]), &log).unwrap();
    wait_for("the follower", SOON, || follower.log().contains("following what is dropped")).unwrap();
    let lines = |follower: &Process| -> Vec<Value> {
        let log = follower.log();
        // The last one may be half there.
        let whole = log.split_inclusive('\n').filter(|line| line.starts_with('{') && line.ends_with('\n'));
        whole.map(|line| serde_json::from_str(line).unwrap()).collect()
    };

    attacked.send(&[&frames["spoofed_inner_source"]]);
    wait_for("the line of a drop", SOON, || !lines(&follower).is_empty()).unwrap();
    let [line] = &lines(&follower)[..] else { panic!("{}", follower.log()) };
    assert_eq!((&line["kind"], &line["reason"]), (&"drop".into(), &"spoofed_inner_source".into()), "{line:#}");
    assert!(
        line["because"]
            .as_str()
            .unwrap()
            .starts_with("sent by 192.168.64.2 (which leases 10.5.2.0/24); its inner source"),
        "{line:#}"
    );
    assert_eq!(line["sample"]["interface"], "eth0");

    // Of a flood, as many lines as there are samples; all the rest is counted, once.
    attacked.send(&vec![frames["unknown_vtep"].as_slice(); FLOOD]);
    attacked.wait_for("unknown_vtep", FLOOD as u64);
    let sum = |lines: &[Value]| {
        let of_flood = lines.iter().filter(|line| line["reason"] == "unknown_vtep");
        of_flood.map(|line| if line["kind"] == "drop" { 1 } else { line["packets"].as_u64().unwrap() }).sum::<u64>()
    };
    wait_for("all of the flood", SOON, || sum(&lines(&follower)) >= FLOOD as u64).unwrap();
    follower.signal(Signal::SIGINT).unwrap();
    let status = follower.wait(SOON).unwrap();
    assert!(status.success(), "{status:?}");
    let all = lines(&follower);
    assert_eq!(sum(&all), FLOOD as u64);
    let end = all.last().unwrap();
    assert_eq!((&end["kind"], end["packets"].as_u64()), (&"end".into(), Some(FLOOD as u64 + 1)), "{end:#}");
    let drops = all.iter().filter(|line| line["kind"] == "drop");
    let numbers: Vec<_> = drops.map(|line| (line["reason"].to_string(), line["sample"]["number"].as_u64())).collect();
    let different: std::collections::BTreeSet<_> = numbers.iter().collect();
    assert_eq!(different.len(), numbers.len(), "a sample was shown twice");
    assert!(!follower.log().contains("inner_not_ipv4"), "what was dropped before is shown");
}

/// Samples of a reason that were ever taken, on all CPUs, as `bpftool` reads the map.
fn taken(attacked: &Attacked, reason: &str) -> u64 {
    let path = attacked.world.hosts[0].pin_dir().join(format!("1/v{}/DROPS", flannel_common::maps::ABI_VERSION));
    let event = flannel_common::event::Event::ALL.iter().find(|event| event.label() == reason).unwrap();
    let key = (*event as u32).to_ne_bytes().map(|byte| byte.to_string());
    let mut bpftool = std::process::Command::new("bpftool");
    bpftool.args(["-j", "map", "lookup", "pinned"]).arg(path).arg("key").args(key);
    let json: Value = serde_json::from_str(&xtask::process::output(&mut bpftool).unwrap()).unwrap();
    let values = json["values"].as_array().unwrap();
    let taken = values.iter().map(|value| {
        let bytes = value["value"].as_array().unwrap()[8..16].iter();
        let bytes: Vec<u8> = bytes.map(|byte| u8::from_str_radix(&byte.as_str().unwrap()[2..], 16).unwrap()).collect();
        u64::from_ne_bytes(bytes.try_into().unwrap())
    });
    taken.sum()
}
