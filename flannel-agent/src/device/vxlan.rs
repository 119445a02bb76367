//! `flannel.<VNI>` and its address (flannel: pkg/backend/vxlan/device.go).

use std::net::{IpAddr, Ipv4Addr};

use flannel_common::{
    packet::Mac,
    vxlan::{OVERHEAD, Vni},
};
use ipnet::Ipv4Net;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVxlan,
    packet_route::{
        address::{AddressAttribute, AddressMessage},
        link::{InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    },
};
use tracing::{info, warn};

use super::{DeviceError, Link, Netlink, external::External};
use crate::{config::VxlanConfig, repair::Repair};

/// The vxlan device that the configuration asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanDevice {
    /// `flannel.<VNI>`.
    pub name: String,
    /// The overlay's VXLAN network identifier.
    pub vni: Vni,
    /// UDP port of the tunnel.
    pub port: u16,
    /// Whether the kernel learns addresses from what it receives.
    pub learning: bool,
    /// The underlay device.
    pub link: u32,
    /// The tunnel's address on it.
    pub local: Ipv4Addr,
    /// MTU of the overlay in bytes.
    pub mtu: u32,
}

impl VxlanDevice {
    /// The device for a configuration on an external interface. The kernel would not let its MTU be larger than the
    /// underlay's less the tunnel's headers.
    pub fn new(config: &VxlanConfig, external: &External) -> Self {
        let underlay_mtu = config.mtu.unwrap_or(external.link.mtu).min(external.link.mtu);
        Self {
            name: Self::name_of(config.vni),
            vni: config.vni,
            port: config.port,
            learning: config.learning,
            link: external.link.index,
            local: external.address,
            mtu: underlay_mtu.saturating_sub(u32::from(OVERHEAD)),
        }
    }

    /// Which device, and where it sends from.
    fn endpoint(&self) -> LinkMessageBuilder<LinkVxlan> {
        LinkVxlan::new(&self.name, self.vni.get()).dev(self.link).local(self.local)
    }

    /// The name of a VNI's device.
    pub fn name_of(vni: Vni) -> String {
        format!("flannel.{vni}")
    }

    /// The VNI of a device by its name; [`None`] of another's.
    pub fn vni_of(name: &str) -> Option<Vni> {
        let vni = Vni::new_checked(name.strip_prefix("flannel.")?.parse().ok()?).ok()?;
        (Self::name_of(vni) == name).then_some(vni)
    }

    /// Whether an existing device is this one, MTU and MAC aside, which can be changed.
    fn matches(&self, message: &LinkMessage) -> bool {
        self.has_endpoint(message) && self.can_become(message)
    }

    /// Whether an existing device sends from where this one does.
    fn has_endpoint(&self, message: &LinkMessage) -> bool {
        let has = |wanted: InfoVxlan| vxlan_options(message).is_some_and(|options| options.contains(&wanted));
        has(InfoVxlan::Link(self.link)) && has(InfoVxlan::Local(self.local))
    }

    /// Whether an existing device can become this one: the kernel changes the endpoint, and none of the rest
    /// (`vxlan_changelink`).
    fn can_become(&self, message: &LinkMessage) -> bool {
        let Some(options) = vxlan_options(message) else { return false };
        let has = |wanted: InfoVxlan| options.contains(&wanted);
        has(InfoVxlan::Id(self.vni.get()))
            && has(InfoVxlan::Port(self.port))
            && has(InfoVxlan::Learning(self.learning))
            && !options.iter().any(|option| {
                is_received_otherwise(option) || matches!(option, InfoVxlan::Group(_) | InfoVxlan::L2Miss(true))
            })
    }

    /// Whether the kernel refuses this device because of another: beside one with the same VNI and port it is not made, even where that
    /// one is down (`vxlan_config_validate`), and beside one that has the port with other settings it is not set up (`__vxlan_sock_add`).
    /// Those of IPv6 have a socket of their own.
    fn is_displaced_by(&self, message: &LinkMessage) -> bool {
        let Some(options) = vxlan_options(message).filter(|_| Link::from_message(message).name != self.name) else {
            return false;
        };
        let is_of_ipv6 = options.iter().any(|option| matches!(option, InfoVxlan::Group6(_) | InfoVxlan::Local6(_)));
        let is_other_socket = options.iter().any(is_received_otherwise);
        let displaces = match is_other_socket {
            true => message.header.flags.contains(LinkFlags::Up),
            false => options.contains(&InfoVxlan::Id(self.vni.get())),
        };
        options.contains(&InfoVxlan::Port(self.port)) && !is_of_ipv6 && displaces
    }
}

