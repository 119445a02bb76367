//! `cargo xtask test`: all tests, or those that need neither root nor other programs.

use anyhow::Result;

use crate::{
    process::{cargo, inherit},
    setup, variants,
};

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Options {
    /// Which tests
    #[arg(value_enum, default_value = "all")]
    suite: Suite,
    /// Only tests whose names contain this
    #[arg(last = true)]
    filter: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Suite {
    /// Everything; needs root
    All,
    /// Without root: pure code
    Unit,
}

/// Runs the tests.
///
/// # Errors
/// Where one fails.
pub fn run(options: &Options) -> Result<()> {
    let Options { suite, filter } = options;
    if *suite == Suite::All { setup::ensure_all() } else { setup::ensure() }?;
    let packages = ["flannel-common", "flannel-agent", "xtask"].map(|package| ["--package", package]);
    inherit(cargo().arg("test").args(packages.as_flattened()).arg("--").args(filter))?;
    if *suite == Suite::All {
        variants::build()?;
        // The namespace tests start the agent as a program.
        inherit(cargo().args(["build", "--package", "flannel-agent"]))?;
        // They wait more than they compute.
        let threads = std::thread::available_parallelism().map_or(2, usize::from) + 1;
        let threads = std::env::var("RUST_TEST_THREADS").unwrap_or_else(|_| threads.to_string());
        inherit(cargo().args(["test", "--package", "tests", "--"]).args(filter).env("RUST_TEST_THREADS", threads))?;
    }
    Ok(())
}
