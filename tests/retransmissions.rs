//! How much of bulk TCP has to be sent again, against that of the hosts themselves, without an overlay.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddrV4},
    thread,
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::socket::{setsockopt, sockopt::SndBuf},
    unistd::Pid,
};
use xtask::lab::Netns;

use crate::{
    sockets::{Pattern, connection, listener_in},
    world::World,
};

/// What one round sends.
const BULK: usize = 256 << 20;
const ROUNDS: u32 = 3;
/// How much may be on its way. Without a limit, TCP sends until the receiver's queue (`netdev_max_backlog`, 1000 frames)
/// runs over, and what is sent again says how the scheduler divided the cores among sender and receiver: from none to
/// 900 segments in a second between hosts alone. As much as this fits into the queue, frame by frame; so nothing but the
/// dataplane loses or reorders any.
const ON_ITS_WAY: usize = 128 << 10;
/// Per GB: a receiver that waits too long for the core has the sender try its last segment again (RFC 8985, 7), one each
/// time.
const SLACK: f64 = 20.0;

/// Keeps this thread, and those that it starts, on one core. Each core has a queue of its own for what passes a veth; who
/// sends from two of them in turns has segments overtaken, which says nothing of the dataplane.
fn stay_on_one_core() {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let core = (0..CpuSet::count()).find(|core| allowed.is_set(*core).unwrap()).unwrap();
    let mut cores = CpuSet::new();
    cores.set(core).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cores).unwrap();
}

/// Segments that TCP of a namespace sent again so far.
fn retransmitted(netns: &Netns) -> u64 {
    let text = netns.exec("nstat -asz TcpRetransSegs").unwrap();
    let line = text.lines().find(|line| line.starts_with("TcpRetransSegs")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Sends a round's worth, and says how many segments were sent again for it.
fn transfer(from: &Netns, to: &Netns, address: Ipv4Addr, pattern: &Pattern) -> u64 {
    let before = retransmitted(from);
    let listener = listener_in(to, address, 7777);
    let (mut one, mut two) = connection(from, SocketAddrV4::new(address, 7777), &listener);
    setsockopt(&one, SndBuf, &ON_ITS_WAY).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            for place in (0..BULK).step_by(Pattern::LARGEST) {
                one.write_all(pattern.at(place, Pattern::LARGEST)).unwrap();
            }
            one.shutdown(Shutdown::Write).unwrap();
        });
        let mut buffer = vec![0; Pattern::LARGEST];
        let mut received = 0;
        while received < BULK {
            let len = two.read(&mut buffer).unwrap();
            assert!(len > 0, "{received} bytes and no more");
            received += len;
        }
    });
    retransmitted(from) - before
}

#[test]
fn pods_send_no_more_again_than_hosts_do() {
    let pattern = &Pattern::new();
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    stay_on_one_core();
    let [one, two] = &world.hosts[..] else { panic!("two hosts") };
    for gso in [true, false] {
        for host in &world.hosts {
            host.set_underlay_gso(gso).unwrap();
        }
        let before = world.counter_row(1, "delivered").1;
        let (mut hosts, mut pods) = (0, 0);
        // In turns, so that both have the same of what else the machine does.
        for _ in 0..ROUNDS {
            hosts += transfer(&one.netns, &two.netns, two.address, pattern);
            pods += transfer(&one.pods[0].netns, &two.pods[0].netns, two.pods[0].address, pattern);
        }
        let sent = BULK as f64 * f64::from(ROUNDS) / 1e9;
        let [hosts, pods] = [hosts, pods].map(|segments| segments as f64 / sent);
        assert!(pods <= hosts + SLACK, "per GB, GSO {gso}: {pods:.1} of pods, {hosts:.1} of hosts");
        let bypassed = world.counter_row(1, "delivered").1 - before;
        assert!(bypassed as f64 / 1e9 > sent * 0.9, "GSO {gso}: {bypassed} bytes past the stack");
    }
}
