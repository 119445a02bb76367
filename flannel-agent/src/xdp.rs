//! Whether packets are taken out of the tunnel by XDP, and why.

use crate::{
    dataplane::XdpMode,
    device::{Link, offload::Offloads},
};

/// What the operator asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum XdpFlag {
    /// Native where it pays: by driver and offloads
    #[default]
    Auto,
    /// By the driver
    Native,
    /// By the kernel's stack: slower than without, but on any device
    Generic,
    /// Not at all
    Off,
}

/// What is done, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// [`None`] for not at all.
    pub mode: Option<XdpMode>,
    /// In words.
    pub reason: String,
}

/// Drivers that run XDP on frames of several buffers before they make a packet of them (kernel 6.18, `xdp_features` with
/// `NETDEV_XDP_ACT_RX_SG`), and let one leave metadata in front of it (`meta_valid` of `xdp_prepare_buff`): ena, gve and mvneta do
/// not, and all packets would stay in their tunnel. virtio_net and veth can both, but lose the large packets that their other
/// side hands them whole.
const NATIVE: [&str; 6] = ["bnxt_en", "i40e", "ice", "igc", "ixgbe", "mlx5_core"];

/// Decides.
pub fn choose(flag: XdpFlag, link: &Link, offloads: &Offloads) -> Choice {
    let name = &link.name;
    let no = |reason: String| Choice { mode: None, reason };
    let asked = |mode| Choice { mode: Some(mode), reason: "as asked for".to_owned() };
    match flag {
        XdpFlag::Off => no("as asked for".to_owned()),
        _ if link.mac.is_none() => no(format!("{name} has no link-layer header")),
        XdpFlag::Native => asked(XdpMode::Native),
        XdpFlag::Generic => asked(XdpMode::Generic),
        XdpFlag::Auto => match &offloads.driver {
            None => no(format!("{name} has no NIC's driver: each packet would be copied, and large ones cut")),
            Some(driver) if !NATIVE.contains(&driver.as_str()) => {
                no(format!("{name}'s driver {driver} is not known to gain by it"))
            }
            Some(_) if !offloads.large_receive.is_empty() => {
                no(format!("{name} would lose {}, which is on", offloads.large_receive.join(" and ")))
            }
            Some(driver) => {
                Choice { mode: Some(XdpMode::Native), reason: format!("{name}'s driver {driver} gains by it") }
            }
        },
    }
}

impl Choice {
    /// Its name in status and metrics.
    pub const fn label(&self) -> &'static str {
        match self.mode {
            Some(mode) => mode.label(),
            None => "off",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_driver_and_offloads() {
        let link = Link { name: "eth0".to_owned(), index: 2, mtu: 1500, mac: Some([2, 0, 0, 0, 0, 1]) };
        let headerless = Link { mac: None, ..link.clone() };
        let offloads = |driver: Option<&str>, on: &[&str]| Offloads {
            driver: driver.map(str::to_owned),
            large_receive: on.iter().map(|name| (*name).to_owned()).collect(),
        };
        let native = Some(XdpMode::Native);
        for (flag, link, driver, on, mode, reason) in [
            (XdpFlag::Auto, &link, Some("mlx5_core"), &[][..], native, "eth0's driver mlx5_core gains by it"),
            (XdpFlag::Auto, &link, Some("mlx5_core"), &["rx-lro"], None, "eth0 would lose rx-lro, which is on"),
            (
                XdpFlag::Auto,
                &link,
                Some("virtio_net"),
                &[],
                None,
                "eth0's driver virtio_net is not known to gain by it",
            ),
            (
                XdpFlag::Auto,
                &link,
                None,
                &[],
                None,
                "eth0 has no NIC's driver: each packet would be copied, and large ones cut",
            ),
            (XdpFlag::Native, &link, None, &[], native, "as asked for"),
            (XdpFlag::Generic, &link, Some("ice"), &["rx-gro-hw"], Some(XdpMode::Generic), "as asked for"),
            (XdpFlag::Off, &link, Some("ice"), &[], None, "as asked for"),
            (XdpFlag::Native, &headerless, Some("ice"), &[], None, "eth0 has no link-layer header"),
        ] {
            let choice = Choice { mode, reason: reason.to_owned() };
            assert_eq!(choose(flag, link, &offloads(driver, on)), choice);
        }
    }
}
