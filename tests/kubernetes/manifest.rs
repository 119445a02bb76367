//! What `deploy/kubernetes` has the cluster run: the objects are of the published types, and the containers do here what they do on a
//! node.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use flannel_agent::privileges::{NEEDED, USEFUL};
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Container, Namespace, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    serde::{Serialize, de::DeserializeOwned},
};
use serde_json::Value;
use xtask::{lab::Host, process::output, progress::wait_for};

use super::{
    Cluster,
    access::{allow, service_account},
    start,
};
use crate::{
    metrics::deploy,
    world::{SOON, agent},
};

/// Where a pod has its service account.
const ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";

/// The objects by their kinds, with the image that the kustomization names.
fn objects() -> BTreeMap<String, Value> {
    let rendered = output(Command::new("kubectl").arg("kustomize").arg(deploy().join("kubernetes"))).unwrap();
    let objects: Vec<Value> = serde_saphyr::from_multiple(&rendered).unwrap();
    objects.into_iter().map(|object| (object["kind"].as_str().unwrap().to_owned(), object)).collect()
}

/// The object of a kind: with all its keys, and no others.
fn object<T: Serialize + DeserializeOwned>(kind: &str) -> T {
    let object = objects().remove(kind).unwrap();
    let typed: T = serde_json::from_value(object.clone()).unwrap();
    assert_eq!(serde_json::to_value(&typed).unwrap(), object, "a key of {kind} is not of the type");
    typed
}

fn daemon_set() -> DaemonSet {
    object("DaemonSet")
}

#[test]
fn all_objects_are_of_the_published_types() {
    let kinds: Vec<_> = objects().into_keys().collect();
    assert_eq!(kinds, ["ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet", "Namespace", "ServiceAccount"]);
    let role: ClusterRole = object("ClusterRole");
    let binding: ClusterRoleBinding = object("ClusterRoleBinding");
    assert_eq!(Some(&binding.role_ref.name), role.metadata.name.as_ref());
    let (account, namespace): (ServiceAccount, Namespace) = (object("ServiceAccount"), object("Namespace"));
    let subject = &binding.subjects.unwrap()[0];
    assert_eq!(Some(&subject.name), account.metadata.name.as_ref());
    assert_eq!(subject.namespace, namespace.metadata.name);
    let set = daemon_set();
    assert_eq!(set.metadata.namespace, namespace.metadata.name);
    let pod = set.spec.unwrap().template.spec.unwrap();
    assert_eq!(pod.service_account_name, account.metadata.name);
}

#[test]
fn the_agents_container_has_its_capabilities_and_no_others() {
    let container = &containers()[2];
    let security = container.security_context.as_ref().unwrap();
    let capabilities = security.capabilities.as_ref().unwrap();
    assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
    let mut agents: Vec<_> =
        NEEDED.iter().chain(&USEFUL).map(|capability| capability.to_string().replace("CAP_", "")).collect();
    agents.sort();
    assert_eq!(capabilities.add.as_ref(), Some(&agents));
    assert_eq!((security.privileged, security.allow_privilege_escalation), (None, Some(false)));
}

/// Those that install, then the agent's.
fn containers() -> Vec<Container> {
    let pod = daemon_set().spec.unwrap().template.spec.unwrap();
    pod.init_containers.unwrap().into_iter().chain(pod.containers).collect()
}

/// A container's command on a host, with its volumes and its capabilities; `command` in the place of its own.
fn run(host: &Host, volumes: &BTreeMap<String, PathBuf>, container: &Container, command: Option<&[String]>) -> Command {
    let top = host.directory().join(format!("container-{}", container.name));
    fs::create_dir_all(&top).unwrap();
    let mut run = host.netns.command("unshare");
    run.args(["--mount", "sh"]).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes/container.sh")).arg(top);
    let bind = |from: &Path, to: &str| format!("{}={to}", from.display());
    run.arg(bind(&agent(), "/usr/bin/flannel-agent"));
    run.arg(bind(&agent().with_file_name("flannel"), "/usr/lib/cni/flannel"));
    run.arg(bind(&volumes["account"], ACCOUNT));
    for mount in container.volume_mounts.iter().flatten() {
        run.arg(bind(&volumes[&mount.name], &mount.mount_path));
    }
    run.args(["--", "setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set"]);
    let capabilities = container.security_context.as_ref().unwrap().capabilities.as_ref().unwrap();
    let added = capabilities.add.iter().flatten().map(|name| format!(",+{}", name.to_lowercase()));
    run.arg(format!("-all{}", added.collect::<String>())).arg("--");
    let own = || container.command.iter().chain(&container.args).flatten();
    match command {
        Some(command) => run.args(command),
        None => run.args(own()),
    };
    for variable in container.env.iter().flatten() {
        let source = variable.value_from.as_ref().and_then(|from| from.field_ref.as_ref());
        assert_eq!(source.unwrap().field_path, "spec.nodeName");
        run.env(&variable.name, "node1");
    }
    run.env("KUBERNETES_SERVICE_HOST", "192.168.64.254").env("KUBERNETES_SERVICE_PORT", "6443");
    run
}

