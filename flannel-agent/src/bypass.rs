//! What keeps packets off the bypass: whatever somebody has this host do to each packet.
//!
//! The bypass repeats what the stack did to the last packet of a flow. A queue, a filter, a program, a capture or a rule that
//! counts, limits or copies has to see each packet itself. Whoever looks for such things (`device`, `inspection`) says what it
//! found as [`Restriction`]s; together they make the [`Plan`] that the dataplane carries out.

use std::{collections::BTreeSet, fmt, ops::RangeInclusive};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// `--bypass`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BypassFlag {
    /// What somebody wants to see takes the stack.
    #[default]
    Auto,
    /// Only what is for a pod with a queueing discipline takes the stack.
    On,
    /// Everything takes the stack.
    Off,
}

impl BypassFlag {
    /// As it is given.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }

    /// Whether the bypass makes way for it.
    pub const fn obeys(self, Restriction { kind, scope, .. }: &Restriction) -> bool {
        match (self, kind, scope) {
            (_, _, Scope::Nothing) => false,
            (Self::On, Kind::Queue | Kind::Setting | Kind::Helper, Scope::Pod(_) | Scope::Ports(_)) => true,
            (Self::On, ..) => false,
            (Self::Auto | Self::Off, ..) => true,
        }
    }
}

/// Something that has to see each packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Restriction {
    /// What it is.
    pub kind: Kind,
    /// Which one, and where, as an operator can find it: `tbf on flannel.1`, `nft inet t forward handle 5: limit rate`.
    pub subject: String,
    /// What takes the stack because of it.
    pub scope: Scope,
}

/// What wants to see each packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A queueing discipline.
    Queue,
    /// A filter of traffic control.
    Filter,
    /// A BPF program on TCX or XDP.
    Program,
    /// A packet socket.
    Capture,
    /// A packet rule, or a routing rule for the tunnel packets themselves.
    Rule,
    /// A conntrack helper.
    Helper,
    /// What somebody asked for: a pod's configuration.
    Setting,
}

impl Kind {
    /// Each of them.
    pub const ALL: [Self; 7] =
        [Self::Queue, Self::Filter, Self::Program, Self::Capture, Self::Rule, Self::Helper, Self::Setting];

    /// In status and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Filter => "filter",
            Self::Program => "program",
            Self::Capture => "capture",
            Self::Rule => "rule",
            Self::Helper => "helper",
            Self::Setting => "setting",
        }
    }
}

/// Which packets take the stack.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// None: it is only named.
    Nothing,
    /// All of the overlay's.
    Everything,
    /// All, and they go through the queue of `flannel.<VNI>`.
    OverlayQueue,
    /// All, and they are shown to who captures on `flannel.<VNI>`.
    OverlayCapture,
    /// All that come in by the external interface, which are left in their tunnel for who looks there, or from other hosts at all.
    ExternalInterface,
    /// None, but XDP leaves them in their tunnel for who captures on the external interface.
    Xdp,
    /// Those that come in by another link of the underlay, by its number.
    UnderlayLink(u32),
    /// Those of the pod behind this link, by its number.
    Pod(u32),
    /// Those from or to these addresses, before or after a translation.
    Addresses(Ipv4Net),
    /// Those from or to these ports, before or after a translation.
    Ports(Ports),
}

/// What it costs, in words.
impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("packets that bypass the stack bypass it as well"),
            Self::Everything => f.write_str("all packets take the stack"),
            Self::OverlayQueue => f.write_str("all packets take the stack, and go out by the overlay's device"),
            Self::OverlayCapture => {
                f.write_str("all packets take the stack, and are shown at the overlay's device on their way out")
            }
            Self::ExternalInterface => f.write_str("what comes in from other hosts takes the stack"),
            Self::Xdp => f.write_str("XDP takes nothing out of the tunnel meanwhile"),
            Self::UnderlayLink(_) => f.write_str("what comes in there from other hosts takes the stack"),
            Self::Pod(_) => f.write_str("the pod's packets take the stack"),
            Self::Addresses(prefix) => write!(f, "packets from and to {prefix} take the stack"),
            Self::Ports(Ports { protocol, first, last }) => {
                let protocol = match protocol {
                    Protocol::Tcp => "TCP",
                    Protocol::Udp => "UDP",
                };
                write!(f, "packets from and to {protocol} ports {first} to {last} take the stack")
            }
        }
    }
}

