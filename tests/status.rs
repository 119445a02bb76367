//! `flannel-agent status`: what the kernel has, with an agent and without.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use xtask::progress::wait_for;

use crate::{
    frames::{FROM_TWO, POD_ONE, POD_TWO, inner, udp, vxlan},
    short_frames::send,
    world::{SOON, World},
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
            ["to_overlay", "flannel.1", "attached"],
            ["from_overlay", "flannel.1", "attached"],
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

    world.start(0, &[]);
    wait_for("the repair", SOON, || hooks(&world.status(0)) == wanted("attached")).unwrap();
}
