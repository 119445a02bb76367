//! The tunnel itself: starting it, whom it reaches, and what it counts.

use std::{collections::BTreeMap, net::SocketAddrV4};

use ipnet::Ipv4Net;
use tokio::time::Instant;

use super::{super::SILENCE, TUNNEL, UserSpace};
use crate::{
    lease::LeaseTable,
    status::TunnelStatus,
    udp::{Event, Peers, Settings, Tunnel, UdpError},
};

impl UserSpace<'_> {
    /// Whether packets arrive from the host behind a subnet.
    pub(in crate::daemon) fn is_heard(&self, subnet: Ipv4Net) -> bool {
        let silence = self.tunnel.as_ref().and_then(|tunnel| tunnel.silence_of(subnet));
        silence.is_some_and(|silence| silence < SILENCE)
    }

    /// Takes the peers as they are now.
    pub(in crate::daemon) fn set_peers(&self, table: &LeaseTable) {
        if let Some(tunnel) = &self.tunnel {
            tunnel.set_peers(self.peers(table));
        }
    }

    fn peers(&self, table: &LeaseTable) -> Peers {
        let leases = table.iter().map(|(subnet, peer)| (*subnet, peer.public_ip));
        let own = (self.host.lease.key.subnet, self.host.uplink.external.address);
        Peers::new(own, self.host.cli.accept_source.clone(), leases)
    }

    pub(super) fn settings(&self) -> Settings {
        Settings {
            device: self.device.as_ref().map(|device| device.name.clone()),
            vni: self.host.backend.vni(),
            local: SocketAddrV4::new(self.host.uplink.external.address, self.host.backend.port()),
            overlay: self.host.lease.key.subnet.network(),
            network: self.host.network.network,
            mtu: self.host.backend.mtu(),
        }
    }

    /// Starts the tunnel, by the device that there is.
    pub(super) async fn start(&mut self, table: &LeaseTable) -> Result<(), UdpError> {
        self.counted = self.counts();
        // First: port and device are its.
        self.tunnel = None;
        self.tunnel = Some(Tunnel::start(&self.host.netlink, &self.settings(), self.peers(table)).await?);
        self.tell_counts();
        Ok(())
    }

    pub(super) async fn restart(&mut self, table: &LeaseTable) {
        let started = self.start(table).await;
        let problem = started.as_ref().err().map(|error| format!("nothing is carried: {error}"));
        self.host.status.waiting(TUNNEL, problem);
        if started.is_ok() {
            self.ensure_or_say().await;
        }
    }

    /// What became of packets since the agent's start.
    fn counts(&self) -> BTreeMap<String, u64> {
        let Some(tunnel) = &self.tunnel else { return self.counted.clone() };
        let count = |event: &Event| {
            let before = self.counted.get(event.label()).copied().unwrap_or(0);
            (event.label().to_owned(), before + tunnel.count(*event))
        };
        Event::ALL.iter().map(count).collect()
    }

    pub(super) fn tell_counts(&mut self) {
        self.count_at = Instant::now();
        let device = self.tunnel.as_ref().map(|tunnel| tunnel.device().to_owned()).unwrap_or_default();
        let tunnel = TunnelStatus { device, port: self.host.backend.port(), packets: self.counts() };
        self.host.status.tunnel(tunnel);
    }
}
