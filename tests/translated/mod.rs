//! Flows that netfilter translates on the client's host, by kube-proxy's rules in both their forms: whoever calls gets its own
//! bytes, from whom it asked, by TCP and by UDP, whatever else has the same ports and addresses once it is translated.
//!
//! * [`at_once`] — callers, services and direct connections with ports that clash; masquerading; a pod that calls itself
//! * [`one_tag`] — flows that share the place of what they leave before the stack, at full speed
//! * [`resets`] — what conntrack makes of a RST, that has seen few packets of the flow
//! * [`servers`] — which server it is, of several, and when it becomes another
//! * [`packets`] — every size, the path's MTU, no checksum, none lost

mod at_once;
mod one_tag;
mod packets;
mod resets;
mod servers;

use serde_json::json;
use xtask::progress::wait_for;

use crate::{
    counted::{Asked, Counted},
    services::SERVICE,
    world::{SOON, World},
};

/// What counts packets of translated flows past the stack of the host that translates: out of its pods, and into them.
const PASSED_BY: &[&str] = &["pod_translated", "delivered_translated"];

/// What passes by the stack of the client's host, from now on.
fn passed_by(world: &World) -> Counted<'_> {
    Counted::since_now(world, PASSED_BY.iter().map(|label| (0, *label)))
}

/// Waits until nothing is known any more of the flows of a host, so that the next of the same name is a new one.
fn wait_forgotten(world: &World, host: usize) {
    let flows = || world.status(host)["dataplane"]["flows"]["translated"].clone();
    wait_for("the flows to be forgotten", SOON, || flows() == json!({ "egress": 0, "ingress": 0 })).unwrap();
}

/// [`SERVICE`], with the first pod of the second host behind it.
const fn asked() -> Asked<'static> {
    Asked::service(SERVICE, PASSED_BY)
}
