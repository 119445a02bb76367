//! `flannel-agent lease show`: this host's lease, as the agent and the store have it.

use std::time::Duration;

use flannel_common::vxlan::Vni;
use serde::Serialize;
use serde_json::json;
use tokio::time::timeout;

use super::{
    OperatorError, agent_note,
    asked::{Asked, LIMIT},
    is_running, rows,
    status::lease_words,
};
use crate::{
    cli::{Cli, Output},
    escape,
    last_known::LastKnown,
    plural::counted,
    registry::{Registry, StoreKind},
    status::{API_VERSION, LeaseStatus, Status},
};

/// A lease of this host.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Lease {
    vni: u32,
    #[serde(skip)]
    name: String,
    running: Option<bool>,
    /// As the agent told of it last.
    #[serde(flatten)]
    lease: LeaseStatus,
    store: StoreKind,
    #[serde(flatten)]
    there: There,
}

/// What the store says of it.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct There {
    /// The name that it is found by.
    key: Option<String>,
    /// In how many seconds it ends, unless it is renewed; [`None`] for one without an end, and where it is not known.
    expires_in_seconds: Option<u64>,
    /// Whether it has an end; [`None`] where that is not known.
    expires: Option<bool>,
    /// How many other hosts have a lease.
    others: Option<usize>,
    /// Why something is not known.
    problem: Option<String>,
}

/// Prints the lease of each overlay of this host.
///
/// # Errors
/// [`OperatorError::Status`] where no agent has run.
pub async fn print(cli: &Cli, output: Output) -> Result<(), OperatorError> {
    let statuses = Status::read_all(&cli.run_dir)?;
    let mut asked = Asked::ask(cli).await;
    let mut leases = Vec::new();
    for (vni, status) in statuses {
        let there = look(cli, &mut asked, &status).await;
        leases.push(lease(cli, vni, status, there));
    }
    match output {
        Output::Table => leases.iter().for_each(|lease| print!("{}", table(lease))),
        Output::Json => println!("{:#}", json!({ "apiVersion": API_VERSION, "leases": leases })),
    }
    Ok(())
}

fn lease(cli: &Cli, vni: Vni, status: Status, there: There) -> Lease {
    let (name, store) = (status.name(), status.store.kind);
    Lease { vni: vni.get(), name, running: is_running(cli, vni), lease: status.lease, store, there }
}

async fn look(cli: &Cli, asked: &mut Asked, status: &Status) -> There {
    let not_known = |problem: String| There { problem: Some(problem), ..There::default() };
    let Some(registry) = asked.registry.as_mut().filter(|_| asked.has_answered) else {
        return not_known(asked.config.as_ref().err().cloned().unwrap_or_default());
    };
    match timeout(LIMIT, ask(cli, registry, status)).await {
        Ok(there) => there,
        Err(_) => not_known(format!("{} does not answer within {LIMIT:?}", status.store.kind)),
    }
}

async fn ask(cli: &Cli, registry: &mut Registry, status: &Status) -> There {
    let snapshot = match registry.snapshot().await {
        Ok(snapshot) => snapshot,
        Err(error) => return There { problem: Some(error.to_string()), ..There::default() },
    };
    let own = snapshot.entries.iter().find(|entry| entry.key.subnet == status.lease.subnet);
    let Some(own) = own else {
        let others = Some(snapshot.entries.len());
        let problem = Some(format!("{} does not name it, with these flags", status.store.kind));
        return There { others, problem, ..There::default() };
    };
    let others = Some(snapshot.entries.len() - 1);
    let key = Some(registry.key_of(own));
    let known = LastKnown::find(&cli.run_dir, registry.identity(), |known| known.lease.key == own.key);
    let remaining = registry.remaining(own).await;
    let (expires, left, problem) = match remaining {
        Ok(Some(left)) => (Some(true), Some(left), None),
        Ok(None) => (Some(false), None, None),
        Err(error) => (None, None, Some(error.to_string())),
    };
    let is_another = known.is_some_and(|known| own.is_of_another(&known.lease));
    let problem = problem.or_else(|| is_another.then(|| "another host has it".to_owned()));
    There { key, expires_in_seconds: left.map(|left| left.as_secs()), expires, others, problem }
}

fn table(lease: &Lease) -> String {
    let Lease { name, running, lease, store, there, .. } = lease;
    let There { key, expires_in_seconds, expires, others, problem } = there;
    let end = match (expires, expires_in_seconds) {
        (Some(true), Some(seconds)) => format!("in {}, unless it is renewed", words(Duration::from_secs(*seconds))),
        (Some(false), _) => "not by itself".to_owned(),
        _ => "not known".to_owned(),
    };
    let mut lines = vec![
        [name.clone(), format!("{}{}", lease.subnet, agent_note(*running))],
        ["state".to_owned(), lease_words(lease)],
        ["MAC".to_owned(), lease.vtep_mac.to_string()],
        ["store".to_owned(), format!("{store}: {}", key.as_deref().unwrap_or("not known"))],
        ["ends".to_owned(), end],
        ["others".to_owned(), others.map_or("not known".to_owned(), |others| counted(others, "other lease"))],
    ];
    lines
        .extend(problem.iter().map(|problem| ["look at".to_owned(), escape::control_characters(problem).into_owned()]));
    rows(lines)
}

fn words(left: Duration) -> String {
    match left.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}
