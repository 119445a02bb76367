//! The kernel's network objects: the only room that speaks netlink.
//!
//! For any number of peers these are `flannel.<VNI>` with its address, the fewest routes into it that there can be and one
//! neighbour for their next hop.

mod addresses;
mod blackhole;
mod census;
mod events;
pub mod external;
pub mod filters;
mod flannels;
pub mod host_routes;
pub mod link_route;
pub mod next_hop;
pub mod observers;
pub mod offload;
pub mod overlay_route;
mod pods;
mod raw;
pub mod raw_frame;
mod raw_route;
pub mod routing_rules;
pub mod stack_route;
mod sweep;
pub mod tun;
mod underlay_links;
pub mod vxlan;

use std::sync::{Arc, RwLock};

use flannel_common::{packet::Mac, vxlan::Vni};
use futures_util::{StreamExt as _, TryStream, TryStreamExt as _};
use ipnet::Ipv4Net;
use nix::fcntl::{Flock, FlockArg};
use rtnetlink::{
    Handle, MulticastGroup, new_connection, new_connection_with_strict_check, new_multicast_connection,
    packet_core::NetlinkPayload,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::{LinkAttribute, LinkLayerType, LinkMessage},
    },
};
use tokio::{
    sync::{Mutex, broadcast, mpsc},
    task::JoinHandle,
};

pub use self::{
    addresses::AddressKind,
    census::Census,
    events::LinkSocket,
    pods::{PodLink, PodNetwork},
    underlay_links::UnderlayCriteria,
};
use self::{events::RawEvents, host_routes::Interest};
use crate::sysctl;

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
    /// Another vxlan device has its place.
    #[error(
        "{error}: the vxlan device {other} has the UDP port {port}, with the same VNI {vni} or with settings that can't be had beside \
         this one's; remove it with `ip link delete {other}`, or give this network another VNI or Port in its config"
    )]
    Displaced {
        /// What the kernel refused.
        error: Box<Self>,
        /// The name of the other.
        other: String,
        /// VNI of the one that was refused.
        vni: Vni,
        /// UDP port of both.
        port: u16,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Changed {
    /// A queueing discipline or a filter of somebody else's.
    TrafficControl,
    /// A neighbour: a next hop's MAC may be known, changed or unsure now.
    Neighbour,
    /// A routing rule, or a route to a peer or to something else that this host needs: it may have another next hop.
    Way,
    /// A route into the overlay, or one that may be beside it. To look at these costs by all routes of the host: the kernel
    /// passes over each that leads elsewhere.
    Route,
    /// An address or a link: all next hops may be others.
    Topology,
}

/// A change that the agent's view of the kernel may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceEvent {
    /// Of what kind.
    pub kind: Changed,
    /// The link that it happened on, where it is one's.
    pub ifindex: Option<u32>,
    /// The prefix of the route that it happened to.
    pub prefix: Option<Ipv4Net>,
    /// Whether what was read of the host's routes may be other now.
    pub is_scan_due: bool,
}

impl DeviceEvent {
    const fn new(kind: Changed, ifindex: Option<u32>) -> Self {
        Self { kind, ifindex, prefix: None, is_scan_due: false }
    }

