//! Who looks at packets of pods, or holds them back, on the devices that these cross: what the bypass makes way for.
//!
//! * [`Places`] — these devices, and what takes the stack because of something on one of them
//! * `traffic_control` — queueing disciplines and filters
//! * `packet_sockets` — who captures; `socket_filter` — what a socket's filter lets through

mod packet_sockets;
mod socket_filter;
mod traffic_control;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
};

use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::{
    packet_core::Emitable as _,
    packet_route::link::{LinkAttribute, LinkMessage, LinkXdp},
    sys::{Socket, protocols::NETLINK_ROUTE},
};

pub use self::packet_sockets::Tap;
pub(super) use self::traffic_control::event as traffic_control_event;
use super::{
    DeviceError, Link, Netlink, PodLink, UnderlayCriteria, filters::Side, pods::pods_among, raw::act,
    underlay_links::underlay_links,
};
use crate::bypass::{Kind, Restriction, Scope};

/// What a veth's other side may be sent at most. Where that one has an XDP program of the driver's, it is less than, or
/// (frames of several buffers) not the same as without (`veth_xdp_set`, drivers/net/veth.c).
const VETH_MAX_MTU: u32 = 65_535;

/// A word of an alias.
const SETTING: &str = "bypass=off";
/// `RTM_SETLINK` (linux/rtnetlink.h).
const SET_LINK: u16 = 19;

/// Has what a pod sends and receives be left to the stack, by the host's side of its veth, as long as that is there.
///
/// # Errors
/// The kernel's.
pub fn leave_to_stack(veth: &str) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = nix::net::if_::if_nametoindex(veth)?;
    message.attributes.push(LinkAttribute::IfAlias(SETTING.to_owned()));
    let mut payload = vec![0; message.buffer_len()];
    message.emit(&mut payload);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    act(&mut socket, SET_LINK, &payload)
}

/// The devices that packets of pods cross.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// The pods' links.
    pub pods: Vec<PodLink>,
    /// The links that tunnel packets can come in by.
    pub underlay: Vec<Link>,
    devices: BTreeMap<u32, Device>,
}

#[derive(Clone, Debug)]
struct Device {
    name: String,
    role: Role,
    /// An XDP program that passed packets do not meet: its own, or a pod's at the other side.
    xdp: Option<String>,
    /// Whether its alias asks for the stack.
    has_setting: bool,
}

/// What a device is to packets of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The host's side of a pod's veth.
    Pod,
    /// Pods' veths are its ports.
    Bridge,
    /// `flannel.<VNI>`.
    Overlay,
    /// The external interface.
    External,
    /// Another link that tunnel packets can come in by.
    Underlay,
}

impl Netlink {
    /// Finds the pods ([`PodNetwork::pods`](super::PodNetwork::pods)), and the other devices on the way of their packets.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn places(
        &self,
        subnet: Ipv4Net,
        routed: &HashSet<u32>,
        of_underlay: UnderlayCriteria<'_>,
    ) -> Result<Places, DeviceError> {
        let links = self.dump("links", || self.handle.link().get().execute()).await?;
        let addresses = self.addresses().await?;
        let pods = pods_among(&links, &addresses, subnet, routed);
        let underlay = underlay_links(&links, &addresses, &pods, of_underlay);
        let mut roles: BTreeMap<u32, Role> = underlay.iter().map(|link| (link.index, Role::Underlay)).collect();
        roles.extend(pods.iter().filter_map(|pod| pod.bridge).map(|bridge| (bridge, Role::Bridge)));
        roles.extend(pods.iter().map(|pod| (pod.index, Role::Pod)));
        roles.extend([(of_underlay.overlay, Role::Overlay), (of_underlay.external, Role::External)]);
        let device = |message: &LinkMessage| {
            Some((message.header.index, Device::of(message, *roles.get(&message.header.index)?)))
        };
        let devices = links.iter().filter_map(device).collect();
        Ok(Places { pods, underlay, devices })
    }

    /// Looks again for XDP programs where the kernel may not have told of one: on bridges and `flannel.<VNI>`. (A pod's has the
    /// features of the veth's other side change, which is told.)
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn look_for_xdp(&self, places: &mut Places) -> Result<(), DeviceError> {
        for (index, device) in &mut places.devices {
            if !matches!(device.role, Role::Bridge | Role::Overlay) {
                continue;
            }
            let mut links = self.handle.link().get().match_index(*index).execute();
            match links.try_next().await {
                Ok(Some(link)) => *device = Device::of(&link, device.role),
                Ok(None) => {}
                Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::ENODEV => {}
                Err(error) => return Err(DeviceError::call("look up the link", &device.name)(error)),
            }
        }
        Ok(())
    }
}

