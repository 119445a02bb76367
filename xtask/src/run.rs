//! `cargo xtask run`: a lab of hosts with the agent on each, and a tour of it. `cargo xtask lab`: into it, and down.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Subcommand;
use nix::sys::signal::{Signal, kill};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{
    capture::Capture,
    lab::{Host, Lab, Lock, Netns, PREFIX, Store, remove_leftovers},
    process::{cargo, inherit, output, workspace},
    progress::{heading, step, wait_for},
    setup,
    transfer::tcp_transfer,
};

const NAME: &str = "flannel-lab";
const CONFIG: &str = r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#;

/// Options of `cargo xtask run`.
#[derive(clap::Args)]
pub struct Options {
    /// How many hosts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=32))]
    nodes: u8,
    /// End after the tour instead of staying up
    #[arg(long)]
    once: bool,
}

/// Options of `cargo xtask lab`.
#[derive(clap::Args)]
pub struct LabOptions {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Subcommand)]
enum LabCommand {
    /// Run a command on a host or in a pod of the lab that is up: `exec node1 -- ip route`, `exec node1-pod2 -- ping ...`
    Exec {
        /// node1, node1-pod1, underlay, ...
        place: String,
        /// The command; a shell without one
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Take the lab down, also what is left of one that could not do so itself
    Down,
}

/// Builds the lab, shows it, and takes it down: at once or when asked to.
///
/// # Errors
/// Where something of it does not work.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    // From here on a signal ends the programs that it reaches, and with them the step, but not the taking down.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let directory = directory();
    let _lock = Lock::take(NAME)?;
    remove_leftovers(NAME, &directory)?;
    let result = run_in(options, &directory, &mut signals);
    remove_leftovers(NAME, &directory)?;
    result
}

fn run_in(options: &Options, directory: &Path, signals: &mut Signals) -> Result<()> {
    step("build the agent", || inherit(cargo().args(["build", "--release", "--package", "flannel-agent"])))?;
    let agent = workspace().join("target/release/flannel-agent");

    let lab = step("underlay: a bridge in a namespace", || Lab::new(NAME, directory))?;
    let store = step("etcd on it, with a network config", || {
        let store = lab.store()?;
        store.put(&format!("{PREFIX}/config"), CONFIG)?;
        Ok(store)
    })?;
    let mut hosts = step(&format!("{} hosts", options.nodes), || {
        (1..=options.nodes).map(|number| lab.host(&format!("node{number}"), number)).collect::<Result<Vec<_>>>()
    })?;
    let start = Instant::now();
    step("the agent on each", || start_agents(&mut hosts, &agent, &store))?;
    step("the first ping between two of them", || {
        wait_for_ping(&hosts[0], &hosts[1])?;
        println!("  answered {:.0?} after the agents were started", start.elapsed());
        Ok(())
    })?;
    step("two pods on each, from its subnet.env", || {
        for host in &mut hosts {
            host.add_pod()?;
            host.add_pod()?;
        }
        Ok(())
    })?;
    tour(&hosts, &store, &agent, directory)?;
    hosts.push(join(&lab, &hosts, &agent, &store)?);
    no_peer_state(&hosts)?;
    if !options.once {
        println!(
            "\nThe lab is up. In another terminal, for example:\n  \
             cargo xtask lab exec node1 -- ip -d link show flannel.1\n  \
             cargo xtask lab exec node1-pod1 -- ping {}\nCtrl-C takes it down.",
            hosts[1].pods[0].address
        );
        signals.forever().next();
        println!();
    }
    step("take the lab down", || {
        drop(hosts);
        drop(store);
        drop(lab);
        Ok(())
    })
}

/// Shows what the lab is and does.
fn tour(hosts: &[Host], store: &Store, agent: &Path, directory: &Path) -> Result<()> {
    let [first, second, ..] = hosts else { anyhow::bail!("a tour needs two hosts") };
    let (from, to) = (&first.pods[0], &second.pods[0]);

    heading("what was built");
    picture(hosts, store)?;

    heading(&format!("ping from each host's first pod to the next host's ({} -> {} first)", from.address, to.address));
    for (index, host) in hosts.iter().enumerate() {
        let destination = hosts[(index + 1) % hosts.len()].pods[0].address;
        let text = host.pods[0].netns.exec(&format!("ping -c 3 -i 0.2 -W 2 {destination}"))?;
        let summary = text.lines().filter(|line| line.contains("packets transmitted") || line.contains("rtt"));
        println!("{:>8}-pod1 -> {destination}: {}", host.name, summary.collect::<Vec<_>>().join(", "));
        anyhow::ensure!(text.contains(" 0% packet loss"), "not every ping was answered");
    }

    heading("TCP for two seconds");
    let transfer = tcp_transfer(&from.netns, &to.netns, to.address, 2, directory)?;
    println!("{:.2} Gb/s from {} to {}", transfer.gbits, from.address, to.address);

    heading("one packet on the underlay, decoded by tshark");
    let provoke = || from.netns.exec(&format!("ping -c 1 -W 2 {}", to.address)).map(drop);
    println!("{}", layers(&decoded_packet(&first.netns, "udp port 8472", directory, provoke)?));

    heading(&format!("what became of the packets on {}", first.name));
    let counters = output(first.agent_command(agent).arg("counters"))?;
    for line in counters.lines().filter(|line| line.split_whitespace().nth(1) != Some("0")) {
        println!("{line}");
    }

    heading(&format!("the kernel's state on {}: nothing in it belongs to a peer", first.name));
    for command in ["ip route", "ip neigh show dev flannel.1", "bridge fdb show dev flannel.1"] {
        println!("$ {command}\n{}", first.netns.exec(command)?.trim_end());
    }
    Ok(())
}

