//! From place to place on a packet's way through this host.

use std::net::Ipv4Addr;

use flannel_common::{
    event::{Event, Outcome},
    maps::{Config, Vtep},
    packet::Mac,
};

use super::{
    TraceError,
    consulted::{self, Consulted, constants},
    host::{Host, Pod},
    layers::layers,
    packet::{ETHERNET_LEN, Query, Sender, TTL},
    report::{Fate, ProgramStep, Step, Trace, is_drop, tc_verdict, xdp_verdict},
};
use crate::{
    dataplane::{
        Hook, XdpMode,
        replica::{Concerned, Program, Ran},
    },
    device::{Link, stack_route::StackRoute},
    operator::interface_name,
    plural::counted,
};

/// Where a tunnel packet has its inner Ethernet header.
const INNER_ETHERNET: usize = flannel_common::vxlan::OVERHEAD as usize;
/// What `xdp_decap` puts in front of a packet that it took out of the tunnel.
const XDP_MARK: usize = size_of::<flannel_common::maps::Decapsulated>();
/// A locally administered MAC, for a sender of whom none is known.
const SOMEBODY: Mac = [0x02, 0, 0, 0, 0, 0xfe];

/// A trace that goes on.
struct Way<'a> {
    host: &'a Host,
    query: &'a Query,
    concerned: Concerned,
    steps: Vec<Step>,
}

/// How it ended.
type End = (Fate, String);

/// What becomes of a packet. `from_vtep` is the VTEP that is to send it, where it is not the one that leases its source.
pub(super) async fn trace(host: &Host, query: &Query, from_vtep: Option<Ipv4Addr>) -> Result<Trace, TraceError> {
    let is_here = |address: Ipv4Addr| host.config.is_local(address.to_bits()) || host.interface_of(address).is_some();
    let is_outward = from_vtep.is_none() && is_here(query.source);
    let mut way = Way::new(host, query, is_outward)?;
    let (fate, conclusion) = if is_outward {
        way.outward().await?
    } else {
        let (vtep, sender) = way.sender(from_vtep)?;
        if from_vtep.is_none() && !is_here(query.destination) {
            return Err(TraceError::NotHere {
                here: host.subnet(),
                source_host: way.name_of(query.source)?,
                destination_host: way.name_of(query.destination)?,
            });
        }
        way.inward(vtep, sender, from_vtep.is_some()).await?
    };
    let packet = layers(&query.frame(TTL, Mac::default(), Mac::default())?, 0).split_off(1).join(" | ");
    Ok(Trace { vni: host.vni.get(), packet, steps: way.steps, fate, conclusion })
}

impl<'a> Way<'a> {
    fn new(host: &'a Host, query: &'a Query, is_outward: bool) -> Result<Self, TraceError> {
        let flow = query.flow(is_outward);
        let remote = [query.source, query.destination];
        let sent_as = host.tables.flow(&flow)?.map(|flow| Ipv4Addr::from(flow.egress.sent_as.remote));
        let mut vteps = Vec::new();
        for address in remote.into_iter().chain(sent_as) {
            vteps.extend(host.tables.leaseholder(&host.config, address)?.map(|leased| leased.id));
        }
        vteps.dedup();
        let concerned = Concerned { flow: Some(flow), vteps, veth: None, original: None };
        Ok(Self { host, query, concerned, steps: Vec::new() })
    }

    /// A host in words, by an address of its lease.
    fn name_of(&self, address: Ipv4Addr) -> Result<String, TraceError> {
        let leased = self.host.tables.leaseholder(&self.host.config, address)?;
        let vtep = match leased {
            Some(leased) => self.host.tables.vtep(leased.id)?,
            None => None,
        };
        Ok(match vtep {
            Some(vtep) => format!("the host with the VTEP address {}", Ipv4Addr::from_bits(vtep.address)),
            None => format!("the host that has {address}, which no lease covers"),
        })
    }

