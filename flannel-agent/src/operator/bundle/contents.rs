//! What is in a bundle. What is not named here is not.

use std::{collections::BTreeSet, fs, net::IpAddr, path::Path};

use serde_json::Value;

use super::programs;
use crate::{
    cli::Cli,
    netfilter::legacy_tables,
    registry::{StoreOptions, kubernetes::KubernetesOptions},
    routes::host_of,
};

/// This program's commands, by the name of the file.
const COMMANDS: [(&str, &[&str]); 10] = [
    ("status.json", &["status", "-o", "json"]),
    ("peers.json", &["peers", "-o", "json"]),
    ("counters.txt", &["counters"]),
    ("drops.json", &["drops", "-o", "json"]),
    ("doctor.json", &["doctor", "-o", "json"]),
    ("audit.json", &["audit", "-o", "json"]),
    ("version.json", &["version", "-o", "json"]),
    ("config.json", &["config", "show", "-o", "json"]),
    ("lease.json", &["lease", "show", "-o", "json"]),
    ("metrics.txt", &["metrics"]),
];
/// The host's programs.
const PROGRAMS: [(&str, &str, &[&str]); 10] = [
    ("ip-link.json", "ip", &["-d", "-s", "-j", "link"]),
    ("ip-addr.json", "ip", &["-d", "-j", "addr"]),
    ("ip-route.json", "ip", &["-d", "-j", "route", "show", "table", "all"]),
    ("ip-rule.json", "ip", &["-d", "-j", "rule"]),
    ("ip-neigh.json", "ip", &["-d", "-j", "neigh"]),
    ("bridge-fdb.json", "bridge", &["-j", "fdb"]),
    ("nft-ruleset.txt", "nft", &["-a", "list", "ruleset"]),
    ("iptables-nft.txt", "iptables-nft-save", &[]),
    ("bpf-programs.json", "bpftool", &["-j", "prog", "show"]),
    ("bpf-network.json", "bpftool", &["-j", "net", "show"]),
];
/// Those of x_tables are only asked where somebody has some: asking makes them.
const LEGACY: (&str, &str) = ("iptables-legacy.txt", "iptables-legacy-save");
/// Below /proc/sys; of a folder, each interface's.
const SETTINGS: [&str; 16] = [
    "kernel/osrelease",
    "kernel/unprivileged_bpf_disabled",
    "net/core/bpf_jit_enable",
    "net/core/rmem_max",
    "net/core/netdev_max_backlog",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/conf/*/forwarding",
    "net/ipv4/conf/*/rp_filter",
    "net/ipv4/conf/*/accept_local",
    "net/bridge/bridge-nf-call-iptables",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_events",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
    "net/netfilter/nf_conntrack_tcp_ignore_invalid_rst",
];

/// A file of the archive.
pub(super) struct File {
    pub(super) name: String,
    pub(super) text: String,
}

/// Everything, and a list of what could not be had.
pub(super) async fn collect(cli: &Cli) -> Vec<File> {
    let mut files = Vec::new();
    let mut missing = Vec::new();
    let mut take = |name: &str, result: Result<String, String>| match result {
        Ok(text) => files.push(File { name: name.to_owned(), text }),
        Err(problem) => missing.push(format!("{name}: {problem}\n")),
    };
    for (name, arguments) in COMMANDS {
        take(name, programs::own(cli, arguments).await);
    }
    for (name, program, arguments) in PROGRAMS {
        take(name, programs::host(program, arguments).await.map_err(|problem| format!("{program} {problem}")));
    }
    if legacy_tables().is_ok_and(|tables| !tables.trim().is_empty()) {
        let (name, program) = LEGACY;
        take(name, programs::host(program, &[]).await.map_err(|problem| format!("{program} {problem}")));
    }
    take("sysctl.txt", Ok(settings(Path::new("/proc/sys"))));
    take("kernel.txt", fs::read_to_string("/proc/version").map_err(|error| error.to_string()));
    for path in run_files(cli) {
        let name = format!("run/{}", path.file_name().unwrap_or_default().to_string_lossy());
        take(&name, fs::read_to_string(&path).map_err(|error| error.to_string()));
    }
    files.push(File { name: "missing.txt".to_owned(), text: missing.concat() });
    files
}

/// What agents say of themselves for everybody to read, and subnet.env. Nothing else of the run directory.
fn run_files(cli: &Cli) -> Vec<std::path::PathBuf> {
    let is_told = |name: &str| {
        name.starts_with("flannel.") && name.ends_with(".status.json")
            || name.starts_with("waiting.") && name.ends_with(".json")
    };
    let entries = fs::read_dir(&cli.run_dir).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter(|entry| entry.file_name().to_str().is_some_and(is_told))
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files.extend(Some(cli.subnet_file()).filter(|path| path.is_file()));
    files
}

fn settings(root: &Path) -> String {
    let mut lines = String::new();
    for setting in SETTINGS {
        let paths = match setting.split_once("/*/") {
            None => vec![setting.to_owned()],
            Some((folder, name)) => {
                let entries = fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
                let mut interfaces: Vec<_> =
                    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
                interfaces.sort();
                interfaces.into_iter().map(|interface| format!("{folder}/{interface}/{name}")).collect()
            }
        };
        for path in paths {
            if let Ok(value) = fs::read_to_string(root.join(&path)) {
                lines += &format!("{path} = {}\n", value.trim());
            }
        }
    }
    lines
}

/// The names of this host and of others, as far as they are known to be some.
pub(super) fn names(cli: &Cli, files: &[File]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    names.extend(fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()));
    names.extend(["NODE_NAME", "POD_NAME", "HOSTNAME"].iter().filter_map(|name| std::env::var(name).ok()));
    names.extend(cli.etcd().endpoints.iter().map(|endpoint| host_of(endpoint).to_owned()));
    if let StoreOptions::Kubernetes(KubernetesOptions { api_url, node_name, pod, .. }) = cli.store() {
        names.extend(api_url.iter().map(|url| host_of(url).to_owned()).chain(node_name));
        names.extend(pod.map(|(_, name)| name));
    }
    let status = files.iter().find(|file| file.name == "status.json");
    let status: Value = status.and_then(|file| serde_json::from_str(&file.text).ok()).unwrap_or_default();
    for overlay in status["overlays"].as_array().into_iter().flatten() {
        // Of Kubernetes these are nodes; of etcd they are subnets.
        for key in ["passed_over", "remarks", "passedOver"] {
            let entries = overlay["status"]["store"][key].as_object().into_iter().flatten();
            names.extend(entries.map(|(name, _)| name.clone()));
        }
    }
    names.retain(|name| name.parse::<IpAddr>().is_err());
    // What is before the first point is used alone, too.
    let short: Vec<_> = names.iter().filter_map(|name| Some(name.split_once('.')?.0.to_owned())).collect();
    names.extend(short);
    names
}
