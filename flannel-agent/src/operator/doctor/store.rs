//! The agents, their store, and what its network config comes to.

use super::{
    Check,
    facts::{Host, Overlay},
};
use crate::{config::unknown_keys, operator::asked::Asked, status::time};

/// Whether the agent of each overlay runs.
pub(super) fn agents(host: &Host<'_>) -> Vec<Check> {
    let check = |overlay: &Overlay| {
        let Some(status) = &overlay.status else {
            return Check::warning(
                "agent",
                format!("none has run with the --run-dir {}", host.cli.run_dir.display()),
                "before one does, `flannel-agent doctor --before-install` says what it will need",
            );
        };
        let (name, ago) = (status.name(), time(status.written));
        match overlay.is_running {
            Some(true) => Check::ok("agent", format!("that of {name} runs")),
            Some(false) => {
                let found = format!("that of {name} does not run, and told of itself last {ago} ago");
                Check::problem("agent", found, "start it: what it made goes on, and follows no changes")
            }
            None => {
                let found = format!("whether that of {name} runs, only root and its user can tell");
                Check::warning("agent", found, "run doctor as root")
            }
        }
    };
    host.overlays.iter().filter(|_| !host.before_install).map(check).collect()
}

pub(super) fn checks(host: &Host<'_>) -> Vec<Check> {
    let asked = &host.store;
    let running = host.overlays.iter().filter(|overlay| overlay.is_running != Some(false));
    let followed = running.filter_map(|overlay| overlay.status.as_ref()).map(|status| &status.store).next();
    let at = if asked.endpoints.is_empty() { String::new() } else { format!(" at {}", asked.endpoints.join(", ")) };
    let kind = asked.kind;
    let advice = "flags and variables that name it are those of the agent, and can be given to doctor, too";
    let store = match (&asked.config, followed) {
        (_, Some(store)) if store.following => Check::ok(
            "store",
            format!("the agent follows {} for {}, at revision {}", store.kind, time(store.since), store.revision),
        ),
        (_, Some(store)) if store.problem.is_some() => {
            let problem = store.problem.clone().unwrap_or_default();
            let found = format!("the agent has not followed {} for {}: {problem}", store.kind, time(store.since));
            Check::problem("store", found, "see that it runs; the overlay stays as it was meanwhile")
        }
        _ if asked.has_answered => Check::ok("store", format!("{kind}{at} answers")),
        (Err(error), _) => Check::problem("store", error.clone(), advice),
        (Ok(_), _) => Check::problem("store", format!("{kind}{at} does not answer"), advice),
    };
    std::iter::once(store).chain(config(asked)).collect()
}

/// [`None`] where it can't be told.
fn config(asked: &Asked) -> Option<Check> {
    const NAME: &str = "network config";
    let place = &asked.place;
    match &asked.config {
        Ok(config) => {
            let remarks = unknown_keys(&asked.text);
            let found = format!("in {place}: {} with the backend {}", config.network, config.backend.kind());
            Some(match remarks.is_empty() {
                true => Check::ok(NAME, found),
                false => Check::warning(
                    NAME,
                    format!("{found}; {}", remarks.join("; ")),
                    "see `flannel-agent config validate`",
                ),
            })
        }
        Err(error) if asked.has_answered => Some(Check::problem(
            NAME,
            error.clone(),
            "write one that `flannel-agent config validate` accepts; the agent waits for it",
        )),
        Err(_) => None,
    }
}