    /// Who sends it here: what the tables have of him, and as whom he sends.
    fn sender(&self, from_vtep: Option<Ipv4Addr>) -> Result<(Option<Vtep>, Sender), TraceError> {
        let Host { tables, config, .. } = self.host;
        let source = self.query.source;
        let by_lease = tables.leaseholder(config, source)?.map(|leased| leased.id);
        let id = match from_vtep {
            Some(address) => tables.vtep_of(address)?,
            None => match by_lease {
                Some(id) => Some(id),
                None => Some(tables.vtep_of(source)?.ok_or(TraceError::NotLeased(source))?),
            },
        };
        let vtep = match id {
            Some(id) => tables.vtep(id)?,
            None => None,
        };
        let address = from_vtep.or(vtep.map(|vtep| Ipv4Addr::from_bits(vtep.address)));
        let underlay_mac =
            vtep.filter(|vtep| vtep.flags & Vtep::HAS_MAC != 0).map(|vtep| vtep.header.underlay_macs().0);
        let sender = Sender {
            address: address.unwrap_or(source),
            vtep_mac: vtep.map_or(SOMEBODY, |vtep| vtep.header.peer_vtep_mac()),
            underlay_mac: underlay_mac.unwrap_or(SOMEBODY),
        };
        Ok((vtep, sender))
    }

    /// Runs a program, and notes the step.
    async fn run(
        &mut self,
        program: Program,
        link: &Link,
        frame: &[u8],
        note: u16,
        tables: Vec<Consulted>,
    ) -> Result<Ran, TraceError> {
        let (attached, mut ran) = self.host.run(program, link, frame, note, &self.concerned).await?;
        if ran.event == Some(Event::XdpDecapsulated) {
            ran.frame.drain(..XDP_MARK.min(ran.frame.len()));
        }
        let (event, description) = ProgramStep::describe(ran.event);
        let port = self.host.config.port;
        self.steps.push(Step::Program(ProgramStep {
            program: program.name(),
            interface: link.name.clone(),
            program_id: attached.id,
            event,
            description,
            verdict: match program {
                Program::Tc(_) => tc_verdict(ran.verdict),
                Program::Xdp(_) => xdp_verdict(ran.verdict),
            },
            tables: [vec![constants(&attached.config)], tables].concat(),
            before: layers(frame, port),
            after: layers(&ran.frame, port),
        }));
        if ran.original.is_some() {
            self.concerned.original = ran.original;
        }
        Ok(ran)
    }

    fn stack(&mut self, does: impl Into<String>) {
        self.steps.push(Step::Stack { does: does.into() });
    }

    /// From a pod, or from the host itself.
    async fn outward(&mut self) -> Result<End, TraceError> {
        let Query { source, destination, .. } = *self.query;
        if let Some(interface) = self.host.interface_of(source) {
            let interface = interface.to_owned();
            self.stack(format!("{source} is this host's own address, of {interface}: no pod sends it"));
            return self.routed(None, TTL, 0).await;
        }
        let pod = self.host.pod(source)?;
        self.concerned.veth = Some(pod.veth.index);
        let mut tables = vec![consulted::pod(self.host, pod.veth.index)?];
        tables.extend(
            self.concerned
                .flow
                .iter()
                .map(|key| consulted::flow(self.host, key))
                .collect::<Result<Vec<_>, _>>()?
                .concat(),
        );
        tables.extend(consulted::leaseholder(self.host, destination)?);
        let frame = self.query.frame(TTL, pod.mac, pod.gateway_mac)?;
        let ran = self.run(Program::Tc(Hook::FromPod), &pod.veth, &frame, 0, tables).await?;
        match ran.event.map(|event| (event, event.outcome())) {
            Some((event, Outcome::Drop)) => Ok(dropped(event, &pod.veth)),
            Some((event, Outcome::Forward)) => Ok(self.sent(event, "past the stack")?),
            _ => self.routed(Some(&pod), TTL - 1, ran.note).await,
        }
    }

