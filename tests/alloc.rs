//! The alloc backend: a lease and `subnet.env`, and nothing of the kernel's.

use std::{fs, process::Command};

use nix::sys::signal::Signal;
use xtask::{
    lab::PREFIX,
    process::{Process, output},
    progress::wait_for,
};

use crate::world::{SOON, World, agent};

const ALLOC: &str = r#"{"Type": "alloc"}"#;

fn config(backend: &str) -> String {
    format!(r#"{{"Network": "10.5.0.0/16", "Backend": {backend}}}"#)
}

impl World {
    fn with_alloc(hosts: u8) -> Self {
        let world = Self::without_config(hosts);
        world.store.put(&format!("{PREFIX}/config"), &config(ALLOC)).unwrap();
        world
    }

    /// Starts the agent anew with another backend in the store.
    fn restart_with(&mut self, host: usize, backend: &str) {
        self.store.put(&format!("{PREFIX}/config"), &config(backend)).unwrap();
        self.end(host);
        self.start(host, &["--ip-masq"]);
        self.hosts[host].wait_ready().unwrap();
        let kind = backend.split('"').nth(3).unwrap();
        self.wait_status(host, kind, |status| status["backend"] == kind);
    }

    fn end(&mut self, host: usize) {
        let Some(mut agent) = self.hosts[host].agent.take() else { return };
        agent.signal(Signal::SIGTERM).unwrap();
        agent.wait(SOON).unwrap();
    }

    /// What an agent could have made in the kernel of a host.
    fn kernel_of(&self, host: usize) -> String {
        let netns = &self.hosts[host].netns;
        let commands = [
            "ip -o link show type vxlan",
            "ip route show table all proto 72",
            "ip neigh show nud permanent",
            "nft list ruleset",
            "iptables-legacy-save",
            "tc filter show dev eth0 ingress",
            "sysctl net.ipv4.ip_forward",
        ];
        commands.map(|command| netns.exec(command).unwrap()).concat()
    }

    fn status_text(&self, host: usize) -> String {
        output(self.agent_on(host).arg("status")).unwrap()
    }
}

#[test]
fn a_lease_and_subnet_env_and_nothing_else() {
    let mut world = World::with_alloc(2);
    let before = world.kernel_of(0);
    (0..2).for_each(|host| world.start(host, &["--ip-masq", "--healthz-port=8081", "--healthz-ip=127.0.0.1"]));
    for host in &mut world.hosts {
        assert_eq!(host.wait_ready().unwrap().mtu, 1500);
    }
    let (key, value) = world.lease_of(0);
    assert_eq!(value, r#"{"PublicIP":"192.168.64.1","PublicIPv6":null}"#, "{key}");
    let file = world.hosts[0].run_dir().join("subnet.env");
    let text = fs::read_to_string(&file).unwrap();
    // Nobody masquerades here: whoever reads it may.
    assert!(text.contains("FLANNEL_IPMASQ=false\n") && text.contains("FLANNEL_NETWORK=10.5.0.0/16\n"), "{text}");
    world.wait_status(0, "the other host", |status| status["peers"] == 1 && status["store"]["following"] == true);
    let status = world.status_text(0);
    assert!(status.contains("all is well") && !status.contains("hook"), "{status}");
    assert!(status.contains("with the backend alloc nothing is carried"), "{status}");
    assert!(world.status(0)["dataplane"].is_null());
    world.hosts[0].netns.exec("curl -sf http://127.0.0.1:8081/readyz").unwrap();
    // What it says of the host follows.
    world.hosts[0].set_underlay_mtu(1400).unwrap();
    wait_for("the MTU", SOON, || world.hosts[0].subnet().is_ok_and(|subnet| subnet.mtu == 1400)).unwrap();
    fs::remove_file(&file).unwrap();
    wait_for("subnet.env", SOON, || file.exists()).unwrap();
    world.hosts[0].netns.ip("address delete 192.168.64.1/24 dev eth0").unwrap();
    world.hosts[0].netns.ip("address add 192.168.64.77/24 dev eth0").unwrap();
    let renamed = || {
        world
            .store
            .list(&format!("{PREFIX}/subnets/"))
            .unwrap()
            .iter()
            .any(|(of, value)| of.ends_with(&key) && value == r#"{"PublicIP":"192.168.64.77","PublicIPv6":null}"#)
    };
    assert!(wait_for("its other address", SOON, renamed).is_ok(), "{}", world.hosts[0].agent.as_ref().unwrap().log());
    assert_eq!(world.kernel_of(0), before);
    assert!(!world.hosts[0].pin_dir().exists());
    // One that is taken away ends the agent, as with any backend.
    world.store.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")]).unwrap();
    assert!(world.hosts[0].agent.as_mut().unwrap().wait(2 * SOON).unwrap().success());
    world.hosts[0].agent = None;
    output(world.agent_on(0).arg("cleanup")).unwrap();
    assert!(!world.hosts[0].run_dir().exists());
    assert_eq!(world.kernel_of(0), before);
}

#[test]
fn a_host_that_can_have_no_programs_can_have_this_and_nothing_else() {
    let mut world = World::with_alloc(1);
    let elsewhere = world.lab.directory().join("pins");
    let host = &world.hosts[0];
    let mut command = host.netns.command("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all", "--reuid=65534", "--regid=65534", "--clear-groups"]);
    fs::create_dir_all(host.run_dir()).unwrap();
    output(Command::new("chown").arg("65534:65534").arg(host.run_dir())).unwrap();
    command.arg(agent()).arg("--bpf-pin-dir").arg(&elsewhere).arg("--run-dir").arg(host.run_dir());
    command.arg(format!("--subnet-file={}", host.run_dir().join("subnet.env").display()));
    command.arg(format!("--etcd-endpoints={}", world.store.endpoint()));
    let log = world.lab.directory().join("agent.log");
    let mut start = |world: &mut World| world.hosts[0].agent = Some(Process::start(&mut command, &log).unwrap());
    start(&mut world);
    world.hosts[0].wait_ready().unwrap();
    assert!(!elsewhere.exists());
    // The store says so still where it is away.
    world.wait_status(0, "its lease", |status| status["store"]["following"] == true);
    wait_for("what is known", SOON, || world.hosts[0].run_dir().join("flannel.1.leases").exists()).unwrap();
    world.end(0);
    world.store.stop();
    start(&mut world);
    world.wait_log(0, "going on with the lease");
    world.end(0);
    world.store.resume().unwrap();
    // Any other backend is refused by what it lacks.
    world.store.put(&format!("{PREFIX}/config"), &config(r#"{"Type": "vxlan"}"#)).unwrap();
    start(&mut world);
    let agent = world.hosts[0].agent.as_mut().unwrap();
    assert_eq!(agent.wait(SOON).unwrap().code(), Some(77), "{}", agent.log());
    assert!(agent.log().contains("the capability CAP_BPF is missing"), "{}", agent.log());
}

#[test]
fn a_network_changes_to_it_and_back_and_nothing_stays() {
    let mut world = World::with_alloc(2);
    let liberal = "sysctl -n net.netfilter.nf_conntrack_tcp_be_liberal";
    (0..2).for_each(|host| world.restart_with(host, r#"{"Type": "vxlan"}"#));
    for host in &mut world.hosts {
        host.add_pod().unwrap();
    }
    world.wait_connected(0, 1);
    let subnet = world.hosts[0].subnet().unwrap();
    for backend in [r#"{"Type": "host-gw"}"#, r#"{"Type": "host-gw", "KernelRoutes": true}"#, r#"{"Type": "vxlan"}"#] {
        assert!(world.kernel_of(0).contains("flannel"), "{}", world.kernel_of(0));
        let lease = world.lease_of(0).0;
        (0..2).for_each(|host| world.restart_with(host, ALLOC));
        assert_eq!(world.lease_of(0).0, lease, "the host keeps its subnet");
        let kernel = world.kernel_of(0);
        let has_left = ["flannel", "proto 72", "169.254.1.1", "FLANNEL"].iter().any(|left| kernel.contains(left));
        assert!(!has_left, "{kernel}");
        assert!(!world.hosts[0].pin_dir().exists());
        assert_eq!(world.hosts[0].netns.exec(liberal).unwrap().trim(), "0");
        let status = world.status_text(0);
        assert!(status.contains("all is well"), "{status}");
        let address = world.hosts[1].pods[0].address.to_string();
        assert!(!crate::world::is_answered(&world.hosts[0].pods[0].netns, &address), "somebody carries packets");
        (0..2).for_each(|host| world.restart_with(host, backend));
        let now = world.hosts[0].subnet().unwrap();
        assert_eq!((now.gateway, now.len), (subnet.gateway, subnet.len));
        world.wait_connected(0, 1);
        world.wait_pods(0);
    }
}
