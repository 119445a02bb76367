//! Several networks on one host: agents side by side, each with its own prefix, number, subnet file and folders or these shared, and
//! pods in either or both by two conflists.

use std::{net::Ipv4Addr, path::PathBuf};

use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{
    lab::{
        Host, Netns, PREFIX, Pod,
        capture::Capture,
        cni::{self, Runtime},
    },
    process::{Process, output},
    progress::wait_for,
    transfer::tcp_transfer,
};

use crate::world::{SOON, World, agent, is_answered};

/// The second network's prefix in the store; the first has the lab's.
const SECOND: &str = "/second/network";

/// The second agent of a host.
struct Second {
    agent: Option<Process>,
    run_dir: PathBuf,
    pin_dir: PathBuf,
    subnet_file: PathBuf,
}

/// A host's pods: in the first network, in the second, and in both.
struct Pods {
    first: Pod,
    second: Pod,
    both: Pod,
    /// The address of that one in the second network.
    other_address: Ipv4Addr,
}

struct Networks {
    pods: Vec<Pods>,
    second: Vec<Second>,
    world: World,
}

fn config(network: &str, backend: &str) -> String {
    format!(r#"{{"Network": "{network}", "Backend": {backend}}}"#)
}

impl Second {
    fn of(host: &Host, is_apart: bool) -> Self {
        let directory = host.directory();
        let (run_dir, pin_dir) = if is_apart {
            let name = host.pin_dir().file_name().unwrap().to_string_lossy().into_owned();
            (directory.join("run2"), host.pin_dir().with_file_name(format!("{name}-second")))
        } else {
            (host.run_dir(), host.pin_dir().to_owned())
        };
        Self { agent: None, run_dir, pin_dir, subnet_file: directory.join("second.env") }
    }

    fn command(&self, host: &Host) -> std::process::Command {
        let mut command = host.netns.command(&agent().to_string_lossy());
        command.arg("--run-dir").arg(&self.run_dir).arg("--bpf-pin-dir").arg(&self.pin_dir);
        command
    }

    fn start(&mut self, host: &Host, endpoint: &str) {
        let mut command = self.command(host);
        command.args([&format!("--etcd-endpoints={endpoint}"), &format!("--etcd-prefix={SECOND}")]);
        command.arg(format!("--subnet-file={}", self.subnet_file.display()));
        self.agent = Some(Process::start(&mut command, &host.directory().join("second.log")).unwrap());
    }

    fn wait_ready(&self) {
        let agent = self.agent.as_ref().unwrap();
        let waited = wait_for("the second subnet.env", SOON, || self.subnet_file.exists());
        assert!(waited.is_ok(), "{}", agent.log());
    }

    fn end(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.signal(Signal::SIGTERM).unwrap();
        agent.wait(SOON).unwrap();
    }
}

impl Networks {
    fn new(first: &str, second: &str, is_apart: bool) -> Self {
        let mut world = World::without_config(2);
        world.store.put(&format!("{PREFIX}/config"), &config("10.5.0.0/16", first)).unwrap();
        world.store.put(&format!("{SECOND}/config"), &config("10.6.0.0/16", second)).unwrap();
        let mut all = Vec::new();
        for host in 0..2 {
            world.start(host, &[]);
            let mut agent = Second::of(&world.hosts[host], is_apart);
            agent.start(&world.hosts[host], world.store.endpoint());
            all.push(agent);
        }
        let mut networks = Self { pods: Vec::new(), second: all, world };
        for host in 0..2 {
            networks.world.hosts[host].wait_ready().unwrap();
            networks.second[host].wait_ready();
            let pods = networks.make_pods(host);
            networks.pods.push(pods);
        }
        networks
    }

    /// By two conflists. (The way into the second network is what a pod's annotations or a meta plugin give it.)
    fn make_pods(&self, number: usize) -> Pods {
        let host = &self.world.hosts[number];
        let ours = agent();
        let first = Runtime::new(host, ours.parent().unwrap()).unwrap().alone();
        let mut second = first.clone();
        second.directory = host.directory().join("cni2");
        second.subnet_file.clone_from(&self.second[number].subnet_file);
        second.plugins[0]["subnetFile"] = second.subnet_file.display().to_string().into();
        second.plugins[0]["dataDir"] = second.directory.join("state").display().to_string().into();
        second.plugins[0]["ipam"]["dataDir"] = second.directory.join("addresses").display().to_string().into();
        second.plugins[0]["delegate"]["bridge"] = "cni1".into();
        let pod = |runtime: &Runtime, name: &str| {
            let netns = Netns::create(&format!("{}-{name}", host.netns.name())).unwrap();
            netns.ip("link set lo up").unwrap();
            let address = cni::address(&runtime.add(name, &netns).unwrap()).unwrap();
            Pod { netns, address }
        };
        let (in_first, both) = (pod(&first, "one"), pod(&first, "both"));
        let in_second = pod(&second, "two");
        second.plugins[0]["delegate"]["isDefaultGateway"] = false.into();
        second.plugins[0]["delegate"]["isGateway"] = true.into();
        let added = second.call("ADD", 0, "both", &both.netns.path(), "net1", None).unwrap().into_output().unwrap();
        let other_address = cni::address(&serde_json::from_str::<Value>(&added).unwrap()).unwrap();
        let [a, b, c, _] = other_address.octets();
        both.netns.ip(&format!("route replace 10.6.0.0/16 via {a}.{b}.{c}.1 dev net1")).unwrap();
        Pods { first: in_first, second: in_second, both, other_address }
    }

    fn assert_all_talk(&self) {
        for [from, to] in [[0, 1], [1, 0]] {
            let [here, there] = [from, to].map(|host| &self.pods[host]);
            let (first, second) = (there.first.address, there.second.address);
            let ways = [
                (&here.first, first),
                (&here.second, second),
                (&here.both, first),
                (&here.both, second),
                (&here.first, there.both.address),
                (&here.second, there.other_address),
            ];
            for (pod, address) in ways {
                let waited = wait_for("an answer", SOON, || is_answered(&pod.netns, &address.to_string()));
                assert!(waited.is_ok(), "{} to {address}: {:#}", pod.address, self.status(from));
            }
            for (from, to) in [(&here.first, &there.first), (&here.second, &there.second)] {
                let flow = tcp_transfer(&from.netns, &to.netns, to.address, 1, self.world.lab.directory()).unwrap();
                assert!(flow.is_flowing(), "{} Gb/s to {}", flow.gbits, to.address);
            }
        }
    }

    /// What `status` says of all that have the first agent's run directory.
    fn status(&self, host: usize) -> Value {
        let result = self.world.agent_on(host).args(["status", "-o", "json"]).output().unwrap();
        serde_json::from_slice(&result.stdout).unwrap()
    }

    /// Both networks are well, by their numbers.
    fn wait_well(&self, host: usize, numbers: &[u64], is_apart: bool) {
        let overlays = || {
            let mut overlays = self.status(host)["overlays"].as_array().unwrap().clone();
            if is_apart {
                let mut command = self.second[host].command(&self.world.hosts[host]);
                let result = command.args(["status", "-o", "json"]).output().unwrap();
                let second: Value = serde_json::from_slice(&result.stdout).unwrap();
                overlays.extend(second["overlays"].as_array().unwrap().clone());
            }
            overlays
        };
        let is_well = |overlay: &Value| overlay["running"] == true && overlay["troubles"] == serde_json::json!([]);
        let waited = wait_for("all to be well", SOON, || {
            let overlays = overlays();
            let have: Vec<_> = overlays.iter().filter_map(|overlay| overlay["status"]["vni"].as_u64()).collect();
            have == numbers && overlays.iter().all(is_well)
        });
        assert!(waited.is_ok(), "{:#}", Value::from(overlays()));
    }

    /// `flannel-agent capture` has both networks in one file, each in its own tunnel.
    fn assert_captured_apart(&self) {
        let file = self.world.lab.directory().join("both.pcapng");
        let mut command = self.world.agent_on(0);
        // Requests and answers in each.
        command.args(["capture", "--icmp", "--packets", "20", "-w"]).arg(&file);
        let mut capture = Process::start(&mut command, &file.with_extension("log")).unwrap();
        wait_for("the capture", SOON, || capture.log().contains("flannel.1 on eth0, flannel.2 on eth0")).unwrap();
        let [here, there] = [0, 1].map(|host| &self.pods[host]);
        for (from, to) in [(&here.first, &there.first), (&here.second, &there.second)] {
            from.netns.exec(&format!("ping -c 5 -i 0.05 -W 10 {}", to.address)).unwrap();
        }
        assert!(capture.wait(SOON).unwrap().success(), "{}", capture.log());
        let mut tshark = std::process::Command::new("tshark");
        tshark.args(["-T", "fields", "-e", "frame.interface_name", "-e", "ip.src", "-r"]);
        let listed = output(tshark.arg(&file)).unwrap();
        for (interface, network, count) in
            [("flannel.1", "10.5.", 10), ("flannel.2", "10.6.", 10), ("eth0", "192.", 20)]
        {
            let of_network = |line: &&str| line.starts_with(&format!("{interface}\t{network}"));
            assert_eq!(listed.lines().filter(of_network).count(), count, "{interface}: {listed}\n{}", capture.log());
        }
        assert_eq!(listed.lines().count(), 40, "{listed}");
    }

    /// Takes away the second network of a host, and brings it back. The first one's pods do not notice.
    fn remove_and_return(&mut self, host: usize) {
        let traffic = {
            let (from, to) = (&self.pods[0].first, &self.pods[1].first);
            crate::stream::Stream::start(from, to)
        };
        self.second[host].end();
        let result = self.second[host].command(&self.world.hosts[host]).arg("cleanup").output().unwrap();
        let said = String::from_utf8_lossy(&result.stderr).into_owned();
        let (run_dir, vni) = (&self.second[host].run_dir, 2);
        assert!(!run_dir.join(format!("flannel.{vni}.status.json")).exists(), "{said}");
        assert!(!self.second[host].pin_dir.join(vni.to_string()).exists(), "{said}");
        assert!(!self.second[host].subnet_file.exists(), "{said}");
        let netns = &self.world.hosts[host].netns;
        let routes = netns.exec("ip route show proto 72").unwrap();
        assert!(!routes.contains("10.6.") && routes.contains("10.5."), "{routes}\n{said}");
        assert!(netns.ip("link show flannel.2").is_err());
        let to = self.pods[1 - host].second.address.to_string();
        assert!(!is_answered(&self.pods[host].second.netns, &to), "somebody carries packets");
        let endpoint = self.world.store.endpoint().to_owned();
        self.second[host].start(&self.world.hosts[host], &endpoint);
        self.second[host].wait_ready();
        let (sent, arrived) = traffic.end();
        let arrived: std::collections::BTreeSet<_> = arrived.into_iter().collect();
        let lost = (0..sent).filter(|number| !arrived.contains(number)).count();
        assert_eq!(lost, 0, "of {sent} datagrams of the first network");
    }
}

#[test]
fn two_tunnels_side_by_side_in_one_run_directory() {
    let mut networks = Networks::new(r#"{"Type": "vxlan"}"#, r#"{"Type": "vxlan", "VNI": 2}"#, false);
    let underlay = &networks.world.hosts[0].netns;
    let mut capture = Capture::start(underlay, "eth0", "udp port 8472", networks.world.lab.directory()).unwrap();
    networks.assert_all_talk();
    // Nothing of one network is in the other's tunnel.
    capture.end_after(100).unwrap();
    let packets = capture.tunnelled("icmp").unwrap();
    for packet in &packets {
        let network = if packet.vni == "1" { "10.5." } else { "10.6." };
        assert!(packet.inner.iter().all(|address| address.starts_with(network)), "{packet}");
    }
    assert!(["1", "2"].iter().all(|vni| packets.iter().any(|packet| packet.vni == **vni)));
    (0..2).for_each(|host| networks.wait_well(host, &[1, 2], false));
    networks.assert_captured_apart();
    networks.remove_and_return(0);
    networks.assert_all_talk();
    networks.wait_well(0, &[1, 2], false);
    // One more agent for a network that has one.
    let endpoint = format!("--etcd-endpoints={}", networks.world.store.endpoint());
    let mut command = networks.second[0].command(&networks.world.hosts[0]);
    let result = command.args([&endpoint, &format!("--etcd-prefix={SECOND}")]).output().unwrap();
    let said = String::from_utf8_lossy(&result.stderr);
    assert!(
        !result.status.success() && said.contains("another agent serves flannel.2 with the same --run-dir"),
        "{said}"
    );
    networks.assert_all_talk();
}

#[test]
fn a_tunnel_beside_host_gw_with_folders_of_their_own() {
    let mut networks = Networks::new(r#"{"Type": "vxlan"}"#, r#"{"Type": "host-gw", "VNI": 2}"#, true);
    networks.assert_all_talk();
    (0..2).for_each(|host| networks.wait_well(host, &[1, 2], true));
    networks.remove_and_return(1);
    networks.assert_all_talk();
    networks.wait_well(1, &[1, 2], true);
    // One more agent for a number that is taken here, with folders of its own.
    let host = &networks.world.hosts[0];
    let mut third = Second::of(host, true);
    third.run_dir = host.directory().join("run3");
    let endpoint = format!("--etcd-endpoints={}", networks.world.store.endpoint());
    let said = |command: &mut std::process::Command| {
        let result = command.output().unwrap();
        (result.status.code(), String::from_utf8_lossy(&result.stderr).into_owned())
    };
    let (code, refused) = said(third.command(host).args([&endpoint, &format!("--etcd-prefix={PREFIX}")]));
    assert!(refused.contains("serves flannel.1 on this host, with another --run-dir"), "{refused}");
    assert_eq!(code, Some(1), "{refused}");
    // Nor does a cleanup that names other folders take anything away, whether or not one has been there.
    third.pin_dir = host.pin_dir().with_file_name("third");
    let (code, refused) = said(third.command(host).arg("cleanup"));
    assert!(refused.contains("serves flannel.1 on this host, with another --run-dir"), "{refused}");
    assert_eq!(code, Some(1), "{refused}");
    third.run_dir = host.directory().join("run4");
    let (code, left) = said(third.command(host).arg("cleanup"));
    assert!(left.contains("left flannel.1: it has programs of an agent with another --run-dir"), "{left}");
    assert_eq!(code, Some(0), "{left}");
    networks.assert_all_talk();
}

#[test]
fn two_networks_of_host_gw_on_one_interface() {
    let mut networks = Networks::new(r#"{"Type": "host-gw"}"#, r#"{"Type": "host-gw", "VNI": 2}"#, false);
    networks.assert_all_talk();
    (0..2).for_each(|host| networks.wait_well(host, &[1, 2], false));
    networks.remove_and_return(0);
    networks.assert_all_talk();
    networks.wait_well(0, &[1, 2], false);
    let mtu = output(networks.world.hosts[0].netns.command("cat").arg(&networks.second[0].subnet_file)).unwrap();
    assert!(mtu.contains("FLANNEL_MTU=1500"), "{mtu}");
}
