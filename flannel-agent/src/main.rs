//! The agent's process: command line, log, exit code.

use std::process::ExitCode;

use flannel_agent::{
    cleanup,
    cli::{Cli, Command},
    daemon::{self, DaemonError},
};
use tracing::error;
use tracing_subscriber::filter::LevelFilter;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::from_process();
    if cli.version {
        // To stderr, as flannel does.
        eprintln!("{}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    start_log(&cli);
    let result = match &cli.command {
        None => daemon::run(&cli).await,
        Some(Command::Cleanup) => cleanup::run(&cli).await.map_err(DaemonError::from),
        Some(Command::Counters) => daemon::print_counters(&cli),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn start_log(cli: &Cli) {
    let level = match cli.verbosity {
        0 => LevelFilter::INFO,
        1..=4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The programs' records come at the level that they were asked for.
    let level = if cli.bpf_log_level == Default::default() { level } else { LevelFilter::TRACE };
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .parse_lossy(format!("flannel_agent={level},flannel_ebpf={level},flannel={level}"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