#[test]
fn a_node_runs_what_the_manifest_says() {
    let mut cluster = Cluster::with_nodes(1);
    let role: ClusterRole = object("ClusterRole");
    allow(&cluster, &serde_json::to_value(role.rules).unwrap());
    let account = service_account(&cluster);
    let host = &cluster.hosts[0];
    let folder = |name: &str| {
        let folder = host.directory().join(name);
        fs::create_dir_all(&folder).unwrap();
        folder
    };
    let config = folder("kube-flannel");
    let map: ConfigMap = object("ConfigMap");
    let data = map.data.unwrap();
    for (name, text) in &data {
        // The lab's cluster has another Network than kubeadm's documentation.
        fs::write(config.join(name), text.replace("10.244.0.0/16", "10.5.0.0/16")).unwrap();
    }
    let pins = host.pin_dir().join("pod");
    fs::create_dir_all(&pins).unwrap();
    let lock = host.directory().join("xtables.lock");
    fs::write(&lock, "").unwrap();
    fs::create_dir_all(host.run_dir()).unwrap();
    let volumes = BTreeMap::from([
        ("account".to_owned(), account),
        ("run".to_owned(), host.run_dir()),
        ("bpf".to_owned(), pins),
        ("sysctl-net".to_owned(), PathBuf::from("/proc/sys/net")),
        ("xtables-lock".to_owned(), lock),
        ("cni-plugin".to_owned(), folder("bin")),
        ("cni".to_owned(), folder("net.d")),
        ("flannel-cfg".to_owned(), config),
    ]);
    let [plugin, network, kube_flannel] = containers().try_into().unwrap();
    for installer in [&plugin, &network] {
        output(&mut run(host, &volumes, installer, None)).unwrap();
    }
    let installed = fs::read(volumes["cni-plugin"].join("flannel")).unwrap();
    assert!(installed == fs::read(agent().with_file_name("flannel")).unwrap());
    let conflist = fs::read_to_string(volumes["cni"].join("10-flannel.conflist")).unwrap();
    assert_eq!(conflist, data["cni-conf.json"]);

    host.netns.exec("sysctl -q -w net.ipv4.ip_forward=0 net.netfilter.nf_conntrack_tcp_be_liberal=0").unwrap();
    let mut command = run(host, &volumes, &kube_flannel, None);
    start(&mut cluster.hosts[0], &mut command);
    cluster.hosts[0].wait_ready().unwrap();
    cluster.wait_annotation("node1", "public-ip", "192.168.64.1");
    let host = &cluster.hosts[0];
    for probe in [&kube_flannel.startup_probe, &kube_flannel.readiness_probe, &kube_flannel.liveness_probe] {
        let command = probe.as_ref().unwrap().exec.as_ref().unwrap().command.as_ref().unwrap();
        let mut said = String::new();
        let passed = wait_for("a probe", SOON, || {
            let ended = run(host, &volumes, &kube_flannel, Some(command)).output().unwrap();
            said = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
            ended.status.success()
        });
        assert!(passed.is_ok(), "{command:?}: {said}");
    }
    for setting in ["net.ipv4.ip_forward", "net.netfilter.nf_conntrack_tcp_be_liberal"] {
        assert_eq!(host.netns.exec(&format!("sysctl -n {setting}")).unwrap().trim(), "1", "{setting}");
    }
    let log = host.agent.as_ref().unwrap().log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}
