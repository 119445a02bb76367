//! What somebody else changes by hand on a host, while pods talk, is made right again within two seconds, and said.

use std::{
    net::{SocketAddrV4, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use xtask::{
    lab::{PREFIX, Pod},
    process::output,
    progress::wait_for,
};

use crate::{
    loaded::enter,
    sockets::socket_in,
    upgrade::Kernel,
    world::{SOON, World, lease_value},
};

/// Within this time after a change everything flows again.
pub const REPAIR_LIMIT: Duration = Duration::from_secs(2);
/// For how long nothing may arrive where everything flows: the machine may be busy.
const PAUSE: Duration = Duration::from_millis(300);
/// For how long it is watched whether it goes on flowing: longer than a flow bypasses the stack (a second).
const AFTERWARDS: Duration = Duration::from_millis(1500);

/// Datagrams from one pod to another, and when they arrived.
struct Lane {
    name: &'static str,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    arrivals: Arc<Mutex<Vec<Instant>>>,
}

/// Whether the packets of a lane bypass the host's stack.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// All are of one flow.
    Bypass,
    /// Each is of a flow of its own.
    Stack,
}

impl Lane {
    fn start(name: &'static str, from: &Pod, to: &Pod, way: Way, port: u16) -> Self {
        let (stop, arrivals) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let listening = socket_in(&to.netns, SocketAddrV4::new(to.address, port));
        listening.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (netns, source, destination) = (from.netns.name().to_owned(), from.address, (to.address, port));
        let sender = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                enter(Path::new(&format!("/run/netns/{netns}")));
                let mut socket = UdpSocket::bind((source, 0)).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    if way == Way::Stack {
                        socket = UdpSocket::bind((source, 0)).unwrap();
                    }
                    // Refused while there is no way; that is one less that arrives.
                    let _refused = socket.send_to(b"x", destination);
                    thread::sleep(Duration::from_millis(5));
                }
            }
        });
        let receiver = thread::spawn({
            let (stop, arrivals) = (Arc::clone(&stop), Arc::clone(&arrivals));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    if listening.recv(&mut [0; 8]).is_ok() {
                        arrivals.lock().unwrap().push(Instant::now());
                    }
                }
            }
        });
        Self { name, stop, threads: vec![sender, receiver], arrivals }
    }

    /// How long after `since` the last pause ended; [`None`] where it lasts.
    fn last_pause(&self, since: Instant) -> Option<Duration> {
        let arrivals = self.arrivals.lock().unwrap();
        let mut times: Vec<Instant> = arrivals.iter().copied().filter(|time| *time > since).collect();
        let now = Instant::now();
        times.insert(0, since);
        if now - times[times.len() - 1] > PAUSE {
            return None;
        }
        let ends = times.windows(2).filter(|pair| pair[1] - pair[0] > PAUSE).map(|pair| pair[1] - since);
        Some(ends.max().unwrap_or_default())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

/// Two hosts whose pods talk both ways, past the stack and through it.
pub struct Talk {
    // Ends before its namespaces do.
    lanes: Vec<Lane>,
    pub world: World,
}

impl Talk {
    pub fn start(arguments: &[&str]) -> Self {
        Self::between(World::new(2).ready(arguments))
    }

    pub fn between(world: World) -> Self {
        world.wait_connected(0, 1);
        let [one, two] = [&world.hosts[0].pods[0], &world.hosts[1].pods[0]];
        let lanes = vec![
            Lane::start("out, bypass", one, two, Way::Bypass, 7001),
            Lane::start("out, stack", one, two, Way::Stack, 7002),
            Lane::start("in, bypass", two, one, Way::Bypass, 7003),
            Lane::start("in, stack", two, one, Way::Stack, 7004),
        ];
        let talk = Self { lanes, world };
        talk.wait_flowing();
        talk
    }

    fn wait_flowing(&self) {
        let since = Instant::now();
        wait_for("all lanes", SOON, || self.has_flowed(since)).unwrap();
    }

    /// Whether something arrived on each lane since then.
    pub fn has_flowed(&self, since: Instant) -> bool {
        self.lanes.iter().all(|lane| lane.arrivals.lock().unwrap().iter().any(|time| *time > since))
    }

    /// What the first host has repaired: names and counts.
    pub fn repaired(&self) -> Vec<(String, u64)> {
        let status = self.world.status(0);
        let repaired = status["status"]["drift"]["repaired"].as_object().unwrap();
        repaired.iter().map(|(name, of)| (name.clone(), of["count"].as_u64().unwrap())).collect()
    }

    /// The same of its metrics.
    fn exported(&self) -> Vec<(String, u64)> {
        let metrics = output(self.world.agent_on(0).arg("metrics")).unwrap();
        let samples = metrics.lines().filter_map(|line| line.strip_prefix(r#"flannel_repairs_total{vni="1",repair=""#));
        let counts = samples.map(|sample| sample.split_once("\"} ").unwrap());
        let mut counts: Vec<_> = counts.map(|(repair, count)| (repair.to_owned(), count.parse().unwrap())).collect();
        assert_eq!(counts.len(), flannel_agent::repair::Repair::ALL.len(), "{metrics}");
        counts.retain(|(_, count)| *count > 0);
        counts.sort();
        counts
    }

    /// Does something to the first host. Once that is repaired, and two seconds later at the latest, everything flows. What the
    /// agents waited for a CPU, where there is too much to do for all, is not of these two seconds.
    pub fn flows_again(&self, what: &str, damage: impl FnOnce(&World), is_repaired: impl FnMut() -> bool) {
        let (since, delayed) = (Instant::now(), self.run_delay());
        damage(&self.world);
        let done = Instant::now();
        let repaired = wait_for("the repair", SOON, is_repaired);
        assert!(repaired.is_ok(), "{what}: {:?} were repaired\n{}", self.repaired(), self.logs());
        // Nothing tells that a flow will not stop: those past the stack do so when they have to take it again.
        thread::sleep(AFTERWARDS);
        self.wait_flowing();
        let limit = REPAIR_LIMIT + (done - since) + self.run_delay().saturating_sub(delayed);
        let pauses: Vec<_> = self.lanes.iter().map(|lane| (lane.name, lane.last_pause(since))).collect();
        println!("{what}: {pauses:?}");
        let flows = pauses.iter().all(|(_, pause)| pause.is_some_and(|pause| pause <= limit));
        assert!(flows, "{what}: paused until {pauses:?}\n{}", self.logs());
    }

    /// How long the agents have waited for a CPU.
    fn run_delay(&self) -> Duration {
        self.world.hosts.iter().filter_map(|host| host.agent.as_ref()?.run_delay().ok()).sum()
    }

    fn logs(&self) -> String {
        let logs = self.world.hosts.iter().map(|host| host.agent.as_ref().unwrap().log());
        logs.collect::<Vec<_>>().join("\n--\n")
    }

    /// Does something to the first host. Two seconds later everything flows, `repair` was reported, and beside it no more
    /// than `along`; agent, lease and peers are the same.
    pub fn heals(&self, what: &str, repair: &str, along: &[&str], damage: impl FnOnce(&World)) {
        let before = self.repaired();
        let pid = self.world.status(0)["status"]["pid"].clone();
        let key = self.world.lease_of(0).0;
        let count = |repaired: &[(String, u64)], name: &str| {
            repaired.iter().find(|(of, _)| of == name).map_or(0, |(_, count)| *count)
        };
        self.flows_again(what, damage, || count(&self.repaired(), repair) > count(&before, repair));
        let log = || self.logs();
        assert!(self.world.hosts[0].agent.as_ref().unwrap().log().contains(&format!("repaired ({repair})")));
        let after = self.repaired();
        assert_eq!(self.exported(), after, "{what}: the metrics");
        let others = after.iter().filter(|(name, of)| *of > count(&before, name) && name != repair);
        let others: Vec<_> = others.map(|(name, _)| name.as_str()).filter(|name| !along.contains(name)).collect();
        assert!(others.is_empty(), "{what} also repaired {others:?}\n{}", log());
        let status = self.world.status(0);
        assert_eq!(status["status"]["pid"], pid, "{what}");
        assert_eq!(status["status"]["peers"], 1, "{what}");
        assert_eq!(self.world.lease_of_key(&key), 1, "{what}");
    }
}

impl World {
    /// How many leases have this key.
    fn lease_of_key(&self, key: &str) -> usize {
        let leases = self.store.list(&format!("{PREFIX}/subnets/")).unwrap();
        leases.iter().filter(|(name, _)| name.ends_with(key)).count()
    }

    fn in_host(&self, line: &str) {
        self.hosts[0].netns.exec(line).unwrap();
    }

    fn pins(&self) -> PathBuf {
        self.hosts[0].pin_dir().join("1")
    }

    /// Where the first host pins a map.
    fn map(&self, name: &str) -> String {
        let versions = std::fs::read_dir(self.pins()).unwrap().flatten().map(|entry| entry.path());
        let version = versions.into_iter().find(|path| path.is_dir()).unwrap();
        version.join(name).display().to_string()
    }

    /// The pinned links of a program of the first host.
    pub fn links(&self, program: &str) -> Vec<PathBuf> {
        let all = std::fs::read_dir(self.pins()).unwrap().flatten().map(|entry| entry.path());
        all.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{program}-"))).collect()
    }

    /// Runs bpftool, without a new mount namespace.
    fn bpftool(&self, line: &str) -> String {
        output(Command::new("bpftool").args(line.split_whitespace())).unwrap()
    }

    fn detach(&self, program: &str) {
        let links = self.links(program);
        assert!(!links.is_empty(), "{program}");
        for link in links {
            self.bpftool(&format!("link detach pinned {}", link.display()));
        }
    }
}

#[test]
fn the_device() {
    let talk = Talk::start(&[]);
    // A device that is down has lost its routes and neighbours, one that is gone its programs too.
    let with_it = ["route", "neighbour", "forwarding_entry", "device_address", "program"];
    for (damage, repair, along) in [
        ("ip link delete flannel.1", "device", &with_it[..]),
        ("ip link set flannel.1 down", "device_settings", &with_it),
        ("ip link set flannel.1 mtu 1300", "device_settings", &[]),
        ("ip link set flannel.1 address 0a:00:00:00:00:77", "device_settings", &["neighbour"]),
        ("ip link set flannel.1 type vxlan id 1 local 192.168.64.99 dev eth0", "device_settings", &[]),
        ("ip address add 10.5.77.7/32 dev flannel.1", "device_address", &[]),
    ] {
        talk.heals(damage, repair, along, |world| world.in_host(damage));
    }
    let address = talk.world.lease_of(0).0.replace("-24", "/32");
    let damage = format!("ip address delete {address} dev flannel.1");
    // With its last address a device loses its neighbours.
    talk.heals(&damage, "device_address", &["route", "neighbour"], |world| world.in_host(&damage));
}

#[test]
fn who_undoes_it_again_and_again_is_told_of() {
    let world = World::with_agents(1);
    let repaired = || world.status(0)["status"]["drift"]["repaired"]["route"]["count"].as_u64().unwrap_or_default();
    for time in 1..=5 {
        assert_eq!(world.status(0)["troubles"], json!([]), "{time}");
        world.hosts[0].netns.ip("route flush dev flannel.1 scope global").unwrap();
        wait_for("the repair", SOON, || repaired() == time).unwrap();
    }
    world.assert_shown(0, "another program undoes", &[]);
}

#[test]
fn what_leads_into_the_device() {
    let talk = Talk::start(&[]);
    for (damage, repair) in [
        ("ip route delete 10.5.128.0/18", "route"),
        ("ip route replace 10.5.128.0/18 via 169.254.1.1 dev flannel.1 onlink proto 72 metric 8472", "route"),
        ("ip neigh delete 169.254.1.1 dev flannel.1", "neighbour"),
        ("ip neigh replace 169.254.1.1 lladdr 02:00:00:00:00:77 dev flannel.1 nud permanent", "neighbour"),
        ("ip neigh replace 169.254.1.1 lladdr 02:00:00:00:00:01 dev flannel.1 nud stale", "neighbour"),
        ("bridge fdb delete 02:00:00:00:00:01 dev flannel.1", "forwarding_entry"),
        ("bridge fdb replace 02:00:00:00:00:01 dev flannel.1 dst 192.168.64.99", "forwarding_entry"),
    ] {
        talk.heals(damage, repair, &[], |world| world.in_host(damage));
    }
}

#[test]
fn programs() {
    let talk = Talk::start(&["--xdp=generic"]);
    for program in ["to_overlay", "from_overlay", "from_underlay", "xdp_decap", "from_pod", "to_pod"] {
        talk.heals(program, "program", &[], |world| world.detach(program));
        for link in talk.world.links(program) {
            let shown = talk.world.bpftool(&format!("link show pinned {}", link.display()));
            assert!(!shown.contains("ifindex 0") && !shown.contains("detached"), "{program}: {shown}");
        }
    }
}

#[test]
fn filters_without_tcx() {
    let mut talk = Talk::between(Kernel::WithoutTcx.two_hosts());
    let attached = || {
        let shown = talk.world.hosts[0].netns.exec("bpftool -j net show").unwrap();
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        let filters = shown[0]["tc"].as_array().unwrap().iter();
        let mut filters: Vec<_> =
            filters.map(|filter| ["devname", "kind", "name"].map(|key| filter[key].to_string())).collect();
        filters.sort();
        filters
    };
    let before = attached();
    assert_eq!(before.len(), 5, "{before:?}");
    let mut shown = [
        ["from_overlay", "flannel.1", "attached"],
        ["from_pod", "pod1", "attached"],
        ["from_underlay", "eth0", "attached"],
        ["to_overlay", "flannel.1", "attached"],
        ["to_pod", "pod1", "attached"],
    ];
    assert_eq!(hooks(&talk.world), shown);
    for damage in [
        "tc filter delete dev eth0 ingress",
        "tc filter delete dev flannel.1 ingress",
        "tc filter delete dev flannel.1 egress",
        "tc filter delete dev pod1 ingress",
        "tc filter delete dev pod1 egress",
        "tc qdisc delete dev eth0 clsact",
        "tc qdisc delete dev flannel.1 clsact",
        "tc qdisc delete dev pod1 clsact",
    ] {
        talk.heals(damage, "program", &[], |world| world.in_host(damage));
        assert_eq!(attached(), before, "{damage}");
    }
    talk.world.hosts[0].agent = None;
    talk.world.in_host("tc filter delete dev pod1 ingress");
    shown[1][2] = "missing";
    assert_eq!(hooks(&talk.world), shown);
}

/// What `status` says of each: program, interface, and whether it is attached.
fn hooks(world: &World) -> Vec<[String; 3]> {
    let status = world.status(0);
    let hooks = status["dataplane"]["hooks"].as_array().unwrap().iter();
    let mut hooks: Vec<_> =
        hooks.map(|hook| ["program", "interface", "state"].map(|key| hook[key].as_str().unwrap().to_owned())).collect();
    hooks.sort();
    hooks
}

#[test]
fn map_entries() {
    let talk = Talk::start(&[]);
    let second = talk.world.lease_of(1).0;
    let slot: u8 = second.split('.').nth(2).unwrap().parse().unwrap();
    let update = |world: &World, map: &str, key: &str, value: &str| {
        world.bpftool(&format!("map update pinned {} key hex {key} value hex {value}", world.map(map)));
    };
    let subnets = format!("{slot:02x} 00 00 00");
    for value in ["00 00 00 00", "63 00 00 00"] {
        talk.heals(&format!("SUBNETS {value}"), "map_entry", &[], |world| update(world, "SUBNETS", &subnets, value));
    }
    let read = |map: &str, key: &str| {
        let line = format!("-j map lookup pinned {} key hex {key}", talk.world.map(map));
        let entry: serde_json::Value = serde_json::from_str(&talk.world.bpftool(&line)).unwrap();
        let bytes = entry["value"].as_array().unwrap().iter().map(|byte| byte.as_str().unwrap()[2..].to_owned());
        bytes.collect::<Vec<_>>().join(" ")
    };
    // The first byte of an id says it all here.
    let vtep = read("SUBNETS", &subnets);
    let other = |value: &str| format!("ff {}", &value[3..]);
    for (map, key) in [("VTEPS", vtep.as_str()), ("VTEPS", "00 00 00 00")] {
        let right = read(map, key);
        for wrong in [other(&right), vec!["00"; 80].join(" ")] {
            talk.heals(&format!("{map} {key}"), "map_entry", &[], |world| update(world, map, key, &wrong));
            assert_eq!(read(map, key), right);
        }
    }
    // A slot that nobody leases.
    talk.heals("SUBNETS", "map_entry", &[], |world| update(world, "SUBNETS", "07 00 00 00", &vtep));
    assert_eq!(read("SUBNETS", "07 00 00 00"), "00 00 00 00");

    let lease = lease_value("192.168.64.77", "0a:00:00:00:00:77");
    talk.world.store.put(&format!("{PREFIX}/subnets/10.7.7.0-24"), &lease).unwrap();
    let prefix = "18 00 00 00 0a 07 07 00";
    let dump = || talk.world.bpftool(&format!("map dump pinned {}", talk.world.map("PREFIXES")));
    wait_for("the prefix", SOON, || dump().contains("Found 1 element")).unwrap();
    let repairs = || talk.repaired().iter().map(|(_, count)| count).sum::<u64>();
    let before = repairs();
    let (since, delayed) = (Instant::now(), talk.run_delay());
    talk.world.bpftool(&format!("map delete pinned {} key hex {prefix}", talk.world.map("PREFIXES")));
    wait_for("the prefix again", SOON, || dump().contains("Found 1 element")).unwrap();
    let limit = REPAIR_LIMIT + PAUSE + talk.run_delay().saturating_sub(delayed);
    assert!(since.elapsed() < limit, "{:?} of {limit:?}", since.elapsed());
    wait_for("the report", SOON, || repairs() > before).unwrap();
}

#[test]
fn settings_of_the_host() {
    let talk = Talk::start(&[]);
    let read = |setting: &str| talk.world.hosts[0].netns.exec(&format!("sysctl -n {setting}")).unwrap();
    let forwarding = "net.ipv4.ip_forward";
    talk.heals(forwarding, "ip_forward", &[], |world| world.in_host(&format!("sysctl -qw {forwarding}=0")));
    assert_eq!(read(forwarding).trim(), "1");
}

#[test]
fn pins() {
    let mut talk = Talk::start(&["--xdp=generic"]);
    let all = |talk: &Talk| {
        let listed = output(Command::new("find").arg(talk.world.pins()).args(["-type", "f"])).unwrap();
        let mut listed: Vec<_> = listed.lines().map(str::to_owned).collect();
        listed.sort();
        listed
    };
    let before = all(&talk);
    talk.heals("a link's pin", "pin", &[], |world| std::fs::remove_file(&world.links("from_underlay")[0]).unwrap());
    talk.heals("a map's pin", "pin", &[], |world| std::fs::remove_file(world.map("VTEPS")).unwrap());
    assert_eq!(all(&talk), before);

    let bpf = talk.world.hosts[0].pin_dir().parent().unwrap().to_owned();
    let begun = Instant::now();
    umount2(&bpf, MntFlags::empty()).unwrap();
    talk.world.wait_status(0, "the missing pins", |status| !status["drift"]["waiting"]["pin directory"].is_null());
    // The programs run on; a pod that comes meanwhile has some too.
    talk.world.hosts[0].add_pod().unwrap();
    thread::sleep(REPAIR_LIMIT);
    for lane in &talk.lanes {
        assert_eq!(lane.last_pause(begun), Some(Duration::ZERO), "{} without pins", lane.name);
    }
    talk.heals("the file system back", "pin", &[], |_| {
        mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
    });
    // Those of the new pod too.
    assert_eq!(all(&talk).len(), before.len() + 2);
    talk.world
        .wait_status(0, "nothing to wait for", |status| status["drift"]["waiting"].as_object().unwrap().is_empty());

    // And they hold what they should: nothing is lost without an agent, nor with the next.
    let begun = Instant::now();
    talk.world.hosts[0].agent = None;
    thread::sleep(AFTERWARDS);
    talk.world.start(0, &["--xdp=generic"]);
    talk.world.wait_log(0, "carries");
    thread::sleep(AFTERWARDS);
    for lane in &talk.lanes {
        assert_eq!(lane.last_pause(begun), Some(Duration::ZERO), "{} with the pins again", lane.name);
    }
}
