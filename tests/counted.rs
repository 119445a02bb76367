//! How counters of hosts grow while something goes on.

use std::net::SocketAddrV4;

use crate::{calls::SERVER_PORT, world::World};

/// What counts packets of a plain flow past the stack of a host: out of its pods, and into them.
const PLAIN: &[&str] = &["pod_encapsulated", "delivered"];

/// What pods of the first host ask, and what counts the packets past the stacks of the first two: out of their pods, and
/// into them.
pub struct Asked<'a> {
    pub address: SocketAddrV4,
    passed_by: [&'a [&'a str]; 2],
}

impl<'a> Asked<'a> {
    /// The server in the first pod of the second host, by its own address.
    pub fn pod(world: &World) -> Self {
        let address = SocketAddrV4::new(world.hosts[1].pods[0].address, SERVER_PORT);
        Self { address, passed_by: [PLAIN; 2] }
    }

    /// The same by a service: what is counted on the first host, which translates.
    pub const fn service(address: SocketAddrV4, passed_by: &'a [&'a str]) -> Self {
        Self { address, passed_by: [passed_by, PLAIN] }
    }

    /// The counters of what leaves pods, of both hosts.
    pub fn outward(&self) -> impl Iterator<Item = (usize, &'a str)> {
        self.counters(0)
    }

    /// The counters of what is put into pods, of both hosts.
    pub fn inward(&self) -> impl Iterator<Item = (usize, &'a str)> {
        self.counters(1)
    }

    fn counters(&self, place: usize) -> impl Iterator<Item = (usize, &'a str)> {
        let counters = self.passed_by.into_iter().enumerate();
        counters.filter_map(move |(host, counters)| Some((host, *counters.get(place)?)))
    }
}

/// Counters of hosts, from a moment on.
pub struct Counted<'a> {
    world: &'a World,
    counters: Vec<(usize, &'a str)>,
    before: Vec<(u64, u64)>,
}

impl<'a> Counted<'a> {
    /// Each counter is one of a host.
    pub fn since_now(world: &'a World, counters: impl IntoIterator<Item = (usize, &'a str)>) -> Self {
        let mut counted = Self { world, counters: counters.into_iter().collect(), before: Vec::new() };
        counted.before = counted.rows();
        counted
    }

    fn rows(&self) -> Vec<(u64, u64)> {
        self.counters.iter().map(|(host, label)| self.world.counter_row(*host, label)).collect()
    }

    fn growth(&self) -> Vec<(u64, u64)> {
        let rows = self.rows().into_iter().zip(&self.before);
        rows.map(|(after, before)| (after.0 - before.0, after.1 - before.1)).collect()
    }

    /// By how many packets each has grown.
    pub fn packets(&self) -> Vec<u64> {
        self.growth().into_iter().map(|(packets, _)| packets).collect()
    }

    /// That each has grown by so many packets.
    pub fn assert_packets(&self, least: u64, what: &str) {
        let packets = self.packets();
        assert!(packets.iter().all(|packets| *packets >= least), "{what}: {:?}: {packets:?} of {least}", self.counters);
    }

    /// That each has grown by so many bytes.
    pub fn assert_bytes(&self, least: u64, what: &str) {
        let bytes: Vec<_> = self.growth().into_iter().map(|(_, bytes)| bytes).collect();
        assert!(bytes.iter().all(|bytes| *bytes >= least), "{what}: {:?}: {bytes:?} of {least}", self.counters);
    }
}
