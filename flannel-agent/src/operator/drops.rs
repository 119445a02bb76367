//! `flannel-agent drops`: what was dropped, how often, and what it was.

mod follow;

use std::time::Duration;

use flannel_common::{
    event::{Event, Outcome},
    maps::Counter,
    vxlan::Vni,
};
use serde::Serialize;
use serde_json::json;

pub use self::follow::print as follow;
use super::{
    OperatorError, agent_note,
    decode::{Decoded, decode},
    interface_name, is_running, rows,
};
use crate::{
    cli::{Cli, Output},
    dataplane::{self, Dropped, PinDirectory},
    status::API_VERSION,
};

/// A reason, and what was dropped for it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Reason {
    pub(super) reason: &'static str,
    pub(super) description: &'static str,
    pub(super) packets: u64,
    pub(super) bytes: u64,
    /// Latest first.
    pub(super) samples: Vec<Sample>,
}

/// One of the packets.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Sample {
    /// For `explain`.
    pub(super) number: u64,
    pub(super) age_ms: u64,
    ifindex: u32,
    /// [`None`] where it is gone.
    interface: Option<String>,
    /// In bytes.
    length: u32,
    /// In one line.
    pub(super) summary: String,
    #[serde(flatten)]
    decoded: Decoded,
    /// Its first bytes, in hexadecimal digits.
    bytes: String,
}

/// Prints what the programs of each pinned overlay dropped, with as many samples of each reason as asked for.
///
/// # Errors
/// [`OperatorError::NoDataplane`] or [`OperatorError::Dataplane`].
pub fn print(cli: &Cli, output: Output, samples: usize) -> Result<(), OperatorError> {
    let vnis = dataplane::pinned_vnis(&cli.bpf_pin_dir);
    if vnis.is_empty() {
        return Err(OperatorError::NoDataplane(cli.bpf_pin_dir.clone()));
    }
    let mut overlays = Vec::new();
    for vni in vnis {
        let reasons = reasons(&PinDirectory::new(&cli.bpf_pin_dir, vni), samples)?;
        let running = is_running(cli, vni);
        match output {
            Output::Table => print!("{}", table(vni, running, &reasons)),
            Output::Json => overlays.push(json!({ "vni": vni.get(), "running": running, "reasons": reasons })),
        }
    }
    if output == Output::Json {
        println!("{:#}", json!({ "apiVersion": API_VERSION, "overlays": overlays }));
    }
    Ok(())
}

/// Everything that packets are dropped for, with so many samples of each.
pub(super) fn reasons(pins: &PinDirectory, samples: usize) -> Result<Vec<Reason>, OperatorError> {
    let counters = dataplane::pinned_counters(pins)?;
    let mut dropped = dataplane::pinned_drops(pins)?;
    let reasons = counters.into_iter().filter(|(event, _)| event.outcome() == Outcome::Drop);
    let reasons = reasons.map(|(event, Counter { packets, bytes })| {
        let found = dropped.iter_mut().find(|(reason, _)| *reason == event);
        let found = found.map(|(_, dropped)| std::mem::take(dropped)).unwrap_or_default();
        let samples = found.iter().take(samples).map(|dropped| Sample::new(event, dropped)).collect();
        Reason { reason: event.label(), description: event.description().trim(), packets, bytes, samples }
    });
    Ok(reasons.collect())
}

impl Sample {
    fn new(reason: Event, dropped: &Dropped) -> Self {
        let decoded = decode(reason, &dropped.frame, dropped.link_header_len);
        Self {
            number: dropped.number,
            age_ms: dropped.ago.as_millis() as u64,
            ifindex: dropped.ifindex,
            interface: interface_name(dropped.ifindex),
            length: dropped.len,
            summary: decoded.to_string(),
            decoded,
            bytes: dropped.frame.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    fn interface(&self) -> String {
        self.interface.clone().unwrap_or_else(|| format!("no. {}", self.ifindex))
    }
}

fn table(vni: Vni, running: Option<bool>, reasons: &[Reason]) -> String {
    let agent = agent_note(running);
    let seen: Vec<_> = reasons.iter().filter(|reason| reason.packets > 0).collect();
    if seen.is_empty() {
        return format!("flannel.{vni}{agent}: nothing was dropped\n");
    }
    let mut text = format!("flannel.{vni}{agent}\n");
    let counts = seen.iter().map(|reason| {
        [reason.reason.to_owned(), reason.packets.to_string(), reason.bytes.to_string(), reason.description.to_owned()]
    });
    text += &rows([["reason", "packets", "bytes", ""].map(str::to_owned)].into_iter().chain(counts));
    let samples = seen.iter().flat_map(|reason| {
        reason.samples.iter().map(|sample| {
            [
                sample.number.to_string(),
                age(Duration::from_millis(sample.age_ms)),
                reason.reason.to_owned(),
                sample.interface(),
                sample.length.to_string(),
                sample.summary.clone(),
            ]
        })
    });
    text.push('\n');
    text + &rows(
        [["no.", "age", "reason", "interface", "bytes", "packet"].map(str::to_owned)].into_iter().chain(samples),
    )
}

/// In words.
pub(super) fn age(age: Duration) -> String {
    match age.as_secs() {
        0..10 => format!("{:.1} s", age.as_secs_f64()),
        10..120 => format!("{} s", age.as_secs()),
        120..7200 => format!("{} min", age.as_secs() / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}
