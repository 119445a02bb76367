//! The CNI plugin, run as a runtime runs it, with the real `bridge`, `host-local` and `portmap`.
//!
//! * [`runtime`] — what runs it
//! * [`errors`] — every error result, and nothing left behind
//! * [`flannels`] — beside flannel's plugin: what either attached, the other detaches
//! * [`many_pods`] — 250 pods on a host, under traffic

mod errors;
mod flannels;
mod many_pods;
mod runtime;

use std::{fs, net::SocketAddrV4, os::unix::fs::PermissionsExt as _};

use nix::sys::signal::Signal;
use serde_json::json;
use xtask::{
    lab::{PREFIX, cni::POD_ANNOTATIONS},
    progress::wait_for,
    transfer::tcp_transfer,
};

use self::runtime::{Expected as _, Runtime, delegates, pod};
use crate::{
    sockets::{connection, listener_in},
    world::{SOON, World, is_answered},
};

/// Hosts with a ready agent each, and no pods.
fn world(hosts: u8) -> World {
    World::new(hosts).with_ready_agents(&[])
}

/// A delegate of CNI 1.1.0: Debian's is of 1.0.0, and gets what this one was given as such. What else it is asked, and for
/// what, is in a file beside it.
fn of_newest_version(runtime: &mut Runtime) {
    runtime.version = "1.1.0".to_owned();
    runtime.set("delegate", json!({ "type": "newest", "bridge": "cni0", "isGateway": true }));
    let calls = runtime.directory.join("calls");
    let script = format!(
        r#"case $CNI_COMMAND in
STATUS|GC) echo "$CNI_COMMAND $(cat)" >> {calls};;
*) sed 's/"1.1.0"/"1.0.0"/; s/"type":"newest"/"type":"bridge"/' | {plugins}/bridge;;
esac"#,
        calls = calls.display(),
        plugins = delegates()
    );
    runtime.script("newest", &script);
}

/// Sends bulk TCP between two pods of the first kind and one of another host's. Whether the first bypass the stack.
fn bypasses(world: &World, runtimes: &[Runtime], id: &str) -> bool {
    let (one, result) = pod(&runtimes[0], &world.hosts[0], id);
    let (two, _) = pod(&runtimes[1], &world.hosts[1], id);
    wait_for("pods", SOON, || is_answered(&one.netns, &two.address.to_string())).unwrap();
    let veth = result["interfaces"][1]["name"].as_str().unwrap();
    let links = world.hosts[0].netns.ip_json(&format!("link show {veth}")).unwrap();
    let is_set = links[0]["ifalias"] == "bypass=off";
    if is_set {
        world.wait_status(0, "the setting", |status| {
            let all = status["bypass"]["restrictions"].as_array().unwrap();
            all.iter().any(|one| one["kind"] == "setting" && one["subject"] == format!("bypass=off on {veth}"))
        });
    }
    let counters = |host| ["pod_encapsulated", "delivered"].map(|label| world.counter(host, label));
    let before = [counters(0), counters(1)];
    tcp_transfer(&one.netns, &two.netns, two.address, 1, world.lab.directory()).unwrap();
    let after = [counters(0), counters(1)];
    assert!(after[1][1] > before[1][1] + 100, "the other host's pod bypasses the stack");
    let is_bypassed = after[0] != before[0];
    assert_eq!(is_bypassed, !is_set, "{id}: {before:?} {after:?}");
    is_bypassed
}

#[test]
fn a_pod_whose_network_or_annotation_says_so_takes_the_stack() {
    let world = world(2);
    let mut runtimes: Vec<_> = world.hosts.iter().map(Runtime::new).collect();
    runtimes[0].set("bypass", json!("off"));
    assert!(!bypasses(&world, &runtimes, "network"));
    let annotated = |value: &str| json!({ "example.com/a": "b", "flannel.alpha.coreos.com/bypass": value });
    // A runtime tells it nobody who does not ask.
    runtimes[0].annotations = annotated("auto");
    assert!(!bypasses(&world, &runtimes, "unasked"));
    runtimes[0].set("capabilities", json!({ POD_ANNOTATIONS: true }));
    assert!(bypasses(&world, &runtimes, "auto"));
    runtimes[0].set("bypass", json!(null));
    runtimes[0].annotations = annotated("off");
    assert!(!bypasses(&world, &runtimes, "annotated"));
    runtimes[0].annotations = json!({ "example.com/a": "b" });
    assert!(bypasses(&world, &runtimes, "others"));
}

