//! Hosts with the tunnel of the backend udp, driven as a daemon drives it.

use std::net::{Ipv4Addr, SocketAddrV4};

use flannel_agent::{
    device::Netlink,
    udp::{OVERHEAD, Peers, Settings, Tunnel, UdpError},
};
use flannel_common::vxlan::Vni;
use xtask::lab::{Host, Netns, Subnet};

/// Number and address of each host: that number's subnet is `10.5.<number>.0/24`.
pub type Lease = (u8, Ipv4Addr);

pub const PORT: u16 = flannel_agent::udp::PORT;
pub const MTU: u32 = 1500 - OVERHEAD;

/// What a host of this number is told.
pub fn settings(host: &Host, number: u8) -> Settings {
    Settings {
        device: None,
        vni: Vni::DEFAULT,
        local: SocketAddrV4::new(host.address, PORT),
        overlay: Ipv4Addr::new(10, 5, number, 0),
        network: "10.5.0.0/16".parse().unwrap(),
        mtu: MTU,
    }
}

/// The leases of others, for a host of this number.
pub fn peers(number: u8, leases: &[Lease]) -> Peers {
    let subnet = |number: u8| format!("10.5.{number}.0/24").parse().unwrap();
    let own = (subnet(number), Ipv4Addr::new(192, 168, 64, number));
    Peers::new(own, Vec::new(), leases.iter().map(|(number, host)| (subnet(*number), *host)))
}

/// Starts a tunnel in a namespace: its threads stay there.
pub fn start(netns: &Netns, settings: &Settings, peers: Peers) -> Result<Tunnel, UdpError> {
    let start = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (netlink, _events, _connection) = Netlink::open().unwrap();
            Tunnel::start(&netlink, settings, peers).await
        })
    };
    netns.within(start).unwrap()
}

/// Gives a host the pod of its subnet.
pub fn add_pod(host: &mut Host, number: u8) {
    host.netns.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
    host.add_pod_in(&Subnet { gateway: Ipv4Addr::new(10, 5, number, 1), len: 24, mtu: MTU }).unwrap();
}

/// The same, once nobody has port and device any more: a program that another test has just started may hold those of a
/// tunnel before, until it has begun (close-on-exec).
pub fn start_again(netns: &Netns, settings: &Settings, peers: &Peers) -> Tunnel {
    let mut started = None;
    let waited = xtask::progress::wait_for("port and device", std::time::Duration::from_secs(20), || {
        started = match start(netns, settings, peers.clone()) {
            Err(UdpError::PortTaken(_) | UdpError::InUse { .. }) => None,
            result => Some(result.unwrap()),
        };
        started.is_some()
    });
    waited.unwrap();
    started.unwrap()
}