/// Ports of a protocol, host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ports {
    /// Of which protocol.
    pub protocol: Protocol,
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

impl Ports {
    /// A range of them.
    pub const fn new(protocol: Protocol, range: &RangeInclusive<u16>) -> Self {
        Self { protocol, first: *range.start(), last: *range.end() }
    }
}

/// A protocol with ports whose flows can bypass the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What takes the stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Everything.
    pub everything: bool,
    /// Packets go through the queue of `flannel.<VNI>`.
    pub overlay_queue: bool,
    /// Packets are shown to who captures on `flannel.<VNI>`.
    pub overlay_capture: bool,
    /// What comes in by the external interface.
    pub external_interface: bool,
    /// XDP takes nothing out of the tunnel.
    pub xdp_passes: bool,
    /// What comes in by these links of the underlay.
    pub underlay_links: BTreeSet<u32>,
    /// What is from or for the pods behind these links.
    pub pods: BTreeSet<u32>,
    /// What is from or to these addresses.
    pub addresses: BTreeSet<Ipv4Net>,
    /// What is from or to these ports.
    pub ports: BTreeSet<Ports>,
    /// What takes the stack does so in its tunnel, for packet rules to meet the tunnel packets.
    pub left_in_tunnel: bool,
}

impl Plan {
    /// What the restrictions come to.
    pub fn of<'a>(flag: BypassFlag, restrictions: impl IntoIterator<Item = &'a Restriction>) -> Self {
        let mut plan = Self { everything: flag == BypassFlag::Off, ..Self::default() };
        for Restriction { scope, .. } in restrictions.into_iter().filter(|restriction| flag.obeys(restriction)) {
            plan.add(scope);
        }
        plan
    }

    fn add(&mut self, scope: &Scope) {
        match scope {
            Scope::Nothing => {}
            Scope::Everything => self.everything = true,
            Scope::OverlayQueue => (self.everything, self.overlay_queue) = (true, true),
            Scope::OverlayCapture => (self.everything, self.overlay_capture) = (true, true),
            Scope::ExternalInterface => self.external_interface = true,
            Scope::Xdp => self.xdp_passes = true,
            Scope::UnderlayLink(link) => {
                self.underlay_links.insert(*link);
            }
            Scope::Pod(link) => {
                self.pods.insert(*link);
            }
            Scope::Addresses(prefix) => {
                self.addresses.insert(*prefix);
            }
            Scope::Ports(ports) => {
                self.ports.insert(*ports);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restriction(kind: Kind, scope: Scope) -> Restriction {
        Restriction { kind, subject: String::new(), scope }
    }

    #[test]
    fn only_what_was_asked_for_is_obeyed() {
        let all = [
            restriction(Kind::Queue, Scope::Pod(7)),
            restriction(Kind::Capture, Scope::Pod(8)),
            restriction(Kind::Queue, Scope::OverlayQueue),
            restriction(Kind::Rule, Scope::Nothing),
        ];
        let auto = Plan::of(BypassFlag::Auto, &all);
        assert_eq!((auto.everything, auto.overlay_queue, auto.pods.len()), (true, true, 2));
        let on = Plan::of(BypassFlag::On, &all);
        assert_eq!(on, Plan { pods: [7].into(), ..Plan::default() });
        // Where everything takes the stack, it still goes by the device.
        let off = Plan::of(BypassFlag::Off, &all);
        assert_eq!((off.everything, off.overlay_queue, off.overlay_capture), (true, true, false));
        assert_eq!(Plan::of(BypassFlag::Auto, &[]), Plan::default());
    }
}