    /// What the stack does with it, from a pod or from the host itself.
    async fn routed(&mut self, pod: Option<&Pod>, ttl: u8, note: u16) -> Result<End, TraceError> {
        let Query { source, destination, size, .. } = *self.query;
        let host = self.host;
        let route = host.netlink.stack_route(source, destination, pod.map(|pod| pod.input)).await?;
        let (next_hop, ifindex, mtu) = match route {
            StackRoute::Local => {
                let of = host.interface_of(destination).unwrap_or("lo").to_owned();
                self.stack(format!("{destination} is this host's own address, of {of}"));
                return Ok((Fate::Received, "it stays on this host; the overlay has no part in it".to_owned()));
            }
            StackRoute::Refused(reason) => {
                self.stack(format!("the kernel's routes refuse it: {reason}"));
                let look = format!("`ip route get {destination} from {source}`");
                return Ok((Fate::Refused, format!("the stack drops it: {reason}; see {look}")));
            }
            StackRoute::Forwarded { next_hop, ifindex, mtu } => (next_hop, ifindex, mtu),
        };
        let link = host.link(ifindex)?.clone();
        let mtu = mtu.unwrap_or(link.mtu).min(link.mtu);
        let by = next_hop.map(|next_hop| format!(" by the next hop {}", next_hop.address)).unwrap_or_default();
        let mut does = format!("routes it to {}{by}, MTU {mtu}; its packet rules are not run here", link.name);
        if link.index != host.overlay.index {
            self.stack(does);
            let is_bridged =
                pod.is_some_and(|pod| pod.input == link.index) || host.config.is_local(destination.to_bits());
            let end = match is_bridged {
                true => format!("it stays on this host, at {}; the overlay has no part in it", link.name),
                false => format!("it leaves by {}; the overlay has no part in it", link.name),
            };
            return Ok((Fate::Elsewhere, end));
        }
        if u32::from(size) > mtu {
            does += match pod {
                Some(_) => {
                    "; it is larger, and must not be fragmented: the sender is told so (ICMP fragmentation needed)"
                }
                None => "; it is larger, and must not be fragmented: the sending program is told so (EMSGSIZE)",
            };
            self.stack(does);
            let end = format!(
                "it is too large by {}: the stack drops it, and tells the sender that {mtu} fit",
                counted(u32::from(size) - mtu, "byte")
            );
            return Ok((Fate::Refused, end));
        }
        self.stack(does);
        let frame = self.query.frame(ttl, link.mac.unwrap_or_default(), host.mac_of(next_hop))?;
        self.encapsulation(&link, &frame, note).await
    }

    /// What the stack routed to the overlay's device.
    async fn encapsulation(&mut self, link: &Link, frame: &[u8], note: u16) -> Result<End, TraceError> {
        let host = self.host;
        let destination = self.query.destination;
        let is_tunnel = !host.config.has(Config::NO_TUNNEL);
        let hook = if is_tunnel { Hook::ToOverlay } else { Hook::ToUnderlay };
        let tables = consulted::leaseholder(host, destination)?;
        let ran = self.run(Program::Tc(hook), link, frame, note, tables.clone()).await?;
        let Some(event) = ran.event else { return Ok(elsewhere(link)) };
        match (event, event.outcome()) {
            (_, Outcome::Drop) => Ok(dropped(event, link)),
            (_, Outcome::Forward) | (Event::Routed | Event::RoutedChanged, _) => self.sent(event, "by the stack"),
            (Event::EncapOtherNextHop | Event::RoutedOther, _) => Ok(elsewhere(link)),
            (_, Outcome::Pass) => {
                self.stack(format!("{} sends what it gets to this host itself, and it comes out again", link.name));
                let program = Program::Tc(Hook::FromOverlay);
                let again = self.run(program, link, &ran.frame, ran.note, tables).await?;
                match again.event {
                    Some(last) if last.outcome() == Outcome::Forward => self.sent(last, "by the stack"),
                    Some(last) => Ok(dropped(last, link)),
                    None => Ok(elsewhere(link)),
                }
            }
        }
    }

