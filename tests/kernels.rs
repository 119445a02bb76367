//! What differs from kernel to kernel: what it has, how programs are attached, and what the verifier makes of them.
//! `cargo xtask vm` runs this on others.

use std::time::Duration;

use flannel_agent::dataplane::{Hook, XdpMode};
use nix::sys::signal::Signal;
use xtask::{lab::Netns, process::output, progress::wait_for};

use crate::{
    loaded::with_programs,
    world::{SOON, World},
};

/// The programs, in the order of the columns.
const PROGRAMS: [&str; 8] = [
    "to_overlay",
    "from_overlay",
    "from_underlay",
    "from_pod",
    "to_pod",
    "to_underlay",
    "xdp_decap",
    "xdp_decap_generic",
];
/// How many instructions the verifier went through, by kernel and program. It gives up at a million; each program was far
/// below that when these were counted, and each step of it costs time at every start of the agent.
const VERIFIED: [(&str, [u32; 8]); 3] = [
    ("6.1", [7676, 2445, 20160, 7520, 6452, 6908, 6905, 6905]),
    ("6.12", [5973, 2256, 15734, 6762, 4337, 7200, 7973, 7973]),
    ("6.18", [5688, 2294, 16350, 7445, 2558, 7254, 7206, 7206]),
];

/// What another compiler, or another patch level of a kernel, may add: a tenth.
const BUDGET: (u32, u32) = (11, 10);

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_owned()
}

#[test]
fn the_verifier_has_no_more_to_do_than_it_had() {
    let mut counted = Vec::new();
    with_programs(|programs| {
        let dataplane = &mut programs.dataplane;
        for hook in Hook::ALL {
            let info = dataplane.program(hook).unwrap().info().unwrap();
            counted.push((hook.program(), info.verified_instruction_count().unwrap()));
        }
        for (mode, name) in [(XdpMode::Native, "xdp_decap"), (XdpMode::Generic, "xdp_decap_generic")] {
            let info = dataplane.xdp_program(mode).unwrap().info().unwrap();
            counted.push((name, info.verified_instruction_count().unwrap()));
        }
    });
    let release = release();
    println!("{release}: {counted:?}");
    assert_eq!(counted.iter().map(|(program, _)| *program).collect::<Vec<_>>(), PROGRAMS);
    let known = VERIFIED.iter().find(|(kernel, _)| release.starts_with(&format!("{kernel}.")));
    for (number, (program, count)) in counted.iter().enumerate() {
        // A kernel that is not in the table has the greatest of all budgets.
        let greatest = VERIFIED.iter().map(|(_, counts)| counts[number]).max().unwrap();
        let recorded = known.map_or(greatest, |(_, counts)| counts[number]);
        let budget = recorded * BUDGET.0 / BUDGET.1;
        assert!(*count <= budget, "{program} on {release}: {count} instructions, more than {budget}; all: {counted:?}");
    }
}

/// Handle and program of each.
type Filters = Vec<(String, String)>;

/// The filters of a hook, as `tc` says it.
fn filters(netns: &Netns, device: &str, direction: &str) -> Filters {
    let shown = output(netns.command("tc").args(["filter", "show", "dev", device, direction])).unwrap();
    let word = |line: &str, after: &str| Some(line.split_once(after)?.1.split_whitespace().next()?.to_owned());
    shown.lines().filter_map(|line| Some((word(line, " handle ")?, word(line, " id ")?))).collect()
}

