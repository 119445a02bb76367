//! The packets that rules are looked through for: each stands for all that bypass the stack in one direction, of one protocol
//! and in one state of their connection.

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc};

use ipnet::{Ipv4Net, Ipv4Subnets};

/// Of how many prefixes or ranges a packet's addresses or ports may be. More tell no more than none.
const MOST: usize = 64;

/// Whether a packet meets a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Truth {
    /// None of those that it stands for does.
    No,
    /// Some may.
    Maybe,
    /// Each does.
    Yes,
}

impl Truth {
    /// For both conditions.
    pub(super) const fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Yes, Self::Yes) => Self::Yes,
            _ => Self::Maybe,
        }
    }

    const fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
            Self::Yes => Self::No,
        }
    }
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Way {
    /// From a pod into the overlay.
    Out,
    /// From the overlay to a pod.
    In,
    /// A tunnel packet to a peer.
    TunnelOut,
    /// A tunnel packet from a peer.
    TunnelIn,
}

/// What conntrack says of a connection (`enum ip_conntrack_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum State {
    /// Packets were seen in both directions.
    Established,
    /// In one only: the first of a connection, and all of UDP that nobody answers.
    New,
    /// No connection is kept for it.
    Untracked,
    /// conntrack has not seen it yet.
    Unseen,
}

/// Prefixes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Nets(pub(super) Arc<[Ipv4Net]>);

impl Nets {
    pub(super) fn any() -> Self {
        Self([Ipv4Net::default()].into())
    }

    pub(super) fn of(nets: &[Ipv4Net]) -> Self {
        Self(Ipv4Net::aggregate(&nets.to_vec()).into())
    }

    /// All from one address to another.
    pub(super) fn range(first: Ipv4Addr, last: Ipv4Addr) -> Vec<Ipv4Net> {
        if first > last { Vec::new() } else { Ipv4Subnets::new(first, last, 0).collect() }
    }

    /// What of a prefix is not in another that lies in it.
    pub(super) fn without(outer: Ipv4Net, inner: Ipv4Net) -> Self {
        let mut rest = Vec::new();
        let mut part = outer;
        while part.contains(&inner) && part != inner {
            let Ok(halves) = part.subnets(part.prefix_len() + 1) else { break };
            for half in halves {
                if half.contains(&inner) {
                    part = half;
                } else {
                    rest.push(half);
                }
            }
        }
        Self(rest.into())
    }

    fn overlap(&self, other: &Self) -> bool {
        self.0.iter().any(|one| other.0.iter().any(|two| one.contains(two) || two.contains(one)))
    }

    fn narrow(&mut self, wanted: &[Ipv4Net]) -> Truth {
        let mut both = BTreeSet::new();
        let mut is_covered = true;
        for own in self.0.iter() {
            if wanted.iter().any(|net| net.contains(own)) {
                both.insert(*own);
                continue;
            }
            is_covered = false;
            both.extend(wanted.iter().filter(|net| own.contains(*net)));
        }
        narrow_to(&mut self.0, both, is_covered)
    }
}

/// Leaves of a packet's values those that a condition asks for, too, unless they are too many to keep; `is_covered` where that
/// is all of them.
fn narrow_to<T>(values: &mut Arc<[T]>, both: BTreeSet<T>, is_covered: bool) -> Truth {
    match (is_covered, both.len()) {
        (_, 0) => Truth::No,
        (true, _) => Truth::Yes,
        (false, len) => {
            if len <= MOST {
                *values = both.into_iter().collect();
            }
            Truth::Maybe
        }
    }
}

/// Ranges of ports, both ends included.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PortRanges(pub(super) Arc<[(u16, u16)]>);

impl PortRanges {
    pub(super) fn any() -> Self {
        Self([(0, u16::MAX)].into())
    }

    fn narrow(&mut self, wanted: &[(u16, u16)]) -> Truth {
        let mut both = BTreeSet::new();
        let mut is_covered = true;
        for &(first, last) in self.0.iter() {
            is_covered &= wanted.iter().any(|&(from, to)| from <= first && last <= to);
            let parts = wanted.iter().map(|&(from, to)| (from.max(first), to.min(last)));
            both.extend(parts.filter(|(first, last)| first <= last));
        }
        narrow_to(&mut self.0, both, is_covered)
    }
}

/// The names of devices.
pub(super) type Devices = Arc<[Arc<str>]>;

