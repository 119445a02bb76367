//! `flannel-agent doctor`: what of this host stands in the way of the overlay, before an agent runs here and beside one.
//!
//! * `Check` — what one look found; `facts` — what the looks have in common
//! * `facts` — the overlays of this host, or the one that it is going to have
//! * `kernel` — kernel, capabilities, bpf file system; `clock` — whether the clock is set by others
//! * `link` — the external interface: MTU, driver, offloads, XDP
//! * `port` — the tunnel's UDP port
//! * `strays` — flannel's daemon and other networks of pods
//! * `firewall` — packet rules
//! * `settings` — sysctls
//! * `store` — etcd or Kubernetes, and the network config

mod clock;
mod facts;
mod firewall;
mod kernel;
mod link;
mod port;
mod settings;
mod store;
mod strays;

use std::path::PathBuf;

use serde::Serialize;
use serde_json::json;

use self::facts::Host;
use super::{OperatorError, rows};
use crate::{
    cli::{Cli, Output},
    escape,
    status::API_VERSION,
};

/// How it is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Leave out what is only there once an agent runs, and say what the agent will need
    #[arg(long)]
    before_install: bool,
    /// Where the container runtime reads the configurations of CNI plugins (k3s: /var/lib/rancher/k3s/agent/etc/cni/net.d)
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// How it stands with something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// It may cost packets or speed, or could not be looked at.
    Warning,
    /// It costs packets, or keeps the agent from starting.
    Problem,
}

impl Verdict {
    const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// What one look found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    check: &'static str,
    verdict: Verdict,
    /// In words.
    found: String,
    /// What to do about it.
    advice: Option<String>,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warning, found: found.into(), advice: Some(advice.into()) }
    }

    fn problem(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Problem, found: found.into(), advice: Some(advice.into()) }
    }
}

/// Looks at everything, and prints a line for each check. `false` where something is to be looked at.
///
/// # Errors
/// [`OperatorError::Device`] where the kernel's network can't be asked at all.
pub async fn print(cli: &Cli, options: &Options) -> Result<bool, OperatorError> {
    let host = Host::look(cli, options.before_install).await?;
    let mut checks = store::agents(&host);
    checks.extend(kernel::checks(cli, &host));
    checks.extend(link::checks(&host).await);
    checks.extend(port::checks(&host).await);
    checks.extend(strays::checks(&host, &options.cni_conf_dir).await);
    checks.extend(firewall::checks(&host).await);
    checks.extend(settings::checks(&host).await);
    checks.extend(store::checks(&host));
    checks.extend([clock::check(cli)]);
    if options.before_install {
        checks.push(facts::needs(cli, &host));
    }
    let worst = checks.iter().map(|check| check.verdict).max();
    match options.output {
        Output::Table => print!("{}", table(&checks)),
        Output::Json => {
            let before_install = options.before_install;
            println!("{:#}", json!({ "apiVersion": API_VERSION, "beforeInstall": before_install, "checks": checks }));
        }
    }
    Ok(worst.is_none_or(|worst| worst == Verdict::Ok))
}

fn table(checks: &[Check]) -> String {
    rows(checks.iter().map(|Check { check, verdict, found, advice }| {
        let advice = advice.iter().map(|advice| format!("; {advice}"));
        let words = std::iter::once(found.clone()).chain(advice).collect::<String>();
        [verdict.label().to_owned(), (*check).to_owned(), escape::control_characters(&words).into_owned()]
    }))
}