/// One more host, and how long it takes until all others reach it.
fn join(lab: &Lab, hosts: &[Host], agent: &Path, store: &Store) -> Result<Host> {
    heading("one more host joins");
    let number = u8::try_from(hosts.len())? + 1;
    let mut host = [lab.host(&format!("node{number}"), number)?];
    let start = Instant::now();
    start_agents(&mut host, agent, store)?;
    let [host] = host;
    for other in hosts {
        wait_for_ping(other, &host)?;
    }
    println!("{} is reached from all others {:.0?} after its agent was started", host.name, start.elapsed());
    Ok(host)
}

fn start_agents(hosts: &mut [Host], agent: &Path, store: &Store) -> Result<()> {
    for host in &mut *hosts {
        host.start_agent(agent, store, &[])?;
    }
    for host in hosts {
        host.wait_ready()?;
    }
    Ok(())
}

/// Waits until one host reaches the overlay address of another.
fn wait_for_ping(from: &Host, to: &Host) -> Result<()> {
    let overlay_address = std::net::Ipv4Addr::from_bits(to.subnet()?.gateway.to_bits() - 1);
    let ping = format!("ping -c 1 -W 0.2 {overlay_address}");
    wait_for(&ping, Duration::from_secs(10), || from.netns.exec(&ping).is_ok()).map(drop)
}

/// Every host has one route, one neighbour and one forwarding entry for the overlay, whatever the number of peers. The
/// forwarding entry leads to the host itself.
fn no_peer_state(hosts: &[Host]) -> Result<()> {
    for host in hosts {
        let routes = host.netns.ip_json("route show dev flannel.1")?;
        let neighbours = host.netns.ip_json("neigh show dev flannel.1")?;
        let forwarding = host.netns.exec("bridge fdb show dev flannel.1")?;
        let count = |list: &serde_json::Value| list.as_array().map_or(0, Vec::len);
        anyhow::ensure!(
            count(&routes) == 1
                && count(&neighbours) == 1
                && forwarding.trim() == format!("02:00:00:00:00:01 dst {} self permanent", host.address),
            "{} has kernel state of its peers: {routes} {neighbours} {forwarding}",
            host.name
        );
    }
    Ok(())
}

fn picture(hosts: &[Host], store: &Store) -> Result<()> {
    println!("  underlay 192.168.64.0/24: br0, etcd at {}", store.endpoint());
    for host in hosts {
        let subnet = host.subnet()?;
        println!("   ├─ {} eth0 {}", host.name, host.address);
        println!("   │    flannel.1, cni0 {}/{}, MTU {}", subnet.gateway, subnet.len, subnet.mtu);
        for (index, pod) in host.pods.iter().enumerate() {
            println!("   │      └─ {}-pod{} eth0 {}", host.name, index + 1, pod.address);
        }
    }
    for (key, value) in store.list(&format!("{PREFIX}/subnets/"))? {
        println!("  {key}\n    {value}");
    }
    Ok(())
}

/// The first packet that `provoke` sends through `eth0` of a namespace and the filter takes, decoded by tshark.
///
/// # Errors
/// Where none comes within two seconds.
pub fn decoded_packet(
    netns: &Netns,
    filter: &str,
    directory: &Path,
    provoke: impl FnOnce() -> Result<()>,
) -> Result<String> {
    let capture = Capture::start(netns, "eth0", filter, 1, directory)?;
    provoke()?;
    capture.decoded(&["-V"])
}

/// The names of a decoded packet's layers, and its VNI.
fn layers(decoded: &str) -> String {
    let layers = decoded.lines().filter(|line| {
        // Names of layers begin the line; fields are indented, and bytes begin with their offset.
        let is_layer = line.starts_with(|c: char| c.is_ascii_uppercase()) && !line.starts_with("Frame");
        is_layer || line.contains("VXLAN Network Identifier")
    });
    layers.collect::<Vec<_>>().join("\n")
}

/// Into a lab, or down with it.
///
/// # Errors
/// Where there is none to enter, or it does not go.
pub fn lab(options: &LabOptions) -> Result<()> {
    match &options.command {
        LabCommand::Exec { place, command } => enter(place, command),
        LabCommand::Down => take_down(),
    }
}

fn enter(place: &str, command: &[String]) -> Result<()> {
    let namespace = PathBuf::from(format!("/run/netns/{NAME}-{place}"));
    anyhow::ensure!(namespace.exists(), "there is no {place} in a lab; `cargo xtask run` builds one");
    let shell = [std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned())];
    let command = if command.is_empty() { &shell } else { command };
    // Returns only where it fails.
    let error = Command::new("nsenter").arg(format!("--net={}", namespace.display())).arg("--").args(command).exec();
    Err(error).context("start nsenter")
}

fn take_down() -> Result<()> {
    let held = match Lock::take(NAME) {
        Ok(lock) => lock,
        Err(_) => {
            let pid = Lock::holder(NAME)?;
            println!("the lab's process {pid} is asked to take it down");
            kill(pid, Signal::SIGTERM)?;
            let mut lock = None;
            wait_for("the lab to go", Duration::from_secs(30), || {
                lock = Lock::take(NAME).ok();
                lock.is_some()
            })?;
            lock.context("the lab's lock was just taken")?
        }
    };
    remove_leftovers(NAME, &directory())?;
    drop(held);
    println!("nothing of a lab is left");
    Ok(())
}

fn directory() -> PathBuf {
    std::env::temp_dir().join(NAME)
}