    /// To a peer.
    fn sent(&self, event: Event, how: &str) -> Result<End, TraceError> {
        let flow = self.concerned.flow.map(|key| self.host.tables.flow(&key)).transpose()?.flatten();
        let translated = matches!(event, Event::PodTranslated | Event::PodDirect).then_some(flow).flatten();
        let destination = translated.map_or(self.query.destination, |flow| flow.egress.sent_as.remote.into());
        let leased = self.host.tables.leaseholder(&self.host.config, destination)?;
        let vtep = leased.map(|leased| self.host.tables.vtep(leased.id)).transpose()?.flatten();
        let to = vtep.map_or_else(
            || "a peer".to_owned(),
            |vtep| {
                let device = interface_name(vtep.ifindex).unwrap_or_else(|| format!("device no. {}", vtep.ifindex));
                format!("{} by {device}", Ipv4Addr::from_bits(vtep.address))
            },
        );
        let form = match event {
            Event::Direct | Event::PodDirect | Event::Routed | Event::RoutedNeighbour | Event::RoutedChanged => {
                "without encapsulation"
            }
            _ => "in the tunnel",
        };
        let unresolved =
            matches!(event, Event::EncapsulatedNeighbour | Event::PodEncapsulatedNeighbour | Event::RoutedNeighbour);
        let neighbour = if unresolved { "; the kernel finds out the next hop's MAC first (ARP)" } else { "" };
        Ok((Fate::Sent, format!("sent {form} to {to}, {how}{neighbour}")))
    }

    /// From another host.
    async fn inward(&mut self, vtep: Option<Vtep>, sender: Sender, is_forced: bool) -> Result<End, TraceError> {
        let host = self.host;
        let config = host.config;
        let link = host.input_from(vtep.map_or(0, |vtep| vtep.ifindex))?.clone();
        let mac = link.mac.ok_or_else(|| TraceError::NoEthernet(link.name.clone()))?;
        let is_direct = !is_forced && self.is_direct(vtep)?;
        let frame = match is_direct {
            true => self.query.frame(TTL - 1, sender.underlay_mac, mac)?,
            false => self.query.tunnel(TTL - 1, &config, host.vni, &sender, mac)?,
        };
        let mut tables = consulted::leaseholder(host, self.query.source)?;
        if !is_direct {
            tables.extend(consulted::sender(host, sender.address, self.query.source)?);
        }
        if let Some(key) = &self.concerned.flow {
            tables.extend(consulted::flow(host, key)?);
        }
        for mode in [XdpMode::Native, XdpMode::Generic] {
            let program = Program::Xdp(mode);
            if !host.is_pinned(program, link.index)? {
                continue;
            }
            let ran = self.run(program, &link, &frame, 0, tables.clone()).await?;
            match ran.event {
                Some(event) if is_drop(Some(event)) => return Ok(dropped(event, &link)),
                // What XDP leaves in front of a packet can't be given to a run of a TC program.
                Some(_) => self.stack(
                    "goes on with from_underlay, which knows the packet by XDP's mark; shown here is what it does with the same \
                     packet in its tunnel",
                ),
                None => {}
            }
        }
        let ran = self.run(Program::Tc(Hook::FromUnderlay), &link, &frame, 0, tables).await?;
        let Some(event) = ran.event else { return Ok(elsewhere(&link)) };
        match event {
            Event::Delivered | Event::DeliveredTranslated | Event::DirectDelivered => {
                let flow = self.concerned.flow.map(|key| host.tables.flow(&key)).transpose()?.flatten();
                let veth = flow.and_then(|flow| interface_name(flow.ingress.veth));
                Ok((Fate::Delivered, format!("put into the pod at {}, past the stack", veth.unwrap_or_default())))
            }
            Event::HandedIn | Event::DirectHandedIn => {
                let overlay = host.overlay.clone();
                self.out_of_tunnel(&overlay, &ran.frame, ran.note).await
            }
            Event::Admitted | Event::AdmittedByRoute => {
                let overlay = host.overlay.clone();
                self.stack(format!("{} takes the packet out of the tunnel", overlay.name));
                let inner = ran.frame.get(INNER_ETHERNET..).unwrap_or_default();
                self.out_of_tunnel(&overlay, inner, ran.note).await
            }
            Event::DirectReceived => self.delivery(&link, ran.note).await,
            event if event.outcome() == Outcome::Drop => Ok(dropped(event, &link)),
            _ => Ok(elsewhere(&link)),
        }
    }

