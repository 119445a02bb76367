//! What the external interface's driver does by itself.

use std::{collections::BTreeMap, fs, path::PathBuf};

use ethtool::{EthtoolAttr, EthtoolFeatureAttr};
use futures_util::TryStreamExt as _;

use super::Link;

/// Features by which a device hands the kernel larger packets than come by the wire, as ethtool names them. XDP switches
/// them off.
const LARGE_RECEIVE: [&str; 2] = ["rx-lro", "rx-gro-hw"];

/// A device's driver and offloads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// The driver's name; [`None`] for a virtual device, or one that sysfs does not show.
    pub driver: Option<String>,
    /// Features that make large packets of what comes by the wire, where they are on, as ethtool names them.
    pub large_receive: Vec<String>,
}

impl Offloads {
    /// Asks the kernel. What it does not tell is taken for absent.
    pub async fn of(link: &Link) -> Self {
        Self { driver: driver(link), large_receive: large_receive(&link.name).await.unwrap_or_default() }
    }
}

fn driver(link: &Link) -> Option<String> {
    let directory = PathBuf::from(format!("/sys/class/net/{}", link.name));
    let says =
        |file: &str, value: &str| fs::read_to_string(directory.join(file)).is_ok_and(|text| text.trim() == value);
    // sysfs may show the links of another network namespace than the agent's.
    let mac = link.mac?.map(|octet| format!("{octet:02x}")).join(":");
    if !says("ifindex", &link.index.to_string()) || !says("address", &mac) {
        return None;
    }
    let driver = fs::read_link(directory.join("device/driver")).ok()?;
    Some(driver.file_name()?.to_str()?.to_owned())
}

async fn large_receive(interface: &str) -> Option<Vec<String>> {
    let features = features(interface).await?;
    let on = |name: &&str| features.get(*name).is_some_and(|feature| feature.is_on);
    Some(LARGE_RECEIVE.iter().filter(|name| on(name)).map(|name| (*name).to_owned()).collect())
}

/// What a device's feature is set to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Feature {
    /// It is in use.
    pub is_on: bool,
    /// The device has it, and it can be turned on and off.
    pub can_be_set: bool,
}

/// All features of a device, by their names as ethtool has them; [`None`] where the kernel does not tell.
pub async fn features(interface: &str) -> Option<BTreeMap<String, Feature>> {
    let (connection, mut handle, _) = ethtool::new_connection().ok()?;
    let connection = tokio::spawn(connection);
    let answers = handle.feature().get(Some(interface)).execute().await;
    let answers = match answers {
        Ok(answers) => answers.try_collect::<Vec<_>>().await.ok(),
        Err(_) => None,
    };
    connection.abort();
    let mut found = BTreeMap::<String, Feature>::new();
    let mut fixed = Vec::new();
    for attribute in answers?.into_iter().flat_map(|answer| answer.payload.nlas) {
        match attribute {
            EthtoolAttr::Feature(EthtoolFeatureAttr::Active(features)) => {
                features.into_iter().for_each(|bit| found.entry(bit.name).or_default().is_on = bit.value);
            }
            EthtoolAttr::Feature(EthtoolFeatureAttr::Hw(features)) => {
                features.into_iter().for_each(|bit| found.entry(bit.name).or_default().can_be_set = bit.value);
            }
            EthtoolAttr::Feature(EthtoolFeatureAttr::NoChange(features)) => {
                fixed.extend(features.into_iter().filter(|bit| bit.value).map(|bit| bit.name));
            }
            _ => {}
        }
    }
    for name in fixed {
        found.entry(name).or_default().can_be_set = false;
    }
    Some(found)
}