#[test]
fn pods_talk_across_hosts_past_the_stack() {
    let world = world(2);
    let runtimes: Vec<_> = world.hosts.iter().map(Runtime::new).collect();
    let (one, one_result) = pod(&runtimes[0], &world.hosts[0], "c1");
    let (two, two_result) = pod(&runtimes[1], &world.hosts[1], "c1");
    for (host, pod, result) in [(0, &one, &one_result), (1, &two, &two_result)] {
        let subnet = world.hosts[host].subnet().unwrap();
        assert_eq!(result["ips"][0]["address"], format!("{}/24", pod.address));
        assert_eq!(result["ips"][0]["gateway"], subnet.gateway.to_string());
        assert_eq!(pod.address.octets()[..3], subnet.gateway.octets()[..3]);
        let link = &pod.netns.ip_json("link show eth0").unwrap()[0];
        assert_eq!(link["mtu"], subnet.mtu);
        runtimes[host].check("c1", &pod.netns, result);
    }
    wait_for("pods", SOON, || is_answered(&one.netns, &two.address.to_string())).unwrap();
    let counters = |host| ["pod_encapsulated", "delivered"].map(|label| world.counter(host, label));
    let before = [counters(0), counters(1)];
    tcp_transfer(&one.netns, &two.netns, two.address, 1, world.lab.directory()).unwrap();
    for (host, before) in before.into_iter().enumerate() {
        let after = counters(host);
        assert!(after[0] > before[0] + 100 && after[1] > before[1] + 100, "host {host}: {before:?} {after:?}");
    }
    for (host, pod, result) in [(0, &one, &one_result), (1, &two, &two_result)] {
        let runtime = &runtimes[host];
        runtime.del("c1", &pod.netns.path(), Some(result));
        assert!(pod.netns.ip("link show eth0").is_err(), "the interface is gone");
        // Once more, and as for a container that is gone.
        runtime.del("c1", &pod.netns.path(), Some(result));
        runtime.del("c1", "", None);
        runtime.assert_nothing_is_left(&world.hosts[host]);
    }
}

#[test]
fn a_host_port_leads_into_the_pod_until_it_goes() {
    let world = world(2);
    let mut runtime = Runtime::new(&world.hosts[0]);
    let mapping = json!([{ "hostPort": 8081, "containerPort": 80, "protocol": "tcp" }]);
    runtime.port_mappings = mapping;
    let (pod, result) = pod(&runtime, &world.hosts[0], "web");
    let listener = listener_in(&pod.netns, pod.address, 80);
    // From the other host, by the underlay.
    let asked = SocketAddrV4::new(world.hosts[0].address, 8081);
    let (client, _server) = connection(&world.hosts[1].netns, asked, &listener);
    assert_eq!(client.peer_addr().unwrap(), asked.into());
    let rules = || world.hosts[0].netns.exec("iptables-save -t nat").unwrap();
    assert!(rules().contains("CNI-DN-"), "{}", rules());
    runtime.del("web", &pod.netns.path(), Some(&result));
    assert!(!rules().contains("CNI-DN-") && !rules().contains(&pod.address.to_string()), "{}", rules());
    runtime.assert_nothing_is_left(&world.hosts[0]);
}

