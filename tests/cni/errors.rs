//! Bad input: the specification's code, a message that says what to do, and nothing left behind.

use std::{fs, path::Path, process::Command};

use serde_json::json;
use xtask::{
    lab::{Netns, PREFIX, cni::POD_ANNOTATIONS},
    process::output,
};

use super::{
    runtime::{Expected as _, Runtime, delegates, pod},
    world,
};
use crate::world::{World, is_delivered};

#[test]
fn a_request_that_is_none() {
    let world = World::new(1);
    let runtime = Runtime::alone(&world.hosts[0]);
    let netns = world.hosts[0].netns.path();
    let good = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", netns.as_str()),
        ("CNI_IFNAME", "eth7"),
        ("CNI_PATH", runtime.path.as_str()),
    ];
    let conf = runtime.conf(0, None);
    for (name, value, code, words) in [
        ("CNI_COMMAND", "FROB", 4, "unknown CNI_COMMAND"),
        ("CNI_CONTAINERID", "", 4, "required env variables [CNI_CONTAINERID] missing"),
        ("CNI_NETNS", "", 4, "required env variables [CNI_NETNS] missing"),
        ("CNI_IFNAME", "", 4, "required env variables [CNI_IFNAME] missing"),
        ("CNI_PATH", "", 4, "required env variables [CNI_PATH] missing"),
        ("CNI_CONTAINERID", "../../etc/x", 4, "CNI_CONTAINERID: invalid characters"),
        ("CNI_IFNAME", "../x", 4, "CNI_IFNAME: interface name contains"),
        ("CNI_IFNAME", "a-name-of-sixteen", 4, "CNI_IFNAME: interface name is too long"),
    ] {
        let variables = good.map(|(key, given)| (key, if key == name { value } else { given }));
        runtime.run("flannel", &variables, conf.to_string().as_bytes()).failed(code, words);
    }
    for (input, code, words) in [
        ("", 6, "failed to load netconf"),
        ("garbage \u{0}", 6, "failed to load netconf"),
        ("[]", 6, "failed to load netconf"),
        (r#"{"name":"n","dataDir":7}"#, 6, "failed to load netconf"),
        ("{}", 7, "missing network name"),
        (r#"{"name":"a/b"}"#, 7, "invalid characters found in network name"),
        (r#"{"name":"n","cniVersion":"2.0.0"}"#, 1, "incompatible CNI versions"),
        (r#"{"name":"n","subnetFile":"/nonexistent/subnet.env"}"#, 11, "/nonexistent/subnet.env: no such file"),
    ] {
        runtime.run("flannel", &good, input.as_bytes()).failed(code, words);
    }
    let deep = "[".repeat(100_000);
    runtime.run("flannel", &good, deep.as_bytes()).failed(6, "failed to load netconf");
    // Before the agent has a lease; then what it wrote is damaged.
    let add = || runtime.run("flannel", &good, conf.to_string().as_bytes());
    add().failed(11, "Check the flannel pod log for this node.");
    assert!(add().json()["details"].as_str().unwrap().contains("flannel-agent status"));
    fs::create_dir_all(runtime.subnet_file.parent().unwrap()).unwrap();
    for (env, words) in [
        ("", "is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET"),
        ("FLANNEL_SUBNET", "FLANNEL_SUBNET in"),
        ("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.1.1/24\nFLANNEL_MTU=x", "FLANNEL_MTU in"),
    ] {
        fs::write(&runtime.subnet_file, env).unwrap();
        add().failed(6, words);
    }
    let env = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n";
    fs::write(&runtime.subnet_file, env).unwrap();
    for (delegate, code, words) in [
        (json!({ "name": "x" }), 2, "'delegate' dictionary must not have 'name' field, it'll be set by flannel"),
        (json!({ "ipam": {} }), 2, "'delegate' dictionary must not have 'ipam' field, it'll be set by flannel"),
        (json!({ "type": 7 }), 7, "'delegate' dictionary, if present, must have (string) 'type' field"),
        (json!({ "type": "no-such" }), 5, "failed to find plugin \"no-such\" in path"),
        (json!({ "type": "../x" }), 7, "invalid plugin name"),
    ] {
        let mut conf = conf.clone();
        conf["delegate"] = delegate;
        runtime.run("flannel", &good, conf.to_string().as_bytes()).failed(code, words);
    }
    // Before anything is made.
    for (key, value, words) in [
        ("bypass", json!("no"), "bypass is \"no\", and can be \"off\" or \"auto\""),
        (
            "runtimeConfig",
            json!({ POD_ANNOTATIONS: { "flannel.alpha.coreos.com/bypass": "On" } }),
            "the pod's annotation flannel.alpha.coreos.com/bypass is \"On\"",
        ),
    ] {
        let mut conf = conf.clone();
        conf[key] = value;
        runtime.run("flannel", &good, conf.to_string().as_bytes()).failed(7, words);
    }
    for (netns, code, words) in
        [("/run/netns/no-such", 3, "does not exist"), ("/etc/hostname", 4, "CNI_NETNS: it is not a network namespace")]
    {
        let variables = good.map(|(key, given)| (key, if key == "CNI_NETNS" { netns } else { given }));
        runtime.run("flannel", &variables, conf.to_string().as_bytes()).failed(code, words);
    }
    runtime.assert_nothing_is_left(&world.hosts[0]);
    assert!(!runtime.directory.join("state").exists());
}

#[test]
fn a_container_is_attached_once_and_its_leftovers_are_not_in_the_way() {
    let world = world(1);
    let runtime = Runtime::alone(&world.hosts[0]);
    let (pod, _) = pod(&runtime, &world.hosts[0], "c1");
    let before = (runtime.states(), runtime.addresses());
    runtime.add_alone("c1", &pod.netns.path()).failed(4, "eth0 already exists");
    runtime.add_alone("c2", &pod.netns.path()).failed(4, "eth0 already exists");
    assert_eq!((runtime.states(), runtime.addresses()), before);
    assert!(is_delivered(&world.hosts[0].netns, &pod.address.to_string()));
    // After a reboot: what was kept and reserved is there, the namespace is another.
    let name = pod.netns.name().to_owned();
    drop(pod);
    let again = Netns::create(&name).unwrap();
    runtime.add_alone("c1", &again.path()).succeeded();
    assert_eq!(runtime.addresses().len(), 1);
    runtime.del_alone("c1", &again.path()).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}

#[test]
fn what_flannels_plugin_kept_of_one_interface_outlives_the_next() {
    let world = world(1);
    let runtime = Runtime::alone(&world.hosts[0]);
    // As flannel's plugin keeps it: by the container's name alone.
    let (pod, _) = pod(&runtime, &world.hosts[0], "c1");
    let second = |command| {
        runtime.call(command, 0, "c1", &pod.netns.path(), "net1", None).succeeded();
    };
    second("ADD");
    assert_eq!(runtime.states(), ["c1", "c1:net1"]);
    assert_eq!(runtime.addresses().len(), 2);
    // The second time there is nothing of its own left, and the other's stays.
    for _ in 0..2 {
        second("DEL");
        assert_eq!(runtime.states(), ["c1"]);
        assert_eq!(runtime.addresses(), [pod.address.to_string()]);
        assert!(is_delivered(&world.hosts[0].netns, &pod.address.to_string()));
    }
    runtime.del_alone("c1", &pod.netns.path()).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}

#[test]
fn a_namespace_that_vanished_is_detached() {
    let world = world(1);
    let runtime = Runtime::new(&world.hosts[0]);
    for (id, with_result) in [("c1", true), ("c2", false)] {
        let (pod, result) = pod(&runtime, &world.hosts[0], id);
        let netns = pod.netns.path();
        drop(pod);
        runtime.del(id, &netns, with_result.then_some(&result));
        runtime.assert_nothing_is_left(&world.hosts[0]);
    }
}

#[test]
fn a_full_subnet() {
    let mut world = World::without_config(1);
    let config = r#"{"Network": "10.5.0.0/16", "SubnetLen": 30, "Backend": {"Type": "vxlan"}}"#;
    world.store.put(&format!("{PREFIX}/config"), config).unwrap();
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    let runtime = Runtime::alone(&world.hosts[0]);
    let (first, _) = pod(&runtime, &world.hosts[0], "c1");
    let netns = Netns::create(&format!("{}-c2", world.hosts[0].netns.name())).unwrap();
    let reply = runtime.add_alone("c2", &netns.path());
    assert!(reply.code != Some(0) && reply.json()["msg"].as_str().unwrap().contains("no IP addresses"), "{reply:?}");
    assert_eq!((runtime.states(), runtime.addresses()), (vec!["c1".to_owned()], vec![first.address.to_string()]));
    runtime.del_alone("c2", &netns.path()).succeeded();
    assert!(is_delivered(&world.hosts[0].netns, &first.address.to_string()));
    runtime.del_alone("c1", &first.netns.path()).succeeded();
    runtime.add_alone("c2", &netns.path()).succeeded();
    runtime.del_alone("c2", &netns.path()).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}

#[test]
fn a_delegate_that_fails_half_way() {
    let world = world(1);
    let mut runtime = Runtime::alone(&world.hosts[0]);
    runtime.set("delegate", json!({ "type": "fails", "bridge": "cni0", "isGateway": true }));
    let netns = Netns::create(&format!("{}-c1", world.hosts[0].netns.name())).unwrap();
    let bridge = format!(r#"sed 's/"type":"fails"/"type":"bridge"/' | {}/bridge"#, delegates());
    let error = r#"{"cniVersion":"1.0.0","code":142,"msg":"half-way","details":"as it is"}"#;

    // The whole interface is made, and then it fails: handed on as it is, undone by the delegate's own DEL.
    let says = format!("echo '{error}'; exit 1");
    runtime.script("fails", &format!("if [ $CNI_COMMAND = ADD ]; then {bridge} >&2; {says}; fi; {bridge}"));
    let reply = runtime.add_alone("c1", &netns.path());
    assert_eq!((reply.code, reply.output.as_str()), (Some(1), format!("{error}\n").as_str()));
    assert!(reply.log.contains("eth0"), "the delegate did attach it: {reply:?}");
    runtime.assert_nothing_is_left(&world.hosts[0]);
    assert!(netns.ip("link show eth0").is_err());

    // It dies.
    runtime.script("fails", &format!("if [ $CNI_COMMAND = ADD ]; then {bridge} >&2; kill -9 $$; fi; {bridge}"));
    runtime.add_alone("c1", &netns.path()).failed(100, "the plugin fails failed without saying why");
    runtime.assert_nothing_is_left(&world.hosts[0]);

    // It can't undo it either: kept, and the runtime's DEL is tried again until it succeeds.
    runtime.script("fails", &format!("if [ $CNI_COMMAND = ADD ]; then {bridge} >&2; fi; {says}"));
    let reply = runtime.add_alone("c1", &netns.path());
    assert_eq!(reply.output, format!("{error}\n"));
    assert_eq!((runtime.states().len(), runtime.addresses().len()), (1, 1));
    let reply = runtime.del_alone("c1", &netns.path());
    assert_eq!((reply.code, reply.output), (Some(1), format!("{error}\n")));
    assert_eq!(runtime.states(), ["c1"]);
    runtime.script("fails", &bridge);
    runtime.del_alone("c1", &netns.path()).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}

/// A file system of one page, for what is kept.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(directory: &'a Path, option: &str) -> Self {
        fs::create_dir_all(directory).unwrap();
        let options = format!("size=4k,{option}");
        output(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(directory)).unwrap();
        Self(directory)
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        output(Command::new("umount").arg(self.0)).unwrap();
    }
}

#[test]
fn a_disk_that_can_t_be_written() {
    let world = world(1);
    let runtime = Runtime::alone(&world.hosts[0]);
    let netns = Netns::create(&format!("{}-c1", world.hosts[0].netns.name())).unwrap();
    let directory = runtime.directory.join("state");
    for (option, words) in [("ro", "Read-only file system"), ("rw", "No space left on device")] {
        let disk = SmallDisk::mount(&directory, option);
        if option == "rw" {
            fs::write(directory.join("other"), [0; 4096]).unwrap();
        }
        let reply = runtime.add_alone("c1", &netns.path());
        reply.failed(5, words);
        assert!(reply.json()["details"].as_str().unwrap().contains("dataDir"), "{reply:?}");
        runtime.del_alone("c1", &netns.path()).succeeded();
        assert!(runtime.states().iter().all(|name| name == "other"), "{:?}", runtime.states());
        drop(disk);
        runtime.assert_nothing_is_left(&world.hosts[0]);
    }
    // Detached where it can't be forgotten: said, and tried again.
    fs::create_dir_all(&directory).unwrap();
    runtime.add_alone("c1", &netns.path()).succeeded();
    output(Command::new("mount").args(["--bind", "-o", "ro"]).arg(&directory).arg(&directory)).unwrap();
    let disk = SmallDisk(&directory);
    runtime.del_alone("c1", &netns.path()).failed(5, "remove");
    drop(disk);
    runtime.del_alone("c1", &netns.path()).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}
