//! The agent's process: command line, log, exit code.

use std::{io::IsTerminal as _, process::ExitCode};

use flannel_agent::{
    cleanup,
    cli::{Cli, Command, ConfigCommand, LeaseCommand},
    daemon::{self, DaemonError},
    docker_opts, log,
    operator::{self, ping::Question},
};
use nix::sys::signal::{SigHandler, Signal, signal};
use tracing::{error, warn};
use tracing_subscriber::filter::LevelFilter;

/// Exit code of `status`, `doctor` and `audit` where not all is well.
const SOMETHING_TO_LOOK_AT: u8 = 3;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::from_process();
    if cli.version {
        // To stderr, as flannel does.
        eprintln!("{}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if cli.command.is_some() {
        end_with_the_reader();
    }
    start_log(&cli);
    for notice in &cli.notices {
        warn!("{notice}");
    }
    match serve(&cli).await {
        Ok(code) => code,
        Err(error) => {
            error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

async fn serve(cli: &Cli) -> Result<ExitCode, DaemonError> {
    match &cli.command {
        None => daemon::run(cli).await?,
        Some(Command::Cleanup) => cleanup::run(cli).await?,
        Some(Command::Counters) => operator::print_counters(cli)?,
        Some(Command::Drops { output, follow: true, .. }) => operator::follow_drops(cli, *output).await?,
        Some(Command::Drops { output, samples, .. }) => operator::print_drops(cli, *output, *samples)?,
        Some(Command::Status(options)) => return Ok(exit_code(operator::print_status(cli, options).await?)),
        Some(Command::Peers { output }) => operator::print_peers(cli, *output).await?,
        Some(Command::Ping { target, size, count, output }) => {
            let question = Question { target: *target, size: *size, count: *count };
            return Ok(exit_code(operator::ping::print(cli, question, *output).await?));
        }
        Some(Command::Explain(options)) => operator::print_explanation(cli, options)?,
        Some(Command::Trace(options)) => operator::print_trace(cli, options).await?,
        Some(Command::Capture(options)) => operator::print_capture(cli, options).await?,
        Some(Command::Doctor(options)) => return Ok(exit_code(operator::print_doctor(cli, options).await?)),
        Some(Command::Audit { output }) => return Ok(exit_code(operator::print_audit(cli, *output).await?)),
        Some(Command::Metrics { textfile }) => operator::print_metrics(cli, textfile.as_deref()).await?,
        Some(Command::Config(ConfigCommand::Show { origin, output })) => {
            operator::print_config(cli, *origin, *output).await?;
        }
        Some(Command::Config(ConfigCommand::Validate { file })) => operator::validate(cli, file.as_deref()).await?,
        Some(Command::Version { output }) => operator::print_version(*output),
        Some(Command::Bundle(options)) => operator::make_bundle(cli, options).await?,
        Some(Command::Completions { shell }) => operator::print_completions(*shell),
        Some(Command::Man { directory }) => operator::manual(directory.as_deref())?,
        Some(Command::Lease(LeaseCommand::Show { output })) => operator::print_lease(cli, *output).await?,
        Some(Command::Lease(LeaseCommand::ReleaseGuard)) => operator::release_guard(cli).await?,
        Some(Command::DockerOpts(options)) => docker_opts::run(options)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Of a command that looks whether all is well.
fn exit_code(is_well: bool) -> ExitCode {
    if is_well { ExitCode::SUCCESS } else { ExitCode::from(SOMETHING_TO_LOOK_AT) }
}

/// Has a command end in silence where nobody reads any more what it prints (`... | head`), as others do.
fn end_with_the_reader() {
    // SAFETY: the default action runs no code of this process, and nothing else of it has set up signals yet.
    if let Err(error) = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) } {
        eprintln!("restore the default action of SIGPIPE: {error}");
    }
}

fn start_log(cli: &Cli) {
    let level = match cli.verbosity {
        ..=0 => LevelFilter::INFO,
        1..=4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The programs' records come at the level that they were asked for.
    let level = if cli.bpf_log_level == Default::default() { level } else { LevelFilter::TRACE };
    log::start(cli.log_format, level, std::io::stderr().is_terminal());
}
