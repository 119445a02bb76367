//! `cargo xtask`: the project's commands.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::{api_server, bench, chaos, check, dist, fuzz, run, setup, test, vm};

/// The project's commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what builds, lab and tests need
    Setup(setup::Options),
    /// Build hosts, pods and a store in network namespaces, run the agent on each host, and show what it does
    Run(run::Options),
    /// Enter a lab that is up, or take one down
    Lab(run::LabOptions),
    /// Run the tests
    Test(test::Options),
    /// Run the tests on another kernel, in a virtual machine; or agents on two that are connected by their NICs
    Vm(vm::Options),
    /// Build the release, and pack what users install
    Dist(dist::Options),
    /// Format, lints and documentation, for the eBPF programs too
    Check,
    /// Feed the agent's parsers, and the eBPF programs beside a model, with what a fuzzer comes up with
    Fuzz(fuzz::Options),
    /// Let agents, etcd and network fail under traffic, by a schedule that a seed replays, and check what must hold
    Chaos(chaos::Options),
    /// Measure against the kernel's own vxlan path
    Bench(bench::Options),
    /// A double of the Kubernetes API server, which lab and tests start
    ApiServer(api_server::Options),
    /// Do what is asked by a serial port; what a machine of `vm --hosts 2` runs
    #[command(hide = true)]
    Guest(vm::GuestOptions),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup(options) => setup::run(&options),
        Command::Run(options) => run::run(&options),
        Command::Lab(options) => run::lab(&options),
        Command::Test(options) => test::run(&options),
        Command::Vm(options) => vm::run(&options),
        Command::Dist(options) => dist::run(&options),
        Command::Check => check::run(),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Chaos(options) => chaos::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::ApiServer(options) => api_server::run(&options),
        Command::Guest(options) => vm::guest(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
