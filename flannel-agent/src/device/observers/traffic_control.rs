//! Queueing disciplines and filters, as `tc` sets them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use rtnetlink::sys::{Socket, protocols::NETLINK_ROUTE};
use tokio::task::spawn_blocking;

use super::{
    super::raw::{attribute, dump, text, word},
    Places,
};
use crate::{
    bypass::{Kind, Restriction},
    dataplane::Hook,
    device::{Changed, DeviceError, DeviceEvent, Netlink, filters::Side},
};

/// Of a message's own header (`struct tcmsg`).
const HEADER_LEN: usize = 20;
// linux/rtnetlink.h.
const NEW_DISCIPLINE: u16 = 36;
const DELETED_DISCIPLINE: u16 = 37;
const GET_DISCIPLINE: u16 = 38;
const NEW_FILTER: u16 = 44;
const DELETED_FILTER: u16 = 45;
const GET_FILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
// linux/pkt_cls.h, linux/pkt_sched.h.
const TCA_BPF_NAME: u16 = 7;
const ROOT: u32 = 0xffff_ffff;
const AT_INGRESS: u32 = 0xffff_fff2;
const AT_EGRESS: u32 = 0xffff_fff3;
/// Instead of a device's number, where devices share filters (`TCM_IFINDEX_MAGIC_BLOCK`).
const SHARED: u32 = 0xffff_ffff;
// linux/if_ether.h.
const ALL: u16 = 0x0003;
const IPV4: u16 = 0x0800;

/// The hooks that filters can be at, without holding a packet back.
const HOOKS: [&str; 2] = ["clsact", "ingress"];

/// A message about a discipline or a filter.
struct Message<'a> {
    index: u32,
    handle: u32,
    parent: u32,
    /// Of the filter's packets.
    protocol: u16,
    kind: &'a str,
    attributes: &'a [u8],
}

impl<'a> Message<'a> {
    fn of(payload: &'a [u8]) -> Option<Self> {
        let (header, attributes) = payload.split_at_checked(HEADER_LEN)?;
        let info = word(header, 16)?;
        Some(Self {
            index: word(header, 4)?,
            handle: word(header, 8)?,
            parent: word(header, 12)?,
            protocol: u16::from_be(info as u16),
            kind: text(attribute(attributes, TCA_KIND).unwrap_or_default()),
            attributes,
        })
    }

    /// Whether it may hold packets back. What the kernel gives a device by itself, by `net.core.default_qdisc` or as a part of
    /// that, has no number.
    fn is_queue(&self) -> bool {
        let is_first = self.parent == ROOT || self.parent >> 16 == 0;
        self.kind != "noqueue" && !HOOKS.contains(&self.kind) && self.handle != 0 && is_first
    }

    /// Whether it is one of this agent's, or of one for another overlay. (Attached where the kernel has no TCX.)
    fn is_ours(&self) -> bool {
        const OURS: u32 = 0xf1;
        let options = || attribute(self.attributes, TCA_OPTIONS);
        let name = || Some(text(attribute(options()?, TCA_BPF_NAME)?));
        self.handle >> 24 == OURS
            && self.kind == "bpf"
            && name().is_some_and(|name| Hook::ALL.iter().any(|hook| hook.program() == name))
    }

    /// Whether it is a filter of somebody else's that packets of pods can meet. (Those of a priority come after a message
    /// without a number that stands for all of them.)
    fn is_foreign_filter(&self) -> bool {
        self.handle != 0 && [ALL, IPV4].contains(&self.protocol) && !self.is_ours()
    }
}

impl Netlink {
    /// The queueing disciplines and filters that somebody has set on these devices.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn traffic_control(&self, places: &Places) -> Result<BTreeSet<Restriction>, DeviceError> {
        let failed = |cause: String| DeviceError::Call {
            call: "list",
            subject: "queueing disciplines and filters".to_owned(),
            cause,
        };
        let places = places.clone();
        let found = spawn_blocking(move || find(&places)).await.map_err(|error| failed(error.to_string()))?;
        found.map_err(|error| failed(error.to_string()))
    }
}

fn find(places: &Places) -> io::Result<BTreeSet<Restriction>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    let mut found = BTreeSet::new();
    let mut hooks = BTreeMap::new();
    dump(&mut socket, GET_DISCIPLINE, &[0; HEADER_LEN], |payload| {
        let Some(message) = Message::of(payload) else { return };
        if HOOKS.contains(&message.kind) {
            hooks.insert(message.index, message.kind == "clsact");
        } else if message.is_queue() {
            found.extend(places.restrictions(Kind::Queue, message.kind, message.index, Side::Egress));
        }
    })?;
    hooks.retain(|index, _| places.devices.contains_key(index));
    for (index, has_egress) in hooks {
        for (parent, side, name) in [(AT_INGRESS, Side::Ingress, "ingress"), (AT_EGRESS, Side::Egress, "egress")] {
            if side == Side::Egress && !has_egress {
                continue;
            }
            let mut request = [0; HEADER_LEN];
            request[4..8].copy_from_slice(&index.to_ne_bytes());
            request[12..16].copy_from_slice(&parent.to_ne_bytes());
            dump(&mut socket, GET_FILTER, &request, |payload| {
                if let Some(message) = Message::of(payload).filter(Message::is_foreign_filter) {
                    let what = format!("filter {} at {name}", message.kind);
                    found.extend(places.restrictions(Kind::Filter, &what, index, side));
                }
            })?;
        }
    }
    Ok(found)
}

