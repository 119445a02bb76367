//! What nf_tables tells of changes (`NFNLGRP_NFTABLES`), as far as it says whether to look again at once.
//!
//! A host whose services come and go changes its rules all the time, and a look through all of them costs what a listing costs.
//! So each change is looked at by itself: whether it can have put a rule that acts on each packet where a packet of the overlay
//! gets to. What was true at the last look, and which chains lead where, is the [`Graph`].

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
    },
};
use tokio::io::unix::AsyncFd;

use super::{
    RuleSets,
    messages::{Change, FAMILIES, Message, messages},
    rule::{Table, Verdict},
};

/// As a bit: `1 << (NFNLGRP_NFTABLES - 1)` (include/uapi/linux/netfilter/nfnetlink.h).
const NFTABLES: u32 = 1 << 6;
/// The kernel puts all messages of a transaction into the socket at once; ten thousand rules are some of these.
const ROOM: usize = 8 << 20;
/// The longest datagram of the kernel's (`NLMSG_GOODSIZE` of the largest page).
const LONGEST: usize = 1 << 16;

/// No events can be had.
#[derive(Debug, thiserror::Error)]
#[error("{call} for nf_tables' events: {source}")]
pub(super) struct EventsError {
    call: &'static str,
    source: io::Error,
}

/// How soon to look again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// Something is otherwise; nothing new acts on each packet.
    Later,
    /// Something may.
    Now,
}

/// A socket for the changes of the network namespace that it was opened in.
pub(super) struct Events {
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
}

impl Events {
    pub(super) fn open() -> Result<Self, EventsError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let family = AddressFamily::Netlink;
        let socket = socket(family, SockType::Raw, flags, SockProtocol::NetlinkNetFilter);
        let socket = socket.map_err(failed("open a netlink socket"))?;
        // Less room loses messages sooner, which is told.
        if setsockopt(&socket, sockopt::RcvBufForce, &ROOM).is_err() {
            let _less = setsockopt(&socket, sockopt::RcvBuf, &ROOM);
        }
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, NFTABLES)).map_err(failed("join the group"))?;
        // SAFETY: the descriptor is the socket's own, which stays open as long as what it is registered with.
        let socket = unsafe { AsyncFd::register(socket) };
        let failed = |source| EventsError { call: "watch a netlink socket", source };
        let socket = socket.map_err(|error| failed(error.into()))?;
        Ok(Self { socket, buffer: vec![0; LONGEST] })
    }

    /// Waits for changes, and takes all that are told of now.
    pub(super) async fn told(&mut self, graph: &mut Graph) -> Urgency {
        loop {
            // Fails where the runtime ends.
            let Ok(mut ready) = self.socket.readable().await else { return Urgency::Later };
            let mut told = None;
            loop {
                match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                    Ok(len) => told = told.max(graph.take(self.buffer.get(..len).unwrap_or_default())),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    // More than there was room for (ENOBUFS).
                    Err(_) => told = Some(Urgency::Now),
                }
            }
            if let Some(told) = told {
                return told;
            }
        }
    }
}

fn failed(call: &'static str) -> impl FnOnce(Errno) -> EventsError {
    move |errno| EventsError { call, source: errno.into() }
}

/// Which chains and maps of a table lead where.
#[derive(Debug, Default)]
struct Edges {
    /// The chains that the kernel calls for more than the first packet of a connection.
    bases: HashSet<String>,
    /// The chains and maps that packets get to from there. Maps have an `@` in front.
    reached: HashSet<String>,
    /// The chains with rules that act on each packet.
    acting: HashSet<String>,
    /// From a chain or a map to the others.
    to: HashMap<String, HashSet<String>>,
}

impl Edges {
    fn of(table: &Table) -> Self {
        let mut edges = Self::default();
        for (name, chain) in &table.chains {
            for rule in &chain.rules {
                if !rule.acts.is_empty() {
                    edges.acting.insert(name.clone());
                }
                let mut targets = Vec::new();
                rule.verdict.targets(&mut targets);
                let mut from = name.clone();
                if let Verdict::Map(Some(map), _) = &rule.verdict {
                    let map = format!("@{map}");
                    edges.to.entry(from).or_default().insert(map.clone());
                    from = map;
                }
                edges.to.entry(from).or_default().extend(targets.into_iter().map(str::to_owned));
            }
        }
        for (name, _) in table.bases() {
            edges.bases.insert(name.to_owned());
            edges.reach(name);
        }
        edges
    }

    /// Packets get there, and on. Whether they meet something then that acts on each, and did not before.
    fn reach(&mut self, name: &str) -> bool {
        let mut is_acting = false;
        let mut ahead = vec![name.to_owned()];
        while let Some(name) = ahead.pop() {
            if !self.reached.insert(name.clone()) {
                continue;
            }
            is_acting |= self.acting.contains(&name);
            ahead.extend(self.to.get(&name).into_iter().flatten().cloned());
        }
        is_acting
    }

    /// Whether packets meet something that acts on each.
    fn is_acting(&self) -> bool {
        self.acting.iter().any(|chain| self.reached.contains(chain))
    }

    fn lead(&mut self, from: String, to: String) -> bool {
        let is_reached = self.reached.contains(&from);
        let is_acting = is_reached && self.reach(&to);
        self.to.entry(from).or_default().insert(to);
        is_acting
    }
}

/// What was there at the last look, and what was told since then.
#[derive(Debug, Default)]
pub(super) struct Graph {
    /// By the kernel's number of a family and the name.
    tables: HashMap<(u8, String), Edges>,
}

impl Graph {
    /// Of what was found.
    pub(super) fn of(sets: &RuleSets) -> Self {
        let tables = sets.0.iter().filter_map(|table| Some((table.id.clone()?, Edges::of(table))));
        Self { tables: tables.collect() }
    }

    /// Takes a datagram; [`None`] where it is about nothing that is looked for.
    pub(super) fn take(&mut self, datagram: &[u8]) -> Option<Urgency> {
        messages(datagram).filter_map(|message| self.message(message)).max()
    }

    fn message(&mut self, Message { family, table, change }: Message<'_>) -> Option<Urgency> {
        let is_relevant = FAMILIES.contains(&family);
        if !is_relevant {
            return None;
        }
        let edges = self.tables.entry((family, table.to_owned())).or_default();
        // Where something acts already, what stands in front of it decides on who meets it.
        let is_near = |edges: &Edges, name: &str| edges.reached.contains(name) && edges.is_acting();
        let is_urgent = match change {
            Change::Base { chain } => {
                edges.bases.insert(chain.to_owned()) && {
                    edges.reach(chain);
                    true
                }
            }
            Change::Rule { chain, is_acting, leads_to } => {
                let mut is_urgent = is_near(edges, chain);
                if is_acting {
                    edges.acting.insert(chain.to_owned());
                    is_urgent |= edges.reached.contains(chain);
                }
                for target in leads_to {
                    is_urgent |= edges.lead(chain.to_owned(), target);
                }
                is_urgent
            }
            Change::Gone { chain } => is_near(edges, chain),
            Change::Element { set, chains } => {
                let name = format!("@{set}");
                let mut is_urgent = edges.is_acting();
                for chain in chains {
                    is_urgent |= edges.lead(name.clone(), chain.to_owned());
                }
                is_urgent
            }
            Change::Other => false,
        };
        Some(if is_urgent { Urgency::Now } else { Urgency::Later })
    }
}
