//! Beside flannel's plugin: what either attached, the other detaches, with address and interface.
//!
//! flannel's is played by a script that does what its `cmdAdd` and `cmdDel` do with files and delegate
//! (cni-plugin/flannel.go, flannel_linux.go); the configuration that it keeps is ours to the byte
//! (`what_is_kept_is_flannels_delegate_configuration_for_root_only`).

use std::fs;

use serde_json::json;
use xtask::lab::{Host, Netns, cni::Reply};

use super::{
    runtime::{Expected as _, Runtime, delegates, pod},
    world,
};
use crate::world::is_delivered;

/// flannel's plugin.
struct Flannels<'a>(&'a Runtime);

impl<'a> Flannels<'a> {
    /// With the configuration that our plugin has kept of a container.
    fn new(runtime: &'a mut Runtime, id: &str) -> Self {
        let state = runtime.directory.join("state");
        let conf = runtime.directory.join("flannels.json");
        fs::copy(state.join(id), &conf).unwrap();
        let script = format!(
            r#"state={state}/$CNI_CONTAINERID
case $CNI_COMMAND in
ADD) cat {conf} > $state; exec {plugins}/bridge < $state;;
DEL) [ -e $state ] || exit 0; {plugins}/bridge < $state; code=$?; rm -f $state; exit $code;;
esac"#,
            state = state.display(),
            conf = conf.display(),
            plugins = delegates()
        );
        runtime.script("flannels", &script);
        Self(runtime)
    }

    fn call(&self, command: &str, id: &str, netns: &str, ifname: &str) -> Reply {
        let Self(runtime) = self;
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", ifname),
            ("CNI_PATH", &runtime.path),
        ];
        runtime.run("flannels", &variables, runtime.conf(0, None).to_string().as_bytes()).succeeded()
    }
}

fn empty(host: &Host, id: &str) -> Netns {
    Netns::create(&format!("{}-{id}", host.netns.name())).unwrap()
}

fn has(netns: &Netns, ifname: &str) -> bool {
    netns.ip(&format!("link show {ifname}")).is_ok()
}

#[test]
fn pods_of_ours_are_detached_by_flannels() {
    let world = world(1);
    let mut runtime = Runtime::alone(&world.hosts[0]);
    let (first, _) = pod(&runtime, &world.hosts[0], "c1");
    // A network that has this plugin for further interfaces only, as multus can have it.
    let other = empty(&world.hosts[0], "c2");
    runtime.call("ADD", 0, "c2", &other.path(), "net1", None).succeeded();
    let flannels = Flannels::new(&mut runtime, "c1");
    flannels.call("DEL", "c1", &first.netns.path(), "eth0");
    flannels.call("DEL", "c2", &other.path(), "net1");
    assert!(!has(&first.netns, "eth0") && !has(&other, "net1"));
    assert_eq!(runtime.addresses(), [] as [String; 0]);
    // The name that says the interface is ours to remove: with a DEL that comes again, or before the next ADD.
    assert_eq!(runtime.states(), ["c2:net1"]);
    runtime.call("ADD", 0, "c2", &other.path(), "net1", None).succeeded();
    assert_eq!((runtime.states(), runtime.addresses().len()), (vec!["c2".to_owned(), "c2:net1".to_owned()], 1));
    runtime.call("DEL", 0, "c2", &other.path(), "net1", None).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}

#[test]
fn pods_of_flannels_are_detached_by_ours() {
    let world = world(1);
    let mut runtime = Runtime::alone(&world.hosts[0]);
    let (pod, _) = pod(&runtime, &world.hosts[0], "c1");
    runtime.plugins[0]["delegate"]["bridge"] = json!("cni0");
    let flannels = Flannels::new(&mut runtime, "c1");
    let (first, other) = (empty(&world.hosts[0], "c2"), empty(&world.hosts[0], "c3"));
    flannels.call("ADD", "c2", &first.path(), "eth0");
    flannels.call("ADD", "c3", &other.path(), "net1");
    assert_eq!((runtime.states(), runtime.addresses().len()), (["c1", "c2", "c3"].map(str::to_owned).into(), 3));
    runtime.del_alone("c2", &first.path()).succeeded();
    runtime.call("DEL", 0, "c3", &other.path(), "net1", None).succeeded();
    assert!(!has(&first, "eth0") && !has(&other, "net1"));
    assert_eq!((runtime.states(), runtime.addresses()), (vec!["c1".to_owned()], vec![pod.address.to_string()]));
    assert!(is_delivered(&world.hosts[0].netns, &pod.address.to_string()));
    runtime.del_alone("c1", &pod.netns.path()).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}

#[test]
fn what_an_earlier_version_kept_is_found() {
    let world = world(1);
    let runtime = Runtime::alone(&world.hosts[0]);
    let (pod, result) = pod(&runtime, &world.hosts[0], "c1");
    let state = runtime.directory.join("state");
    fs::rename(state.join("c1"), state.join("c1:eth0")).unwrap();
    runtime.check("c1", &pod.netns, &result);
    // The same container after a reboot, and then without one.
    drop(pod);
    let again = empty(&world.hosts[0], "c1");
    runtime.add_alone("c1", &again.path()).succeeded();
    assert_eq!((runtime.states(), runtime.addresses().len()), (vec!["c1".to_owned()], 1));
    fs::rename(state.join("c1"), state.join("c1:eth0")).unwrap();
    runtime.del_alone("c1", &again.path()).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}
