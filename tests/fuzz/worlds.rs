//! The worlds that the programs are fuzzed in: network configs, leases, and what the kernel has.

use flannel_common::{
    flow::SourcePorts,
    maps::Config,
    model::{Excluded, Lease, Overlay, Peer, Route, World},
};

use crate::{comparison::BYPASS_TIME, frames::*};

/// The worlds that programs are loaded for.
pub const WORLDS: [fn() -> World; 12] = [
    || World { config: config(), leases: leases(), ..routed() },
    || World { config: Config { bypass_time: 0, ..config() }, leases: leases(), ..routed() },
    small_subnets,
    || World { config: Config { slots: 0, ..config() }, leases: leases(), overlay: Overlay::Unknown, ..routed() },
    || World { config: config(), leases: leases(), ..routed() },
    || World { config: config(), leases: leases(), overlay: Overlay::Gone, ..routed() },
    || World { excluded: excluded(), leases: leases(), ..routed() },
    || with_flags(Config::QUEUED | Config::LEFT_IN_TUNNEL),
    || with_flags(Config::SHOWN),
    || World { config: Config { flags: Config::DIRECT, ..config() }, leases: leases(), ..routed() },
    || with_flags(Config::DIRECT | Config::QUEUED | Config::SHOWN),
    || World { config: Config { flags: Config::DIRECT | Config::NO_TUNNEL, ..config() }, leases: leases(), ..routed() },
];

/// Of what is not bypassed.
fn with_flags(flags: u32) -> World {
    World { config: Config { bypass_time: 0, flags, ..config() }, leases: leases(), ..routed() }
}

/// Of each end under each name, and one of another protocol.
fn excluded() -> Excluded {
    const TCP: u32 = 6;
    const UDP: u32 = 17;
    Excluded {
        addresses: vec![([10, 5, 2, 0], 28), ([10, 96, 0, 10], 32), ([10, 5, 1, 64], 26)],
        ports: vec![(TCP, 5353, 5354), (UDP, 0xffff, 0xffff), (UDP, 80, 80)],
    }
}

/// MAC of `flannel.<VNI>` in these: not the one that the programs were loaded for.
pub const DEVICE_MAC: Mac = [0x0a, 0, 0, 0, 0, 0x77];
/// Of no host.
pub const FOREIGN_MAC: Mac = [0x0a, 0, 0, 0, 0, 0x33];

/// A kernel with an agent's route, one that flannel made for each of some peers, and routes of an operator's.
fn routed() -> World {
    let by = |network, len, next_hop, next_hop_mac| Route { network, len, next_hop: Some(next_hop), next_hop_mac };
    let routes = vec![
        by([10, 5, 0, 0], 16, [169, 254, 1, 1], Some(NEXT_HOP_MAC)),
        // A peer as the leases know it, one that came back with another MAC, one that they do not know.
        by([10, 5, 2, 0], 24, [10, 5, 2, 0], Some(VTEP_TWO_MAC)),
        by([10, 5, 3, 0], 24, [10, 5, 3, 0], Some(FOREIGN_MAC)),
        by([10, 5, 9, 0], 24, [10, 5, 9, 0], Some(FOREIGN_MAC)),
        // To part of this host's own subnet.
        by([10, 5, 1, 192], 26, [10, 5, 9, 0], Some(FOREIGN_MAC)),
        // Behind hosts: a known one, one with another MAC, an unknown one, one without a MAC, and an agent's next hops.
        by([10, 20, 0, 0], 16, [10, 5, 2, 0], Some(VTEP_TWO_MAC)),
        by([10, 21, 0, 0], 16, [10, 5, 3, 0], Some(FOREIGN_MAC)),
        by([10, 22, 0, 0], 16, [10, 5, 9, 0], Some(FOREIGN_MAC)),
        by([10, 23, 0, 0], 16, [10, 5, 78, 0], None),
        by([10, 24, 0, 0], 16, [10, 5, 79, 0], Some(NEXT_HOP_MAC)),
        by([10, 25, 0, 0], 16, [169, 254, 1, 1], Some(NEXT_HOP_MAC)),
        Route { network: [10, 26, 0, 0], len: 16, next_hop: None, next_hop_mac: None },
    ];
    let accepted = vec![([10, 27, 0, 0], 16), ([10, 5, 2, 0], 23), ([192, 168, 64, 0], 30)];
    World {
        config: config(),
        leases: Vec::new(),
        accepted,
        overlay: Overlay::Is(DEVICE_MAC),
        routes,
        excluded: Excluded::default(),
    }
}

