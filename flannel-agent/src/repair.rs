//! What somebody else changed on this host, and the agent made right again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::status::{now, time};

/// Repairs of one kind belong together that are no more than so many seconds apart; and so many of them are no accident.
const UNDONE_TIME: u64 = 60;
const UNDONE_OFTEN: u64 = 5;

/// What was repaired. One row of `status` each, with a count and the last time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// `flannel.<VNI>` was gone or another device, and was recreated, with all that hangs on it.
    Device,
    /// `flannel.<VNI>` was down, or had another MTU, MAC or tunnel endpoint.
    DeviceSettings,
    /// `flannel.<VNI>` lacked this host's address on the overlay, or had another within the Network.
    DeviceAddress,
    /// A route into the overlay was gone or another.
    Route,
    /// The neighbour of such a route's next hop was gone or another.
    Neighbour,
    /// The forwarding entry of that neighbour was gone or another.
    ForwardingEntry,
    /// A program was detached from its hook.
    Program,
    /// A pin of a map or a link was gone.
    Pin,
    /// An entry of a map was gone or another.
    MapEntry,
    /// The external interface is another one, or has another address, MTU or MAC: programs, device, `subnet.env` and lease
    /// follow.
    ExternalInterface,
    /// A next hop of the underlay has another MAC.
    NextHop,
    /// `subnet.env` was gone, or lacked what a runtime needs.
    SubnetEnv,
    /// `net.ipv4.ip_forward` was off.
    IpForward,
    /// conntrack was strict about windows.
    Conntrack,
}

impl Repair {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Device,
        Self::DeviceSettings,
        Self::DeviceAddress,
        Self::Route,
        Self::Neighbour,
        Self::ForwardingEntry,
        Self::Program,
        Self::Pin,
        Self::MapEntry,
        Self::ExternalInterface,
        Self::NextHop,
        Self::SubnetEnv,
        Self::IpForward,
        Self::Conntrack,
    ];

    /// Its name in the log, in `status` and in the metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::DeviceSettings => "device_settings",
            Self::DeviceAddress => "device_address",
            Self::Route => "route",
            Self::Neighbour => "neighbour",
            Self::ForwardingEntry => "forwarding_entry",
            Self::Program => "program",
            Self::Pin => "pin",
            Self::MapEntry => "map_entry",
            Self::ExternalInterface => "external_interface",
            Self::NextHop => "next_hop",
            Self::SubnetEnv => "subnet_env",
            Self::IpForward => "ip_forward",
            Self::Conntrack => "conntrack",
        }
    }
}

/// What somebody else changed on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriftStatus {
    /// What was made right again, by [`Repair::label`].
    pub repaired: BTreeMap<String, Repaired>,
    /// What can't be, in words, by what it is about.
    pub waiting: BTreeMap<String, String>,
}

impl DriftStatus {
    /// What is undone again and again, in words.
    pub fn undone(&self) -> impl Iterator<Item = String> {
        self.repaired.iter().filter_map(|(label, repaired)| repaired.trouble(label))
    }
}

/// Repairs of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repaired {
    /// How many.
    pub count: u64,
    /// When the last one was.
    pub last: u64,
    /// What that was, in words.
    #[serde(default)]
    pub what: String,
    /// How many of them came one after the other, each within a minute of the one before.
    #[serde(default)]
    pub consecutive: u64,
    /// When the first of these was.
    #[serde(default)]
    pub since: u64,
}

impl Repaired {
    /// One more.
    pub fn again(&mut self, now: u64, what: &str) {
        if self.consecutive == 0 || now.saturating_sub(self.last) > UNDONE_TIME {
            (self.consecutive, self.since) = (0, now);
        }
        what.clone_into(&mut self.what);
        (self.count, self.consecutive, self.last) = (self.count + 1, self.consecutive + 1, now);
    }

    /// What is to be looked at where it is undone again and again.
    fn trouble(&self, label: &str) -> Option<String> {
        let Self { last, what, consecutive, since, .. } = self;
        let goes_on = *consecutive >= UNDONE_OFTEN && now().saturating_sub(*last) <= UNDONE_TIME;
        goes_on.then(|| {
            format!(
                "another program undoes what the agent sets up: {label} was repaired {consecutive} times in {}, the last time {} ago ({what}); \
                 `flannel-agent doctor` names daemons that are known to, else `ip monitor` and `bpftool net` show who",
                time(*since),
                time(*last)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repairs_far_apart_are_no_row() {
        let mut repaired = Repaired::default();
        [100, 130, 190].iter().for_each(|at| repaired.again(*at, "flannel.1"));
        assert_eq!((repaired.count, repaired.consecutive, repaired.since), (3, 3, 100));
        repaired.again(251, "flannel.1");
        assert_eq!((repaired.count, repaired.consecutive, repaired.since, repaired.last), (4, 1, 251, 251));
        assert_eq!(repaired.trouble("route"), None, "one is an accident");
        let mut undone = Repaired::default();
        (0..UNDONE_OFTEN).for_each(|_| undone.again(now(), "flannel.1"));
        assert!(undone.trouble("route").is_some_and(|words| words.contains("route was repaired 5 times")));
    }
}
