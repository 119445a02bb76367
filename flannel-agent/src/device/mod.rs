//! The kernel's network objects: the only room that speaks netlink.
//!
//! For any number of peers these are `flannel.<VNI>` with its address, one route for the whole Network into it and one
//! neighbour for that route's next hop.

mod blackhole;
pub mod external;
pub mod filters;
mod flannels;
pub mod next_hop;
pub mod offload;
mod overlay_route;
mod pods;
pub mod vxlan;

use std::net::Ipv4Addr;

use flannel_common::packet::Mac;
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_core::NetlinkPayload,
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{LinkAttribute, LinkLayerType, LinkMessage},
    },
};
use tokio::{sync::mpsc, task::JoinHandle};

pub use self::pods::PodLink;

/// A netlink request that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No netlink socket.
    #[error("open a netlink socket: {0}")]
    Socket(std::io::Error),
    /// A request failed.
    #[error("{call} {subject}: {cause}")]
    Call {
        /// What was asked.
        call: &'static str,
        /// Of what.
        subject: String,
        /// Why not.
        cause: String,
    },
    /// The kernel's answer lacks something.
    #[error("{0}")]
    Unexpected(String),
    /// A kernel setting could not be written.
    #[error("set {path} to {value}: {source}")]
    Sysctl {
        /// The file.
        path: &'static str,
        /// What it should hold.
        value: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

impl DeviceError {
    fn call(call: &'static str, subject: impl ToString) -> impl FnOnce(rtnetlink::Error) -> Self {
        move |error| {
            let cause = match &error {
                rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
                other => other.to_string(),
            };
            Self::Call { call, subject: subject.to_string(), cause }
        }
    }
}

/// What has changed in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// A neighbour: a next hop's MAC may be known, changed or unsure now.
    Neighbour,
    /// A route, an address or a link: next hops may be others. Or a link's queue.
    Topology,
}

/// A change that the agent's view of the kernel may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceEvent {
    /// Of what kind.
    pub kind: Changed,
    /// The link that it happened on, where it is one's.
    pub ifindex: Option<u32>,
}

impl DeviceEvent {
    /// [`None`] for what nothing depends on.
    fn of(message: &RouteNetlinkMessage) -> Option<Self> {
        use RouteNetlinkMessage as Message;
        let (kind, ifindex) = match message {
            Message::NewNeighbour(entry) | Message::DelNeighbour(entry) => {
                (Changed::Neighbour, Some(entry.header.ifindex))
            }
            Message::NewLink(link) | Message::DelLink(link) => (Changed::Topology, Some(link.header.index)),
            Message::NewAddress(address) | Message::DelAddress(address) => {
                (Changed::Topology, Some(address.header.index))
            }
            Message::NewQueueDiscipline(queue) | Message::DelQueueDiscipline(queue) => {
                (Changed::Topology, Some(queue.header.index as u32))
            }
            // Of the group that tells of queues. Filters are looked at in turn; where the agent attaches programs as filters, each
            // such look is told here, and would be the reason for the next.
            Message::NewTrafficFilter(_)
            | Message::DelTrafficFilter(_)
            | Message::NewTrafficChain(_)
            | Message::DelTrafficChain(_)
            | Message::NewTrafficClass(_)
            | Message::DelTrafficClass(_) => return None,
            _ => (Changed::Topology, None),
        };
        Some(Self { kind, ifindex })
    }
}

/// A link as the agent needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
    /// In bytes.
    pub mtu: u32,
    /// [`None`] for a device without a link-layer header.
    pub mac: Option<Mac>,
}

impl Link {
    fn from_message(message: &LinkMessage) -> Self {
        let mut link = Self { name: String::new(), index: message.header.index, mtu: 0, mac: None };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(mac) if message.header.link_layer_type == LinkLayerType::Ether => {
                    link.mac = mac.as_slice().try_into().ok();
                }
                _ => {}
            }
        }
        link
    }
}

