//! Hosts with pods on an underlay, in network namespaces, and a store.
//!
//! ```text
//!  <lab>-underlay: br0 192.168.64.254, etcd or an API server
//!     │ node1                      │ node2
//!  <lab>-node1: eth0 .1         <lab>-node2: eth0 .2
//!     cni0, flannel.1              cni0, flannel.1
//!     │ pod1      │ pod2           │ pod1     │ pod2
//!  <lab>-node1-pod1: eth0        <lab>-node2-pod1: eth0
//! ```
//!
//! Where each frame's cost counts, [`Lab::cable`] makes two hosts with a cable between them in the bridge's stead.
//!
//! Everything is made with `ip`, and gone when the [`Lab`] is dropped.

mod api_server;
mod backend;
pub mod capture;
pub mod cni;
mod forward;
mod host;
mod kernel_vxlan;
mod lease_store;
mod lock;
mod netns;
pub mod servers;
pub mod services;
mod store;

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

pub use self::{
    api_server::{ApiServer, User},
    backend::Backend,
    forward::Forward,
    host::{Host, Pod, Subnet},
    kernel_vxlan::KernelVxlan,
    lease_store::{Kubernetes, Lease, LeaseStore, StoreKind},
    lock::Lock,
    netns::Netns,
    store::Store,
};

/// The key prefix that flannel uses by default.
pub const PREFIX: &str = "/coreos.com/network";
/// The underlay's addresses are in this /24.
const UNDERLAY: [u8; 3] = [192, 168, 64];
/// Those of hosts on a cable are in this one.
const CABLE: [u8; 3] = [192, 168, 65];
/// The bridge's, and the store's.
const GATEWAY: u8 = 254;

/// An underlay with what is on it.
pub struct Lab {
    /// What all names begin with.
    name: String,
    /// Folder for files, and below it a bpf file system.
    directory: PathBuf,
    /// The namespace that connects the hosts, with the store.
    pub underlay: Netns,
}

impl Lab {
    /// An underlay without hosts.
    ///
    /// # Errors
    /// Where a namespace, a link or a mount can't be made: without root, above all.
    pub fn new(name: &str, directory: &Path) -> Result<Self> {
        anyhow::ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root: run this as root");
        fs::create_dir_all(directory.join("bpf")).with_context(|| format!("create {directory:?}"))?;
        mount(Some("bpf"), &directory.join("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount a bpf file system on {:?}", directory.join("bpf")))?;
        let underlay = Netns::create(&format!("{name}-underlay"));
        let lab = match underlay {
            Ok(underlay) => Self { name: name.to_owned(), directory: directory.to_owned(), underlay },
            Err(error) => {
                unmount(directory);
                return Err(error);
            }
        };
        lab.underlay.ip("link set lo up")?;
        // With a MAC of its own: a bridge without takes its lowest port's, and another one with the next host, which leaves
        // the hosts before it with a neighbour that is none.
        lab.underlay.ip("link add br0 address 02:00:00:00:00:fe type bridge")?;
        lab.underlay.ip("link set br0 up")?;
        lab.underlay.ip(&format!("address add {}/24 dev br0", address(GATEWAY)))?;
        Ok(lab)
    }

    /// The folder for files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A folder on the bpf file system.
    pub fn bpf(&self, name: &str) -> PathBuf {
        self.directory.join("bpf").join(name)
    }

    /// Starts a store on the underlay.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn store(&self) -> Result<Store> {
        Store::start(&self.underlay, address(GATEWAY), &self.directory)
    }

    /// Starts an API server on the underlay: the double, or the real one.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn api_server(&self) -> Result<ApiServer> {
        ApiServer::start(&self.underlay, address(GATEWAY), &self.directory, &[])
    }

    /// Connects a host, with the address `192.168.64.<number>`.
    ///
    /// # Errors
    /// Where a link can't be made.
    pub fn host(&self, name: &str, number: u8) -> Result<Host> {
        let netns = Netns::create(&format!("{}-{name}", self.name))?;
        let port = format!("{name:.15}");
        self.underlay.ip(&format!("link add {port} type veth peer name eth0 netns {}", netns.name()))?;
        self.underlay.ip(&format!("link set {port} master br0 up"))?;
        netns.ip("link set lo up")?;
        netns.ip(&format!("address add {}/24 dev eth0", address(number)))?;
        netns.ip("link set eth0 up")?;
        netns.ip(&format!("route add default via {}", address(GATEWAY)))?;
        let port = (self.underlay.name().to_owned(), port);
        Ok(Host::new(netns, name, address(number), port, &self.directory, self.bpf(name)))
    }

    /// Two hosts with a cable between their `eth0`, `192.168.65.<number>`. The store is reached by `eth1`,
    /// `192.168.64.<number>`, which is on the bridge; agents on them are told `--iface=eth0`.
    ///
    /// # Errors
    /// Where a link can't be made.
    pub fn cable(&self, names: [&str; 2], numbers: [u8; 2]) -> Result<[Host; 2]> {
        let [first, second] = names.map(|name| Netns::create(&format!("{}-{name}", self.name)));
        let (first, second) = (first?, second?);
        first.ip(&format!("link add eth0 type veth peer name eth0 netns {}", second.name()))?;
        let ports = [second.name().to_owned(), first.name().to_owned()].map(|netns| (netns, "eth0".to_owned()));
        let [first_port, second_port] = ports;
        Ok([
            self.on_cable(first, names[0], numbers[0], first_port)?,
            self.on_cable(second, names[1], numbers[1], second_port)?,
        ])
    }

    fn on_cable(&self, netns: Netns, name: &str, number: u8, port: (String, String)) -> Result<Host> {
        let bridge_port = format!("{name:.15}");
        self.underlay.ip(&format!("link add {bridge_port} type veth peer name eth1 netns {}", netns.name()))?;
        self.underlay.ip(&format!("link set {bridge_port} master br0 up"))?;
        let [a, b, c] = CABLE;
        let on_cable = Ipv4Addr::new(a, b, c, number);
        netns.ip(&format!("address add {on_cable}/24 dev eth0"))?;
        netns.ip(&format!("address add {}/24 dev eth1", address(number)))?;
        for device in ["lo", "eth0", "eth1"] {
            netns.ip(&format!("link set {device} up"))?;
        }
        Ok(Host::new(netns, name, on_cable, port, &self.directory, self.bpf(name)))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        unmount(&self.directory);
    }
}

/// The underlay address of a number.
pub fn address(number: u8) -> Ipv4Addr {
    let [a, b, c] = UNDERLAY;
    Ipv4Addr::new(a, b, c, number)
}

/// Removes what a lab of that name left behind, if it could not do so itself.
///
/// # Errors
/// Where the namespaces can't be listed.
pub fn remove_leftovers(name: &str, directory: &Path) -> Result<()> {
    for netns in Netns::list(&format!("{name}-"))? {
        netns.end_processes()?;
    }
    unmount(directory);
    match fs::remove_dir_all(directory) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove {directory:?}")),
    }
}

fn unmount(directory: &Path) {
    // Lazily: a process that is just ending may still look at it.
    let _gone = umount2(&directory.join("bpf"), MntFlags::MNT_DETACH);
}