/// Packets of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Packet {
    pub(super) way: Way,
    /// Its number (RFC 5237): TCP's or UDP's.
    pub(super) protocol: u8,
    pub(super) state: State,
    /// By which devices it may have come; none where it is the host's own.
    pub(super) input: Devices,
    /// By which it may go; none where it is for the host itself, or where that is not decided yet.
    pub(super) output: Devices,
    pub(super) source: Nets,
    pub(super) destination: Nets,
    pub(super) source_ports: PortRanges,
    pub(super) destination_ports: PortRanges,
    /// Of a tunnel packet, the port that it is for: its `destination_ports` say whether that was asked for.
    pub(super) tunnel_port: Option<u16>,
    /// Those of which either its source's or its destination's port is one.
    pub(super) either_ports: PortRanges,
    /// Whether there are some among them that do not get here, by conditions that can't be told.
    pub(super) is_unsure: bool,
    /// Whether those get no further of whose connections something is noted, as who looks at the first packets of each does of
    /// what may go on.
    pub(super) is_first_look: bool,
    /// Of a tunnel packet, those among them that do not get here, by source and destination.
    pub(super) gone: Vec<(Nets, Nets)>,
}

/// TCP's number.
pub(super) const TCP: u8 = 6;
/// UDP's.
pub(super) const UDP: u8 = 17;

/// A condition of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Match {
    /// Devices by name; one that ends with `*` stands for all that begin so.
    Input(Vec<String>),
    Output(Vec<String>),
    Source(Vec<Ipv4Net>),
    Destination(Vec<Ipv4Net>),
    Protocol(Vec<u8>),
    SourcePorts(Vec<(u16, u16)>),
    DestinationPorts(Vec<(u16, u16)>),
    /// One of both ports.
    EitherPort(Vec<(u16, u16)>),
    State(Vec<State>),
    Not(Box<Self>),
    /// What every packet of the overlay meets.
    Always,
    /// What none meets that can bypass: SYN, FIN, RST, other protocols, IPv6.
    Never,
    /// What somebody has noted of the connection: a mark, a label.
    Noted,
    /// What can't be told.
    Unknown,
}

impl Match {
    /// The same, or its contrary.
    pub(super) fn unless(self, is_negated: bool) -> Self {
        match self {
            plain if !is_negated => plain,
            Self::Always => Self::Never,
            Self::Never => Self::Always,
            Self::Unknown | Self::Noted => Self::Unknown,
            plain => Self::Not(Box::new(plain)),
        }
    }
}

impl Packet {
    /// Takes note that some do not get any further.
    pub(super) fn lose(&mut self, gone: Self) {
        if gone.is_unsure {
            self.is_unsure = true;
        } else if self.tunnel_port.is_some() {
            // Nobody asks of the others, and those differ by little as they are.
            self.gone.push((gone.source, gone.destination));
        }
    }

    /// Whether all that it stands for get here.
    pub(super) fn is_sure(&self) -> bool {
        let lost = |(source, destination): &(Nets, Nets)| {
            source.overlap(&self.source) && destination.overlap(&self.destination)
        };
        !self.is_unsure && !self.gone.iter().any(lost)
    }

    /// Leaves only what may meet a condition.
    pub(super) fn narrow(&mut self, condition: &Match) -> Truth {
        let truth = match condition {
            Match::Input(names) => narrow_devices(&mut self.input, names, false),
            Match::Output(names) => narrow_devices(&mut self.output, names, false),
            Match::Source(nets) => self.source.narrow(nets),
            Match::Destination(nets) => self.destination.narrow(nets),
            Match::Protocol(numbers) => truth(numbers.contains(&self.protocol)),
            Match::SourcePorts(ranges) => self.source_ports.narrow(ranges),
            Match::DestinationPorts(ranges) => match self.tunnel_port {
                None => self.destination_ports.narrow(ranges),
                Some(port) => {
                    self.destination_ports = PortRanges([(port, port)].into());
                    truth(ranges.iter().any(|(first, last)| (*first..=*last).contains(&port)))
                }
            },
            Match::EitherPort(ranges) => self.either_ports.narrow(ranges).and(Truth::Maybe),
            Match::State(_) if self.state == State::Unseen => Truth::Maybe,
            Match::State(states) => truth(states.contains(&self.state)),
            Match::Not(condition) => match &**condition {
                Match::Input(names) => narrow_devices(&mut self.input, names, true),
                Match::Output(names) => narrow_devices(&mut self.output, names, true),
                condition => self.clone().narrow(condition).not(),
            },
            Match::Always => Truth::Yes,
            Match::Never => Truth::No,
            Match::Unknown | Match::Noted => {
                self.is_unsure = true;
                Truth::Maybe
            }
        };
        // What is narrowed by address or port is no less sure; what is left by a negation is.
        self.is_unsure |= truth == Truth::Maybe && matches!(condition, Match::Not(_) | Match::EitherPort(_));
        truth
    }
}