/// A connection to the kernel of the network namespace that it was opened in.
#[derive(Clone)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens a netlink socket that also hears of changes.
    ///
    /// # Errors
    /// [`DeviceError::Socket`].
    pub fn open() -> Result<(Self, mpsc::Receiver<DeviceEvent>, JoinHandle<()>), DeviceError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Tc,
        ];
        let (connection, handle, mut messages) = new_multicast_connection(&groups).map_err(DeviceError::Socket)?;
        let (sender, receiver) = mpsc::channel(1024);
        let connection = tokio::spawn(async move {
            let forward = async {
                while let Some((message, _)) = messages.next().await {
                    let event = match message.payload {
                        NetlinkPayload::InnerMessage(message) => DeviceEvent::of(&message),
                        // The kernel had more to say than the socket holds.
                        NetlinkPayload::Overrun(_) => Some(DeviceEvent { kind: Changed::Topology, ifindex: None }),
                        _ => None,
                    };
                    let Some(event) = event else { continue };
                    // Where the queue is full, the periodic comparison makes up for it.
                    let _lost = sender.try_send(event);
                }
            };
            tokio::join!(connection, forward);
        });
        Ok((Self { handle }, receiver, connection))
    }

    /// The link of that name, if there is one.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn link_by_name(&self, name: &str) -> Result<Option<LinkMessage>, DeviceError> {
        let mut links = self.handle.link().get().match_name(name).execute();
        match links.try_next().await {
            Ok(link) => Ok(link),
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::ENODEV => Ok(None),
            Err(error) => Err(DeviceError::call("look up the link", name)(error)),
        }
    }

    /// All links.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn links(&self) -> Result<Vec<Link>, DeviceError> {
        let links = self.handle.link().get().execute();
        links
            .map_ok(|message| Link::from_message(&message))
            .try_collect()
            .await
            .map_err(DeviceError::call("list", "links"))
    }

    /// The IPv4 addresses of all links, the best of each link first: global before link-local, permanent before
    /// dynamic (flannel: pkg/ip/iface.go).
    async fn addresses(&self) -> Result<Vec<(u32, Ipv4Addr)>, DeviceError> {
        let messages: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(DeviceError::call("list", "addresses"))?;
        let mut addresses: Vec<_> = messages.iter().filter_map(usable_address).collect();
        addresses.sort_by_key(|(rank, ..)| *rank);
        Ok(addresses.into_iter().map(|(_, index, address)| (index, address)).collect())
    }
}

fn usable_address(message: &AddressMessage) -> Option<((bool, bool), u32, Ipv4Addr)> {
    let mut local = None;
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(std::net::IpAddr::V4(address)) => local = Some(*address),
            AddressAttribute::Flags(value) => flags = *value,
            _ => {}
        }
    }
    let address = local.filter(|_| !flags.contains(AddressFlags::Deprecated))?;
    let is_global = message.header.scope == AddressScope::Universe && !address.is_link_local();
    let rank = (!is_global, !flags.contains(AddressFlags::Permanent));
    Some((rank, message.header.index, address))
}

/// Lets the host forward between pods and overlay. `false` where it did already.
///
/// # Errors
/// [`DeviceError::Sysctl`].
pub fn enable_forwarding() -> Result<bool, DeviceError> {
    const PATH: &str = "/proc/sys/net/ipv4/ip_forward";
    // Read first: where it is on already, a read-only /proc/sys is no obstacle.
    if std::fs::read_to_string(PATH).is_ok_and(|value| value.trim() == "1") {
        return Ok(false);
    }
    let written = std::fs::write(PATH, "1");
    written.map(|()| true).map_err(|source| DeviceError::Sysctl { path: PATH, value: "1", source })
}

/// The range that the kernel takes source ports from (`net.ipv4.ip_local_port_range`); its default where it can't be
/// read.
pub fn local_ports() -> flannel_common::flow::SourcePorts {
    const DEFAULT: flannel_common::flow::SourcePorts = flannel_common::flow::SourcePorts { min: 32768, max: 60999 };
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = text.split_whitespace().map(str::parse::<u16>);
    match (ports.next(), ports.next()) {
        (Some(Ok(min)), Some(Ok(max))) if min < max => flannel_common::flow::SourcePorts { min, max },
        _ => DEFAULT,
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::tc::TcMessage;

    use super::*;

    #[test]
    fn a_queue_is_news_and_a_filter_is_none() {
        let message = TcMessage::default();
        assert!(DeviceEvent::of(&RouteNetlinkMessage::NewQueueDiscipline(message.clone())).is_some());
        assert_eq!(DeviceEvent::of(&RouteNetlinkMessage::NewTrafficFilter(message)), None);
    }
}
