//! What else makes networks of pods on this host: flannel's daemon, and other CNI plugins.

use std::{fs, path::Path};

use rtnetlink::packet_route::link::LinkFlags;
use serde_json::Value;

use super::{
    Check,
    facts::{Host, Overlay},
};
use crate::{device::vxlan::VxlanDevice, operator::named, ownership::Written, subnet_env};

const FLANNEL: &str = "flannel";
const CNI: &str = "CNI";

/// Devices of others.
const DEVICES: [(&str, &str); 11] = [
    ("cilium_vxlan", "Cilium"),
    ("cilium_host", "Cilium"),
    ("vxlan.calico", "Calico"),
    ("wireguard.cali", "Calico"),
    ("tunl0", "Calico or kube-router"),
    ("weave", "Weave Net"),
    ("antrea-gw0", "Antrea"),
    ("ovn-k8s-mp0", "OVN-Kubernetes"),
    ("kube-bridge", "kube-router"),
    ("flannel-wg", "flannel's backend wireguard"),
    ("flannel.ipip", "flannel's backend ipip"),
];
/// Their plugins, by `type`.
const PLUGINS: [(&str, &str); 6] = [
    ("cilium-cni", "Cilium"),
    ("calico", "Calico"),
    ("weave-net", "Weave Net"),
    ("antrea", "Antrea"),
    ("ovn-k8s-cni-overlay", "OVN-Kubernetes"),
    ("kuberouter", "kube-router"),
];

pub(super) async fn checks(host: &Host<'_>, configurations: &Path) -> Vec<Check> {
    let mut checks = vec![flannel(host).await];
    checks.push(devices(host).await);
    checks.push(plugins(configurations));
    checks
}

async fn flannel(host: &Host<'_>) -> Check {
    let daemons = daemons();
    if !daemons.is_empty() {
        let pids: Vec<_> = daemons.iter().map(ToString::to_string).collect();
        return Check::problem(
            FLANNEL,
            format!("flanneld runs here (process {})", named(&pids)),
            "stop it before the agent starts: each undoes what the other makes",
        );
    }
    for overlay in &host.overlays {
        if let Some(found) = taken_over(host, overlay).await {
            return found;
        }
    }
    let links = host.netlink.links().await.unwrap_or_default();
    let mut left = Vec::new();
    for link in links.iter().filter(|link| VxlanDevice::vni_of(&link.name).is_some()) {
        if !host.netlink.has_our_next_hop(link.index).await.unwrap_or(true) {
            left.push(link.name.clone());
        }
    }
    let file = host.cli.subnet_file();
    if host.before_install
        && let Some(subnet) = subnet_env::previous_subnet(&file)
    {
        left.push(format!("{} with {subnet}", file.display()));
    }
    match left.is_empty() {
        true => Check::ok(FLANNEL, "flanneld does not run here"),
        false => Check::ok(
            FLANNEL,
            format!("flanneld does not run here; the agent takes over what it left: {}", named(&left)),
        ),
    }
}

/// What flannel's daemon has made of an overlay that an agent had.
async fn taken_over(host: &Host<'_>, overlay: &Overlay) -> Option<Check> {
    overlay.status.as_ref()?;
    let advice = "stop flanneld, and restart the agent";
    let device = host.netlink.link_by_name(&overlay.device).await.ok().flatten();
    if let Some(device) = device {
        let peers = host.netlink.flannels_peers(device.header.index).await.unwrap_or_default();
        if !peers.is_empty() {
            let found = format!("flanneld has routes into {} for {}", overlay.device, named(&peers));
            return Some(Check::problem(FLANNEL, found, advice));
        }
    }
    let written = Written::recall(&host.cli.run_dir, overlay.vni)?;
    let found = || format!("{} is not the agent's any more", written.path.display());
    written.is_replaced().then(|| Check::problem(FLANNEL, found(), advice))
}

/// Processes of flannel's daemon in this network namespace.
fn daemons() -> Vec<u32> {
    let namespace = fs::read_link("/proc/thread-self/ns/net").ok();
    let is_daemon = |pid: &u32| {
        let is_named = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "flanneld");
        is_named && fs::read_link(format!("/proc/{pid}/ns/net")).ok() == namespace
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_daemon).collect()
}

