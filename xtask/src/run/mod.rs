//! `cargo xtask run`: a lab of hosts with the agent on each, and a tour of it. `cargo xtask lab`: into it, and down.

mod calls;
mod page;
mod tour;

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

use self::calls::Served;
pub use self::tour::decoded_packet;
use crate::{
    lab::{
        Backend, Host, Lab, LeaseStore, Lock, StoreKind,
        cni::{self, Runtime},
        remove_leftovers,
    },
    process::{cargo, inherit, workspace},
    progress::{heading, step, wait_for},
    setup,
};

const NAME: &str = "flannel-lab";
/// The host whose page is shown.
const FIRST: &str = "node1";
/// How many each host gets.
const PODS: usize = 2;

/// Options of `cargo xtask run`.
#[derive(clap::Args)]
pub struct Options {
    /// How many hosts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=32))]
    nodes: u8,
    /// What the agents keep their leases in
    #[arg(long, value_enum, default_value_t)]
    store: StoreKind,
    /// How the hosts reach each other
    #[arg(long, value_enum, default_value_t)]
    backend: Backend,
    /// End after the tour instead of staying up
    #[arg(long)]
    once: bool,
    /// Make pods by plain commands, also where the CNI plugins are installed
    #[arg(long)]
    by_hand: bool,
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
    // Not for release, which takes minutes longer: the programs that carry the packets are always optimised.
    step("build the agent", || inherit(cargo().args(["build", "--package", "flannel-agent"])))?;
    let agent = workspace().join("target/debug/flannel-agent");

    let lab = step("underlay: a bridge in a namespace", || Lab::new(NAME, directory))?;
    let store = step(&format!("{} on it, and a network config", options.store), || {
        let config = format!(r#"{{"Network": "10.5.0.0/16", "Backend": {}}}"#, options.backend.json());
        options.store.start(&lab, &config)
    })?;
    let mut hosts = step(&format!("{} hosts", options.nodes), || {
        (1..=options.nodes).map(|number| add_host(&lab, &*store, number)).collect::<Result<Vec<_>>>()
    })?;
    let start = Instant::now();
    step("the agent on each", || start_agents(&mut hosts, &agent, &*store))?;
    step("the first ping between two of them", || {
        wait_for_ping(&hosts[0], &hosts[1], options.backend)?;
        println!("  answered {:.0?} after the agents were started", start.elapsed());
        Ok(())
    })?;
    let how = step("two pods on each, from its subnet.env", || make_pods(&mut hosts, &agent, options.by_hand))?;
    tour::tour(&hosts, &*store, &agent, how, options.backend, directory)?;
    let served = Served::start(&hosts[1], directory)?;
    served.tour(&lab, &hosts, options.backend)?;
    hosts.push(join(&lab, &hosts, &agent, &*store, options.backend)?);
    no_peer_state(&hosts, options.backend)?;
    tour::tables(&lab, &hosts, &*store, options.backend)?;
    let page = page::tour(&hosts)?;
    if !options.once {
        println!(
            "\nThe lab is up. The page of {} is at http://{}/. In another terminal, for example:\n  \
             cargo xtask lab exec node1 -- ip -d link show flannel.1\n  \
             cargo xtask lab exec node1-pod1 -- curl http://{}/\n  \
             cargo xtask lab exec underlay -- {}\nCtrl-C takes it down.",
            hosts[0].name,
            page.address(),
            hosts[1].pods[0].address,
            store.shown_by()
        );
        signals.forever().next();
        println!();
    }
    step("take the lab down", || {
        drop(page);
        drop(served);
        drop(hosts);
        drop(store);
        drop(lab);
        Ok(())
    })
}

/// Gives each host two pods, by the CNI plugin where those that it delegates to are there. How it was done.
fn make_pods(hosts: &mut [Host], agent: &Path, by_hand: bool) -> Result<&'static str> {
    let delegates = if by_hand { None } else { cni::delegates() };
    let ours = agent.parent().context("the agent is in a folder")?;
    for host in hosts {
        let runtime = delegates.map(|_| Runtime::new(host, ours)).transpose()?;
        for _ in 0..PODS {
            match &runtime {
                Some(runtime) => host.attach_pod(runtime)?,
                None => host.add_pod()?,
            };
        }
    }
    let Some(folder) = delegates else {
        println!("  by hand: bridge and host-local (containernetworking-plugins) are not installed, or not wanted");
        return Ok("by hand");
    };
    println!(
        "  by the CNI plugin {}, and bridge and host-local in {}",
        ours.join("flannel").display(),
        folder.display()
    );
    Ok("by the CNI plugin")
}

/// One more host, and how long it takes until all others reach it.
fn join(lab: &Lab, hosts: &[Host], agent: &Path, store: &dyn LeaseStore, backend: Backend) -> Result<Host> {
    heading("one more host joins");
    let number = u8::try_from(hosts.len())? + 1;
    let mut host = [add_host(lab, store, number)?];
    let start = Instant::now();
    start_agents(&mut host, agent, store)?;
    let [host] = host;
    for other in hosts {
        wait_for_ping(other, &host, backend)?;
    }
    println!("{} is reached from all others {:.0?} after its agent was started", host.name, start.elapsed());
    Ok(host)
}

fn add_host(lab: &Lab, store: &dyn LeaseStore, number: u8) -> Result<Host> {
    let host = lab.host(&format!("node{number}"), number)?;
    store.admit(&host)?;
    Ok(host)
}

fn start_agents(hosts: &mut [Host], agent: &Path, store: &dyn LeaseStore) -> Result<()> {
    let flag = page::flag();
    for host in &mut *hosts {
        let arguments = ["--ip-masq", flag.as_str()];
        let count = if host.name == FIRST { 2 } else { 1 };
        host.start_agent(agent, store, &arguments[..count])?;
    }
    for host in hosts {
        host.wait_ready()?;
    }
    Ok(())
}

/// Waits until one host reaches the overlay address of another, or that of its pods' bridge where it has none.
fn wait_for_ping(from: &Host, to: &Host, backend: Backend) -> Result<()> {
    let subnet = to.subnet()?;
    let overlay_address = if backend.has_device() {
        std::net::Ipv4Addr::from_bits(subnet.gateway.to_bits() - 1)
    } else {
        if to.netns.ip("link show cni0").is_err() {
            to.add_bridge(&subnet)?;
        }
        subnet.gateway
    };
    let ping = format!("ping -c 1 -W 0.2 {overlay_address}");
    wait_for(&ping, Duration::from_secs(10), || from.netns.exec(&ping).is_ok()).map(drop)
}

/// Every host has one route, one neighbour and one forwarding entry for the overlay, whatever the number of peers. The
/// forwarding entry leads to the host itself.
fn no_peer_state(hosts: &[Host], backend: Backend) -> Result<()> {
    for host in hosts {
        if !backend.has_device() {
            let routes = host.netns.exec("ip route show proto 72")?;
            anyhow::ensure!(routes.lines().count() == 1, "{} has routes of its peers: {routes}", host.name);
            continue;
        }
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
