//! `flannel-agent status`.
//!
//! * `answer` — what the running agent answers when it is asked how it is
//! * `table` — what is printed for people

mod answer;
mod table;

pub(super) use self::table::lease_words;

use std::{io::IsTerminal as _, path::Path, time::Duration};

use flannel_common::vxlan::Vni;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use self::answer::Answer;
use super::{OperatorError, dataplane::Dataplane, is_running};
use crate::{
    backend::has_datapath,
    cli::{Cli, Output},
    status::{API_VERSION, ReadError, Status, time},
    waiting::Waiting,
};

/// How often `--wait` looks.
const LOOK: Duration = Duration::from_millis(250);
/// How often `--watch` prints.
const PERIOD: Duration = Duration::from_secs(2);
/// Clears a terminal and goes to its first line (ECMA-48: CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[J";

/// How it is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// A line for each overlay
    #[arg(long, conflicts_with = "output")]
    brief: bool,
    /// Show each pod's hooks, which are summed up otherwise
    #[arg(long)]
    pods: bool,
    /// Print it again every 2 s until Ctrl-C
    #[arg(long, conflicts_with_all = ["check", "wait"])]
    watch: bool,
    /// For probes: only whether the agent has started, lives or is ready; prints why where it is not so
    #[arg(long, value_enum, conflicts_with_all = ["brief", "pods"])]
    check: Option<Check>,
    /// Wait until all is well, or until what --check asks for is so
    #[arg(long)]
    wait: bool,
    /// For how long --wait waits
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

/// What a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Check {
    /// An agent runs; it may wait for its first lease
    Startup,
    /// An agent runs and answers, and none of its loops hangs
    Live,
    /// It lives, and the datapath is made
    Ready,
}

/// What is known of an overlay.
pub(super) struct Overlay {
    pub(super) status: Status,
    /// [`None`] where it can't be told.
    is_running: Option<bool>,
    /// [`None`] where no agent runs, where that can't be told, or nobody asked.
    answer: Option<Answer>,
    /// [`None`] where it can't be read, or there is none.
    pub(super) dataplane: Option<Dataplane>,
    /// In words.
    pub(super) troubles: Vec<String>,
}

/// What is known of this host's overlays.
struct Host {
    overlays: Vec<Overlay>,
    waiting: Vec<Waiting>,
}

/// Prints the state of every overlay of this host, and what agents wait for that have none yet. `false` where something is to be
/// looked at, or what was asked for is not so.
///
/// # Errors
/// [`OperatorError::Status`].
pub async fn print(cli: &Cli, options: &Options) -> Result<bool, OperatorError> {
    let until = Instant::now() + Duration::from_secs(if options.wait { options.timeout } else { 0 });
    loop {
        let host = Host::look(cli, options.check.is_none()).await;
        let problem = match (&host, options.check) {
            (Err(_), _) => None,
            (Ok(host), Some(check)) => Some(host.problem(check)),
            (Ok(host), None) => Some((!host.is_well()).then(String::new)),
        };
        if options.watch {
            if std::io::stdout().is_terminal() {
                print!("{CLEAR}");
            }
            match &host {
                Ok(host) => host.print(options),
                Err(error) => println!("{error}"),
            }
            sleep(PERIOD).await;
            continue;
        }
        let is_so = problem == Some(None);
        if !is_so && Instant::now() < until {
            sleep(LOOK).await;
            continue;
        }
        let host = host?;
        match (options.check, problem.flatten()) {
            (None, _) => host.print(options),
            (Some(_), Some(problem)) => println!("{problem}"),
            (Some(_), None) => {}
        }
        return Ok(is_so);
    }
}

impl Host {
    async fn look(cli: &Cli, has_dataplane: bool) -> Result<Self, OperatorError> {
        let waiting = Waiting::read_all(&cli.run_dir);
        let statuses = match Status::read_all(&cli.run_dir) {
            Err(ReadError::None(_)) if !waiting.is_empty() => Vec::new(),
            statuses => statuses?,
        };
        let mut overlays = Vec::new();
        for (vni, status) in statuses {
            let is_running = is_running(cli, vni);
            let answer = match is_running {
                Some(true) => Some(Answer::ask(cli, vni, !waiting.is_empty()).await),
                Some(false) | None => None,
            };
            let mut overlay = Overlay::of(status, is_running, answer);
            if has_dataplane {
                overlay.read(&cli.bpf_pin_dir, vni, !waiting.is_empty()).await;
            }
            overlays.push(overlay);
        }
        Ok(Self { overlays, waiting })
    }

