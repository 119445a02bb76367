//! Packet rules about the tunnel packets that come in: as long as there are none, what takes the stack is taken out of the tunnel
//! in front of it; a rule has them meet it as with flannel.

use flannel_agent::dataplane::{PinDirectory, pinned_counters};
use flannel_common::{event::Event, vxlan::Vni};
use xtask::progress::wait_for;

use crate::world::{SOON, World, is_answered};

/// For a store and pings, whatever else.
const FIREWALL: &str = "table inet fw { chain in { type filter hook input priority 0; policy drop; ip protocol { tcp, icmp } accept; \
                        iif lo accept; }; }";

fn counter(world: &World, event: Event) -> u64 {
    let pins = PinDirectory::new(world.hosts[0].pin_dir(), Vni::new_checked(1).unwrap());
    let counters = pinned_counters(&pins).unwrap();
    counters.iter().find(|(of, _)| *of == event).unwrap().1.packets
}

fn ping(world: &World) -> bool {
    is_answered(&world.hosts[0].pods[0].netns, &world.hosts[1].pods[0].address.to_string())
}

/// That pings are answered, and the answers counted so.
fn wait_answered(world: &World, event: Event, what: &str) {
    wait_for(&format!("{what}: {}", event.label()), SOON, || {
        let before = counter(world, event);
        ping(world) && counter(world, event) > before
    })
    .unwrap();
}

fn in_host(world: &World, line: &str) {
    world.hosts[0].netns.exec(line).unwrap();
}

#[test]
fn a_rule_against_tunnel_packets_holds_for_those_that_take_the_stack() {
    for xdp in ["--xdp=off", "--xdp=generic"] {
        assert_rules_hold(&World::new(2).ready(&[xdp]));
    }
}

fn assert_rules_hold(world: &World) {
    world.wait_connected(0, 1);
    wait_answered(world, Event::HandedIn, "no rule");
    let peer = world.hosts[1].address;
    for (what, set, unset) in [
        (
            "a peer",
            format!("iptables -I INPUT -s {peer} -p udp -j DROP"),
            format!("iptables -D INPUT -s {peer} -p udp -j DROP"),
        ),
        (
            "the port",
            "iptables -t raw -I PREROUTING -p udp --dport 8472 -j DROP".to_owned(),
            "iptables -t raw -D PREROUTING -p udp --dport 8472 -j DROP".to_owned(),
        ),
        ("the policy", format!("nft {FIREWALL}"), "nft delete table inet fw".to_owned()),
    ] {
        in_host(world, &set);
        // Also those of a flow that is known: the last one that the stack let in is its last.
        wait_for(&format!("{what}: no answer"), SOON, || !ping(world)).unwrap();
        assert!(!ping(world) && !ping(world), "{what}: answered");
        in_host(world, &unset);
        wait_answered(world, Event::HandedIn, what);
    }
}

#[test]
fn a_rule_that_counts_or_marks_tunnel_packets_sees_those_that_take_the_stack() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    in_host(&world, "iptables -I INPUT -p udp --dport 8472 -j MARK --set-mark 5");
    wait_answered(&world, Event::Admitted, "a mark");
    in_host(&world, "iptables -D INPUT -p udp --dport 8472 -j MARK --set-mark 5");
    wait_answered(&world, Event::HandedIn, "none");
    // One that lets all of them in, as an operator of flannel's has to have it, costs nothing.
    in_host(&world, &format!("nft {FIREWALL}"));
    wait_for("the policy", SOON, || !ping(&world)).unwrap();
    in_host(&world, "nft add rule inet fw in udp dport 8472 accept");
    wait_answered(&world, Event::HandedIn, "accepted");
}
