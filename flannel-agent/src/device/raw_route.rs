//! Route messages as they lie in a netlink datagram: of hundreds of thousands, all but a few are none of the agent's business.

use std::net::Ipv4Addr;

use super::raw::{attribute, word};
use ipnet::Ipv4Net;

/// Of a route message's own (`struct rtmsg`).
const ROUTE_HEADER_LEN: usize = 12;
/// Of a next hop in a list of several (`struct rtnexthop`).
const NEXT_HOP_LEN: usize = 8;

/// `RTM_NEWROUTE`, `RTM_DELROUTE`, `RTM_GETROUTE` (linux/rtnetlink.h).
pub(super) const NEW_ROUTE: u16 = 24;
pub(super) const DELETED_ROUTE: u16 = 25;
pub(super) const GET_ROUTE: u16 = 26;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_NH_ID: u16 = 30;

/// An IPv4 route's message.
#[derive(Clone, Copy)]
pub(super) struct RawRoute<'a> {
    header: &'a [u8; ROUTE_HEADER_LEN],
    attributes: &'a [u8],
}

impl<'a> RawRoute<'a> {
    /// [`None`] where it is none, or another family's.
    pub(super) fn of(payload: &'a [u8]) -> Option<Self> {
        let (header, attributes) = payload.split_first_chunk()?;
        (i32::from(header[0]) == nix::libc::AF_INET).then_some(Self { header, attributes })
    }

    fn attribute(&self, kind: u16) -> Option<&'a [u8]> {
        attribute(self.attributes, kind)
    }

    fn address(&self, kind: u16) -> Option<Ipv4Addr> {
        self.attribute(kind)?.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets))
    }

    pub(super) fn prefix_len(&self) -> u8 {
        self.header[1]
    }

    pub(super) fn protocol(&self) -> u8 {
        self.header[5]
    }

    pub(super) fn destination(&self) -> Ipv4Addr {
        self.address(RTA_DST).unwrap_or(Ipv4Addr::UNSPECIFIED)
    }

    pub(super) fn prefix(&self) -> Option<Ipv4Net> {
        Ipv4Net::new(self.destination(), self.prefix_len()).ok()
    }

    pub(super) fn is_of_main_table(&self) -> bool {
        let table = self.attribute(RTA_TABLE).and_then(|table| word(table, 0)).unwrap_or(self.header[4].into());
        table == u32::from(nix::libc::RT_TABLE_MAIN)
    }

    pub(super) fn gateway(&self) -> Option<Ipv4Addr> {
        self.address(RTA_GATEWAY)
    }

    /// What the host sends from by it, where it says so.
    pub(super) fn source(&self) -> Option<Ipv4Addr> {
        self.address(RTA_PREFSRC)
    }

    /// Its device; of several, the first.
    pub(super) fn output(&self) -> Option<u32> {
        self.outputs().next()
    }

    /// Whether it has more than one next hop, or may have: by an object of its own (`ip nexthop`), which can change alone.
    pub(super) fn has_several(&self) -> bool {
        self.outputs().nth(1).is_some() || self.attribute(RTA_NH_ID).is_some()
    }

    pub(super) fn outputs(&self) -> impl Iterator<Item = u32> + use<'a> {
        let one = self.attribute(RTA_OIF).and_then(|index| word(index, 0));
        let mut several = self.attribute(RTA_MULTIPATH).unwrap_or_default();
        let next = std::iter::from_fn(move || {
            let index = word(several, 4)?;
            let len = usize::from(u16::from_ne_bytes(*several.first_chunk()?));
            several = several.get(len.max(NEXT_HOP_LEN).next_multiple_of(4)..).unwrap_or_default();
            Some(index)
        });
        one.into_iter().chain(next)
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::{
        RouteMessageBuilder, RouteNextHopBuilder,
        packet_core::NetlinkMessage,
        packet_route::{RouteNetlinkMessage, route::RouteMessage},
    };

    use super::{super::raw::messages, *};

    fn datagram(routes: &[RouteMessage]) -> Vec<u8> {
        let mut all = Vec::new();
        for route in routes {
            let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(route.clone()));
            message.finalize();
            let mut bytes = vec![0; message.buffer_len()];
            message.serialize(&mut bytes);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            all.extend(bytes);
        }
        all
    }

    #[test]
    fn what_another_wrote_is_read() {
        let builder = RouteMessageBuilder::<Ipv4Addr>::new;
        let one = builder().destination_prefix([10, 5, 0, 0].into(), 16).gateway([169, 254, 1, 1].into());
        let hops = [3, 7].map(|index| RouteNextHopBuilder::new_ipv4().interface(index).build());
        let several = builder().table_id(1000).multipath(hops.to_vec());
        let bytes = datagram(&[one.output_interface(9).build(), several.build()]);
        let read: Vec<_> = messages(&bytes)
            .filter_map(|(kind, _, payload)| {
                let route = RawRoute::of(payload)?;
                let outputs: Vec<_> = route.outputs().collect();
                Some((kind, route.prefix()?.to_string(), route.is_of_main_table(), route.gateway(), outputs))
            })
            .collect();
        let gateway = Some([169, 254, 1, 1].into());
        assert_eq!(
            read,
            [
                (NEW_ROUTE, "10.5.0.0/16".to_owned(), true, gateway, vec![9]),
                (NEW_ROUTE, "0.0.0.0/0".to_owned(), false, None, vec![3, 7])
            ]
        );
    }

    #[test]
    fn what_is_cut_off_is_left_out() {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix([10, 5, 0, 0].into(), 16).build();
        let bytes = datagram(&[route]);
        for len in 0..bytes.len() {
            let read: Vec<_> = messages(&bytes[..len]).filter_map(|(.., payload)| RawRoute::of(payload)).collect();
            assert!(read.is_empty(), "{len}");
        }
    }
}
