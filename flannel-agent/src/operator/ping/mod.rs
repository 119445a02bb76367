//! `flannel-agent ping`: whether a peer answers by the underlay and through the overlay, and which packets fit on the way to it.
//!
//! Asked is by ICMP echo, which the kernel of any peer answers, with an agent or flannel on it: at its VTEP address past the tunnel,
//! at its own address in the overlay through it, and at a pod's where one is named. That works before there is any pod.

mod echo;

use std::{fmt, net::Ipv4Addr, str::FromStr, time::Duration};

use ipnet::Ipv4Net;
use serde::Serialize;
use serde_json::json;

pub use self::echo::EchoError;
use self::echo::{Answer, Echo, HEADERS};
use super::{
    OperatorError,
    peers::{self, Peer},
    rows,
};
use crate::{
    backend::has_datapath,
    cli::{Cli, Output},
    config::BackendType,
    dataplane::PinDirectory,
    device::Netlink,
    status::{API_VERSION, Status},
};

/// Bytes of IPv4 of a packet as `ping` sends it.
const USUAL: u16 = 84;
/// Between two requests.
const PAUSE: Duration = Duration::from_millis(200);

/// Whom to ask: a VTEP address, an address in the overlay, or a subnet of a peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A VTEP, an address of a peer's lease, or a pod.
    Address(Ipv4Addr),
    /// A lease.
    Subnet(Ipv4Net),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address = text.parse().map(Self::Address);
        let subnet = || text.parse::<Ipv4Net>().map(|subnet| Self::Subnet(subnet.trunc()));
        address.ok().or_else(|| subnet().ok()).ok_or_else(|| "neither an IPv4 address nor a subnet".to_owned())
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Subnet(subnet) => subnet.fmt(f),
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Whom.
    pub target: Target,
    /// The bytes of IPv4 of each packet; [`None`] for small ones, and the largest that the overlay has.
    pub size: Option<u16>,
    /// How many requests of each kind.
    pub count: u16,
}

/// How requests of one kind went.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    /// Past the tunnel, or through it.
    by: By,
    address: Ipv4Addr,
    /// Bytes of IPv4.
    size: u16,
    sent: u16,
    answered: u16,
    /// Of the round trips, in microseconds: least, mean and greatest.
    #[serde(skip_serializing_if = "Option::is_none")]
    round_trip_us: Option<[u64; 3]>,
    /// Why not all were answered, as far as anybody said.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Which way requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum By {
    Underlay,
    Overlay,
    Pod,
}

impl By {
    const fn label(self) -> &'static str {
        match self {
            Self::Underlay => "underlay",
            Self::Overlay => "overlay",
            Self::Pod => "pod",
        }
    }
}

/// Asks a peer, and prints how it answers. `false` where something is to be looked at.
///
/// # Errors
/// [`OperatorError::NoPeer`] where nobody leases that, and what reading the peers fails by.
pub async fn print(cli: &Cli, question: Question, output: Output) -> Result<bool, OperatorError> {
    let (netlink, _events, _connection) = Netlink::open()?;
    let neighbours = netlink.neighbour_states().await?;
    for (vni, status) in Status::read_all(&cli.run_dir)? {
        if !has_datapath(status.backend_type()) {
            continue;
        }
        let peers = peers::peers(&PinDirectory::new(&cli.bpf_pin_dir, vni), &status, &neighbours)?;
        let Some(peer) = peers.iter().find(|peer| is_asked_for(peer, question.target)) else { continue };
        let mut echo = Echo::open()?;
        let report = Report::of(&mut echo, peer, &status, question)?;
        match output {
            Output::Table => print!("{}", report.table(&status.name(), peer)),
            Output::Json => println!("{:#}", report.json(vni.get(), peer)),
        }
        return Ok(report.problem.is_none());
    }
    Err(OperatorError::NoPeer(question.target))
}