fn config() -> Config {
    Config {
        bypass_time: BYPASS_TIME.as_nanos() as u64,
        network: 0x0a05_0000,
        slot_shift: 8,
        slots: 256,
        subnet: 0x0a05_0100,
        subnet_mask: 0xffff_ff00,
        vtep_address: u32::from_be_bytes(NODE_ONE),
        vni: 1,
        mtu: 1450,
        underlay_header_len: 14,
        underlay_mac: NODE_ONE_MAC,
        port: 8472,
        vtep_mac: VTEP_ONE_MAC,
        source_ports: SourcePorts { min: 32768, max: 60999 },
        flags: 0,
    }
}

const TWO: Peer = Peer {
    address: NODE_TWO,
    vtep_mac: VTEP_TWO_MAC,
    next_hop_mac: Some(NODE_TWO_MAC),
    has_route: true,
    is_on_link: true,
    smaller_mtu: None,
};
const THREE: Peer = Peer {
    address: NODE_THREE,
    vtep_mac: VTEP_THREE_MAC,
    next_hop_mac: None,
    has_route: true,
    is_on_link: true,
    smaller_mtu: None,
};
const FOUR: Peer = Peer {
    address: [192, 168, 64, 4],
    vtep_mac: [0x0a, 0, 0, 0, 0, 4],
    next_hop_mac: None,
    has_route: false,
    is_on_link: false,
    smaller_mtu: None,
};
/// Behind a router, and a smaller MTU.
const FIVE: Peer = Peer {
    address: [192, 168, 65, 5],
    vtep_mac: [0x0a, 0, 0, 0, 0, 5],
    next_hop_mac: Some(NODE_TWO_MAC),
    has_route: true,
    is_on_link: false,
    smaller_mtu: Some(120),
};

const fn lease(network: [u8; 4], len: u32, peer: Peer) -> Lease {
    Lease { network, len, peer }
}

/// In the grid and off it; one claims part of this host's own subnet.
fn leases() -> Vec<Lease> {
    vec![
        lease([10, 5, 2, 0], 24, TWO),
        lease([10, 5, 3, 0], 24, THREE),
        lease([10, 5, 5, 0], 24, FOUR),
        lease([10, 5, 6, 0], 24, FIVE),
        lease([10, 5, 4, 128], 25, TWO),
        lease([10, 5, 4, 160], 27, THREE),
        lease([10, 5, 2, 128], 25, THREE),
        lease([10, 5, 1, 128], 25, TWO),
        lease([172, 30, 0, 0], 16, TWO),
        lease([172, 30, 7, 0], 24, FOUR),
    ]
}

/// Subnets that end within an octet, another VNI and port, a small MTU, one source port, and a lease of everything.
fn small_subnets() -> World {
    let config = Config {
        network: 0xac10_0000,
        slot_shift: 6,
        slots: 1 << 14,
        subnet: 0xac10_0140,
        subnet_mask: 0xffff_ffc0,
        vni: 9_999_999,
        mtu: 200,
        port: 4789,
        source_ports: SourcePorts { min: 1, max: 2 },
        ..config()
    };
    let leases = vec![
        lease([172, 16, 1, 0], 26, TWO),
        lease([172, 16, 1, 128], 26, THREE),
        lease([172, 16, 2, 0], 26, FOUR),
        lease([172, 16, 3, 4], 30, TWO),
        lease([0, 0, 0, 0], 0, THREE),
    ];
    World { config, leases, accepted: vec![([0, 0, 0, 0], 0)], ..routed() }
}
