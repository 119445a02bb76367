//! `flannel-agent explain`: an event in words, and the latest packets that it happened to, joined with what explains them.

use std::time::Duration;

use clap::Args;
use flannel_common::{
    event::{Event, Outcome},
    vxlan::Vni,
};
use serde::Serialize;
use serde_json::json;

use super::{Explanation, Known, explanation};
use crate::{
    cli::{Cli, Output},
    dataplane::{PinDirectory, pinned_counters, pinned_drops, pinned_vnis},
    operator::{OperatorError, decode::decode, drops::age, rows},
    plural::counted,
    status::{API_VERSION, Status},
    suggestion, udp,
};

/// So many packets are explained where none is named.
const SAMPLES: usize = 3;

/// What is explained.
#[derive(Args, Debug)]
pub struct Options {
    /// The name of an event, as `counters` and `drops` have it
    reason: String,
    /// Only this packet; `drops` has its number
    #[arg(long, value_name = "NUMBER")]
    sample: Option<u64>,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// What there is to say.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Explained {
    reason: &'static str,
    description: String,
    #[serde(flatten)]
    explanation: Option<Explanation>,
    overlays: Vec<Overlay>,
}

/// What an overlay has of it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Overlay {
    vni: u32,
    /// How often it happened.
    packets: u64,
    /// Latest first.
    samples: Vec<Sample>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Sample {
    number: u64,
    age_ms: u64,
    summary: String,
    /// Why, in words.
    because: String,
}

/// Explains an event, with the latest packets that were dropped for it. Works without an agent.
///
/// # Errors
/// [`OperatorError::UnknownReason`], [`OperatorError::NoSample`], [`OperatorError::Dataplane`].
pub fn print(cli: &Cli, options: &Options) -> Result<(), OperatorError> {
    let explained = match Event::ALL.iter().find(|event| event.label() == options.reason) {
        Some(event) => of_event(cli, options, *event)?,
        None => of_tunnel(options)?,
    };
    match options.output {
        Output::Table => print!("{}", explained.text()),
        Output::Json => {
            let mut document = json!({ "apiVersion": API_VERSION });
            if let (Some(document), Ok(serde_json::Value::Object(explained))) =
                (document.as_object_mut(), serde_json::to_value(&explained))
            {
                document.extend(explained);
            }
            println!("{document:#}");
        }
    }
    Ok(())
}

fn of_event(cli: &Cli, options: &Options, event: Event) -> Result<Explained, OperatorError> {
    let mut statuses = Status::read_all(&cli.run_dir).unwrap_or_default();
    let mut overlays = Vec::new();
    for vni in pinned_vnis(&cli.bpf_pin_dir) {
        let status = statuses.iter().position(|(of, _)| *of == vni).map(|place| statuses.swap_remove(place).1);
        overlays.push(overlay(cli, options, event, vni, status)?);
    }
    if let Some(number) = options.sample
        && overlays.iter().all(|overlay| overlay.samples.is_empty())
    {
        return Err(OperatorError::NoSample { reason: event.label(), number });
    }
    Ok(Explained {
        reason: event.label(),
        description: event.description().trim().to_owned(),
        explanation: Some(explanation(event)),
        overlays,
    })
}

fn overlay(
    cli: &Cli,
    options: &Options,
    event: Event,
    vni: Vni,
    status: Option<Status>,
) -> Result<Overlay, OperatorError> {
    let pins = PinDirectory::new(&cli.bpf_pin_dir, vni);
    let counters = pinned_counters(&pins)?;
    let packets = counters.iter().find(|(of, _)| *of == event).map_or(0, |(_, counter)| counter.packets);
    let mut samples = Vec::new();
    if event.outcome() == Outcome::Drop {
        let known = Known::read(&pins, status)?;
        let dropped = pinned_drops(&pins)?.into_iter().filter(|(of, _)| *of == event).flat_map(|(_, dropped)| dropped);
        let wanted = dropped.filter(|dropped| options.sample.is_none_or(|number| number == dropped.number));
        samples = wanted
            .take(SAMPLES)
            .map(|dropped| Sample {
                number: dropped.number,
                age_ms: dropped.ago.as_millis() as u64,
                summary: decode(event, &dropped.frame, dropped.link_header_len).to_string(),
                because: known.explain(event, &dropped),
            })
            .collect();
    }
    Ok(Overlay { vni: vni.get(), packets, samples })
}

/// Of the tunnel in user space, which keeps no samples.
fn of_tunnel(options: &Options) -> Result<Explained, OperatorError> {
    let Some(event) = udp::Event::ALL.iter().find(|event| event.label() == options.reason) else {
        let all = Event::ALL.iter().map(|event| event.label()).chain(udp::Event::ALL.iter().map(|event| event.label()));
        let hint = suggestion::closest(&options.reason, all).map(|name| format!(" (did you mean {name}?)"));
        return Err(OperatorError::UnknownReason { reason: options.reason.clone(), hint: hint.unwrap_or_default() });
    };
    if let Some(number) = options.sample {
        return Err(OperatorError::NoSample { reason: event.label(), number });
    }
    Ok(Explained {
        reason: event.label(),
        description: event.description().trim().to_owned(),
        explanation: None,
        overlays: Vec::new(),
    })
}

impl Explained {
    fn text(&self) -> String {
        let mut text = format!("{}\n{}\n", self.reason, self.description);
        if let Some(Explanation { cause, look, mend }) = self.explanation {
            let mend = if mend.is_empty() { "nothing is to be mended" } else { mend };
            text.push('\n');
            text += &rows(
                [["usual cause", cause], ["look further", look], ["mend", mend]].map(|row| row.map(str::to_owned)),
            );
        }
        for Overlay { vni, packets, samples } in &self.overlays {
            text += &format!("\nflannel.{vni}: {}\n", counted(*packets, "packet"));
            for Sample { number, age_ms, summary, because } in samples {
                let age = age(Duration::from_millis(*age_ms));
                text += &format!("  no. {number}, {age} ago: {summary}\n    {because}\n");
            }
        }
        text
    }
}