#[test]
fn what_the_kernel_has_is_found_out_and_shown() {
    let world = World::with_agents(1);
    let status = world.status(0);
    let features = &status["status"]["features"];
    // bpftool tries the helpers itself, and names those that there are.
    let helpers = output(std::process::Command::new("bpftool").args(["feature", "probe", "kernel"])).unwrap();
    let classifier = helpers.split("eBPF helpers supported for program type sched_cls:").nth(1).unwrap();
    let classifier = classifier.split("eBPF helpers supported").next().unwrap();
    for (feature, helper) in [("redirectPeer", "bpf_redirect_peer"), ("redirectNeighbour", "bpf_redirect_neigh")] {
        let there = classifier.lines().any(|line| line.trim().trim_start_matches("- ") == helper);
        assert_eq!(features[feature], there, "{helper}: {features}");
    }
    // The agent would not run without.
    assert_eq!(features["encapEthernet"], true);
    // What the kernel calls these is in its own type information, where it has them.
    let types = output(std::process::Command::new("bpftool").args(["btf", "dump", "file", "/sys/kernel/btf/vmlinux"]));
    if let Ok(types) = types {
        for (feature, name) in [("tcx", "'BPF_TCX_INGRESS'"), ("decapUdp", "'BPF_F_ADJ_ROOM_DECAP_L4_UDP'")] {
            assert_eq!(features[feature], types.contains(name), "{name}: {features}");
        }
        assert_eq!(features["xdpFrags"], types.contains("'xdp_has_frags'"), "{features}");
    }

    let netns = &world.hosts[0].netns;
    let has_links = features["tcx"] == true;
    assert_eq!(filters(netns, "eth0", "ingress").is_empty(), has_links);
    let pins = std::fs::read_dir(world.hosts[0].pin_dir().join("1")).unwrap().flatten();
    let pins: Vec<_> = pins.map(|pin| pin.file_name().into_string().unwrap()).collect();
    assert_eq!(pins.iter().any(|pin| pin.starts_with("from_underlay-")), has_links, "{pins:?}");

    // Else something is to be looked at, which the exit status says.
    world.wait_status(0, "the store followed", |status| status["store"]["following"] == true);
    let table = output(world.agent_on(0).arg("status")).unwrap();
    let row = table.lines().find(|line| line.starts_with("kernel")).unwrap();
    let (has, lacks) = row.split_once("; lacks ").unwrap();
    assert_eq!(has.contains("tcx"), has_links, "{row}");
    assert_eq!(lacks.contains("tcx"), !has_links, "{row}");
    world.wait_log(0, "this kernel has ");
}

/// On kernels without TCX: one filter at each hook, before and after, with another program in it; on others none.
#[test]
fn agents_that_follow_each_other_swap_the_programs_and_lose_no_packet() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let has_links = world.status(0)["status"]["features"]["tcx"] == true;
    let veth = "pod1";
    let hooks =
        [("eth0", "ingress"), ("flannel.1", "ingress"), ("flannel.1", "egress"), (veth, "ingress"), (veth, "egress")];
    let attached = |world: &World| hooks.map(|(device, way)| filters(&world.hosts[0].netns, device, way));
    let count = if has_links { 0 } else { 1 };
    let one_each = |filters: &[Vec<(String, String)>]| filters.iter().all(|filters| filters.len() == count);
    wait_for("the pod's programs", SOON, || one_each(&attached(&world))).unwrap();
    let mut before = attached(&world);
    let status = world.status(0);
    let shown = status["dataplane"]["hooks"].as_array().unwrap();
    assert!(shown.len() == hooks.len() && shown.iter().all(|hook| hook["state"] == "attached"), "{status:#}");

    let traffic = world.traffic(0, 1);
    for _ in 0..3 {
        let agent = world.hosts[0].agent.as_mut().unwrap();
        agent.signal(Signal::SIGKILL).unwrap();
        agent.wait(Duration::from_secs(3)).unwrap();
        assert_eq!(attached(&world), before, "nothing goes with the agent");
        world.start(0, &[]);
        world.wait_log(0, "carries");
        let swapped = wait_for("new programs", SOON, || {
            let now = attached(&world);
            let is_new = |(now, before): (&Filters, &Filters)| {
                now.iter().zip(before).all(|(now, before)| now.0 == before.0 && now.1 != before.1)
            };
            one_each(&now) && now.iter().zip(&before).all(is_new)
        });
        assert!(swapped.is_ok(), "{:?} after {before:?}", attached(&world));
        before = attached(&world);
    }
    traffic.assert_nothing_was_lost();

    world.hosts[0].agent = None;
    output(world.agent_on(0).arg("cleanup")).unwrap();
    for (device, way) in [("eth0", "ingress"), (veth, "ingress"), (veth, "egress")] {
        assert_eq!(filters(&world.hosts[0].netns, device, way), [], "{device} {way}");
    }
}
