//! Hosts of flannel's, made with plain commands.

use std::{fs, net::Ipv4Addr, process::Command};

use anyhow::{Context as _, Result};

use super::{Host, Lease, LeaseStore, PREFIX, Store, Subnet};
use crate::process::output;

/// A host that the kernel's vxlan device serves.
#[derive(Clone, Debug)]
pub struct KernelVxlan {
    /// Its subnet.
    pub subnet: Subnet,
    /// MAC of its vxlan device.
    pub mac: String,
}

impl Host {
    /// Makes this host one of flannel's, with plain commands: the kernel's vxlan device, and a lease in the store.
    ///
    /// # Errors
    /// Where a command fails.
    pub fn become_kernel_vxlan(&mut self, store: &Store, third_octet: u8) -> Result<KernelVxlan> {
        let subnet = Ipv4Addr::new(10, 5, third_octet, 0);
        let address = self.address;
        let mac = self.add_kernel_vxlan(subnet)?;
        let value = format!(
            r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        );
        // "lease 694d7f0d4a1b4a04 granted with TTL(86400s)"
        let granted = store.etcdctl(&["lease", "grant", "86400"])?;
        let lease = granted.split_whitespace().nth(1).context("etcdctl granted no lease")?;
        let lease = format!("--lease={lease}");
        store.etcdctl(&["put", &lease, "--", &format!("{PREFIX}/subnets/{subnet}-24"), &value])?;
        let gateway = Ipv4Addr::from_bits(subnet.to_bits() + 1);
        Ok(KernelVxlan { subnet: Subnet { gateway, len: 24, mtu: 1450 }, mac })
    }

    /// Makes the kernel's vxlan device as flannel does, for a host that leases a subnet; its MAC.
    ///
    /// # Errors
    /// Where a command fails.
    pub fn add_kernel_vxlan(&self, subnet: Ipv4Addr) -> Result<String> {
        let address = self.address;
        // nolearning and dev as flannel does (pkg/backend/vxlan/device.go).
        self.netns
            .ip(&format!("link add flannel.1 type vxlan id 1 dev eth0 local {address} dstport 8472 nolearning"))?;
        self.netns.ip("link set flannel.1 mtu 1450 up")?;
        self.netns.ip(&format!("address add {subnet}/32 dev flannel.1"))?;
        self.netns.exec("sysctl -qw net.ipv4.ip_forward=1")?;
        let links = self.netns.ip_json("link show flannel.1")?;
        Ok(links[0]["address"].as_str().context("flannel.1 has no MAC")?.to_owned())
    }

    /// Makes of this host what `other` would be if flannel served it: its device, with all peers of the store's. Nobody is
    /// told of it.
    ///
    /// # Errors
    /// Where a command fails.
    pub fn imitate_by_flannel(&self, other: &Self, store: &dyn LeaseStore) -> Result<()> {
        let own = Ipv4Addr::from_bits(other.subnet()?.gateway.to_bits() - 1);
        self.add_kernel_vxlan(own)?;
        self.add_kernel_peers(store, own)
    }

    /// Programs all peers of the store's but this host itself.
    fn add_kernel_peers(&self, store: &dyn LeaseStore, own: Ipv4Addr) -> Result<()> {
        let peers = store.leases()?.into_iter().filter(|lease| lease.subnet != own);
        peers.into_iter().try_for_each(|Lease { subnet, vtep_mac, public_ip, .. }| {
            self.add_kernel_peer(subnet, &vtep_mac, public_ip)
        })
    }

    /// Takes this host over as flannel's daemon does where our agent has stopped: it keeps the device that it finds, writes
    /// `subnet.env` with the same content, and then programs the store's peers.
    ///
    /// # Errors
    /// Where a command fails.
    pub fn take_over_by_flannel(&self, store: &dyn LeaseStore) -> Result<()> {
        self.write_subnet_env_as_flannel()?;
        let own = Ipv4Addr::from_bits(self.subnet()?.gateway.to_bits() - 1);
        self.add_kernel_peers(store, own)
    }

    /// Writes `subnet.env` anew as flannel does: a file of its own, in the place of the one before (pkg/subnet/writefile_other.go).
    ///
    /// # Errors
    /// Where the file can't be read or written.
    pub fn write_subnet_env_as_flannel(&self) -> Result<()> {
        let path = self.run_dir().join("subnet.env");
        let new = path.with_file_name(".subnet.env.flannel");
        fs::copy(&path, &new).with_context(|| format!("copy {path:?}"))?;
        fs::rename(&new, &path).with_context(|| format!("rename {new:?}"))
    }

    /// Programs a peer as flannel does: neighbour, forwarding entry, route (pkg/backend/vxlan/vxlan_network.go).
    ///
    /// # Errors
    /// Where a command fails.
    pub fn add_kernel_peer(&self, peer_subnet: Ipv4Addr, peer_mac: &str, peer_address: Ipv4Addr) -> Result<()> {
        let netns = self.netns.name();
        self.netns.ip(&format!("neigh replace {peer_subnet} lladdr {peer_mac} dev flannel.1 nud permanent"))?;
        let fdb = format!("fdb replace {peer_mac} dev flannel.1 dst {peer_address} self permanent");
        output(Command::new("bridge").args(["-n", netns]).args(fdb.split_whitespace()))?;
        self.netns.ip(&format!("route replace {peer_subnet}/24 via {peer_subnet} dev flannel.1 onlink")).map(drop)
    }

    /// Programs the peer that a lease in the store names.
    ///
    /// # Errors
    /// Where the store has none, or a command fails.
    pub fn add_kernel_peer_from(&self, store: &dyn LeaseStore, third_octet: u8) -> Result<()> {
        let subnet = Ipv4Addr::new(10, 5, third_octet, 0);
        let lease = store.leases()?.into_iter().find(|lease| lease.subnet == subnet);
        let Lease { vtep_mac, public_ip, .. } = lease.with_context(|| format!("nobody has the lease {subnet}"))?;
        self.add_kernel_peer(subnet, &vtep_mac, public_ip)
    }
}
