//! `cargo xtask bench control`: the control plane with many leases; see `tests/benches/control.rs`.
//!
//! `cargo xtask bench`: bulk TCP between pods, our dataplane against the kernel's vxlan device set up as flannel does,
//! in one lab, in turns.

use std::path::Path;

use anyhow::Result;

use crate::{
    lab::{Host, Lab, Store, remove_leftovers},
    process::{cargo, inherit, workspace},
    progress::{heading, step},
    setup,
    transfer::tcp_transfer,
};

const NAME: &str = "flannel-bench";

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    what: Option<What>,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of a measurement
    #[arg(long, default_value_t = 4)]
    seconds: u32,
}

#[derive(clap::Subcommand)]
enum What {
    /// The agent with 10, 1,000 and 5,000 leases, beside flannel's scheme for the same
    Control {
        /// Further options; `-- --help` lists them
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

/// Measures and prints medians and ratios.
///
/// # Errors
/// Where the lab does not come up or a transfer fails.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    step("build the agent", || inherit(cargo().args(["build", "--release", "--package", "flannel-agent"])))?;
    if let Some(What::Control { arguments }) = &options.what {
        return inherit(cargo().args(["bench", "--package", "tests", "--bench", "control", "--"]).args(arguments));
    }
    let directory = std::env::temp_dir().join(NAME);
    remove_leftovers(NAME, &directory)?;
    let result = measure(options, &directory);
    remove_leftovers(NAME, &directory)?;
    result
}

fn measure(options: &Options, directory: &Path) -> Result<()> {
    let lab = Lab::new(NAME, directory)?;
    let store = lab.store()?;
    store.put("/coreos.com/network/config", r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#)?;
    let ours = step("two hosts with the agent", || agent_pair(&lab, &store))?;
    let kernel = step("two hosts with the kernel's vxlan device", || kernel_pair(&lab, &store))?;
    for (mode, gso) in [("GSO passes the underlay", true), ("segmented at the underlay", false)] {
        for host in ours.iter().chain(&kernel) {
            host.set_underlay_gso(gso)?;
        }
        heading(mode);
        let mut transfers = [Vec::new(), Vec::new()];
        for _ in 0..options.rounds {
            for (pair, transfers) in [&ours, &kernel].into_iter().zip(&mut transfers) {
                let [client, server] = [&pair[0].pods[0], &pair[1].pods[0]];
                let transfer = tcp_transfer(&client.netns, &server.netns, server.address, options.seconds, directory)?;
                transfers.push(transfer);
            }
        }
        let rates = transfers.each_ref().map(|all| Summary::of(all.iter().map(|transfer| transfer.gbits).collect()));
        let again = transfers.map(|all| Summary::of(all.iter().map(|transfer| transfer.retransmits).collect()).median);
        println!("TCP, 1 flow         Gb/s median, min..max of {}, retransmissions", options.rounds);
        println!("kernel vxlan        {}  {:6}", rates[1], again[1]);
        println!("this dataplane      {}  {:6}   {:.2}x", rates[0], again[0], rates[0].median / rates[1].median);
    }
    Ok(())
}

fn agent_pair(lab: &Lab, store: &Store) -> Result<Vec<Host>> {
    let agent = workspace().join("target/release/flannel-agent");
    let mut hosts = vec![lab.host("node1", 1)?, lab.host("node2", 2)?];
    for host in &mut hosts {
        host.start_agent(&agent, store, &[])?;
        host.wait_ready()?;
        host.add_pod()?;
    }
    Ok(hosts)
}

fn kernel_pair(lab: &Lab, store: &Store) -> Result<Vec<Host>> {
    let mut hosts = vec![lab.host("kernel1", 11)?, lab.host("kernel2", 12)?];
    // Beyond the first hundred subnets, among which the agents choose.
    for (host, octet) in hosts.iter_mut().zip([251, 252]) {
        let vxlan = host.become_kernel_vxlan(store, octet)?;
        host.add_pod_in(&vxlan.subnet)?;
    }
    hosts[0].add_kernel_peer_from(store, 252)?;
    hosts[1].add_kernel_peer_from(store, 251)?;
    Ok(hosts)
}

struct Summary {
    median: f64,
    min: f64,
    max: f64,
}

impl Summary {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self { median: at(values.len() / 2), min: at(0), max: at(values.len().saturating_sub(1)) }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { median, min, max } = self;
        write!(f, "{median:6.2}  {min:.2}..{max:.2}")
    }
}
