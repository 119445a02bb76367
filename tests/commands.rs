//! Commands that show what the agent goes by: `config`, `version`, `lease show`, completions and manual pages.

use std::{
    fs,
    io::Write as _,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};
use xtask::{lab::PREFIX, process::output};

use crate::world::{World, agent, lease_value};

fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(agent()).args(arguments).envs(variables.iter().copied()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn each_flag_is_shown_with_what_it_is_from() {
    let world = World::new(1);
    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());
    let mut command = world.agent_on(0);
    command.args(["config", "show", "-o", "json", &endpoints, "-iface=eth7", "--iface", "eth8", "--etcd-username=u"]);
    command.env("FLANNELD_ETCD_PASSWORD", "hunter22").env("FLANNELD_BYPASS", "off").env("FLANNELD_IFACE", "eth6");
    let shown = text(&command.output().unwrap().stdout);
    assert!(!shown.contains("hunter22"), "{shown}");
    let document: Value = serde_json::from_str(&shown).unwrap();
    let setting = |flag: &str| {
        let mut settings = document["settings"].as_array().unwrap().iter();
        let setting = settings.find(|setting| setting["flag"] == flag).unwrap_or_else(|| panic!("{flag}: {shown}"));
        (setting["value"].as_str().unwrap().to_owned(), setting["origin"].as_str().unwrap().to_owned())
    };
    let is = |value: &str, origin: &str| (value.to_owned(), origin.to_owned());
    assert_eq!(setting("--iface"), is("eth7,eth8", "flag"));
    assert_eq!(setting("--bypass"), is("off", "variable"));
    assert_eq!(setting("--etcd-password"), is("(hidden)", "variable"));
    assert_eq!(setting("--etcd-prefix"), is("/coreos.com/network", "default"));
    assert_eq!(setting("--run-dir").1, "flag");
    assert!(setting("--subnet-file").0.ends_with("/run/subnet.env"));
    assert_eq!(document["networkConfig"]["config"]["Network"], "10.5.0.0/16");

    let mut command = world.agent_on(0);
    command.args(["config", "show", "--origin", &endpoints]).env("FLANNELD_BYPASS", "off");
    let table = output(&mut command).unwrap();
    for line in [
        "--bypass                        off",
        "variable FLANNELD_BYPASS",
        "subnets         10.5.128.0/24 to 10.5.191.0/24: 64 hosts",
    ] {
        assert!(table.contains(line), "{line}:\n{table}");
    }
    let mut command = world.agent_on(0);
    let away = output(command.args(["config", "show", "--etcd-endpoints=http://192.168.64.254:1"])).unwrap();
    assert!(away.contains("problem") && away.contains("connection refused"), "{away}");
}

