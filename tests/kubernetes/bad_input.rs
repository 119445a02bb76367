//! Bad input of every kind: one line that says what and what to do, an exit code where it is final, patience where it
//! may heal, and nothing half-made.

use std::{fs, process::Output};

use xtask::{lab::User, process::output};

use super::{Cluster, start};
use crate::world::agent;

/// The end of an agent that can't go on: its exit code, and what it says last.
fn end(output: &Output) -> (Option<i32>, String) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    (output.status.code(), text.lines().last().unwrap_or_default().to_owned())
}

#[test]
fn what_this_host_lacks_is_named_before_anybody_is_asked() {
    let cluster = Cluster::without_nodes(1);
    let kubeconfig = cluster.store.server.kubeconfig(User::AGENT);
    let kubeconfig = kubeconfig.to_str().unwrap();
    let directory = cluster.lab.directory();
    let broken = directory.join("broken.kubeconfig");
    fs::write(&broken, "apiVersion: v1\nkind: Config\nclusters: {").unwrap();
    let no_token = directory.join("token.kubeconfig");
    let text = fs::read_to_string(kubeconfig).unwrap();
    let token = cluster.store.server.token_file(User::AGENT).display().to_string();
    fs::write(&no_token, text.replace(&token, "/nowhere/token")).unwrap();
    let no_authority = directory.join("authority.kubeconfig");
    let authority = cluster.store.server.authority().display().to_string();
    fs::write(&no_authority, text.replace(&authority, "/nowhere/ca.pem")).unwrap();
    let file = |path: &std::path::Path| format!("--kubeconfig-file={}", path.display());
    let node = [("NODE_NAME", "node1")];
    for (arguments, variables, said) in [
        (
            vec![],
            &node[..],
            "neither --kubeconfig-file nor --kube-api-url is given, and this is no pod with a service account: ",
        ),
        (
            vec![],
            &[("NODE_NAME", "node1"), ("KUBERNETES_SERVICE_HOST", "10.96.0.1"), ("KUBERNETES_SERVICE_PORT", "443")][..],
            "neither --kubeconfig-file nor --kube-api-url is given, and this is no pod with a service account: ",
        ),
        (vec!["--kubeconfig-file=/nowhere".to_owned()], &node, "No such file or directory"),
        (vec![file(&broken)], &node, "; check --kubeconfig-file"),
        (vec![file(&no_authority)], &node, "/nowhere/ca.pem"),
        (vec![file(&no_token)], &node, "the credentials for Kubernetes can't be used: "),
        (
            vec!["--kube-api-url=ftp://x".to_owned()],
            &node,
            "--kube-api-url \"ftp://x\" is no URL such as https://10.0.0.1:6443",
        ),
        (
            vec![format!("--kubeconfig-file={kubeconfig}")],
            &[],
            "env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME: they say which node this host is",
        ),
        (
            vec![format!("--kubeconfig-file={kubeconfig}")],
            &[("POD_NAME", "x")],
            "env variables POD_NAME and POD_NAMESPACE",
        ),
        (
            vec![format!("--kubeconfig-file={kubeconfig}"), "--kube-annotation-prefix=a/b/c".to_owned()],
            &node,
            "subnet/kube: prefix can contain at most single slash; check --kube-annotation-prefix",
        ),
        (
            vec![format!("--kubeconfig-file={kubeconfig}"), "--kube-annotation-prefix=flannel".to_owned()],
            &node,
            "subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*; check --kube-annotation-prefix",
        ),
    ] {
        let mut command = cluster.store.agent_command(&cluster.hosts[0]);
        let (code, line) = end(&command.args(&arguments).envs(variables.iter().copied()).output().unwrap());
        assert_eq!(code, Some(78), "{arguments:?}: {line}");
        assert!(line.contains(said), "{arguments:?}: {line}");
        cluster.assert_untouched(0);
    }
}

#[test]
fn an_absent_api_server_is_named_and_waited_out() {
    let mut cluster = Cluster::with_nodes(1);
    cluster.store.server.stop();
    cluster.start(0, &[]);
    cluster.wait_log(0, "Kubernetes API at https://192.168.64.254:6443: get nodes node1: ");
    cluster.wait_log(0, "Connection refused");
    cluster.assert_untouched(0);
    cluster.store.server.resume().unwrap();
    cluster.hosts[0].wait_ready().unwrap();
}

#[test]
fn another_authority_s_certificate_is_named_and_waited_out() {
    let mut cluster = Cluster::with_nodes(1);
    let directory = cluster.lab.directory().to_owned();
    let authority = directory.join("ca.crt");
    let mut openssl = std::process::Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
    openssl.args(["-subj", "/CN=another", "-keyout", "/dev/null", "-out"]).arg(&authority);
    output(&mut openssl).unwrap();
    let kubeconfig = directory.join("other.kubeconfig");
    let text = fs::read_to_string(cluster.store.server.kubeconfig(User::AGENT)).unwrap();
    let right = cluster.store.server.authority();
    fs::write(&kubeconfig, text.replace(&right.display().to_string(), &authority.display().to_string())).unwrap();
    let mut command = cluster.store.agent_command(&cluster.hosts[0]);
    command.arg("--kubeconfig-file").arg(&kubeconfig).env("NODE_NAME", "node1");
    start(&mut cluster.hosts[0], &mut command);
    cluster.wait_log(0, "another authority signed the API server's certificate than the one that is given");
    cluster.assert_untouched(0);
    fs::copy(right, &authority).unwrap();
    cluster.hosts[0].wait_ready().unwrap();
}

#[test]
fn a_token_that_is_over_is_named_and_waited_out() {
    let mut cluster = Cluster::with_nodes(1);
    let path = cluster.store.server.token_file(User::AGENT);
    let right = fs::read_to_string(&path).unwrap();
    fs::write(&path, "another").unwrap();
    cluster.start(0, &[]);
    cluster.wait_log(
        0,
        "get nodes node1: the API server does not know who asks (401, Unauthorized): the token has expired, or is another \
         cluster's; check the kubeconfig, or the service account's token",
    );
    cluster.assert_untouched(0);
    fs::write(&path, right).unwrap();
    cluster.hosts[0].wait_ready().unwrap();
}

#[test]
fn a_server_that_is_none_is_named() {
    let mut cluster = Cluster::with_nodes(1);
    let mut web = cluster.lab.underlay.command("python3");
    web.args(["-m", "http.server", "--bind", "192.168.64.254", "8080"]).current_dir(cluster.lab.directory());
    let _web = xtask::process::Process::start(&mut web, &cluster.lab.directory().join("web.log")).unwrap();
    let mut command = cluster.hosts[0].agent_command(&agent());
    command.args(["--kube-subnet-mgr", "--kube-api-url=192.168.64.254:8080"]).env("NODE_NAME", "node1");
    command.arg("--net-config-path").arg(&cluster.store.net_conf);
    start(&mut cluster.hosts[0], &mut command);
    cluster.wait_log(0, "Kubernetes API at http://192.168.64.254:8080: get nodes node1: ");
    cluster.wait_log(0, "what answers is no API server (404, ");
    cluster.assert_untouched(0);
}
