//! The alert rules: each fires at its fault, and Prometheus itself sees the faults that are planted.

use std::{fs, net::SocketAddr, process::Command};

use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{
    process::{Process, output},
    progress::wait_for,
    setup,
};

use crate::{
    metrics::{HTTP, PORT, deploy, http},
    stream::Stream,
    world::{SOON, World},
};

const PROMETHEUS: u16 = 9090;

fn promtool(arguments: &[&str]) -> String {
    let mut promtool = Command::new(setup::prometheus("promtool"));
    output(promtool.args(arguments).current_dir(deploy())).unwrap()
}

#[test]
fn each_alert_fires_at_its_fault_and_says_what_to_do() {
    let text = fs::read_to_string(deploy().join("alerts.yaml")).unwrap();
    let lines = |key: &str| text.lines().filter(|line| line.trim_start().starts_with(key)).count();
    let alerts: Vec<_> = text.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    for key in ["summary: ", "description: ", "runbook: ", "severity: "] {
        assert_eq!(lines(key), alerts.len(), "{key}");
    }
    promtool(&["check", "rules", "alerts.yaml"]);
    promtool(&["test", "rules", "alerts.test.yaml"]);
    let tests = fs::read_to_string(deploy().join("alerts.test.yaml")).unwrap();
    for alert in alerts {
        assert!(tests.contains(&format!("alertname=\"{alert}\"")), "{alert} is fired by no test");
    }
}

/// A Prometheus with these rules beside the hosts.
struct Server<'a> {
    world: &'a World,
    process: Process,
}

impl<'a> Server<'a> {
    fn start(world: &'a World) -> Self {
        let directory = world.lab.directory().join("prometheus");
        fs::create_dir_all(&directory).unwrap();
        let targets: Vec<_> = world.hosts.iter().map(|host| format!("\"{}:{PORT}\"", host.address)).collect();
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
             rule_files: [{}]\n\
             scrape_configs:\n  - job_name: flannel-agent\n    static_configs: [{{targets: [{}]}}]\n",
            deploy().join("alerts.yaml").display(),
            targets.join(", ")
        );
        let file = directory.join("prometheus.yaml");
        fs::write(&file, config).unwrap();
        let mut command = world.lab.underlay.command(setup::prometheus("prometheus").to_str().unwrap());
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", directory.join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{PROMETHEUS}"));
        let process = Process::start(&mut command, &directory.join("log")).unwrap();
        Self { world, process }
    }

    fn ask(&self, path: &str) -> Option<Value> {
        let address = SocketAddr::from(([127, 0, 0, 1], PROMETHEUS));
        let (_, body) = http(&self.world.lab.underlay, address, path, "*/*")?;
        Some(serde_json::from_str::<Value>(&body).ok()?["data"].take())
    }

    /// The alerts that fire, or will if what they saw goes on, each with its instance.
    fn alerts(&self) -> Vec<(String, String)> {
        let Some(data) = self.ask("/api/v1/alerts") else { return Vec::new() };
        let alerts = data["alerts"].as_array().unwrap();
        let label = |alert: &Value, name: &str| alert["labels"][name].as_str().unwrap_or_default().to_owned();
        alerts.iter().map(|alert| (label(alert, "alertname"), label(alert, "instance"))).collect()
    }

    /// Waits until these are seen on a host.
    fn wait_for_alerts(&self, host: usize, names: &[&str]) {
        let instance = format!("{}:{PORT}", self.world.hosts[host].address);
        for name in names {
            let wanted = ((*name).to_owned(), instance.clone());
            let waited = wait_for(name, 3 * SOON, || self.alerts().contains(&wanted));
            assert!(waited.is_ok(), "{name} on {instance}: {:?}\n{}", self.alerts(), self.process.log());
        }
    }

    fn wait_for_none(&self) {
        let waited = wait_for("no alert", 3 * SOON, || self.alerts().is_empty());
        assert!(waited.is_ok(), "{:?}", self.alerts());
    }
}

#[test]
fn prometheus_scrapes_the_agents_and_sees_what_is_planted() {
    let mut world = World::new(2).ready(&[HTTP]);
    world.wait_connected(0, 1);
    let server = Server::start(&world);
    let up = || {
        let data = server.ask("/api/v1/query?query=count(up==1)")?;
        Some(data["result"][0]["value"][1].as_str()? == "2")
    };
    let waited = wait_for("both agents to be scraped", 2 * SOON, || up() == Some(true));
    assert!(waited.is_ok(), "{}", server.process.log());
    // It knows types only from what it negotiated and understood.
    let metadata = server.ask("/api/v1/metadata?metric=flannel_convergence_seconds").unwrap();
    assert_eq!(metadata["flannel_convergence_seconds"][0]["type"], "histogram", "{metadata}");
    server.wait_for_none();

    // A peer that is cut off, under traffic.
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    world.lab.underlay.ip("link set node2 nomaster").unwrap();
    server.wait_for_alerts(0, &["FlannelPeersUnanswering", "FlannelPeersUnreached"]);
    server.wait_for_alerts(1, &["FlannelAgentDown"]);
    world.lab.underlay.ip("link set node2 master br0").unwrap();
    world.wait_connected(0, 1);
    drop(stream.end());
    server.wait_for_none();

    // A firewall that forwards nothing.
    let stream = Stream::start(&world.hosts[0].pods[0], &world.hosts[1].pods[0]);
    let netns = &world.hosts[1].netns;
    netns.exec("iptables -I FORWARD -i flannel.1 -j DROP").unwrap();
    server.wait_for_alerts(1, &["FlannelPacketsLost", "FlannelTroubles"]);
    netns.exec("iptables -D FORWARD 1").unwrap();
    drop(stream.end());
    world.wait_connected(0, 1);
    server.wait_for_none();

    // An agent that is stopped.
    let agent = world.hosts[1].agent.as_ref().unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    server.wait_for_alerts(1, &["FlannelAgentDown"]);
    agent.signal(Signal::SIGCONT).unwrap();
    server.wait_for_none();
    drop(server);

    world.store.stop();
    let server = Server::start(&world);
    for host in [0, 1] {
        server.wait_for_alerts(host, &["FlannelStoreAway"]);
    }
}