const fn truth(is_met: bool) -> Truth {
    if is_met { Truth::Yes } else { Truth::No }
}

fn narrow_devices(devices: &mut Devices, names: &[String], is_negated: bool) -> Truth {
    let is_named = |device: &str| {
        names.iter().any(|name| match name.strip_suffix('*') {
            Some(start) => device.starts_with(start),
            None => device == name,
        })
    };
    // Of a packet that has no such device the name is empty.
    if devices.is_empty() {
        return truth(is_named("") != is_negated);
    }
    let left: Devices = devices.iter().filter(|device| is_named(device) != is_negated).cloned().collect();
    let truth = match left.len() {
        0 => Truth::No,
        len if len == devices.len() => Truth::Yes,
        _ => Truth::Maybe,
    };
    if truth == Truth::Maybe {
        *devices = left;
    }
    truth
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<Ipv4Net> {
        texts.iter().map(|text| text.parse().expect("CIDR")).collect()
    }

    fn packet() -> Packet {
        Packet {
            way: Way::Out,
            protocol: TCP,
            state: State::Established,
            input: ["cni0".into(), "cali1".into(), "cali2".into()].into(),
            output: ["flannel.1".into()].into(),
            source: Nets::of(&nets(&["10.5.28.0/24"])),
            destination: Nets::without(nets(&["10.5.0.0/16"])[0], nets(&["10.5.28.0/24"])[0]),
            source_ports: PortRanges::any(),
            destination_ports: PortRanges::any(),
            tunnel_port: None,
            either_ports: PortRanges::any(),
            is_unsure: false,
            is_first_look: false,
            gone: Vec::new(),
        }
    }

    #[test]
    fn conditions_narrow() {
        let name = |name: &str| vec![name.to_owned()];
        let cases = [
            (Match::Source(nets(&["10.5.0.0/16"])), Truth::Yes),
            (Match::Source(nets(&["10.6.0.0/16"])), Truth::No),
            (Match::Source(nets(&["10.5.28.7/32"])), Truth::Maybe),
            (Match::Source(nets(&["10.5.28.7/32"])).unless(true), Truth::Maybe),
            (Match::Source(nets(&["10.5.0.0/16"])).unless(true), Truth::No),
            (Match::Source(nets(&["10.6.0.0/16"])).unless(true), Truth::Yes),
            // What goes to the own subnet does not go into the overlay.
            (Match::Destination(nets(&["10.5.28.0/24"])), Truth::No),
            (Match::Destination(nets(&["10.5.0.0/16"])), Truth::Yes),
            (Match::Input(name("eth0")), Truth::No),
            (Match::Input(name("eth0")).unless(true), Truth::Yes),
            (Match::Input(name("cali*")), Truth::Maybe),
            (Match::Output(name("flannel.1")), Truth::Yes),
            (Match::Output(name("*")), Truth::Yes),
            (Match::Output(name("flannel.1")).unless(true), Truth::No),
            (Match::Protocol(vec![UDP, TCP]), Truth::Yes),
            (Match::Protocol(vec![UDP]), Truth::No),
            (Match::DestinationPorts(vec![(0, 65535)]), Truth::Yes),
            (Match::DestinationPorts(vec![(80, 90)]), Truth::Maybe),
            (Match::EitherPort(vec![(80, 90)]), Truth::Maybe),
            (Match::State(vec![State::New]), Truth::No),
            (Match::State(vec![State::New]).unless(true), Truth::Yes),
            (Match::Never.unless(true), Truth::Yes),
            (Match::Unknown.unless(true), Truth::Maybe),
        ];
        for (condition, expected) in cases {
            assert_eq!(packet().narrow(&condition), expected, "{condition:?}");
        }
    }

    #[test]
    fn what_is_left_is_what_can_be_met() {
        let mut left = packet();
        left.narrow(&Match::Input(vec!["cali*".to_owned()]));
        left.narrow(&Match::Input(vec!["cali1".to_owned()]).unless(true));
        assert_eq!(*left.input, [Arc::from("cali2")]);
        left.narrow(&Match::Source(nets(&["10.5.28.0/25", "10.6.0.0/16"])));
        assert_eq!(*left.source.0, nets(&["10.5.28.0/25"]));
        left.narrow(&Match::DestinationPorts(vec![(80, 90), (100, 110)]));
        assert_eq!(left.narrow(&Match::DestinationPorts(vec![(85, 105)])), Truth::Maybe);
        assert_eq!(*left.destination_ports.0, [(85, 90), (100, 105)]);
        assert_eq!(left.narrow(&Match::DestinationPorts(vec![(1, 2)])), Truth::No);
        assert_eq!(Nets::range(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)).len(), 2);
    }
}
