//! Worlds that differ in who carries the overlay only.

use crate::world::World;

/// Who carries the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// The kernel's vxlan device, set up as flannel does it.
    Kernel,
    /// The agent, and everything takes the stack.
    Slow,
    /// The agent.
    Fast,
}

impl Overlay {
    /// A host with a pod, and one with two, which reach each other.
    pub fn world(self) -> World {
        let mut world = match self {
            Self::Kernel => World::new(2),
            Self::Slow => World::new(2).ready(&["--bypass=off"]),
            Self::Fast => World::new(2).ready(&[]),
        };
        if self == Self::Kernel {
            let octets = [200, 201];
            let kernels = [0, 1].map(|host| {
                let kernel = world.hosts[host].become_kernel_vxlan(&world.store, octets[host]).unwrap();
                world.hosts[host].add_pod_in(&kernel.subnet).unwrap();
                kernel
            });
            world.hosts[1].add_pod_in(&kernels[1].subnet).unwrap();
            world.hosts[0].add_kernel_peer_from(&world.store, octets[1]).unwrap();
            world.hosts[1].add_kernel_peer_from(&world.store, octets[0]).unwrap();
        } else {
            world.hosts[1].add_pod().unwrap();
            world.wait_pods(1);
        }
        world.wait_connected(0, 1);
        world
    }
}