impl Device {
    fn of(message: &LinkMessage, role: Role) -> Self {
        let (mut name, mut has_own, mut max_mtu, mut has_setting) = (String::new(), false, VETH_MAX_MTU, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name.clone_from(text),
                LinkAttribute::IfAlias(alias) => has_setting = alias.split_whitespace().any(|word| word == SETTING),
                LinkAttribute::MaxMtu(mtu) => max_mtu = *mtu,
                LinkAttribute::Xdp(xdp) => {
                    has_own = xdp.iter().any(|xdp| matches!(xdp, LinkXdp::ProgId(id) if *id != 0))
                }
                _ => {}
            }
        }
        let xdp = match role {
            // What comes in by the external interface, or from a pod, meets its XDP program before any of ours.
            Role::External | Role::Underlay => None,
            Role::Pod => (max_mtu != VETH_MAX_MTU).then(|| format!("XDP program at the pod's side of {name}")),
            Role::Bridge | Role::Overlay => has_own.then(|| format!("XDP program on {name}")),
        };
        Self { name, role, xdp, has_setting }
    }
}

impl Places {
    /// Whether a device is one of them.
    pub fn contains(&self, index: u32) -> bool {
        self.devices.contains_key(&index)
    }

    /// Their numbers.
    pub fn indexes(&self) -> impl Iterator<Item = u32> {
        self.devices.keys().copied()
    }

    /// What is known of XDP programs, from the links themselves.
    pub fn xdp_programs(&self) -> BTreeSet<Restriction> {
        let programs = self.devices.iter().filter_map(|(index, device)| Some((*index, device.xdp.as_ref()?)));
        programs
            .flat_map(|(index, subject)| {
                let restriction = |scope| Restriction { kind: Kind::Program, subject: subject.clone(), scope };
                self.scopes(index, Side::Ingress).into_iter().map(restriction)
            })
            .collect()
    }

    /// Pods whose packets somebody asked to be left to the stack: by a word in the alias of the host's side of their veth
    /// (`ip link set dev ... alias`), as the CNI plugin sets it.
    pub fn settings(&self) -> BTreeSet<Restriction> {
        let asks = |(_, device): &(&u32, &Device)| device.role == Role::Pod && device.has_setting;
        let restriction = |(index, device): (&u32, &Device)| Restriction {
            kind: Kind::Setting,
            subject: format!("{SETTING} on {}", device.name),
            scope: Scope::Pod(*index),
        };
        self.devices.iter().filter(asks).map(restriction).collect()
    }

    /// Something on a device that sees what goes in or out there.
    pub fn restrictions(&self, kind: Kind, what: &str, index: u32, side: Side) -> Vec<Restriction> {
        let Some(Device { name, .. }) = self.devices.get(&index) else { return Vec::new() };
        let restriction = |scope| Restriction { kind, subject: format!("{what} on {name}"), scope };
        self.scopes(index, side).into_iter().map(restriction).collect()
    }

    /// What takes the stack, for each packet to be seen there.
    fn scopes(&self, index: u32, side: Side) -> Vec<Scope> {
        match (self.devices.get(&index).map(|device| device.role), side) {
            (Some(Role::Pod), _) => vec![Scope::Pod(index)],
            (Some(Role::Bridge), _) => self.pods_of(index),
            (Some(Role::Overlay), Side::Ingress) => vec![Scope::Everything],
            (Some(Role::Overlay), Side::Egress) => vec![Scope::OverlayQueue],
            (Some(Role::External), Side::Ingress) => vec![Scope::ExternalInterface],
            (Some(Role::Underlay), Side::Ingress) => vec![Scope::UnderlayLink(index)],
            // What bypasses the stack is given to the interface's queue and filters as all else is.
            (Some(Role::External | Role::Underlay), Side::Egress) | (None, _) => Vec::new(),
        }
    }

    fn pods_of(&self, bridge: u32) -> Vec<Scope> {
        self.pods.iter().filter(|pod| pod.bridge == Some(bridge)).map(|pod| Scope::Pod(pod.index)).collect()
    }
}
