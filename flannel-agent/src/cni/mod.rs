//! The CNI plugin `flannel`: a container's network interface, by delegation (flannel: cni-plugin/flannel.go;
//! containernetworking/cni: SPEC.md, versions up to 1.1.0).
//!
//! It makes nothing itself. From its network configuration and `subnet.env` it generates the configuration of another
//! plugin, `bridge` unless told otherwise, runs that one, and keeps the generated configuration until the container goes,
//! since `subnet.env` may be another one by then. No async runtime: it is started once or more for every container.
//!
//! # Layout
//!
//! * [`request`] — environment and standard input
//! * [`subnet_file`] — `subnet.env`, as a runtime reads it
//! * [`delegate_conf`] — the generated configuration, byte for byte flannel's
//! * [`delegate`] — running another plugin
//! * `netns` — a look into the container's namespace
//! * [`state`] — what is kept of each attachment
//! * `commands` — ADD, DEL, CHECK, STATUS, GC
//! * [`error`] — the error result

mod commands;
pub mod delegate;
pub mod delegate_conf;
pub mod error;
mod netns;
pub mod request;
pub mod state;
pub mod subnet_file;

use std::{
    io::{Read as _, Write as _},
    process::ExitCode,
};

use serde_json::json;

use self::{
    error::Error,
    request::{Command, Request},
};

/// The versions of the specification that a network may have. What ADD prints is the delegate's, in its words.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", LATEST];
/// The newest of them.
pub const LATEST: &str = "1.1.0";

/// Serves the command that the environment names. On standard output is the result or the error result, nothing else.
pub fn main() -> ExitCode {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let Some(command) = variable("CNI_COMMAND") else {
        // As the reference implementation does where a person starts it (cni: pkg/skel/skel.go).
        eprintln!("CNI plugin flannel v{}", env!("CARGO_PKG_VERSION"));
        eprintln!("CNI protocol versions supported: {}", VERSIONS.join(", "));
        return ExitCode::SUCCESS;
    };
    let mut input = Vec::new();
    if let Err(source) = std::io::stdin().read_to_end(&mut input) {
        return finish(&[], Err(Error::Io { call: "read", subject: "standard input".to_owned(), source }));
    }
    finish(&input, serve(&command, variable, &input))
}

fn serve(command: &str, variable: impl Fn(&str) -> Option<String>, input: &[u8]) -> Result<Vec<u8>, Error> {
    match Command::parse(command)? {
        Command::Version => {
            let mut result = json!({ "cniVersion": request::version_for_reply(input), "supportedVersions": VERSIONS });
            result.sort_all_objects();
            Ok(result.to_string().into_bytes())
        }
        Command::Operation(operation) => {
            let request = Request::parse(operation, variable, input)?;
            commands::run(&request)
        }
    }
}

fn finish(input: &[u8], result: Result<Vec<u8>, Error>) -> ExitCode {
    let (output, code) = match result {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(error) => (error.to_result(request::version_for_reply(input)), ExitCode::FAILURE),
    };
    match std::io::stdout().write_all(&output) {
        Ok(()) => code,
        // Nobody is left to tell.
        Err(_) => ExitCode::FAILURE,
    }
}
