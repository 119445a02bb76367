//! `cargo xtask fuzz`: libFuzzer on everything that the agent reads. What it found worth keeping is in
//! `tests/fuzz/corpus`; an input that breaks something is written beside it and named.

use std::process::Command;

use anyhow::Result;

use crate::{
    process::{cargo, inherit, workspace},
    setup,
};

/// What the compiler has to note for the fuzzer: edges with counters, and comparisons (cargo-fuzz sets the same).
const INSTRUMENTATION: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                               -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                               -Cllvm-args=-sanitizer-coverage-pc-table \
                               -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Cdebug-assertions \
                               -Ccodegen-units=1";

/// Options of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub struct Options {
    /// How long
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Keep what reaches new code in the corpus
    #[arg(long)]
    keep: bool,
}

/// Fuzzes the parsers.
///
/// # Errors
/// Where an input breaks one.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    // Beside the ordinary build, whose flags are others; and for the host by name, so that build scripts get none.
    let target = workspace().join("target/fuzz");
    let mut build = cargo();
    build
        .args(["build", "--release", "--package", "tests", "--features", "fuzz", "--bin", "fuzz-parsers"])
        .args(["--target", HOST])
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", INSTRUMENTATION);
    inherit(&mut build)?;

    let corpus = workspace().join("tests/fuzz/corpus");
    let found = target.join("found");
    std::fs::create_dir_all(&found)?;
    let mut fuzzer = Command::new(target.join(HOST).join("release/fuzz-parsers"));
    fuzzer.current_dir(workspace().join("tests/fuzz"));
    fuzzer.arg(format!("-max_total_time={}", options.seconds)).args(["-max_len=4096", "-print_final_stats=1"]);
    fuzzer.arg("-dict=dictionary").arg("-artifact_prefix=./");
    // The first folder is where the fuzzer writes to.
    if !options.keep {
        fuzzer.arg(&found);
    }
    inherit(fuzzer.arg(&corpus))
}

/// The machine, as cargo names it.
const HOST: &str = if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };
