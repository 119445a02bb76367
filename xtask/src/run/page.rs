//! The first host's page, from the machine that the lab is on: no link leads into the lab.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    lab::{Forward, Host},
    process::output,
    progress::{heading, wait_for},
};

/// Of loopback, in the host's namespace and on the machine, where that is free.
const PORT: u16 = 8471;
/// How long the agent may take to know of a host that has just joined.
const LIMIT: Duration = Duration::from_secs(10);

/// What the first host's agent is told.
pub(super) fn flag() -> String {
    format!("--http-ui={PORT}")
}

/// Makes the page reachable on the machine as long as this is kept, and looks at what it knows.
pub(super) fn tour(hosts: &[Host]) -> Result<Forward> {
    let host = hosts.first().context("a tour needs hosts")?;
    heading(&format!("the page of {}", host.name));
    let page = Forward::start(&host.netns, PORT, SocketAddr::from(([127, 0, 0, 1], PORT)))?;
    let url = format!("http://{}/", page.address());
    let ask = || -> Result<Value> {
        let ask = ["-sS", "--fail", "--noproxy", "*", "--max-time", "5"];
        let text = output(Command::new("curl").args(ask).arg(format!("{url}api/v1/overview")))?;
        serde_json::from_str(&text).with_context(|| format!("{url} says {text:?}"))
    };
    let count = |overview: &Value| overview["overlays"][0]["peers"].as_array().map_or(0, Vec::len);
    let mut overview = ask()?;
    wait_for("the page to know all peers", LIMIT, || {
        overview = ask().unwrap_or_default();
        count(&overview) == hosts.len() - 1
    })?;
    let troubles = overview["overlays"][0]["troubles"].as_array().map_or(0, Vec::len);
    let words = if overview["isWell"] == true { "all is well".to_owned() } else { format!("{troubles} to look at") };
    println!("{url} on this machine, for a browser: {} peers, {words}", count(&overview));
    Ok(page)
}
