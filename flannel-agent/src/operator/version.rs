//! `flannel-agent version`: which agent, on which kernel.

use std::fs;

use flannel_common::maps::ABI_VERSION;
use serde_json::json;

use super::rows;
use crate::{cli::Output, preflight, status::API_VERSION};

/// The commit, for who builds from one and says so: a build from an archive knows none, and one of the same source is the same.
const COMMIT: Option<&str> = option_env!("FLANNEL_AGENT_COMMIT");
const PROFILE: &str = env!("FLANNEL_AGENT_PROFILE");
const RUSTC: &str = env!("FLANNEL_AGENT_RUSTC");
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Prints them.
pub fn print(output: Output) {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.trim();
    let features = preflight::check();
    match output {
        Output::Table => {
            let features = features.as_ref().map_or_else(ToString::to_string, ToString::to_string);
            let lines = [
                ["version", VERSION],
                ["commit", COMMIT.unwrap_or("not known")],
                ["build", &format!("{PROFILE}, {RUSTC}")],
                ["kernel", kernel],
                ["map layout", &format!("v{ABI_VERSION}")],
                ["features", &features],
            ];
            print!("{}", rows(lines.map(|line| line.map(str::to_owned))));
        }
        Output::Json => {
            let problem = features.as_ref().err().map(ToString::to_string);
            println!(
                "{:#}",
                json!({
                    "apiVersion": API_VERSION,
                    "version": VERSION,
                    "commit": COMMIT,
                    "profile": PROFILE,
                    "rustc": RUSTC,
                    "kernel": kernel,
                    "mapLayout": ABI_VERSION,
                    "features": features.ok(),
                    "problem": problem,
                })
            );
        }
    }
}
