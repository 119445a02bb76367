//! `cargo xtask fuzz`: libFuzzer on everything that the agent reads, and on the loaded programs beside the model of them. What
//! it found worth keeping is in `tests/fuzz/corpus`; an input that breaks something is written there and named, and the
//! tests run it from then on.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};

use crate::{
    process::{Process, cargo, inherit, workspace},
    progress::heading,
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
    /// What is fuzzed; all of it without
    #[arg(value_enum)]
    what: Option<Target>,
    /// For how long each
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// How many inputs each, in place of a time
    #[arg(long)]
    runs: Option<u64>,
    /// What the inputs are made from; by the clock without
    #[arg(long)]
    seed: Option<u32>,
    /// Keep what reaches new code in the corpus
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    /// Everything that the agent reads
    Parsers,
    /// The eBPF programs, loaded, beside the model of them; needs root
    Programs,
}

impl Target {
    const ALL: [Self; 2] = [Self::Parsers, Self::Programs];

    /// Also of its part of the corpus.
    const fn name(self) -> &'static str {
        match self {
            Self::Parsers => "parsers",
            Self::Programs => "programs",
        }
    }
}

/// Fuzzes, with a process for each core.
///
/// # Errors
/// Where an input breaks something.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure()?;
    build()?;
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos();
    // Zero would be by the clock to libFuzzer too, but not told.
    let seed = options.seed.unwrap_or(clock).max(1);
    let targets = Target::ALL.into_iter().filter(|target| options.what.is_none_or(|what| what == *target));
    let mut differs = false;
    for target in targets {
        heading(&format!("{}, seed {seed}", target.name()));
        let report = fuzz(target, options, seed)?;
        println!("{report}");
        differs |= !report.found.is_empty();
    }
    anyhow::ensure!(!differs, "the inputs named above break something; the tests run them from now on");
    Ok(())
}

fn build() -> Result<()> {
    // For the host by name, so that build scripts get no flags.
    let mut build = cargo();
    build
        .args(["build", "--release", "--package", "tests", "--features", "fuzz", "--bins"])
        .args(["--target", HOST])
        .arg("--target-dir")
        .arg(folder())
        .env("RUSTFLAGS", INSTRUMENTATION);
    inherit(&mut build)
}

/// What came of it.
struct Report {
    executions: u64,
    seconds: f64,
    /// Inputs that break something.
    found: Vec<PathBuf>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { executions, seconds, found } = self;
        let rate = *executions as f64 / seconds;
        write!(f, "{executions} executions in {seconds:.0} s ({rate:.0} a second), {} differences", found.len())?;
        found.iter().try_for_each(|path| write!(f, "\n  {}", path.display()))
    }
}

fn fuzz(target: Target, options: &Options, seed: u32) -> Result<Report> {
    let workers = thread::available_parallelism()?.get();
    let start = Instant::now();
    let mut running = (0..workers)
        .map(|worker| {
            let mut fuzzer = fuzzer(target);
            fuzzer.arg(format!("-seed={}", seed.wrapping_add(worker as u32))).arg("-print_final_stats=1");
            fuzzer.arg(format!("-artifact_prefix={}/found-{seed}-{worker}-", corpus(target).display()));
            fuzzer.arg(match options.runs {
                Some(runs) => format!("-runs={}", runs.div_ceil(workers as u64)),
                None => format!("-max_total_time={}", options.seconds),
            });
            // The first folder is where the fuzzer writes to.
            if !options.keep {
                let found = folder().join(format!("found/{}-{worker}", target.name()));
                fs::create_dir_all(&found).with_context(|| format!("create {found:?}"))?;
                fuzzer.arg(found);
            }
            fuzzer.arg(corpus(target));
            Process::start(&mut fuzzer, &folder().join(format!("{}-{worker}.log", target.name())))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut report = Report { executions: 0, seconds: 0.0, found: Vec::new() };
    for worker in &mut running {
        let status = worker.wait_without_limit()?;
        let log = worker.log();
        report.executions += executions(target, &log).with_context(|| format!("no count in: {}", tail(&log)))?;
        if !status.success() {
            let path = artifact(&log).with_context(|| format!("the fuzzer ended with {status}: {}", tail(&log)))?;
            println!("{}", difference(&log));
            report.found.push(path);
        }
    }
    report.seconds = start.elapsed().as_secs_f64();
    report.found.iter().try_for_each(|found| minimise(target, found))?;
    Ok(report)
}

fn fuzzer(target: Target) -> Command {
    let mut fuzzer = Command::new(folder().join(HOST).join("release").join(format!("fuzz-{}", target.name())));
    fuzzer.current_dir(workspace().join("tests/fuzz"));
    match target {
        Target::Parsers => fuzzer.args(["-max_len=4096", "-dict=dictionary"]),
        // Long enough for frames over the MTU; what a run takes is the kernel's business.
        Target::Programs => fuzzer.args(["-max_len=2048", "-len_control=0"]),
    };
    fuzzer
}

/// Looks for a smaller input that breaks something too, and puts it in the place of the first.
fn minimise(target: Target, found: &Path) -> Result<()> {
    let smaller = found.with_extension("smaller");
    let mut fuzzer = fuzzer(target);
    fuzzer.args(["-minimize_crash=1", "-max_total_time=20"]).arg(format!("-exact_artifact_path={}", smaller.display()));
    Process::start(fuzzer.arg(found), &folder().join("minimise.log"))?.wait_without_limit()?;
    match fs::rename(&smaller, found) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Those that count: for the programs, inputs that the kernel runs programs on.
fn executions(target: Target, log: &str) -> Option<u64> {
    let prefix = match target {
        Target::Parsers => "stat::number_of_executed_units:",
        Target::Programs => "compared:",
    };
    log.lines().rev().find_map(|line| line.strip_prefix(prefix)?.trim().parse().ok())
}

/// The file that an input was written to.
fn artifact(log: &str) -> Option<PathBuf> {
    log.lines().find_map(|line| Some(line.split_once("Test unit written to ")?.1.into()))
}

fn difference(log: &str) -> String {
    let lines = log.lines().skip_while(|line| !line.contains("panicked at"));
    lines.take_while(|line| !line.contains("note: run with")).collect::<Vec<_>>().join("\n")
}

fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn corpus(target: Target) -> PathBuf {
    workspace().join("tests/fuzz/corpus").join(target.name())
}

/// Beside the ordinary build, whose flags are others.
fn folder() -> PathBuf {
    workspace().join("target/fuzz")
}

/// The machine, as cargo names it.
const HOST: &str = if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };
