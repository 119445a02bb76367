//! How the API server is found, who asks it, and what they may.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use xtask::{
    lab::{ApiServer, User},
    progress::wait_for,
};

use super::{Cluster, on_double, start};
use crate::world::{SOON, agent};

const ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/flannel";
const POD: &str = "/api/v1/namespaces/default/pods";

/// Has the agents' account these rights and no others.
pub(super) fn allow(cluster: &Cluster, rules: &Value) {
    let role = json!({"metadata": {"name": "flannel"}, "rules": rules});
    let (code, answer) = cluster.store.server.request(User::ADMIN, "PUT", ROLE, &[], &role.to_string()).unwrap();
    assert_eq!(code, 200, "{answer}");
}

/// flannel's rules without a verb.
fn rules_without(resource: &str, verb: &str) -> Value {
    let mut rules = ApiServer::flannels_rules();
    for rule in rules.as_array_mut().unwrap().iter_mut().filter(|rule| rule["resources"][0] == resource) {
        rule["verbs"].as_array_mut().unwrap().retain(|known| known != verb);
    }
    rules
}

/// Makes the agent's pod, on a node.
fn add_pod(cluster: &Cluster, node: Option<&str>) {
    let mut spec = json!({"containers": [{"name": "kube-flannel", "image": "flannel"}]});
    if let Some(node) = node {
        spec["nodeName"] = json!(node);
    }
    cluster.store.server.post(POD, &json!({"metadata": {"name": "kube-flannel-ds-x"}, "spec": spec})).unwrap();
}

/// The folder of a service account, as the kubelet mounts it: links to a folder that is exchanged as a whole.
pub(super) fn service_account(cluster: &Cluster) -> PathBuf {
    let folder = cluster.lab.directory().join("serviceaccount");
    let data = folder.join("..2026_01");
    fs::create_dir_all(&data).unwrap();
    fs::copy(cluster.store.server.authority(), data.join("ca.crt")).unwrap();
    fs::copy(cluster.store.server.token_file(User::AGENT), data.join("token")).unwrap();
    fs::write(data.join("namespace"), "kube-flannel").unwrap();
    symlink("..2026_01", folder.join("..data")).unwrap();
    for name in ["ca.crt", "token", "namespace"] {
        symlink(Path::new("..data").join(name), folder.join(name)).unwrap();
    }
    folder
}

/// The agent on the first host as in a pod: with a service account where pods have it, and a pod's variables.
fn in_cluster(cluster: &Cluster, service_account: &Path) -> Command {
    let host = &cluster.hosts[0];
    let mut command = host.netns.command("unshare");
    let script = "mount -t tmpfs tmpfs /run && mkdir -p \"$0\" && mount --bind \"$1\" \"$0\" && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-ec", script, "/run/secrets/kubernetes.io/serviceaccount"]).arg(service_account);
    command.arg(agent()).arg("--run-dir").arg(host.run_dir()).arg("--bpf-pin-dir").arg(host.pin_dir());
    command.env_remove("NODE_NAME");
    command
        .env("KUBERNETES_SERVICE_HOST", "192.168.64.254")
        .env("KUBERNETES_SERVICE_PORT", "6443")
        .env("POD_NAME", "kube-flannel-ds-x")
        .env("POD_NAMESPACE", "default");
    command
}

#[test]
fn a_pod_finds_its_api_server_and_its_node() {
    let mut cluster = Cluster::with_nodes(1);
    add_pod(&cluster, Some("node1"));
    let service_account = service_account(&cluster);
    // By variables, with all that a template may leave empty.
    let mut command = in_cluster(&cluster, &service_account);
    command
        .args(["-kubeconfig-file=", "-kube-api-url=", "-kube-annotation-prefix=", "-set-node-network-unavailable="])
        .env("FLANNELD_KUBE_SUBNET_MGR", "true")
        .env("FLANNELD_NET_CONFIG_PATH", &cluster.store.net_conf)
        .env("FLANNELD_KUBECONFIG_FILE", "/nowhere")
        .env("NODE_NAME", "");
    start(&mut cluster.hosts[0], &mut command);
    cluster.hosts[0].wait_ready().unwrap();
    cluster.wait_log(0, "this host is the node node1");
    cluster.wait_annotation("node1", "public-ip", "192.168.64.1");
    if on_double("how often the pod is asked for") {
        assert_eq!(cluster.count("get pods"), 1);
    }
    // The other way to say it asks for no pod.
    let mut command = in_cluster(&cluster, &service_account);
    command.arg("-kube-subnet-mgr").arg("-net-config-path").arg(&cluster.store.net_conf).env("NODE_NAME", "node1");
    allow(&cluster, &rules_without("pods", "get"));
    start(&mut cluster.hosts[0], &mut command);
    cluster.hosts[0].wait_ready().unwrap();
    cluster.wait_followed(0);
}

#[test]
fn a_pod_that_is_on_no_node_yet_is_waited_for() {
    let mut cluster = Cluster::with_nodes(1);
    let mut command = cluster.store.agent_command(&cluster.hosts[0]);
    command.arg("--kubeconfig-file").arg(cluster.store.server.kubeconfig(User::AGENT));
    command.env("POD_NAME", "kube-flannel-ds-x").env("POD_NAMESPACE", "default");
    start(&mut cluster.hosts[0], &mut command);
    cluster.wait_log(0, "get pods default/kube-flannel-ds-x: there is none of this name");
    add_pod(&cluster, None);
    cluster.wait_log(0, "node name not present in pod spec 'default/kube-flannel-ds-x'; set NODE_NAME instead");
    cluster.assert_untouched(0);
    let path = format!("{POD}/kube-flannel-ds-x");
    let delete = cluster.store.server.request(User::ADMIN, "DELETE", &path, &[], r#"{"gracePeriodSeconds": 0}"#);
    assert_eq!(delete.unwrap().0, 200);
    add_pod(&cluster, Some("node1"));
    cluster.hosts[0].wait_ready().unwrap();
}

#[test]
fn the_flag_s_api_server_counts_in_the_place_of_the_kubeconfig_s() {
    let mut cluster = Cluster::with_nodes(1);
    let kubeconfig = cluster.lab.directory().join("elsewhere.kubeconfig");
    let text = fs::read_to_string(cluster.store.server.kubeconfig(User::AGENT)).unwrap();
    let endpoint = cluster.store.server.endpoint();
    fs::write(&kubeconfig, text.replace(&endpoint, "https://192.168.64.253:6443")).unwrap();
    let mut command = cluster.store.agent_command(&cluster.hosts[0]);
    // Without a scheme, it has the kubeconfig's TLS.
    command.arg("--kubeconfig-file").arg(&kubeconfig).arg("--kube-api-url=192.168.64.254:6443");
    start(&mut cluster.hosts[0], command.env("NODE_NAME", "node1"));
    cluster.hosts[0].wait_ready().unwrap();
}

#[test]
fn a_right_that_is_missing_is_named_and_its_grant_is_enough() {
    let mut cluster = Cluster::with_nodes(1);
    add_pod(&cluster, Some("node1"));
    for (verb, resource, name) in [
        ("get", "pods", "pods default/kube-flannel-ds-x"),
        ("get", "nodes", "nodes node1"),
        ("patch", "nodes/status", "nodes/status node1"),
        ("list", "nodes", "nodes"),
        ("watch", "nodes", "nodes"),
    ] {
        allow(&cluster, &rules_without(resource, verb));
        // What an agent before has written need not be written again.
        cluster.annotate("node1", &[("public-ip", Some("192.0.2.1"))]);
        let mut command = cluster.store.agent_command(&cluster.hosts[0]);
        command.arg("--kubeconfig-file").arg(cluster.store.server.kubeconfig(User::AGENT));
        command.env("POD_NAME", "kube-flannel-ds-x").env("POD_NAMESPACE", "default");
        start(&mut cluster.hosts[0], &mut command);
        cluster.wait_log(0, &format!("{verb} {name}: forbidden (403, "));
        cluster
            .wait_log(0, &format!("give the agent's service account a ClusterRole with the verb {verb} on {resource}"));
        if verb == "watch" {
            // All but news is there.
            cluster.wait_status(0, "to be away", |status| status["store"]["following"] == false);
        } else {
            cluster.assert_untouched(0);
        }
        allow(&cluster, &ApiServer::flannels_rules());
        cluster.hosts[0].wait_ready().unwrap();
        cluster.wait_followed(0);
        cluster.wait_annotation("node1", "public-ip", "192.168.64.1");
        cluster.hosts[0].agent = None;
        fs::remove_dir_all(cluster.hosts[0].run_dir()).unwrap();
        fs::remove_dir_all(cluster.hosts[0].pin_dir()).unwrap();
        cluster.hosts[0].netns.ip("link delete flannel.1").unwrap();
        cluster.hosts[0].netns.exec("ip route flush proto 72").unwrap_or_default();
    }
}

#[test]
fn flannel_s_rights_are_enough_and_no_others_are_used() {
    let mut cluster = Cluster::with_pods(2);
    cluster.wait_connected(0, 1);
    // A node that is new, one that changes, one that goes.
    cluster.add_peer(200);
    cluster.wait_peers(0, 2);
    cluster.announce("peer200", "192.168.64.201", "0a:00:00:00:00:c9");
    cluster.delete_node("peer200");
    cluster.wait_peers(0, 1);
    // Somebody else's annotations, and a server that comes back.
    cluster.annotate("node1", &[("public-ip", Some("192.0.2.1"))]);
    cluster.wait_annotation("node1", "public-ip", "192.168.64.1");
    assert_only_flannels_rights(&cluster);
    cluster.store.server.kill().unwrap();
    cluster.store.server.resume().unwrap();
    (0..2).for_each(|host| cluster.wait_followed(host));
    for host in 0..2 {
        let log = cluster.hosts[host].agent.as_ref().unwrap().log();
        assert!(!log.contains("forbidden"), "{log}");
    }
    assert_only_flannels_rights(&cluster);
}

/// That agents which are told their node's name ask for nothing but nodes.
fn assert_only_flannels_rights(cluster: &Cluster) {
    if on_double("what is asked for") {
        // One that has just come back counts anew.
        let mut used = Vec::new();
        let asked = wait_for("the agents' calls", SOON, || {
            let counters = cluster.store.server.double("GET", "counters", &Value::Null).unwrap();
            let of_agents = counters[User::AGENT.name()].as_object().cloned().unwrap_or_default();
            used = of_agents.keys().cloned().collect();
            used.iter().any(|what| what == "watch nodes")
        });
        asked.unwrap();
        let flannels = ["get nodes", "list nodes", "watch nodes", "watching nodes", "patch nodes/status"];
        assert!(used.iter().all(|what| flannels.contains(&what.as_str())), "{used:?}");
    }
}