    /// Whether a peer sends without encapsulation, as it is sent to.
    fn is_direct(&self, vtep: Option<Vtep>) -> Result<bool, TraceError> {
        let Host { config, tables, .. } = self.host;
        if config.has(Config::NO_TUNNEL) {
            return Ok(true);
        }
        let on_link = vtep.is_some_and(|vtep| vtep.flags & Vtep::ON_LINK != 0);
        let leased = tables.leaseholder(config, self.query.source)?;
        let heard = leased.map(|leased| tables.heard(leased.id)).transpose()?.flatten().unwrap_or_default();
        Ok(config.has(Config::DIRECT) && on_link && heard.is_direct())
    }

    /// What came out of the tunnel.
    async fn out_of_tunnel(&mut self, overlay: &Link, frame: &[u8], note: u16) -> Result<End, TraceError> {
        let ran = self.run(Program::Tc(Hook::FromOverlay), overlay, frame, note, Vec::new()).await?;
        match ran.event {
            Some(event) if is_drop(Some(event)) => Ok(dropped(event, overlay)),
            _ => self.delivery(overlay, ran.note).await,
        }
    }

    /// What the stack does with what came in, and the pod that it is for.
    async fn delivery(&mut self, input: &Link, note: u16) -> Result<End, TraceError> {
        let Query { source, destination, size, .. } = *self.query;
        let host = self.host;
        let (ifindex, mtu) = match host.netlink.stack_route(source, destination, Some(input.index)).await? {
            StackRoute::Local => {
                let of = host.interface_of(destination).unwrap_or("lo").to_owned();
                self.stack(format!("{destination} is this host's own address, of {of}"));
                return Ok((Fate::Received, "the host itself takes it, as far as its packet rules let it".to_owned()));
            }
            StackRoute::Refused(reason) => {
                self.stack(format!("the kernel's routes refuse it: {reason}"));
                let look = format!("`ip route get {destination} from {source} iif {}`", input.name);
                return Ok((Fate::Refused, format!("the stack drops it: {reason}; see {look}")));
            }
            StackRoute::Forwarded { ifindex, mtu, .. } => (ifindex, mtu),
        };
        let link = host.link(ifindex)?.clone();
        let mtu = mtu.unwrap_or(link.mtu).min(link.mtu);
        self.stack(format!("routes it to {}, MTU {mtu}; its packet rules are not run here", link.name));
        if u32::from(size) > mtu {
            return Ok((
                Fate::Refused,
                format!("too large for {}: the stack drops it, and tells the sender", link.name),
            ));
        }
        let pod = match host.pod(destination) {
            Ok(pod) => pod,
            Err(error @ TraceError::UnknownPod { .. }) => {
                return Ok((
                    Fate::Elsewhere,
                    format!("the stack asks at {} who has {destination}: {error}", link.name),
                ));
            }
            Err(error) => return Err(error),
        };
        self.concerned.veth = Some(pod.veth.index);
        let frame = self.query.frame(TTL - 2, pod.gateway_mac, pod.mac)?;
        debug_assert!(frame.len() > ETHERNET_LEN);
        let tables = vec![consulted::pod(host, pod.veth.index)?];
        self.run(Program::Tc(Hook::ToPod), &pod.veth, &frame, note, tables).await?;
        Ok((Fate::Delivered, format!("put into the pod at {}, by the stack", pod.veth.name)))
    }
}

fn dropped(event: Event, link: &Link) -> End {
    let label = event.label();
    (Fate::Dropped, format!("dropped at {}: {label}; `flannel-agent explain {label}` says what to do", link.name))
}

fn elsewhere(link: &Link) -> End {
    (Fate::Elsewhere, format!("left to the kernel at {}: it is none of the agent's", link.name))
}
