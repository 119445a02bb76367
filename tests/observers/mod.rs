//! Whoever looks at packets on a device sees what he sees with flannel: each of them, once.
//!
//! * [`traffic_control`] — queueing disciplines and filters
//! * [`programs`] — TCX and XDP
//! * [`captures`] — packet sockets

mod captures;
mod programs;
mod traffic_control;

use std::{
    net::{SocketAddrV4, UdpSocket},
    time::{Duration, Instant},
};

use xtask::{
    lab::Pod,
    progress::{patience, wait_for},
};

use crate::{
    sockets::socket_in,
    world::{SOON, World},
};

/// Who serves the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    ByUs,
    WithoutBypass,
    /// The kernel's vxlan device, as flannel sets it up.
    ByKernel,
}

impl Served {
    const ALL: [Self; 3] = [Self::ByUs, Self::WithoutBypass, Self::ByKernel];

    /// Two hosts with so many pods each.
    fn world(self, pods: usize) -> World {
        let mut world = World::with_any_subnet(2);
        let octets = [201, 202];
        if self == Self::ByKernel {
            let subnets = octets.map(|octet| {
                let host = &mut world.hosts[usize::from(octet - 201)];
                host.become_kernel_vxlan(&world.store, octet).unwrap().subnet
            });
            for (host, (subnet, peer)) in world.hosts.iter_mut().zip(subnets.iter().zip([202, 201])) {
                host.add_kernel_peer_from(&world.store, peer).unwrap();
                for _ in 0..pods {
                    host.add_pod_in(subnet).unwrap();
                }
            }
        } else {
            let arguments: &[&str] = if self == Self::WithoutBypass { &["--bypass=off"] } else { &[] };
            world = world.ready(arguments);
            for host in &mut world.hosts {
                for _ in 1..pods {
                    host.add_pod().unwrap();
                }
            }
            (0..2).for_each(|host| world.wait_pods(host));
        }
        world.wait_connected(0, 1);
        world
    }
}

/// Datagrams back and forth between two pods.
pub struct Exchange {
    sockets: [UdpSocket; 2],
    addresses: [SocketAddrV4; 2],
}

impl Exchange {
    /// Of both ends.
    pub const PORT: u16 = 7777;

    pub fn new(one: &Pod, two: &Pod) -> Self {
        let addresses = [one, two].map(|pod| SocketAddrV4::new(pod.address, Self::PORT));
        let sockets = [(one, addresses[0]), (two, addresses[1])].map(|(pod, address)| socket_in(&pod.netns, address));
        sockets.iter().for_each(|socket| socket.set_read_timeout(Some(SOON)).unwrap());
        Self { sockets, addresses }
    }

    /// So many each way, one after the other; all must arrive.
    pub fn times(&self, count: u32) {
        for number in 0..count {
            for (from, to) in [(0, 1), (1, 0)] {
                self.sockets[from].send_to(&number.to_be_bytes(), self.addresses[to]).unwrap();
                let mut content = [0; 4];
                let received = self.sockets[to].recv(&mut content);
                assert!(matches!(received, Ok(4)), "{number} of {count} from {from}: {received:?}");
                assert_eq!(content, number.to_be_bytes());
            }
        }
    }

    /// Has the flow bypass the stack of a host, both ways.
    pub fn wait_bypassed(&self, world: &World, host: usize) {
        let counts = || ["pod_encapsulated", "delivered"].map(|label| world.counter(host, label));
        let waited = wait_for("the bypass", SOON, || {
            let before = counts();
            self.times(50);
            counts().iter().zip(before).all(|(now, before)| now - before > 40)
        });
        waited.unwrap();
    }

    /// After this, somebody who was set a moment ago sees each packet. It comes within a second; `seen` is how many were seen.
    fn wait_seen(&self, what: &str, per_round: u64, seen: impl Fn() -> u64) -> Duration {
        const ROUNDS: u32 = 5;
        let begun = Instant::now();
        let waited = wait_for(what, SOON, || {
            let before = seen();
            self.times(ROUNDS);
            seen() - before >= per_round * u64::from(ROUNDS)
        });
        waited.unwrap_or_else(|error| panic!("{what}: {error:#}"));
        begun.elapsed()
    }
}

/// What is asked of somebody who looks: set under traffic, he sees all within a second, then each packet of the exchange once;
/// and when he has gone, the bypass is open again. The counter of a device also counts what others send, which are few.
fn check(served: Served, what: &str, world: &World, per_round: u64, mut set: impl FnMut(bool), seen: impl Fn() -> u64) {
    const ROUNDS: u32 = 200;
    const STRAY: u64 = 20;
    let [one, two] = [0, 1].map(|host| &world.hosts[host].pods[0]);
    let exchange = Exchange::new(one, two);
    if served == Served::ByUs {
        exchange.wait_bypassed(world, 0);
    }
    set(true);
    let took = exchange.wait_seen(&format!("{what}, {served:?}"), per_round, &seen);
    // The comparison that comes every ten seconds is not what found it, on a busy machine either.
    assert!(took < Duration::from_secs(3) * patience(), "{what}, {served:?}: {took:?}");
    let before = seen();
    exchange.times(ROUNDS);
    let expected = per_round * u64::from(ROUNDS);
    let seen = seen() - before;
    assert!((expected..expected + STRAY).contains(&seen), "{what}, {served:?}: {seen} of {expected}");
    set(false);
    if served == Served::ByUs {
        exchange.wait_bypassed(world, 0);
    }
}
