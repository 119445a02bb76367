//! The network config, which is a file here: of a ConfigMap, a symbolic link to one in a folder that is exchanged.

use std::{fs, os::unix::fs::symlink, path::Path};

use serde_json::Value;

use super::{Cluster, NET_CONF};

const OTHER: &str = r#"{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7}}"#;

fn wait_differs(cluster: &Cluster, host: usize, text: &str) {
    cluster.wait_status(host, text, |status| {
        status["configDiffers"].as_str().is_some_and(|differs| differs.contains(text))
    });
}

fn wait_agrees(cluster: &Cluster, host: usize) {
    cluster.wait_status(host, "the config of before", |status| status["configDiffers"] == Value::Null);
}

/// Exchanges a ConfigMap's content as the kubelet does.
fn publish(folder: &Path, number: u8, content: &str) {
    let data = format!("..2026_{number}");
    fs::create_dir_all(folder.join(&data)).unwrap();
    fs::write(folder.join(&data).join("net-conf.json"), content).unwrap();
    symlink(&data, folder.join("..data_tmp")).unwrap();
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
}

#[test]
fn a_config_map_that_changes_is_reported_and_the_old_one_goes_on() {
    Cluster::with_traffic(|cluster| {
        let folder = cluster.lab.directory().join("kube-flannel-cfg");
        publish(&folder, 1, NET_CONF);
        symlink("..data/net-conf.json", folder.join("net-conf.json")).unwrap();
        cluster.store.net_conf = folder.join("net-conf.json");
        cluster.start(0, &[]);
        cluster.wait_log(0, "carries 10.5.1.0/24");
        cluster.wait_followed(0);
        publish(&folder, 2, OTHER);
        let text = format!(
            "the network config in {} has changed (Network 10.6.0.0/16, not 10.5.0.0/16, EnableNFTables not there, not \
             false, VNI 7, not 1); start the agent again to take it in",
            folder.join("net-conf.json").display()
        );
        wait_differs(cluster, 0, &text);
        assert!(cluster.status(0)["troubles"].to_string().contains("has changed"));
        publish(&folder, 3, "garbage");
        wait_differs(cluster, 0, "not a JSON object");
        fs::remove_file(folder.join("..data")).unwrap();
        wait_differs(
            cluster,
            0,
            &format!("the network config is gone from {}", folder.join("net-conf.json").display()),
        );
        publish(&folder, 4, NET_CONF);
        wait_agrees(cluster, 0);
        // While it is written: the beginning of what is to be.
        fs::write(&cluster.store.net_conf, &NET_CONF[..30]).unwrap();
        wait_differs(cluster, 0, "not a JSON object");
        fs::write(&cluster.store.net_conf, NET_CONF).unwrap();
        wait_agrees(cluster, 0);
        // Which subnets there are is not its business.
        fs::write(
            &cluster.store.net_conf,
            NET_CONF.replacen('{', r#"{"SubnetLen": 26, "SubnetMin": "10.5.9.64", "#, 1),
        )
        .unwrap();
        cluster.add_peer(200);
        cluster.wait_peers(0, 2);
        wait_agrees(cluster, 0);
    });
}

#[test]
fn a_config_that_can_t_be_used_is_named_and_waited_out() {
    let mut cluster = Cluster::with_nodes(1);
    let path = cluster.store.net_conf.clone();
    fs::remove_file(&path).unwrap();
    cluster.start(0, &[]);
    let name = path.display();
    cluster.wait_log(
        0,
        &format!("failed to read net conf: {name}: No such file or directory (os error 2); check --net-config-path"),
    );
    fs::create_dir(&path).unwrap();
    cluster.wait_log(0, &format!("failed to read net conf: {name}: is a directory; check --net-config-path"));
    fs::remove_dir(&path).unwrap();
    // Nobody writes into it.
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    cluster.wait_log(0, &format!("failed to read net conf: {name}: it is no file"));
    fs::remove_file(&path).unwrap();
    symlink("/dev/zero", &path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, " ".repeat((1 << 20) + 1)).unwrap();
    cluster.wait_log(0, "it has more than 1048576 bytes");
    for (config, reason) in [
        ("", "not a JSON object"),
        (&NET_CONF[..30], "not a JSON object"),
        (r#"{"Network": "10.5.0.0/33", "Backend": {"Type": "vxlan"}}"#, "invalid CIDR address: 10.5.0.0/33"),
        (r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "ipsec"}}"#, "unknown backend type: ipsec"),
    ] {
        fs::write(&path, config).unwrap();
        cluster.wait_log(0, &format!("the network config in {name}: "));
        cluster.wait_log(0, reason);
    }
    cluster.assert_untouched(0);
    fs::write(&path, NET_CONF).unwrap();
    cluster.hosts[0].wait_ready().unwrap();
}

#[test]
fn a_start_under_a_config_that_can_t_be_used_goes_on_with_the_last_one() {
    let mut cluster = Cluster::with_pods(2);
    cluster.wait_connected(0, 1);
    cluster.wait_peers(0, 1);
    cluster.wait_last_known(0);
    let traffic = cluster.traffic(1, 0);
    fs::write(&cluster.store.net_conf, "garbage").unwrap();
    cluster.start(0, &[]);
    cluster.wait_log(0, "going on with the lease 10.5.1.0-24 and 1 peers that were last known");
    cluster.wait_status(0, "the last known lease", |status| status["lease"]["state"] == "last_known");
    fs::write(&cluster.store.net_conf, NET_CONF).unwrap();
    cluster.wait_status(0, "the lease to be confirmed", |status| {
        status["lease"]["state"] == "held" && status["configDiffers"].is_null()
    });
    traffic.assert_nothing_was_lost();
}
