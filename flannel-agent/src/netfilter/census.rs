//! How many packet rules an overlay has.

use flannel_common::vxlan::Vni;
use serde_json::Value;

use super::{Names, NetfilterError, iptables::Place, programs::Programs};

/// The rules in an overlay's own chains, in both languages. The jumps that lead there are not among them.
///
/// # Errors
/// [`NetfilterError`].
pub async fn count(vni: Vni) -> Result<usize, NetfilterError> {
    let (mut programs, names) = (Programs::default(), Names::of(vni));
    programs.find();
    let mut rules = 0;
    if let Some(nft) = &programs.nft
        && let Some(text) = nft.list(&["-j", "list", "table", "ip", &names.table]).await?
    {
        let document: Value = serde_json::from_str(&text).unwrap_or_default();
        let objects = document.get("nftables").and_then(Value::as_array).into_iter().flatten();
        rules += objects.filter(|object| object.get("rule").is_some()).count();
    }
    for iptables in programs.iptables().await? {
        for place in [Place::Postrouting, Place::Forward] {
            if iptables.has_table(place, false) {
                let text = iptables.list(place, place.chain(&names)).await?.unwrap_or_default();
                rules += text.lines().filter(|line| line.starts_with("-A ")).count();
            }
        }
    }
    Ok(rules)
}
