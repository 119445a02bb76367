//! `cargo xtask test`: all tests, or those that need neither root nor other programs.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

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
        let mut tests = cargo();
        tests.args(["test", "--package", "tests", "--"]).args(filter).env("RUST_TEST_THREADS", threads);
        // Of a test's thread it names the test and the line that failed, as the reason does already.
        tests.env("RUST_BACKTRACE", "0");
        run_tests(&mut tests)?;
    }
    Ok(())
}

/// Runs tests with their output on ours, and says once more at the end which failed and why: before that come the logs of all.
fn run_tests(command: &mut Command) -> Result<()> {
    let mut tests = command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {command:?}"))?;
    let mut reasons = Vec::new();
    let mut is_reason = false;
    for line in BufReader::new(tests.stdout.take().context("the output of the tests")?).lines() {
        let line = line.context("read the output of the tests")?;
        println!("{line}");
        let is_panic =
            line.starts_with("thread '") && line.contains("' panicked at ") || line.contains(") panicked at ");
        if is_panic || is_reason {
            reasons.push(line);
        }
        is_reason = is_panic;
    }
    let status = tests.wait()?;
    anyhow::ensure!(status.success(), "{command:?}: {status}\n{}", reasons.join("\n"));
    Ok(())
}