    fn is_well(&self) -> bool {
        self.waiting.is_empty() && self.overlays.iter().all(|overlay| overlay.troubles.is_empty())
    }

    /// Why what a probe asks is not so.
    fn problem(&self, check: Check) -> Option<String> {
        let running = || self.overlays.iter().filter_map(|overlay| Some((overlay, overlay.answer.as_ref()?)));
        if running().next().is_none() && (self.waiting.is_empty() || check == Check::Ready) {
            return Some(match self.waiting.first() {
                Some(waiting) => format!("the agent waits: {}", waiting.reason),
                None if self.overlays.iter().any(|overlay| overlay.is_running.is_none()) => {
                    "whether an agent is running, only root and the agent's user can tell".to_owned()
                }
                None => "no agent is running".to_owned(),
            });
        }
        running().find_map(|(overlay, answer)| {
            let problem = match check {
                Check::Startup => None,
                Check::Live => answer.hangs(),
                Check::Ready => answer.hangs().or_else(|| answer.is_not_ready()),
            };
            problem.map(|problem| format!("{}: {problem}", overlay.status.name()))
        })
    }

    fn print(&self, options: &Options) {
        match options.output {
            Output::Json => println!("{:#}", self.json()),
            Output::Table => {
                self.waiting.iter().for_each(|waiting| print!("{}", table::of_waiting(waiting)));
                let text = |overlay| match options.brief {
                    true => table::brief(overlay),
                    false => table::of_overlay(overlay, options.pods),
                };
                self.overlays.iter().for_each(|overlay| print!("{}", text(overlay)));
            }
        }
    }

    fn json(&self) -> Value {
        let overlays = self.overlays.iter().map(|overlay| {
            let Overlay { status, is_running, answer, dataplane, troubles } = overlay;
            let dataplane = dataplane.as_ref().map(Dataplane::json);
            let answers = answer.as_ref().map(|answer| answer.hangs().is_none());
            json!({
                "running": is_running,
                "answers": answers,
                "troubles": troubles,
                "status": status,
                "dataplane": dataplane,
            })
        });
        json!({ "apiVersion": API_VERSION, "overlays": overlays.collect::<Vec<_>>(), "waiting": self.waiting })
    }
}

impl Overlay {
    /// Of which the kernel's part is not read yet.
    const fn of(status: Status, is_running: Option<bool>, answer: Option<Answer>) -> Self {
        Self { status, is_running, answer, dataplane: None, troubles: Vec::new() }
    }

    /// As the agent itself knows it, which wrote this status.
    pub(super) async fn own(pin_dir: &Path, vni: Vni, status: Status) -> Self {
        let mut own = Self::of(status, Some(true), None);
        own.read(pin_dir, vni, false).await;
        own
    }

    /// Reads the kernel's part, and judges both. `one_waits`: whether an agent waits for an overlay.
    async fn read(&mut self, pin_dir: &Path, vni: Vni, one_waits: bool) {
        let status = &self.status;
        let dataplane = match has_datapath(status.backend_type()) {
            true => Some(Dataplane::read(pin_dir, vni, status).await),
            false => None,
        };
        let mut troubles: Vec<_> = self.doubt(one_waits).into_iter().chain(status.troubles()).collect();
        match &dataplane {
            Some(Ok(dataplane)) => troubles.extend(dataplane.troubles(status)),
            Some(Err(error)) => troubles.push(format!("the dataplane can't be read: {error}")),
            None => {}
        }
        self.troubles = troubles;
        self.dataplane = dataplane.and_then(Result::ok);
    }

    /// Why what the agent wrote last may be over.
    fn doubt(&self, one_waits: bool) -> Option<String> {
        let doubt = match (self.is_running, &self.answer) {
            (Some(true), answer) => answer.as_ref()?.problem()?,
            (Some(false), _) if one_waits => "no agent serves it, and one waits, as said above".to_owned(),
            (Some(false), _) => "no agent is running".to_owned(),
            (None, _) => "whether an agent is running, only root and the agent's user can tell".to_owned(),
        };
        Some(format!("{doubt}; this is from {} ago", time(self.status.written)))
    }
}