#[test]
fn every_version_has_the_delegates_result() {
    let world = world(1);
    let mut runtime = Runtime::new(&world.hosts[0]);
    // With the rest left to `subnet.env`.
    runtime.set("delegate", json!({ "hairpinMode": true, "isDefaultGateway": true }));
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        runtime.version = version.to_owned();
        let id = format!("v{version}");
        let (pod, result) = pod(&runtime, &world.hosts[0], &id);
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["ips"][0]["version"] == "4", version < "1.0.0", "{result}");
        if version != "0.3.1" {
            runtime.check(&id, &pod.netns, &result);
        }
        runtime.del(&id, &pod.netns.path(), Some(&result));
    }
    runtime.plugins.truncate(1);
    of_newest_version(&mut runtime);
    let (pod, result) = pod(&runtime, &world.hosts[0], "newest");
    runtime.check("newest", &pod.netns, &result);
    runtime.del("newest", &pod.netns.path(), Some(&result));
    runtime.assert_nothing_is_left(&world.hosts[0]);

    for (input, version) in [("", "1.1.0"), (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"), (r#"{"cniVersion":"9"}"#, "1.1.0")]
    {
        let reply = runtime.run("flannel", &[("CNI_COMMAND", "VERSION")], input.as_bytes()).succeeded();
        let versions = r#"["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]"#;
        assert_eq!(reply.output, format!(r#"{{"cniVersion":"{version}","supportedVersions":{versions}}}"#));
    }
    let about = runtime.run("flannel", &[], b"").succeeded();
    assert_eq!(about.output, "");
    assert!(about.log.contains("CNI plugin flannel v"), "{about:?}");
}

#[test]
fn what_is_kept_is_flannels_delegate_configuration_for_root_only() {
    let world = world(1);
    let mut runtime = Runtime::alone(&world.hosts[0]);
    let (pod, _) = pod(&runtime, &world.hosts[0], "c1");
    // A second interface of the same container, as multus has them.
    runtime.set("delegate", json!({ "bridge": "cni0", "ipMasq": false }));
    let second = runtime.call("ADD", 0, "c1", &pod.netns.path(), "net1", None).succeeded().json();
    assert_eq!(runtime.states(), ["c1", "c1:net1"]);
    let directory = runtime.directory.join("state");
    let subnet = world.hosts[0].subnet().unwrap();
    let [a, b, c, _] = subnet.gateway.octets();
    assert_eq!(
        fs::read_to_string(directory.join("c1")).unwrap(),
        format!(
            r#"{{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":false,"ipam":{{"dataDir":"{}","ranges":[[{{"subnet":"{a}.{b}.{c}.0/24"}}]],"routes":[{{"dst":"10.5.0.0/16"}}],"type":"host-local"}},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}}"#,
            runtime.directory.join("addresses").display()
        )
    );
    let mode = |name: &str| fs::metadata(directory.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(""), mode("c1")), (0o700, 0o600));

    // One goes, the other stays as it is.
    runtime.del_alone("c1", &pod.netns.path()).succeeded();
    assert_eq!(runtime.states(), ["c1:net1"]);
    runtime.call("CHECK", 0, "c1", &pod.netns.path(), "net1", Some(&second)).succeeded();
    // As flannel's own plugin would have kept it.
    fs::rename(directory.join("c1:net1"), directory.join("c1")).unwrap();
    runtime.call("DEL", 0, "c1", &pod.netns.path(), "net1", None).succeeded();
    runtime.assert_nothing_is_left(&world.hosts[0]);
}

#[test]
fn check_finds_what_is_wrong() {
    let mut world = world(1);
    let runtime = Runtime::alone(&world.hosts[0]);
    let (pod, result) = pod(&runtime, &world.hosts[0], "c1");
    let check = |previous| runtime.call("CHECK", 0, "c1", &pod.netns.path(), "eth0", previous);
    assert_eq!(check(Some(&result)).succeeded().output, "");
    check(None).failed(7, "prevResult");

    // The delegate's part, in its own words.
    pod.netns.ip(&format!("address del {}/24 dev eth0", pod.address)).unwrap();
    let reply = check(Some(&result));
    assert_ne!(reply.code, Some(0));
    assert!(reply.output.contains(&pod.address.to_string()), "{reply:?}");
    pod.netns.ip(&format!("address add {}/24 dev eth0", pod.address)).unwrap();
    pod.netns.ip(&format!("route add default via {}", world.hosts[0].subnet().unwrap().gateway)).unwrap();
    pod.netns.ip(&format!("route add 10.5.0.0/16 via {}", world.hosts[0].subnet().unwrap().gateway)).unwrap();
    check(Some(&result)).succeeded();

    // Ours: the host has another subnet since.
    let env = fs::read_to_string(&runtime.subnet_file).unwrap();
    let subnet = world.hosts[0].subnet().unwrap().gateway;
    fs::write(&runtime.subnet_file, env.replace(&format!("{subnet}/"), "10.5.3.1/")).unwrap();
    check(Some(&result)).failed(101, "10.5.3.0/24");
    fs::write(&runtime.subnet_file, env).unwrap();
    check(Some(&result)).succeeded();
    runtime.del_alone("c1", &pod.netns.path()).succeeded();
    check(Some(&result)).failed(3, "container c1 has no interface eth0");
    world.hosts[0].agent = None;
}

#[test]
fn status_says_whether_containers_can_be_attached() {
    let mut world = World::new(1);
    let mut runtime = Runtime::alone(&world.hosts[0]);
    of_newest_version(&mut runtime);
    let status = |runtime: &Runtime| {
        let variables = [("CNI_COMMAND", "STATUS"), ("CNI_PATH", runtime.path.as_str())];
        runtime.run("flannel", &variables, runtime.conf(0, None).to_string().as_bytes())
    };
    status(&runtime).failed(50, "subnet.env");
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    wait_for("the agent's status", SOON, || status(&runtime).code == Some(0)).unwrap();
    assert_eq!(status(&runtime).succeeded().output, "");
    // The delegate was asked as well, and what it says counts.
    let calls = fs::read_to_string(runtime.directory.join("calls")).unwrap();
    assert!(calls.starts_with("STATUS {") && calls.contains(r#""type":"newest""#), "{calls}");
    runtime.script("newest", r#"echo '{"cniVersion":"1.1.0","code":50,"msg":"full"}'; exit 1"#);
    let reply = status(&runtime);
    assert_eq!(reply.output, "{\"cniVersion\":\"1.1.0\",\"code\":50,\"msg\":\"full\"}\n");
    of_newest_version(&mut runtime);
    world.hosts[0].agent.as_ref().unwrap().signal(Signal::SIGKILL).unwrap();
    world.hosts[0].agent.as_mut().unwrap().wait(SOON).unwrap();
    // The lock goes with the last who looks at the dead process's files.
    wait_for("the agent's lock to be gone", SOON, || status(&runtime).code != Some(0)).unwrap();
    status(&runtime).failed(51, "the agent of flannel.1 does not run");
    world.start(0, &[]);
    wait_for("the agent", SOON, || status(&runtime).code == Some(0)).unwrap();
    fs::write(&runtime.subnet_file, "FLANNEL_NETWORK=10.5.0.0/16\n").unwrap();
    status(&runtime).failed(50, "is missing FLANNEL_SUBNET");
    runtime.version = "1.0.0".to_owned();
    status(&runtime).failed(1, "config version does not allow STATUS");
}

#[test]
fn gc_detaches_all_but_what_is_valid() {
    let world = world(1);
    let mut runtime = Runtime::alone(&world.hosts[0]);
    of_newest_version(&mut runtime);
    let mut pods: Vec<_> = ["a", "b", "c"].map(|id| Some(pod(&runtime, &world.hosts[0], id).0)).into();
    // Kept by an earlier version of ours; of another network; damaged.
    let directory = runtime.directory.join("state");
    fs::rename(directory.join("a"), directory.join("a:eth0")).unwrap();
    let other = fs::read_to_string(directory.join("a:eth0")).unwrap().replace("cbr0", "other");
    fs::write(directory.join("x:eth0"), other).unwrap();
    fs::write(directory.join("y:eth0"), "{").unwrap();
    let gc = |valid| {
        let variables = [("CNI_COMMAND", "GC"), ("CNI_PATH", runtime.path.as_str())];
        let mut conf = runtime.conf(0, None);
        conf["cni.dev/valid-attachments"] = valid;
        runtime.run("flannel", &variables, conf.to_string().as_bytes())
    };
    let of = |id: &str| json!({ "containerID": id, "ifname": "eth0" });
    gc(json!([of("a"), of("b"), of("c")])).succeeded();
    assert_eq!(runtime.states(), ["a:eth0", "b", "c", "x:eth0", "y:eth0"]);
    // Two containers go without a DEL.
    pods[1] = None;
    pods[2] = None;
    assert_eq!(runtime.addresses().len(), 3);
    // What flannel's plugin kept does not say of which interface it is.
    gc(json!([of("a"), { "containerID": "c", "ifname": "net1" }])).succeeded();
    assert_eq!(runtime.states(), ["a:eth0", "c", "x:eth0", "y:eth0"]);
    assert_eq!(gc(json!([of("a"), { "containerID": "d", "ifname": "net1" }])).succeeded().output, "");
    assert_eq!(runtime.states(), ["a:eth0", "x:eth0", "y:eth0"]);
    assert_eq!(runtime.addresses(), [pods[0].as_ref().unwrap().address.to_string()]);
    let calls = fs::read_to_string(runtime.directory.join("calls")).unwrap();
    let forwarded = r#""cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"},"#;
    assert!(calls.lines().last().unwrap().contains(forwarded), "{calls}");
    // Without the list nothing is taken away.
    let variables = [("CNI_COMMAND", "GC"), ("CNI_PATH", runtime.path.as_str())];
    let conf = runtime.conf(0, None).to_string();
    runtime.run("flannel", &variables, conf.as_bytes()).failed(7, "cni.dev/valid-attachments");
    assert_eq!(runtime.states(), ["a:eth0", "x:eth0", "y:eth0"]);
    assert!(world.store.list(&format!("{PREFIX}/subnets/")).unwrap().len() == 1);
}