    /// [`None`] for what nothing depends on.
    fn of(message: &RouteNetlinkMessage) -> Option<Self> {
        use RouteNetlinkMessage as Message;
        let (kind, ifindex) = match message {
            // What the agent itself has just added is as it should be.
            Message::NewNeighbour(entry)
                if entry.header.family == AddressFamily::Inet && overlay_route::is_next_hop(entry) =>
            {
                return None;
            }
            Message::NewNeighbour(entry) | Message::DelNeighbour(entry) => {
                // On any link: without it the shared routes lead nowhere.
                let is_ours = overlay_route::is_of_next_hop(entry);
                (if is_ours { Changed::Route } else { Changed::Neighbour }, Some(entry.header.ifindex))
            }
            Message::NewLink(link) | Message::DelLink(link) => (Changed::Topology, Some(link.header.index)),
            // On any link: a route's next hop can't be an address of this host.
            Message::NewAddress(address) | Message::DelAddress(address)
                if overlay_route::is_next_hop_address(address) =>
            {
                (Changed::Topology, None)
            }
            Message::NewAddress(address) | Message::DelAddress(address) => {
                (Changed::Topology, Some(address.header.index))
            }
            // By any rule, any address may have another way.
            Message::NewRule(_) | Message::DelRule(_) => {
                return Some(Self { prefix: Some(Ipv4Net::default()), ..Self::new(Changed::Way, None) });
            }
            _ => (Changed::Topology, None),
        };
        Some(Self::new(kind, ifindex))
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
    /// Bytes of link-layer header in front of what comes in by it: Ethernet's, or none.
    pub fn header_len(&self) -> u16 {
        const ETHERNET: u16 = 14;
        if self.mac.is_some() { ETHERNET } else { 0 }
    }

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
    /// Has the kernel look at what a dump is asked for by (`NETLINK_GET_STRICT_CHK`), and leave out the rest.
    strict: Handle,
    /// Whose turn it is to ask for one.
    dumps: Arc<Mutex<()>>,
    interest: Arc<RwLock<Option<Interest>>>,
    gone: broadcast::Sender<u32>,
}

impl Netlink {
    /// Opens a netlink socket that also hears of changes.
    ///
    /// # Errors
    /// [`DeviceError::Socket`].
    pub fn open() -> Result<(Self, mpsc::Receiver<DeviceEvent>, JoinHandle<()>), DeviceError> {
        let groups =
            [MulticastGroup::Link, MulticastGroup::Neigh, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv4Rule];
        // On a socket of their own: what a burst of them leaves no room for would else be an answer, which is waited for.
        let (told, open, mut messages) = new_multicast_connection(&groups).map_err(DeviceError::Socket)?;
        let (connection, handle, _) = new_connection().map_err(DeviceError::Socket)?;
        let (strict_connection, strict, _) = new_connection_with_strict_check().map_err(DeviceError::Socket)?;
        let interest = Arc::new(RwLock::new(None));
        let listen = |what, group| RawEvents::listen(what, group as u32).map_err(DeviceError::Socket);
        let routes = listen("routes", MulticastGroup::Ipv4Route)?;
        let next_hops = listen("next hops", MulticastGroup::Nexthop)?;
        let traffic_control = listen("queueing disciplines and filters", MulticastGroup::Tc)?;
        let (sender, receiver) = mpsc::channel(1024);
        let gone = broadcast::Sender::new(1024);
        let tell_gone = gone.clone();
        let lost = DeviceEvent { is_scan_due: true, ..DeviceEvent::new(Changed::Topology, None) };
        let of_routes = Arc::clone(&interest);
        let route_event = move |kind, payload: &[u8]| host_routes::event(&of_routes, kind, payload);
        tokio::spawn(routes.tell(sender.clone(), lost, route_event));
        // Of a next hop that is an object of its own (`ip nexthop`) not every route is told of.
        let any_way =
            DeviceEvent { prefix: Some(Ipv4Net::default()), is_scan_due: true, ..DeviceEvent::new(Changed::Way, None) };
        tokio::spawn(next_hops.tell(sender.clone(), any_way, move |_, _| Some(any_way)));
        let lost = DeviceEvent::new(Changed::TrafficControl, None);
        tokio::spawn(traffic_control.tell(sender.clone(), lost, observers::traffic_control_event));
        let connection = tokio::spawn(async move {
            let forward = async {
                while let Some((message, _)) = messages.next().await {
                    if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) = &message.payload
                        && link.header.interface_family == AddressFamily::Unspec
                    {
                        // There may be nobody who wants to know.
                        let _unheard = tell_gone.send(link.header.index);
                    }
                    let event = match message.payload {
                        NetlinkPayload::InnerMessage(message) => DeviceEvent::of(&message),
                        // The kernel had more to say than the socket holds.
                        NetlinkPayload::Overrun(_) => Some(DeviceEvent::new(Changed::Topology, None)),
                        _ => None,
                    };
                    let Some(event) = event else { continue };
                    // Where the queue is full, the periodic comparison makes up for it.
                    let _lost = sender.try_send(event);
                }
            };
            // It ends with its last handle.
            let _open = open;
            tokio::join!(told, connection, strict_connection, forward);
        });
        Ok((Self { handle, strict, dumps: Arc::default(), interest, gone }, receiver, connection))
    }

    /// The numbers of links that go, from now on. What the kernel could not tell is not among them.
    pub fn links_that_go(&self) -> broadcast::Receiver<u32> {
        self.gone.subscribe()
    }

    /// All that the kernel has of something. One at a time: a socket that has still to be told the rest of one is refused
    /// another (EBUSY; `__netlink_dump_start`, net/netlink/af_netlink.c).
    async fn dump<S: TryStream<Error = rtnetlink::Error>>(
        &self,
        subject: impl ToString,
        ask: impl FnOnce() -> S,
    ) -> Result<Vec<S::Ok>, DeviceError> {
        let _turn = self.dumps.lock().await;
        ask().try_collect().await.map_err(DeviceError::call("list", subject))
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
        let messages = self.dump("links", || self.handle.link().get().execute()).await?;
        Ok(messages.iter().map(Link::from_message).collect())
    }
}

/// Lets the host forward between pods and overlay. `false` where it did already.
///
/// Two writers at once (another agent, a bridge plugin) can leave `ip_forward` on and every interface off: the kernel puts a
/// refused writer's old value back before it lets it try again, and whoever wrote in between changed nothing by its own view
/// (`devinet_sysctl_forward`). Where `ip_forward` changes, `conf/default` follows, so that it tells whether the change took.
///
/// # Errors
/// [`DeviceError::Sysctl`].
pub fn enable_forwarding() -> Result<bool, DeviceError> {
    const PATH: &str = "/proc/sys/net/ipv4/ip_forward";
    const DEFAULT: &str = "/proc/sys/net/ipv4/conf/default/forwarding";
    const TRIES: usize = 5;
    // Anybody may hold a lock on a file that anybody may read.
    const LOCK_TRIES: usize = 100;
    const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(1);
    let is = |path: &str, wanted: &str| std::fs::read_to_string(path).is_ok_and(|value| value.trim() == wanted);
    let write = |value: &'static str| {
        sysctl::write(PATH, value).map_err(|source| DeviceError::Sysctl { path: PATH, value, source })
    };
    // Read first: where it is on already, a read-only /proc/sys is no obstacle.
    if is(PATH, "1") {
        return Ok(false);
    }
    // One agent at a time. Where the file can't be locked, the look at `conf/default` is what is left.
    let lock = || Flock::lock(std::fs::File::open(PATH).ok()?, FlockArg::LockExclusiveNonblock).ok();
    let _lock = (0..LOCK_TRIES).find_map(|_| {
        let lock = lock();
        if lock.is_none() {
            std::thread::sleep(LOCK_PAUSE);
        }
        lock
    });
    if is(PATH, "1") {
        return Ok(false);
    }
    for _ in 0..TRIES {
        write("1")?;
        if !is(DEFAULT, "0") {
            return Ok(true);
        }
        write("0")?;
    }
    write("1")?;
    Ok(true)
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
