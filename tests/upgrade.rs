//! Another version takes over, and the packets that pass meanwhile. The other versions are this one with other programs, or
//! with maps of another layout (`xtask::variants`).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use flannel_common::maps::{ABI_VERSION, PINNED};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use xtask::{lab::PREFIX, process::output, progress::wait_for, variants::Variant};

use crate::{
    numbered::{BothWays, kill},
    world::{SOON, World, agent},
};

/// What the agent says when it has taken over.
const FOLLOWING: &str = "leases in etcd";

fn variant(variant: Variant) -> PathBuf {
    let path = variant.agent(agent().parent().unwrap());
    assert!(path.exists(), "{path:?} is not built; `cargo xtask test` builds it");
    path
}

/// What the kernel lets an agent use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    This,
    /// As before 6.6: links to TC hooks are invalid.
    WithoutTcx,
}

impl Kernel {
    /// Two hosts with a ready agent and a pod each.
    pub fn two_hosts(self) -> World {
        self.two_hosts_with(&[])
    }

    /// The same with arguments for the agents.
    pub fn two_hosts_with(self, arguments: &[&str]) -> World {
        let mut world = World::new(2);
        for host in 0..2 {
            self.start_with(&mut world, host, &agent(), arguments);
        }
        for host in &mut world.hosts {
            host.wait_ready().unwrap();
            host.add_pod().unwrap();
        }
        world
    }

    fn start(self, world: &mut World, host: usize, binary: &Path) {
        self.start_with(world, host, binary, &[]);
    }

    fn start_with(self, world: &mut World, host: usize, binary: &Path, arguments: &[&str]) {
        let World { hosts, store, .. } = world;
        thread::scope(|scope| {
            scope.spawn(|| {
                if self == Self::WithoutTcx {
                    // Of this thread and what it starts.
                    refuse_links();
                }
                hosts[host].start_agent(binary, store, arguments).unwrap();
            });
        });
    }

    fn take_over(self, world: &mut World, host: usize, binary: &Path) {
        kill(world, host);
        self.start(world, host, binary);
        world.wait_log(host, FOLLOWING);
    }
}