fn is_asked_for(peer: &Peer, target: Target) -> bool {
    match target {
        Target::Address(address) => peer.address == address || peer.subnet.contains(&address),
        Target::Subnet(subnet) => peer.subnet == subnet,
    }
}

/// How a peer answered.
struct Report {
    asked: Vec<Asked>,
    /// The largest packet that passed the overlay, where the largest of the overlay's own did not.
    path_mtu: Option<u16>,
    /// What is wrong, and what to do; [`None`] where nothing is.
    problem: Option<String>,
}

impl Report {
    fn of(echo: &mut Echo, peer: &Peer, status: &Status, question: Question) -> Result<Self, OperatorError> {
        let Question { target, size, count } = question;
        let pod = match target {
            Target::Address(address) if address != peer.address && address != peer.subnet.network() => Some(address),
            _ => None,
        };
        let mtu = u16::try_from(status.mtu).unwrap_or(u16::MAX);
        let small = size.unwrap_or(USUAL);
        let mut asked = vec![ask(echo, By::Underlay, peer.address, USUAL, count)?];
        // Without a tunnel the host has no address in the overlay.
        let overlay = (status.backend_type() == BackendType::Vxlan).then(|| peer.subnet.network());
        let within = overlay.map(|address| (By::Overlay, address)).or(pod.map(|pod| (By::Pod, pod)));
        let mut path_mtu = None;
        if let Some((by, address)) = within {
            asked.push(ask(echo, by, address, small, count)?);
            let is_answered = asked.last().is_some_and(|asked| asked.answered > 0);
            if is_answered && size.is_none() {
                let large = ask(echo, by, address, mtu, count)?;
                if large.answered == 0 {
                    // The size is the reason only where the other still passes.
                    asked.push(ask(echo, by, address, small, count)?);
                    if asked.last().is_some_and(|asked| asked.answered > 0) {
                        path_mtu = Some(largest(echo, address, small, mtu)?);
                    }
                }
                asked.push(large);
            }
        }
        if let Some(pod) = pod.filter(|_| overlay.is_some()) {
            asked.push(ask(echo, By::Pod, pod, small, count)?);
        }
        let problem = problem(&asked, path_mtu, peer);
        Ok(Self { asked, path_mtu, problem })
    }

    fn table(&self, name: &str, peer: &Peer) -> String {
        let lines = self.asked.iter().map(|asked| {
            let round_trip = asked.round_trip_us.map_or_else(String::new, |times| {
                let [least, mean, greatest] = times.map(|time| time as f64 / 1000.0);
                format!("{least:.3} / {mean:.3} / {greatest:.3} ms")
            });
            [
                asked.by.label().to_owned(),
                asked.address.to_string(),
                asked.size.to_string(),
                format!("{} of {}", asked.answered, asked.sent),
                round_trip,
                asked.problem.clone().unwrap_or_default(),
            ]
        });
        let header =
            ["by", "address", "bytes", "answered", "round trip (least, mean, greatest)", ""].map(str::to_owned);
        let way = format!("{name}: {} by {}, {}\n", peer.subnet, peer.address, peer.way_in_words());
        let problem = self.problem.as_ref().map_or_else(String::new, |problem| format!("look at  {problem}\n"));
        way + &rows([header].into_iter().chain(lines)) + &problem
    }

    fn json(&self, vni: u32, peer: &Peer) -> serde_json::Value {
        json!({
            "apiVersion": API_VERSION,
            "vni": vni,
            "peer": peer,
            "asked": self.asked,
            "pathMtu": self.path_mtu,
            "problem": self.problem,
        })
    }
}

