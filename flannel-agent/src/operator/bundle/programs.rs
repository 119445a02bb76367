//! Running this program's own commands, and those of the host that only show.
#![expect(clippy::disallowed_types, reason = "only who asks for a bundle starts them, and no daemon does")]

use std::{process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

use crate::cli::Cli;

/// For so long each may take.
const LIMIT: Duration = Duration::from_secs(15);
/// Where they are, also for users whose `PATH` lacks the system's programs.
const SYSTEM_PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin";

/// What a command of this program's prints, with the same flags; or what went wrong, in words.
pub(super) async fn own(cli: &Cli, arguments: &[&str]) -> Result<String, String> {
    let (flags, variables) = cli.passed_on();
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.args(flags).args(arguments).envs(variables);
    run(command).await
}

/// What a program of the host's prints; or what went wrong, in words.
pub(super) async fn host(program: &str, arguments: &[&str]) -> Result<String, String> {
    let path = format!("{}:{SYSTEM_PATH}", std::env::var("PATH").unwrap_or_default());
    let found = which::which_in(program, Some(&path), "/").map_err(|_| "is not installed".to_owned())?;
    let mut command = Command::new(found);
    command.args(arguments).env_clear().env("PATH", path).env("LC_ALL", "C");
    run(command).await
}

async fn run(mut command: Command) -> Result<String, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = match timeout(LIMIT, command.output()).await {
        Err(_) => return Err(format!("did not end within {LIMIT:?}")),
        Ok(result) => result.map_err(|error| error.to_string())?,
    };
    // Whatever it found: those that look whether all is well say so by their exit code.
    match output.stdout.is_empty() {
        false => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        true if output.status.success() => Ok(String::new()),
        true => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())),
    }
}