fn refuse_links() {
    // include/uapi/linux/bpf.h: BPF_PROG_QUERY, by which the agent asks for TCX, and BPF_LINK_CREATE.
    let rules = [16, 28].map(|command| {
        let is_command = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, command).unwrap();
        SeccompRule::new(vec![is_command]).unwrap()
    });
    let rules = BTreeMap::from([(libc::SYS_bpf, rules.to_vec())]);
    let refused = SeccompAction::Errno(libc::EINVAL as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// The programs at the hooks of a host, as the kernel tells them apart, by what the hooks are called: pinned links, or
/// filters of devices.
fn tags(world: &World, host: usize) -> BTreeMap<String, String> {
    let json = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
    let bpftool = |arguments: &[&str]| json(output(Command::new("bpftool").arg("-j").args(arguments)).unwrap());
    let host = &world.hosts[host];
    let pins = fs::read_dir(host.pin_dir().join("1")).unwrap().map(|entry| entry.unwrap().path());
    let links = pins.filter(|path| path.is_file()).map(|path| {
        let link = bpftool(&["link", "show", "pinned", path.to_str().unwrap()]);
        (path.file_name().unwrap().to_str().unwrap().to_owned(), link["prog_id"].clone())
    });
    let filters = json(host.netns.exec("bpftool -j net show").unwrap())[0]["tc"].clone();
    let filters = filters.as_array().unwrap().iter().map(|filter| {
        let name = format!("{}-{}", filter["name"].as_str().unwrap(), filter["devname"]);
        (name, filter["id"].clone())
    });
    let tags: BTreeMap<_, _> = links
        .chain(filters)
        .map(|(name, id)| {
            let program = bpftool(&["prog", "show", "id", &id.to_string()]);
            (name, program["tag"].as_str().unwrap().to_owned())
        })
        .collect();
    assert_eq!(tags.len(), 5, "{tags:?}");
    tags
}

fn versions(world: &World, host: usize) -> Vec<String> {
    let entries = fs::read_dir(world.hosts[host].pin_dir().join("1")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('v')).collect()
}

fn there_and_back(kernel: Kernel) {
    let mut world = kernel.two_hosts();
    world.wait_connected(0, 1);
    let links = fs::read_dir(world.hosts[0].pin_dir().join("1")).unwrap().count() - 1;
    assert_eq!(links == 0, kernel == Kernel::WithoutTcx, "{links} links are pinned");
    let streams = BothWays::start(&world);
    streams.assert_ways(&world);
    for other in Variant::ALL {
        for host in 0..2 {
            let before = tags(&world, host);
            kernel.take_over(&mut world, host, &variant(other));
            let after = tags(&world, host);
            assert!(before.keys().eq(after.keys()), "{before:?}\n{after:?}");
            let unchanged = before.iter().filter(|(name, tag)| after[*name] == **tag).count();
            assert_eq!(unchanged, 0, "{other:?}: {before:?}\n{after:?}");
            let abi = ABI_VERSION + u32::from(other == Variant::Layout);
            assert_eq!(versions(&world, host), [format!("v{abi}")]);
            streams.wait_for_more(2000);
        }
        for host in 0..2 {
            kernel.take_over(&mut world, host, &agent());
            assert_eq!(versions(&world, host), [format!("v{ABI_VERSION}")]);
            streams.wait_for_more(2000);
        }
        streams.assert_ways(&world);
    }
    streams.end_whole(&format!("upgrades and downgrades, {kernel:?}"));
}

#[test]
fn other_programs_and_another_layout_and_back_lose_nothing() {
    there_and_back(Kernel::This);
}

#[test]
fn the_same_without_tcx() {
    there_and_back(Kernel::WithoutTcx);
}

/// A filter has no pin that it would go with.
#[test]
fn without_tcx_what_is_no_pods_any_more_loses_its_filters() {
    let mut world = World::new(1);
    Kernel::WithoutTcx.start(&mut world, 0, &agent());
    world.hosts[0].wait_ready().unwrap();
    world.hosts[0].add_pod().unwrap();
    let netns = &world.hosts[0].netns;
    let has_filters =
        |direction: &str| !netns.exec(&format!("tc filter show dev pod1 {direction}")).unwrap().is_empty();
    wait_for("filters", SOON, || ["ingress", "egress"].into_iter().all(has_filters)).unwrap();
    // Programs are loaded anew for that, and filters swapped.
    netns.ip("link set eth0 mtu 1400").unwrap();
    world.wait_log(0, "repaired (external_interface)");
    assert!(["ingress", "egress"].into_iter().all(has_filters));
    netns.ip("link set pod1 nomaster").unwrap();
    wait_for("no filters", SOON, || !["ingress", "egress"].into_iter().any(has_filters)).unwrap();
}

#[test]
fn a_crash_at_any_moment_of_an_upgrade_loses_nothing() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let streams = BothWays::start(&world);
    let other = variant(Variant::Layout);
    for milliseconds in (10..200).step_by(10) {
        for binary in [&other, &agent()] {
            kill(&mut world, 0);
            Kernel::This.start(&mut world, 0, binary);
            // The moment is what is tried; nothing waits for it.
            thread::sleep(std::time::Duration::from_millis(milliseconds));
        }
    }
    Kernel::This.take_over(&mut world, 0, &agent());
    assert_eq!(versions(&world, 0), [format!("v{ABI_VERSION}")]);
    streams.assert_ways(&world);
    streams.end_whole("crashes in the middle of upgrades");
}

/// An operator's commands are there with the package, before the agent is restarted.
#[test]
fn commands_of_another_layout_say_so() {
    let world = World::with_agents(1);
    let [own] = versions(&world, 0).try_into().unwrap();
    let other = variant(Variant::Layout);
    let expected = format!("the maps of overlay 1 have layout {}, and this flannel-agent reads layout", &own[1..]);
    for (command, code) in [("peers", 1), ("drops", 1), ("status", 3)] {
        let ended = world.hosts[0].agent_command(&other).arg(command).output().unwrap();
        let said = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
        assert!(ended.status.code() == Some(code) && said.contains(&expected), "{command}: {}: {said}", ended.status);
    }
}

#[test]
fn a_peer_that_sends_is_held_across_a_change_of_the_layout() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    world.wait_last_known(1);
    let streams = BothWays::start(&world);
    let (key, _) = world.lease_of(0);
    kill(&mut world, 0);
    kill(&mut world, 1);
    world.store.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")]).unwrap();
    Kernel::This.start(&mut world, 1, &variant(Variant::Layout));
    world.wait_log(1, FOLLOWING);
    world.wait_status(1, "a held peer", |status| status["held"][0]["reason"] == "still_sends");
    streams.wait_for_more(5000);
    streams.end_whole("a peer that the store forgot during an upgrade");
}