fn ask(echo: &mut Echo, by: By, address: Ipv4Addr, size: u16, count: u16) -> Result<Asked, OperatorError> {
    let mut times = Vec::new();
    let mut problem = None;
    for number in 0..count {
        if number > 0 {
            std::thread::sleep(PAUSE);
        }
        match echo.ask(address, size)? {
            Answer::After(time) => times.push(time.as_micros() as u64),
            Answer::None => {}
            Answer::Unsent(errno) => problem = Some(format!("this host did not send it: {}", errno.desc())),
            Answer::Refused { by, code } => problem = Some(format!("{by} says: {}", unreachable(code))),
        }
    }
    let mean = |times: &[u64]| times.iter().sum::<u64>() / (times.len() as u64).max(1);
    let round_trip_us = times.iter().min().zip(times.iter().max()).map(|(min, max)| [*min, mean(&times), *max]);
    Ok(Asked { by, address, size, sent: count, answered: times.len() as u16, round_trip_us, problem })
}

/// The largest packet that passes, of those between one that does and one that does not, in bytes of IPv4.
fn largest(echo: &mut Echo, address: Ipv4Addr, small: u16, large: u16) -> Result<u16, OperatorError> {
    let (mut passes, mut fails) = (small.max(HEADERS), large);
    while fails - passes > 1 {
        let size = passes + (fails - passes) / 2;
        // One that is lost by chance is no evidence.
        let mut is_answered = false;
        for _ in 0..2 {
            is_answered = is_answered || matches!(echo.ask(address, size)?, Answer::After(_));
        }
        if is_answered {
            passes = size;
        } else {
            fails = size;
        }
    }
    Ok(passes)
}

/// Of "destination unreachable", in words (RFC 792, RFC 1812 section 5.2.7.1).
const fn unreachable(code: u8) -> &'static str {
    match code {
        0 => "network unreachable",
        1 => "host unreachable",
        3 => "port unreachable",
        4 => "too big, fragmentation needed",
        9 | 10 | 13 => "administratively prohibited",
        _ => "unreachable",
    }
}

/// What is wrong, by who answered.
fn problem(asked: &[Asked], path_mtu: Option<u16>, peer: &Peer) -> Option<String> {
    // As the last small ones were answered.
    let answered = |by: By| {
        let of_kind = || asked.iter().filter(|asked| asked.by == by);
        let size = of_kind().map(|asked| asked.size).min()?;
        of_kind().rfind(|asked| asked.size == size).map(|asked| asked.answered > 0)
    };
    let address = peer.address;
    match (answered(By::Underlay)?, answered(By::Overlay), answered(By::Pod)) {
        (true, Some(false), _) => Some(format!(
            "{address} answers, and its overlay does not: is an agent or flannel running there, the tunnel's UDP port let in on both \
             hosts, and ICMP for its own address in the overlay? `flannel-agent status` on both hosts says more"
        )),
        (false, Some(false), _) => Some(format!(
            "{address} does not answer at all ({}): is the host up, and on that link?",
            peer.way_in_words()
        )),
        (_, Some(true), Some(false)) => Some(
            "the host answers through the overlay, and the pod does not: is there such a pod, and do the policies of its host let ICMP \
             through?"
                .to_owned(),
        ),
        (is_answered, None, Some(false)) => {
            let host = if is_answered { "answers" } else { "does not answer" };
            Some(format!("{address} {host}, and the pod does not"))
        }
        (false, None, None) => Some(format!("{address} does not answer ({})", peer.way_in_words())),
        (_, Some(true), _) | (_, None, Some(true)) | (true, None, None) => {
            let size = path_mtu?;
            Some(format!(
                "packets of up to {size} bytes pass, larger ones do not: the way to {address} has a smaller MTU than it is said to \
                 have; a route to it with `mtu` tells the kernel, or a smaller MTU of the overlay"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_addresses_or_subnets() {
        assert_eq!("192.0.2.1".parse(), Ok(Target::Address([192, 0, 2, 1].into())));
        assert_eq!("10.5.2.7/24".parse(), Ok(Target::Subnet("10.5.2.0/24".parse().unwrap())));
        assert!("node1".parse::<Target>().is_err() && "10.5.2.0/33".parse::<Target>().is_err());
    }
}