/// What a message tells of.
///
/// Where the agent attaches programs as filters, each of its own looks replaces them, and would be the reason for the next.
pub(in crate::device) fn event(kind: u16, payload: &[u8]) -> Option<DeviceEvent> {
    let message = Message::of(payload)?;
    let is_news = match kind {
        NEW_DISCIPLINE | DELETED_DISCIPLINE => true,
        NEW_FILTER | DELETED_FILTER => !message.is_ours(),
        _ => false,
    };
    let index = Some(message.index).filter(|index| *index != SHARED);
    is_news.then(|| DeviceEvent::new(Changed::TrafficControl, index))
}

#[cfg(test)]
mod tests {
    use rtnetlink::{
        packet_core::Emitable as _,
        packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    };

    use super::*;

    fn message(handle: u32, parent: u32, info: u32, kind: &str, options: Vec<TcOption>) -> Vec<u8> {
        let mut message = TcMessage::default();
        let handle_of = |handle: u32| TcHandle { major: (handle >> 16) as u16, minor: handle as u16 };
        message.header.index = 7;
        (message.header.handle, message.header.parent) = (handle_of(handle), handle_of(parent));
        message.header.info = info;
        message.attributes = vec![TcAttribute::Kind(kind.to_owned())];
        if !options.is_empty() {
            message.attributes.push(TcAttribute::Options(options));
        }
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn program(name: &str) -> Vec<TcOption> {
        vec![TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned()))]
    }

    fn info(protocol: u16) -> u32 {
        49152 << 16 | u32::from(protocol.to_be())
    }

    #[test]
    fn what_the_kernel_gives_a_device_is_no_queue_of_anybodys() {
        for (handle, parent, kind, expected) in [
            (0, ROOT, "noqueue", false),
            (0, ROOT, "pfifo_fast", false),
            (0, ROOT, "mq", false),
            (0, 1, "fq_codel", false),
            (0xffff_0000, 0xffff_fff1, "clsact", false),
            (0xffff_0000, 0xffff_fff1, "ingress", false),
            (0x8001_0000, ROOT, "noqueue", false),
            (0x8001_0000, ROOT, "tbf", true),
            (0x8001_0000, 1, "netem", true),
            // Behind another one.
            (0x8002_0000, 0x8001_0001, "pfifo", false),
        ] {
            let bytes = message(handle, parent, 2, kind, Vec::new());
            assert_eq!(Message::of(&bytes).expect("a message").is_queue(), expected, "{kind} {handle:x}");
        }
    }

    #[test]
    fn filters_of_others_are_told_from_ours_and_are_news() {
        for (bytes, expected) in [
            (message(0, AT_INGRESS, info(ALL), "bpf", Vec::new()), false),
            (message(1, AT_INGRESS, info(ALL), "bpf", program("from_pod")), true),
            (message(0xf100_0001, AT_INGRESS, info(ALL), "bpf", program("from_pod")), false),
            (message(0xf100_0002, AT_EGRESS, info(ALL), "bpf", program("to_pod")), false),
            (message(0xf100_0001, AT_INGRESS, info(ALL), "bpf", program("mirror")), true),
            (message(0x8000_0800, AT_INGRESS, info(IPV4), "u32", Vec::new()), true),
            (message(0x8000_0800, AT_INGRESS, info(0x0806), "u32", Vec::new()), false),
        ] {
            let message = Message::of(&bytes).expect("a message");
            assert_eq!(message.is_foreign_filter(), expected, "{:x}", message.handle);
        }
        let ours = message(0xf100_0001, AT_INGRESS, info(ALL), "bpf", program("from_pod"));
        assert_eq!(event(NEW_FILTER, &ours), None);
        let others = message(1, AT_INGRESS, info(ALL), "matchall", Vec::new());
        for kind in [NEW_FILTER, DELETED_FILTER, NEW_DISCIPLINE] {
            assert_eq!(event(kind, &others), Some(DeviceEvent::new(Changed::TrafficControl, Some(7))));
        }
        for len in 0..others.len() {
            let _cut = event(NEW_FILTER, &others[..len]);
        }
    }
}
