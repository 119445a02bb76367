//! The agent killed and started anew, and the packets that pass meanwhile.

use std::{fs, time::Duration};

use crate::{
    numbered::{BothWays, kill},
    world::World,
};

const RESTARTS: usize = 20;

#[test]
fn twenty_crashes_lose_nothing_on_either_way() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let streams = BothWays::start(&world);
    streams.assert_ways(&world);
    for restart in 0..RESTARTS {
        // The host that sends, and the host that receives.
        let host = restart % 2;
        kill(&mut world, host);
        streams.wait_for_more(1000);
        world.start(host, &[]);
        world.wait_log(host, "leases in etcd");
        streams.wait_for_more(1000);
    }
    streams.assert_ways(&world);
    streams.end_whole("twenty restarts");
}

#[test]
fn a_crash_at_any_moment_of_a_start_loses_nothing() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let streams = BothWays::start(&world);
    for milliseconds in (2..150).step_by(4) {
        kill(&mut world, 0);
        world.start(0, &[]);
        // The moment is what is tried; nothing waits for it.
        std::thread::sleep(Duration::from_millis(milliseconds));
    }
    kill(&mut world, 0);
    world.start(0, &[]);
    world.wait_log(0, "leases in etcd");
    streams.assert_ways(&world);
    streams.end_whole("crashes in the middle of starts");
}

#[test]
fn a_crash_at_any_moment_of_the_first_start_is_repaired_by_the_next() {
    let mut world = World::new(2).ready(&[]);
    for milliseconds in [5, 20, 40, 50, 60, 70, 80, 90, 100, 120] {
        world.hosts[0].agent = None;
        xtask::process::output(world.agent_on(0).arg("cleanup")).unwrap();
        world.start(0, &[]);
        std::thread::sleep(Duration::from_millis(milliseconds));
        kill(&mut world, 0);
        let _first_start_got_so_far = fs::remove_file(world.hosts[0].run_dir().join("subnet.env"));
        world.start(0, &[]);
        world.hosts[0].wait_ready().unwrap();
        world.wait_connected(0, 1);
    }
}
