use std::net::SocketAddrV4;

use xtask::lab::services::ServiceRules;

use crate::{
    calls::{Caller, Connections, SERVER_PORT},
    services::{EXCHANGE, SERVICE, service, world},
    sockets::Pattern,
};

const RULES: ServiceRules = ServiceRules::Iptables;
/// From here on, sequence numbers seem to lie before those that conntrack last took note of (`before`, net/tcp.h): it leaves
/// its windows as they are where a packet is outside of them, and takes a RST from there for invalid
/// (net/netfilter/nf_conntrack_proto_tcp.c).
const WRAPPED: usize = 1 << 31;

#[test]
fn a_reset_is_heard_however_much_went_past_the_stack() {
    let (world, pattern) = (world(2), Pattern::new());
    let (client, server) = (&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    RULES.set(&world.hosts[0], &service(SERVICE, &[server])).unwrap();
    for asked in [SocketAddrV4::new(server.address, SERVER_PORT), SERVICE] {
        let what = format!("{asked}");
        let caller = Caller { netns: &client.netns, port: 0, asked, seen_as: client.address };
        let connections = Connections::new(&what, &[server], &[caller]);
        let mut bytes = 0;
        while bytes <= WRAPPED {
            bytes += connections.exchange(EXCHANGE, &pattern);
        }
        connections.reset();
    }
}
