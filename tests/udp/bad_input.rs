//! What stands in the way of a tunnel: one clear error each, and nothing half-made.

use std::net::SocketAddrV4;

use flannel_agent::udp::{Settings, UdpError};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::socket::{setsockopt, sockopt::ReusePort},
};
use xtask::lab::Host;

use super::{
    Hosts, PORT,
    engines::{peers, settings, start, start_again},
};
use crate::sockets::socket_in;

/// Names of all links, and all routes, whether or not somebody carries their packets.
fn network(host: &Host) -> (Vec<String>, String) {
    let links = host.netns.ip_json("link show").unwrap();
    let names = links.as_array().unwrap().iter().map(|link| link["ifname"].as_str().unwrap().to_owned());
    (names.collect(), host.netns.ip("route show").unwrap().replace("linkdown ", ""))
}

/// That a tunnel is refused with these words, and leaves nothing behind.
fn assert_refused(host: &Host, settings: &Settings, words: &[&str]) -> UdpError {
    let before = network(host);
    let error = start(&host.netns, settings, peers(1, &[])).unwrap_err();
    let said = error.to_string();
    assert!(words.iter().all(|word| said.contains(word)) && !said.contains('\n'), "{said}");
    assert_eq!(network(host), before, "{said}");
    error
}

#[test]
fn a_port_that_is_taken() {
    let hosts = Hosts::new(1);
    let host = &hosts.hosts[0];
    let words = ["UDP port 8285 of 192.168.64.1 is taken", "ss -lunp"];
    {
        let _tunnel = hosts.start(1);
        assert_refused(host, &settings(host, 1), &words);
    }
    for shares in [false, true] {
        let socket = socket_in(&host.netns, SocketAddrV4::new(host.address, PORT));
        setsockopt(&socket, ReusePort, &shares).unwrap();
        assert_refused(host, &settings(host, 1), &words);
    }
    // By the device that the first one has left.
    let again = Settings { device: Some("flannel0".to_owned()), ..settings(host, 1) };
    start_again(&host.netns, &again, &peers(1, &[]));
}

#[test]
fn an_address_that_is_none_of_the_hosts() {
    let hosts = Hosts::new(1);
    let host = &hosts.hosts[0];
    let elsewhere = Settings { local: SocketAddrV4::new([192, 168, 64, 9].into(), PORT), ..settings(host, 1) };
    assert_refused(host, &elsewhere, &["192.168.64.9 is no address of this host"]);
}

#[test]
fn a_name_that_is_taken() {
    let hosts = Hosts::new(1);
    let host = &hosts.hosts[0];
    host.netns.ip("link add flannel7 type bridge").unwrap();
    host.netns.ip("tuntap add flannel8 mode tap").unwrap();
    host.netns.ip("tuntap add flannel9 mode tun").unwrap();
    for name in ["flannel7", "flannel8", "flannel9"] {
        let taken = Settings { device: Some(name.to_owned()), ..settings(host, 1) };
        assert_refused(host, &taken, &[name, "no TUN device of this agent's", "ip link delete"]);
    }
    let tunnel = hosts.start(1);
    assert_eq!(tunnel.device(), "flannel0");
    let same = Settings {
        device: Some("flannel0".to_owned()),
        local: SocketAddrV4::new(host.address, 9999),
        ..settings(host, 1)
    };
    assert_refused(host, &same, &["flannel0", "in use by another program"]);
    let long = Settings { device: Some("flannel0123456789".to_owned()), ..same };
    assert_refused(host, &long, &["flannel0123456789"]);
}

#[test]
fn no_tun_devices() {
    let hosts = Hosts::new(1);
    let host = &hosts.hosts[0];
    let before = network(host);
    let settings = settings(host, 1);
    let said = host.netns.within(|| {
        // This thread's view of the files.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("none"), "/dev/net", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let started = runtime.block_on(async {
            let (netlink, _events, _connection) = flannel_agent::device::Netlink::open().unwrap();
            flannel_agent::udp::Tunnel::start(&netlink, &settings, peers(1, &[])).await
        });
        started.unwrap_err().to_string()
    });
    let said = said.unwrap();
    assert!(said.contains("open /dev/net/tun") && said.contains("modprobe tun"), "{said}");
    assert_eq!(network(host), before);
}
