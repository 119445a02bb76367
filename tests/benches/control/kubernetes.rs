//! Leases in the nodes of the double of an API server, each as large as a real one, with a kubelet that reports.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use http::{Method, Request, header};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use xtask::lab::{self, ApiServer, Host, Lab, LeaseStore, User};

use super::{Leases, Row, cost::cpu};

const CONFIG: &str = r#"{"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}"#;
/// How often a kubelet reports, in seconds (`--node-status-report-frequency`).
const REPORT_PERIOD: u32 = 300;
/// Beyond all that are there from the start.
const FIRST_NEW_SLOT: u32 = 30_000;
/// The podCIDR of the host that is really there: beyond those.
const OWN: &str = "10.250.0.0/24";
const NODES: &str = "/api/v1/nodes";
const JSON: &str = "application/json";
const STRATEGIC_MERGE: &str = "application/strategic-merge-patch+json";

/// An API server with many nodes.
pub(super) struct Kubernetes {
    cluster: lab::Kubernetes,
    count: u32,
    runtime: Runtime,
    client: Client,
    /// A node as large as a real one.
    template: Value,
    /// How many lists there were when the agent's start was over.
    lists: f64,
}

impl Kubernetes {
    pub(super) fn start(lab: &Lab, host: &Host, count: u32) -> (lab::Kubernetes, u32) {
        assert!(ApiServer::is_double(), "the nodes are the double's: KUBE_APISERVER must not be set here");
        let arguments = [format!("--nodes={count}"), format!("--heartbeat={REPORT_PERIOD}")];
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let server = ApiServer::start(&lab.underlay, lab::address(254), lab.directory(), &arguments).unwrap();
        server.add_node(&host.name, OWN).unwrap();
        let net_config = lab.directory().join("net-conf.json");
        (lab::Kubernetes::with(server, net_config, CONFIG).unwrap(), count)
    }

    /// This thread reaches it.
    pub(super) fn reach((cluster, count): (lab::Kubernetes, u32), runtime: Runtime) -> Self {
        let kubeconfig = Kubeconfig::read_from(cluster.server.kubeconfig(User::ADMIN)).unwrap();
        let client = runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
            Client::try_from(config).unwrap()
        });
        let mut this = Self { cluster, count, runtime, client, template: Value::Null, lists: 0.0 };
        this.template = this.get(&format!("{NODES}/{}", name(1)));
        this
    }

    fn get(&self, path: &str) -> Value {
        self.ask(Method::GET, path, JSON, &Value::Null)
    }

    fn ask(&self, method: Method, path: &str, content_type: &str, body: &Value) -> Value {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, content_type);
        self.runtime.block_on(self.client.request(request.body(body).unwrap())).unwrap()
    }

    /// How often the agent did what begins so.
    fn counted(&self, what: &str) -> f64 {
        let counters = self.get("/double/counters");
        let agents = counters[User::AGENT.name()].as_object().cloned().unwrap_or_default();
        let of = agents.iter().filter(|(name, _)| name.starts_with(what) && !name.starts_with("watching"));
        of.filter_map(|(_, count)| count.as_f64()).sum()
    }

    fn revision(&self) -> f64 {
        let list = self.get(&format!("{NODES}?limit=1"));
        list["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
    }

    fn delete(&self, name: &str) {
        self.ask(Method::DELETE, &format!("{NODES}/{name}"), JSON, &Value::Null);
    }
}

impl Leases for Kubernetes {
    fn store(&self) -> &dyn LeaseStore {
        &self.cluster
    }

    fn slots(&self) -> Range<u32> {
        1..self.count + 1
    }

    fn new_slots(&self, count: u32) -> Range<u32> {
        FIRST_NEW_SLOT..FIRST_NEW_SLOT + count
    }

    fn calls(&mut self) -> f64 {
        self.counted("")
    }

    /// The nodes are there, with their podCIDRs, before somebody announces for them.
    fn prepare(&mut self, slots: Range<u32>) {
        self.lists = self.counted("list");
        for slot in slots {
            let mut node = self.template.clone();
            node["metadata"] = json!({
                "name": name(slot), "labels": node["metadata"]["labels"],
                "managedFields": node["metadata"]["managedFields"],
                "annotations": {"node.alpha.kubernetes.io/ttl": "300"},
            });
            let [high, low] = (slot as u16).to_be_bytes();
            let pod_cidr = format!("10.{high}.{low}.0/24");
            node["spec"] = json!({"podCIDR": pod_cidr, "podCIDRs": [pod_cidr]});
            self.ask(Method::POST, NODES, JSON, &node);
        }
    }

    /// As flannel, or our agent.
    fn announce(&mut self, slot: u32) {
        let [high, low] = (slot as u16).to_be_bytes();
        let patch = json!({"metadata": {"annotations": {
            "flannel.alpha.coreos.com/backend-data": format!(r#"{{"VNI":1,"VtepMAC":"0a:00:00:00:{high:02x}:{low:02x}"}}"#),
            "flannel.alpha.coreos.com/backend-type": "vxlan",
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/public-ip": format!("172.16.{high}.{low}"),
        }}});
        self.ask(Method::PATCH, &format!("{NODES}/{}/status", name(slot)), STRATEGIC_MERGE, &patch);
    }

    fn withdraw(&mut self, slots: Range<u32>) {
        slots.for_each(|slot| self.delete(&name(slot)));
    }

    fn forget(&mut self, host: &Host) {
        self.delete(&host.name);
        self.cluster.server.add_node(&host.name, OWN).unwrap();
    }

    /// Kubelets report, and in the middle the server ends the watches, as it does every few minutes.
    fn pass(&mut self, time: Duration) -> Vec<Row> {
        let pid = self.cluster.server.id().unwrap();
        let watches = self.counted("watch");
        let (start, revision, cpu_before) = (Instant::now(), self.revision(), cpu(pid));
        std::thread::sleep(time / 2);
        self.ask(Method::POST, "/double/close-watches", JSON, &Value::Null);
        std::thread::sleep((time / 2).saturating_sub(start.elapsed() - time / 2));
        let (cpu, elapsed) = (cpu(pid) - cpu_before, start.elapsed().as_secs_f64());
        assert_eq!(self.counted("watch"), watches + 1.0, "a watch that ended is followed by one");
        vec![
            ("agent: lists after the start", self.counted("list") - self.lists),
            ("store: changes a second when nothing happens", (self.revision() - revision) / elapsed),
            ("store: CPU of the double meanwhile, % of a core", cpu / elapsed * 100.0),
        ]
    }
}

fn name(slot: u32) -> String {
    format!("node-{slot:05}")
}
