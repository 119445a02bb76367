//! What a trace prints.

use flannel_common::event::{Event, Outcome};
use serde::Serialize;
use serde_json::json;

use super::consulted::Consulted;
use crate::{cli::Output, operator::rows, status::API_VERSION};

/// A packet's way through this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Trace {
    pub(super) vni: u32,
    /// The packet, in one line.
    pub(super) packet: String,
    pub(super) steps: Vec<Step>,
    pub(super) fate: Fate,
    /// The fate in words.
    pub(super) conclusion: String,
}

/// What becomes of a packet on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Fate {
    /// Sent to a peer.
    Sent,
    /// Put into a pod.
    Delivered,
    /// Taken by the host itself.
    Received,
    /// Dropped by a program.
    Dropped,
    /// Not taken by the stack: it drops it, or answers that it is too large.
    Refused,
    /// Not the overlay's any more.
    Elsewhere,
}

/// One place on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "kind")]
pub(super) enum Step {
    /// A program was run.
    #[serde(rename_all = "camelCase")]
    Program(ProgramStep),
    /// The stack was asked.
    #[serde(rename_all = "camelCase")]
    Stack {
        /// What it does, in words.
        does: String,
    },
}

/// A program, and what it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProgramStep {
    pub(super) program: &'static str,
    pub(super) interface: String,
    /// The kernel's number of the attached program.
    pub(super) program_id: u32,
    /// What it counts; [`None`] where it leaves the packet as it is without a count.
    pub(super) event: Option<&'static str>,
    pub(super) description: &'static str,
    /// In the kernel's words.
    pub(super) verdict: String,
    pub(super) tables: Vec<Consulted>,
    pub(super) before: Vec<String>,
    pub(super) after: Vec<String>,
}

impl ProgramStep {
    /// Of an event.
    pub(super) fn describe(event: Option<Event>) -> (Option<&'static str>, &'static str) {
        match event {
            Some(event) => (Some(event.label()), event.description().trim()),
            None => (None, "left as it is"),
        }
    }
}

/// The kernel's name of what a TC program returns (include/uapi/linux/pkt_cls.h).
pub(super) fn tc_verdict(number: i32) -> String {
    match number {
        -1 => "next (TC_ACT_UNSPEC)".to_owned(),
        0 => "pass (TC_ACT_OK)".to_owned(),
        2 => "drop (TC_ACT_SHOT)".to_owned(),
        7 => "redirect (TC_ACT_REDIRECT)".to_owned(),
        other => format!("TC action {other}"),
    }
}

/// The kernel's name of what an XDP program returns (`enum xdp_action`).
pub(super) fn xdp_verdict(number: i32) -> String {
    match number {
        1 => "drop (XDP_DROP)".to_owned(),
        2 => "pass (XDP_PASS)".to_owned(),
        other => format!("XDP action {other}"),
    }
}

impl Trace {
    pub(super) fn print(&self, output: Output) {
        match output {
            Output::Table => print!("{}", self.text()),
            Output::Json => {
                let mut document = json!({ "apiVersion": API_VERSION });
                if let (Some(document), Ok(serde_json::Value::Object(trace))) =
                    (document.as_object_mut(), serde_json::to_value(self))
                {
                    document.extend(trace);
                }
                println!("{document:#}");
            }
        }
    }

    fn text(&self) -> String {
        let mut text = format!("flannel.{}: {}\n", self.vni, self.packet);
        for (number, step) in (1..).zip(&self.steps) {
            text += &match step {
                Step::Stack { does } => format!("\n{number}. the stack: {does}\n"),
                Step::Program(step) => format!("\n{number}. {}", step.text()),
            };
        }
        text + &format!("\n=> {}\n", self.conclusion)
    }
}

impl ProgramStep {
    fn text(&self) -> String {
        let Self { program, interface, event, description, verdict, .. } = self;
        let event = event.unwrap_or("not counted");
        let mut text = format!("{program} at {interface}: {event}, {verdict}\n   {description}\n");
        let tables = self
            .tables
            .iter()
            .map(|Consulted { table, key, answer }| [format!("   {table}"), key.clone(), answer.clone()]);
        text += &rows(tables);
        text += &format!("   before  {}\n", self.before.join(" | "));
        let after = if self.after == self.before { "as before".to_owned() } else { self.after.join(" | ") };
        text + &format!("   after   {after}\n")
    }
}

/// Whether an event ends the packet.
pub(super) fn is_drop(event: Option<Event>) -> bool {
    event.is_some_and(|event| event.outcome() == Outcome::Drop)
}