/// Of what a device receives.
fn is_received_otherwise(option: &InfoVxlan) -> bool {
    matches!(option, InfoVxlan::Gbp | InfoVxlan::Gpe | InfoVxlan::CollectMetadata(true))
}

fn vxlan_options(message: &LinkMessage) -> Option<&Vec<InfoVxlan>> {
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Data(InfoData::Vxlan(options)) => Some(options),
            _ => None,
        }),
        _ => None,
    })
}

impl Netlink {
    /// The MAC of an existing device that can be kept.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn vxlan_mac(&self, device: &VxlanDevice) -> Result<Option<Mac>, DeviceError> {
        let existing = self.link_by_name(&device.name).await?;
        Ok(existing.filter(|message| device.matches(message)).and_then(|message| Link::from_message(&message).mac))
    }

    /// Makes the device, or what it differs in, and sets it up. The device, and what was done.
    ///
    /// # Errors
    /// [`DeviceError`] with the request that failed.
    pub async fn ensure_vxlan(&self, device: &VxlanDevice, mac: Mac) -> Result<(Link, Option<Repair>), DeviceError> {
        let name = device.name.as_str();
        let mut repair = None;
        let existing = match self.link_by_name(name).await? {
            Some(message) if device.matches(&message) => Some(message),
            Some(message) if device.can_become(&message) => {
                let change = device.endpoint().build();
                self.handle.link().change(change).execute().await.map_err(DeviceError::call("change", name))?;
                repair = Some(Repair::DeviceSettings);
                Some(message)
            }
            Some(message) => {
                info!("{name} is of another kind or has other settings; it is made anew");
                self.delete_link(name, message.header.index).await?;
                None
            }
            None => None,
        };
        let message = match existing {
            Some(message) => message,
            None => {
                repair = Some(Repair::Device);
                self.create_vxlan(device, mac).await?
            }
        };
        let link = Link::from_message(&message);
        let is_up = message.header.flags.contains(LinkFlags::Up);
        if link.mtu != device.mtu || link.mac != Some(mac) || !is_up {
            let mut change = LinkUnspec::new_with_index(link.index).mtu(device.mtu).up();
            if link.mac != Some(mac) {
                // Even the same one again would cost the device its neighbours (`neigh_changeaddr`).
                change = change.address(mac.to_vec());
            }
            if let Err(error) = self.handle.link().set(change.build()).execute().await {
                return Err(self.explain(device, DeviceError::call("set up", name)(error)).await);
            }
            repair = repair.or(Some(Repair::DeviceSettings));
        }
        Ok((Link { mtu: device.mtu, mac: Some(mac), ..link }, repair))
    }

    async fn create_vxlan(&self, device: &VxlanDevice, mac: Mac) -> Result<LinkMessage, DeviceError> {
        let message = device
            .endpoint()
            .port(device.port)
            .learning(device.learning)
            // Set at creation, so that no network manager sees the device with another one and "corrects" it.
            .address(mac.to_vec())
            .mtu(device.mtu)
            .build();
        if let Err(error) = self.handle.link().add(message).execute().await {
            return Err(self.explain(device, DeviceError::call("create", &device.name)(error)).await);
        }
        self.link_by_name(&device.name)
            .await?
            .ok_or_else(|| DeviceError::Unexpected(format!("{} vanished right after its creation", device.name)))
    }

    /// Why the device is refused, with the name of another that has its place.
    async fn explain(&self, device: &VxlanDevice, error: DeviceError) -> DeviceError {
        match self.displacing(device).await {
            Ok(Some(other)) => {
                DeviceError::Displaced { error: Box::new(error), other, vni: device.vni, port: device.port }
            }
            _ => error,
        }
    }

    /// The name of another vxlan device that this one can't be beside.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn displacing(&self, device: &VxlanDevice) -> Result<Option<String>, DeviceError> {
        let links = self.dump("links", || self.handle.link().get().execute()).await?;
        let other = links.iter().find(|message| device.is_displaced_by(message));
        Ok(other.map(|message| Link::from_message(message).name))
    }

    /// The names of vxlan devices, and their UDP ports.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn vxlan_ports(&self) -> Result<Vec<(String, u16)>, DeviceError> {
        let links = self.dump("links", || self.handle.link().get().execute()).await?;
        let port = |message: &LinkMessage| {
            let options = vxlan_options(message)?.iter();
            let mut port = options.filter_map(|option| match option {
                InfoVxlan::Port(port) => Some(*port),
                _ => None,
            });
            Some((Link::from_message(message).name, port.next_back()?))
        };
        Ok(links.iter().filter_map(port).collect())
    }

    /// Deletes a link by its number.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn delete_link(&self, name: &str, index: u32) -> Result<(), DeviceError> {
        self.handle.link().del(index).execute().await.map_err(DeviceError::call("delete", name))
    }

    /// Gives the device this host's address on the overlay, `<subnet>.0/32`, and takes away others within the Network.
    /// Whether there was something to do.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn ensure_address(&self, link: &Link, network: Ipv4Net, address: Ipv4Addr) -> Result<bool, DeviceError> {
        let ask = || self.handle.address().get().set_link_index_filter(link.index).execute();
        let existing = self.dump(format!("the addresses of {}", link.name), ask).await?;
        let local = |message: &AddressMessage| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
                _ => None,
            })
        };
        let is_own = |message: &AddressMessage| local(message) == Some(address) && message.header.prefix_len == 32;
        let is_there = existing.iter().any(is_own);
        if !is_there {
            let addition = self.handle.address().add(link.index, address.into(), 32).execute().await;
            addition.map_err(DeviceError::call("give an address to", &link.name))?;
        }
        let mut is_other = false;
        for message in existing.into_iter().filter(|message| !is_own(message)) {
            if let Some(local) = local(&message).filter(|local| network.contains(local)) {
                warn!("{} had the address {local}/{}; removed", link.name, message.header.prefix_len);
                let removal = self.handle.address().del(message).execute().await;
                removal.map_err(DeviceError::call("remove an address of", &link.name))?;
                is_other = true;
            }
        }
        Ok(is_other || !is_there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that is there.
    fn other(
        build: impl FnOnce(LinkMessageBuilder<LinkVxlan>) -> LinkMessageBuilder<LinkVxlan>,
        vni: u32,
    ) -> LinkMessage {
        build(LinkVxlan::new("other", vni)).build()
    }

    #[test]
    fn a_device_is_displaced_by_one_that_the_kernel_does_not_have_beside_it() {
        let vni = Vni::new_checked(1).unwrap();
        let device = VxlanDevice {
            name: VxlanDevice::name_of(vni),
            vni,
            port: 8472,
            learning: false,
            link: 2,
            local: [192, 0, 2, 1].into(),
            mtu: 1450,
        };
        assert!(device.is_displaced_by(&other(|other| other.port(8472), 1)));
        assert!(!device.is_displaced_by(&other(|other| other.port(4789), 1)));
        assert!(!device.is_displaced_by(&other(|other| other.port(8472), 2)));
        assert!(!device.is_displaced_by(&other(|other| other.port(8472).local6(std::net::Ipv6Addr::LOCALHOST), 1)));
        let external = other(|other| other.port(8472).collect_metadata(true), 0);
        assert!(!device.is_displaced_by(&external));
        let mut up = external;
        up.header.flags |= LinkFlags::Up;
        assert!(device.is_displaced_by(&up));
        // It is not in its own way.
        assert!(!device.is_displaced_by(&device.endpoint().port(8472).build()));

        let cause = DeviceError::Unexpected("create flannel.1: File exists".to_owned());
        let error = DeviceError::Displaced { error: Box::new(cause), other: "other".to_owned(), vni, port: 8472 };
        let said = error.to_string();
        assert!(
            said.starts_with("create flannel.1: File exists: the vxlan device other has the UDP port 8472, "),
            "{said}"
        );
        assert!(said.contains("remove it with `ip link delete other`"), "{said}");
    }
}
