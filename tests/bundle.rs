//! `flannel-agent bundle`: what is in it, and what is not.

use std::{fs, path::Path, process::Command};

use serde_json::Value;
use xtask::{lab::PREFIX, process::output};

use crate::world::World;

/// What must not be in it.
const SECRETS: [&str; 6] =
    ["hunter22-flag", "hunter22-variable", "hunter22-psk", "hunter22-token", "hunter22-url", "hunter22-key"];

/// Unpacks a bundle. All of its files, by name, in one text each.
fn unpacked(archive: &Path, into: &Path) -> Vec<(String, String)> {
    fs::create_dir(into).unwrap();
    output(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(into)).unwrap();
    let folder = fs::read_dir(into).unwrap().next().unwrap().unwrap().path();
    let mut files = Vec::new();
    let mut folders = vec![folder.clone()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(at).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                let name = entry.path().strip_prefix(&folder).unwrap().to_string_lossy().into_owned();
                files.push((name, fs::read_to_string(entry.path()).unwrap()));
            }
        }
    }
    files.sort();
    files
}

fn file<'a>(files: &'a [(String, String)], name: &str) -> &'a str {
    let found = files.iter().find(|(of, _)| of == name);
    let names = || files.iter().map(|(name, _)| name).collect::<Vec<_>>();
    &found
        .unwrap_or_else(|| {
            panic!("no {name} in {:?}: {}", names(), files.iter().find(|(name, _)| name == "missing.txt").unwrap().1)
        })
        .1
}

#[test]
fn all_that_support_needs_and_no_secret() {
    let world = World::without_config(2);
    let config = r#"{"Network": "10.5.0.0/16", "SubnetMin": "10.5.128.0", "SubnetMax": "10.5.191.0",
        "Backend": {"Type": "vxlan", "PSK": "hunter22-psk"}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    let world = world.ready(&[]);
    world.wait_connected(0, 1);
    let (host, directory) = (&world.hosts[0], world.lab.directory());
    // Beside what it takes from there.
    let run_dir = host.run_dir();
    fs::write(run_dir.join("kubeconfig"), "token: hunter22-token").unwrap();
    fs::write(run_dir.join("client.key"), "hunter22-key").unwrap();
    fs::write(run_dir.join("flannel.1.status.json.bak"), "hunter22-token").unwrap();
    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());
    let url = "--kube-api-url=https://root:hunter22-url@192.168.64.254:6443";

    let archive = directory.join("bundle.tar.gz");
    let mut command = world.agent_on(0);
    command.args(["bundle", &endpoints, url, "--etcd-username=u", "--etcd-password=hunter22-flag"]).arg(&archive);
    command.env("MY_TOKEN", "hunter22-variable").env("NODE_NAME", "node1");
    let said = output(&mut command).unwrap();
    assert!(said.contains("look through them before you give them away"), "{said}");
    let files = unpacked(&archive, &directory.join("bundle"));
    for secret in SECRETS {
        let with: Vec<_> = files.iter().filter(|(_, text)| text.contains(secret)).map(|(name, _)| name).collect();
        assert!(with.is_empty(), "{secret} is in {with:?}");
    }
    for name in [
        "status.json",
        "peers.json",
        "counters.txt",
        "drops.json",
        "doctor.json",
        "audit.json",
        "version.json",
        "config.json",
        "lease.json",
        "ip-link.json",
        "ip-addr.json",
        "ip-route.json",
        "ip-rule.json",
        "ip-neigh.json",
        "nft-ruleset.txt",
        "sysctl.txt",
        "kernel.txt",
        "run/flannel.1.status.json",
        "run/subnet.env",
        "missing.txt",
    ] {
        file(&files, name);
    }
    for (name, text) in files.iter().filter(|(name, _)| name.ends_with(".json") && !name.contains('/')) {
        serde_json::from_str::<Value>(text).unwrap_or_else(|error| panic!("{name}: {error}: {text}"));
    }
    assert!(file(&files, "config.json").contains("(hidden)"));
    assert!(file(&files, "status.json").contains("10.5.0.0/16") && file(&files, "ip-link.json").contains("flannel.1"));
    assert!(file(&files, "sysctl.txt").contains("net/ipv4/conf/flannel.1/rp_filter = "));
    let again = world.agent_on(0).arg("bundle").arg(&archive).output().unwrap();
    assert_eq!(again.status.code(), Some(1), "an archive that is there is kept");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&archive).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn addresses_and_names_stand_for_others_the_same_everywhere() {
    let world = World::with_agents(2);
    world.wait_connected(0, 1);
    let directory = world.lab.directory();
    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());
    let archive = directory.join("anonymous.tar.gz");
    let mut command = world.agent_on(0);
    command.args(["bundle", "--anonymize", &endpoints]).arg(&archive).env("NODE_NAME", "blue-whale.corp.example");
    output(&mut command).unwrap();
    let files = unpacked(&archive, &directory.join("anonymous"));
    let status: Value = world.status(0);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let subnet = text(&status["status"]["lease"]["subnet"]);
    let links = world.hosts[0].netns.ip_json("link show eth0").unwrap();
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let own = [
        subnet.split('/').next().unwrap().to_owned(),
        text(&status["status"]["lease"]["vtepMac"]),
        text(&links[0]["address"]),
        world.hosts[0].address.to_string(),
        world.hosts[1].address.to_string(),
        "blue-whale".to_owned(),
        hostname.trim().to_owned(),
    ];
    // By chance, one of the few bits between may be changed in none.
    let changed = |own: &str, files: &[(String, String)]| files.iter().all(|(_, text)| !text.contains(own));
    let kept: Vec<_> = own.iter().filter(|own| own.len() > 3 && !changed(own, &files)).collect();
    assert!(kept.iter().all(|own| own.parse::<std::net::Ipv4Addr>().is_ok()) && kept.len() < own.len() - 3, "{kept:?}");
    let anonymous: Value = serde_json::from_str(file(&files, "status.json")).unwrap();
    let address = text(&anonymous["overlays"][0]["status"]["publicIp"]);
    assert!(address.starts_with("192.168.") && address.ends_with(".1"), "{address}");
    for name in ["ip-addr.json", "doctor.json"] {
        assert!(file(&files, name).contains(&address), "{name} does not have {address}");
    }
    let mac = text(&anonymous["overlays"][0]["status"]["lease"]["vtepMac"]);
    assert!(mac.starts_with("02:00:00:00:") && file(&files, "ip-link.json").contains(&mac), "{mac}");
}