#[test]
fn maps_that_cant_be_adopted_are_made_anew_with_a_reason_and_without_a_gap() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let maps = world.hosts[0].pin_dir().join("1").join(format!("v{ABI_VERSION}"));
    let foreign = world.hosts[0].pin_dir().join("foreign");
    let create = |path: &Path, kind: &str, name: &str| {
        let line = format!("map create {} type {kind} key 4 value 4 entries 16 name {name}", path.display());
        output(Command::new("bpftool").args(line.split_whitespace())).unwrap();
    };
    create(&foreign, "hash", "foreign");
    let streams = BothWays::start(&world);
    type Damage<'a> = &'a dyn Fn();
    let damages: [(Damage<'_>, &str); 6] = [
        (&|| create(&maps.join("HEARD"), "hash", "HEARD"), "HEARD is Hash of 16 entries"),
        (&|| create(&maps.join("SUBNETS"), "array", "other"), "SUBNETS is the map \"other\""),
        (&|| fs::create_dir(maps.join("COUNTERS")).unwrap(), "COUNTERS is no map"),
        (&|| std::os::unix::fs::symlink(&foreign, maps.join("VTEPS")).unwrap(), "VTEPS is no map"),
        (&|| {}, "SUBNETS is missing"),
        (
            &|| {
                let program = output(Command::new("bpftool").args(["-j", "prog", "show"])).unwrap();
                let programs: serde_json::Value = serde_json::from_str(&program).unwrap();
                let is_ours = |program: &&serde_json::Value| program["name"] == "to_pod";
                let id = programs.as_array().unwrap().iter().find(is_ours).unwrap()["id"].to_string();
                let path = maps.join("FLOWS");
                output(Command::new("bpftool").args(["prog", "pin", "id", &id]).arg(path)).unwrap();
            },
            "FLOWS is no map",
        ),
    ];
    for (damage, reason) in damages {
        kill(&mut world, 0);
        let name = PINNED.iter().find(|name| reason.starts_with(**name)).unwrap();
        fs::remove_file(maps.join(name)).unwrap();
        damage();
        world.start(0, &[]);
        world.wait_log(0, reason);
        world.wait_log(0, FOLLOWING);
        streams.assert_ways(&world);
    }
    // What else may lie about: versions that are none, and one that an upgrade left.
    kill(&mut world, 0);
    create(&maps.with_file_name("v98"), "array", "VTEPS");
    fs::create_dir(maps.with_file_name("v99")).unwrap();
    create(&maps.with_file_name("v99").join("VTEPS"), "array", "VTEPS");
    create(&maps.with_file_name("notes"), "array", "notes");
    world.start(0, &[]);
    world.wait_log(0, FOLLOWING);
    assert_eq!(versions(&world, 0), [format!("v{ABI_VERSION}")]);
    assert!(maps.with_file_name("notes").exists(), "what is not the agent's stays");
    streams.assert_ways(&world);
    streams.end_whole("maps that can't be adopted");
}

#[test]
fn something_else_in_the_place_of_a_link_is_replaced_with_a_reason() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let pins = world.hosts[0].pin_dir().join("1");
    let links: Vec<_> = fs::read_dir(&pins).unwrap().map(|entry| entry.unwrap().path()).collect();
    let links: Vec<_> = links.iter().filter(|path| path.is_file()).collect();
    assert_eq!(links.len(), 5, "{links:?}");
    let before = tags(&world, 0);
    kill(&mut world, 0);
    for (number, link) in links.iter().enumerate() {
        fs::remove_file(link).unwrap();
        match number % 3 {
            0 => fs::create_dir(link).unwrap(),
            1 => std::os::unix::fs::symlink(pins.join("nowhere"), link).unwrap(),
            _ => {
                let mut create = Command::new("bpftool");
                create.args(["map", "create"]).arg(link);
                output(create.args("type array key 4 value 4 entries 1 name m".split(' '))).unwrap();
            }
        }
    }
    world.start(0, &[]);
    world.wait_log(0, FOLLOWING);
    for link in links {
        world.wait_log(0, &format!("{} is no link of such a program", link.display()));
    }
    assert_eq!(tags(&world, 0), before);
    world.wait_connected(0, 1);
}