async fn devices(host: &Host<'_>) -> Check {
    let links = host.netlink.links().await.unwrap_or_default();
    let mut found = Vec::new();
    for (name, whose) in DEVICES {
        if !links.iter().any(|link| link.name == name) {
            continue;
        }
        // The kernel has a tunl0 wherever its module is, and down.
        let message = host.netlink.link_by_name(name).await.ok().flatten();
        if message.is_some_and(|message| message.header.flags.contains(LinkFlags::Up) || name != "tunl0") {
            found.push(format!("{name} ({whose})"));
        }
    }
    match found.is_empty() {
        true => Check::ok("other networks", "no devices of other networks of pods"),
        false => Check::warning(
            "other networks",
            format!("devices of other networks of pods: {}", named(&found)),
            "remove what is left of them: they may route the same addresses or take pods' packets",
        ),
    }
}

/// What the container runtime would take: the first file by name.
fn plugins(directory: &Path) -> Check {
    let mut files: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|path| {
        path.extension().and_then(|kind| kind.to_str()).is_some_and(|kind| ["conf", "conflist", "json"].contains(&kind))
    });
    files.sort();
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let found: Vec<_> = files
        .iter()
        .filter_map(|path| {
            let document: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
            Some((name(path), types(&document)))
        })
        .collect();
    let whose = |types: &[String]| PLUGINS.iter().find(|(plugin, _)| types.iter().any(|own| own == plugin));
    let flannels = found.iter().position(|(_, types)| types.iter().any(|own| own == "flannel"));
    let others = found.iter().position(|(_, types)| whose(types).is_some());
    let at = directory.display();
    match (flannels, others) {
        (Some(ours), Some(other)) if other < ours => Check::problem(
            CNI,
            format!("the runtime takes {} in {at} instead of {}", found[other].0, found[ours].0),
            format!("remove {}", directory.join(&found[other].0).display()),
        ),
        (None, Some(other)) => {
            let (file, types) = &found[other];
            let whose = whose(types).map_or("another network", |(_, whose)| whose);
            let path = directory.join(file);
            Check::warning(
                CNI,
                format!("{} is {whose}'s", path.display()),
                "pods are made by it, and not in this overlay",
            )
        }
        (Some(ours), _) if ours > 0 => Check::warning(
            CNI,
            format!("the runtime takes {} in {at}, which is before {}", found[0].0, found[ours].0),
            "remove it, or give it a later name",
        ),
        (Some(ours), _) => Check::ok(CNI, format!("{}", directory.join(&found[ours].0).display())),
        (None, None) => Check::ok(CNI, format!("nothing in {at} is of flannel's or of another network's plugin")),
    }
}

/// The types of a configuration's plugins.
fn types(document: &Value) -> Vec<String> {
    let lists = document.get("plugins").and_then(Value::as_array).into_iter().flatten();
    let plugins = lists.chain(std::iter::once(document));
    plugins.filter_map(|plugin| plugin.get("type")?.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn the_first_configuration_counts() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let write = |name: &str, text: &str| fs::write(at.join(name), text).unwrap();
        let verdict = || plugins(at).verdict;
        assert_eq!(verdict(), Verdict::Ok);
        assert_eq!(plugins(&at.join("none")).verdict, Verdict::Ok);
        let cilium = r#"{"cniVersion": "0.3.1", "name": "cilium", "type": "cilium-cni"}"#;
        let flannel = r#"{"name": "cbr0", "plugins": [{"type": "flannel"}, {"type": "portmap"}]}"#;
        write("20-cilium.conf", cilium);
        assert_eq!(verdict(), Verdict::Warning);
        write("10-flannel.conflist", flannel);
        assert_eq!(verdict(), Verdict::Ok);
        write("05-cilium.conflist", cilium);
        let found = plugins(at);
        assert_eq!(found.verdict, Verdict::Problem);
        assert!(found.found.starts_with("the runtime takes 05-cilium.conflist in "), "{found:?}");
        write("05-cilium.conflist", r#"{"type": "bridge"}"#);
        assert_eq!(verdict(), Verdict::Warning);
        // What is not of a configuration's name is not read.
        fs::rename(at.join("05-cilium.conflist"), at.join("05-cilium.conflist.bak")).unwrap();
        assert_eq!(verdict(), Verdict::Ok);
    }
}