#[test]
fn a_network_config_is_validated_as_the_agent_takes_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("net-conf.json");
    let validate = |text: &str| {
        fs::write(&path, text).unwrap();
        let result = run(&["config", "validate", path.to_str().unwrap()], &[]);
        (result.status.code(), text_of(&result))
    };
    let (code, said) =
        validate(r#"{"Network": "10.5.0.0/16", "SubnetLne": 24, "Backend": {"Type": "vxlan", "Prot": 4789}}"#);
    assert_eq!(code, Some(0), "{said}");
    for words in [
        "10.5.1.0/24 to 10.5.255.0/24: 255 hosts",
        "vxlan: VNI 1, UDP port 8472",
        "the key SubnetLne is none of flannel's (did you mean SubnetLen?)",
        "the key Backend.Prot is none of flannel's (did you mean Backend.Port?)",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    for (bad, words) in [
        (r#"{"Network": "10.5.0.0/33"}"#, "invalid CIDR address: 10.5.0.0/33"),
        (
            r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard"}}"#,
            "wireguard is flannel's, and this agent does not have it",
        ),
        (
            r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "aws-vpc"}}"#,
            "aws-vpc is flannel's, and this agent does not have it",
        ),
        (r#"{"Network": "10.5.0.0/30"}"#, "network is too small"),
        ("{", "not a JSON object"),
    ] {
        let (code, said) = validate(bad);
        assert!(code == Some(1) && said.contains(words), "{bad}: {code:?} {said}");
    }
    // As others assign the subnets, by what is around it or by a flag.
    let small = r#"{"Network": "10.5.0.0/30", "Backend": {"Type": "vxlan"}}"#;
    let map = json!({ "kind": "ConfigMap", "data": { "net-conf.json": small } }).to_string();
    let (code, said) = validate(&map);
    assert!(code == Some(0) && said.contains("the podCIDRs of the nodes"), "{said}");
    fs::write(&path, small).unwrap();
    let result = run(&["config", "validate", "--kube-subnet-mgr", path.to_str().unwrap()], &[]);
    assert_eq!(result.status.code(), Some(0), "{}", text_of(&result));
    let missing = run(&["config", "validate", "/nonexistent"], &[]);
    assert!(missing.status.code() == Some(1) && text_of(&missing).contains("/nonexistent"), "{missing:?}");

    let mut command = Command::new(agent());
    command.args(["config", "validate", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(br#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#).unwrap();
    let result = child.wait_with_output().unwrap();
    assert!(result.status.success() && text_of(&result).contains("the standard input"), "{result:?}");

    let world = World::new(1);
    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());
    let of_store = output(world.agent_on(0).args(["config", "validate", &endpoints])).unwrap();
    assert!(of_store.contains("64 hosts"), "{of_store}");
}

fn text_of(result: &Output) -> String {
    text(&result.stdout) + &text(&result.stderr)
}

#[test]
fn the_agent_says_which_it_is() {
    let result = run(&["version", "-o", "json"], &[]);
    let version: Value = serde_json::from_slice(&result.stdout).unwrap();
    assert_eq!(version["version"], "0.1.0");
    assert!(version["rustc"].as_str().unwrap().starts_with("rustc 1."), "{version}");
    assert!(version["mapLayout"].as_u64().unwrap() > 0 && version["features"]["encapEthernet"] == true, "{version}");
    let table = text(&run(&["version"], &[]).stdout);
    assert!(table.starts_with("version     0.1.0\ncommit ") && table.contains("\nmap layout  v"), "{table}");
    // As flannel's.
    let plain = run(&["--version"], &[]);
    assert_eq!((text(&plain.stdout), text(&plain.stderr)), (String::new(), "0.1.0\n".to_owned()));
    let without = Command::new("setpriv")
        .args(["--bounding-set=-bpf", "--inh-caps=-bpf"])
        .arg(agent())
        .args(["version"])
        .output();
    assert!(text(&without.unwrap().stdout).contains("the capability CAP_BPF is missing"));
}

#[test]
fn the_lease_is_shown_as_the_store_has_it() {
    let world = World::with_agents(2);
    world
        .store
        .put(&format!("{PREFIX}/subnets/10.5.7.0-24"), &lease_value("192.168.65.7", "0a:00:00:00:00:07"))
        .unwrap();
    let endpoints = format!("--etcd-endpoints={}", world.store.endpoint());
    let lease = |arguments: &[&str]| {
        let text = output(world.agent_on(0).args(["lease", "show", "-o", "json"]).args(arguments)).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["leases"][0].take()
    };
    let shown = lease(&[&endpoints]);
    let own = world.lease_of(0).0;
    assert_eq!(shown["subnet"], own.replace('-', "/"));
    assert_eq!(shown["key"], format!("{PREFIX}/subnets/{own}"));
    assert_eq!(
        (&shown["state"], &shown["others"], &shown["running"]),
        (&json!("held"), &json!(2), &json!(true)),
        "{shown}"
    );
    let left = shown["expiresInSeconds"].as_u64().unwrap();
    assert!((80_000..=86_400).contains(&left), "{shown}");
    let away = lease(&["--etcd-endpoints=http://192.168.64.254:1"]);
    assert_eq!((&away["subnet"], &away["key"]), (&shown["subnet"], &Value::Null));
    assert!(away["problem"].as_str().unwrap().contains("connection refused"), "{away}");
    let table = output(world.agent_on(0).args(["lease", "show", &endpoints])).unwrap();
    assert!(table.contains("ends       in 23 h") && table.contains("others     2 other leases"), "{table}");
}

#[test]
fn shells_and_manuals_know_every_command() {
    let commands = ["cleanup", "doctor", "audit", "config", "bundle", "lease"];
    for shell in ["bash", "zsh", "fish"] {
        let completions = text(&run(&["completions", shell], &[]).stdout);
        assert!(commands.iter().all(|command| completions.contains(command)), "{shell}: {completions}");
    }
    let mut bash = Command::new("bash");
    bash.arg("-n").stdin(Stdio::piped());
    let mut child = bash.spawn().unwrap();
    child.stdin.take().unwrap().write_all(&run(&["completions", "bash"], &[]).stdout).unwrap();
    assert!(child.wait().unwrap().success());
    let manual = text(&run(&["man"], &[]).stdout);
    assert!(manual.contains(".TH flannel-agent") && manual.contains("etcd\\-endpoints"), "{manual}");
    let directory = tempfile::tempdir().unwrap();
    let into = directory.path().join("man1");
    assert!(run(&["man", into.to_str().unwrap()], &[]).status.success());
    for page in ["flannel-agent.1", "flannel-agent-doctor.1", "flannel-agent-config-validate.1"] {
        assert!(into.join(page).exists(), "{page}: {:?}", fs::read_dir(&into).unwrap().flatten().collect::<Vec<_>>());
    }
}
