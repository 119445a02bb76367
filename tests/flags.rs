//! Flags and variables as flannel takes them, with the agent's own process: what templates leave empty, what is refused and
//! how, which keys a prefix means, which servers a list of endpoints means; and the files that others share with it.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use xtask::{
    lab::{PREFIX, Store},
    process::{Process, output},
    progress::wait_for,
};

use crate::world::{CONFIG, SOON, World, agent};

/// Flags of flannel's as a template leaves them that has no values for them.
const EMPTY: [&str; 23] = [
    "-iface=",
    "-iface-regex=",
    "-iface-can-reach=",
    "-public-ip=",
    "-public-ipv6=",
    "-etcd-cafile=",
    "-etcd-certfile=",
    "-etcd-keyfile=",
    "-etcd-username=",
    "-etcd-password=",
    "-subnet-file=",
    "-healthz-ip=",
    "-healthz-port=0",
    "-kubeconfig-file=",
    "-kube-api-url=",
    "-kube-subnet-mgr=false",
    "-kube-annotation-prefix=flannel.alpha.coreos.com",
    "-net-config-path=/etc/kube-flannel/net-conf.json",
    "-set-node-network-unavailable=true",
    "-vmodule=",
    "-log_backtrace_at=",
    "-v=0",
    "-version=false",
];

/// Runs a host's agent until it is ready, with arguments and variables.
fn ready(world: &mut World, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let host = &mut world.hosts[0];
    host.agent = None;
    let _there_may_be_none = fs::remove_file(host.run_dir().join("subnet.env"));
    let mut command = host.agent_command(&agent());
    command.args(arguments).envs(variables.iter().copied());
    host.agent = Some(Process::start(&mut command, &world.lab.directory().join("agent.log")).unwrap());
    host.wait_ready().unwrap();
    host.agent.as_ref().unwrap().log()
}

fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(agent()).args(arguments).envs(variables.iter().copied()).output().unwrap()
}

#[test]
fn what_templates_leave_empty_is_taken() {
    let mut world = World::new(1);
    let endpoints = format!("-etcd-endpoints={}", world.store.endpoint());
    let arguments: Vec<&str> = EMPTY.iter().copied().chain([endpoints.as_str()]).collect();
    let names: Vec<String> = EMPTY
        .iter()
        .map(|flag| flag.split('=').next().unwrap().trim_start_matches('-'))
        .map(|name| format!("FLANNELD_{}", name.to_uppercase().replace('-', "_")))
        .collect();
    let empty: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    for (arguments, variables) in [(&arguments[..], &[][..]), (&[&endpoints], &empty)] {
        let log = ready(&mut world, arguments, variables);
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
        assert!(log.contains("external interface eth0"), "{log}");
    }
}

#[test]
fn the_three_ways_to_name_the_interface_are_asked_in_turn() {
    let mut world = World::new(1);
    let endpoints = format!("-etcd-endpoints={}", world.store.endpoint());
    for flags in [
        &["-iface=eth9", "-iface-regex=^eth[0-3]$"][..],
        &["-iface=eth9", "-iface-regex=^wlan", "-iface-can-reach=192.168.64.254"],
    ] {
        let arguments: Vec<&str> = flags.iter().copied().chain([endpoints.as_str()]).collect();
        let log = ready(&mut world, &arguments, &[]);
        assert!(log.contains("external interface eth0"), "{log}");
    }
}

#[test]
fn what_is_refused_is_named_as_it_was_written() {
    for (arguments, message) in [
        (&["-ifac=eth0"][..], "unknown flag -ifac (did you mean -iface?); flannel-agent --help lists them"),
        (
            &["--public-ipv6=fd00::1"],
            "--public-ipv6: IPv6 between hosts is not supported by this agent; leave it out, or empty",
        ),
        (&["-healthz-port=x"], "invalid value \"x\" for -healthz-port: expected a number of at most 65535"),
        (
            &["-ip-masq", "false"],
            "unexpected argument \"false\": the value of -ip-masq goes behind \"=\", as in -ip-masq=false",
        ),
        (
            &["--etcd-endpoints=etcd"],
            "invalid value \"etcd\" for --etcd-endpoints: the endpoint \"etcd\" names no port; expected etcd:2379, or \
             another port that etcd listens on",
        ),
        (&["-etcd-keyfile=k"], "-etcd-keyfile is given without --etcd-certfile: TLS to etcd takes both, or neither"),
    ] {
        let result = run(arguments, &[]);
        assert_eq!(result.status.code(), Some(2), "{arguments:?}");
        assert_eq!(String::from_utf8_lossy(&result.stderr), format!("error: {message}\n"));
    }
    let by_variable = run(&[], &[("FLANNELD_PUBLIC_IPV6", "fd00::1")]);
    assert_eq!(by_variable.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&by_variable.stderr).starts_with("error: FLANNELD_PUBLIC_IPV6: IPv6 between"));
}

#[test]
fn version_and_help_are_given_in_every_form() {
    for flag in ["-version", "--version", "-version=1"] {
        let result = run(&[flag], &[]);
        assert!(result.status.success() && result.stdout.is_empty(), "{flag}");
        assert!(String::from_utf8_lossy(&result.stderr).starts_with("0."), "{flag}");
    }
    for flag in ["-h", "-help", "--help"] {
        let result = run(&[flag], &[]);
        assert!(result.status.success(), "{flag}");
        assert!(String::from_utf8_lossy(&result.stdout).contains("--etcd-endpoints"), "{flag}");
    }
}

#[test]
fn a_variable_that_can_t_be_used_is_said_and_passed_over() {
    let mut world = World::new(1);
    let endpoint = world.store.endpoint().to_owned();
    let variables = [
        ("FLANNELD_ETCD_ENDPOINTS", endpoint.as_str()),
        ("FLANNELD_PUBLIC_IP", "nonsense"),
        ("FLANNELD_IPTABLES_RESYNC", "5s"),
        ("FLANNELD_VERSION", "true"),
        ("FLANNELD_KUBE_API_URL", "https://10.0.0.1"),
        ("FLANNELD_IP_MASQ", "true"),
        ("EVENT_QUEUE_DEPTH", "none"),
    ];
    let log = ready(&mut world, &[], &variables);
    for said in [
        "invalid value \"nonsense\" for FLANNELD_PUBLIC_IP: expected an IPv4 address, as in 192.168.64.1; going on without it",
        "invalid value \"5s\" for FLANNELD_IPTABLES_RESYNC: expected a number from 1 to 4294967295; going on without it",
        "FLANNELD_KUBE_API_URL has no effect without --kube-subnet-mgr, as with flannel",
    ] {
        assert!(log.contains(said), "{said}: {log}");
    }
    assert_eq!(log.matches("WARN").count(), 3, "{log}");
    let env = fs::read_to_string(world.hosts[0].run_dir().join("subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_IPMASQ=true"), "{env}");
}

#[test]
fn a_prefix_means_flannels_keys_to_the_byte() {
    let mut world = World::without_config(1);
    let endpoints = format!("-etcd-endpoints={}", world.store.endpoint());
    let prefixes = [
        ("coreos.com/network", "coreos.com/network/"),
        ("/coreos.com//network/", "/coreos.com/network/"),
        ("./x", "x/"),
        ("/a/../b/", "/b/"),
        (".", ""),
    ];
    let mut expected = Vec::new();
    for (prefix, root) in prefixes {
        world.store.put(&format!("{root}config"), CONFIG).unwrap();
        ready(&mut world, &[&endpoints, &format!("-etcd-prefix={prefix}")], &[]);
        let gateway = world.hosts[0].subnet().unwrap().gateway.octets();
        let subnet = format!("{}.{}.{}.0-24", gateway[0], gateway[1], gateway[2]);
        expected.extend([format!("{root}config"), format!("{root}subnets/{subnet}")]);
    }
    let keys = world.store.etcdctl(&["get", "--keys-only", "--from-key", ""]).unwrap();
    let mut keys: Vec<&str> = keys.lines().filter(|line| !line.is_empty()).collect();
    keys.sort_unstable();
    expected.sort_unstable();
    assert_eq!(keys, expected);
}

#[test]
fn endpoints_are_taken_as_gos_client_takes_them() {
    let mut world = World::new(1);
    let address = world.store.endpoint().trim_start_matches("http://").to_owned();
    let files =
        ["-etcd-certfile=/absent/client.pem", "-etcd-keyfile=/absent/client.key", "-etcd-cafile=/absent/ca.pem"];
    for (endpoints, more, said) in [
        (address.clone(), &[][..], ""),
        (format!("HTTP://{address}"), &[], ""),
        (format!("http://{address}/v2/keys"), &[], ""),
        (format!("\"http://192.168.64.254:4001, http://{address}\""), &[], ""),
        (format!(",'http://{address}',"), &[], ""),
        (format!("etcd,http://{address}"), &[], "the endpoint \"etcd\" names no port; expected etcd:2379"),
        (format!("http://{address}"), &files, "is reached in clear text, in spite of -etcd-certfile"),
        (address.clone(), &files[2..], "is reached in clear text, in spite of -etcd-cafile"),
    ] {
        let endpoints = format!("-etcd-endpoints={endpoints}");
        let arguments: Vec<&str> = more.iter().copied().chain([endpoints.as_str()]).collect();
        let log = ready(&mut world, &arguments, &[]);
        assert!(log.contains(said), "{said}: {log}");
        assert_eq!(log.contains("WARN"), !said.is_empty(), "{log}");
    }
}

#[test]
fn without_a_scheme_a_certificate_means_tls() {
    let mut world = World::new(1);
    let directory = world.lab.directory().join("tls");
    fs::create_dir(&directory).unwrap();
    let script = "set -e; key='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
        openssl req -x509 $key -days 1 -subj /CN=ca -keyout ca.key -out ca.pem
        printf 'subjectAltName=IP:192.168.64.254\\nbasicConstraints=CA:FALSE\\n' > extensions
        openssl req $key -subj /CN=both -keyout both.key -out request
        openssl x509 -req -days 1 -in request -CA ca.pem -CAkey ca.key -CAcreateserial -extfile extensions -out both.pem";
    output(Command::new("sh").current_dir(&directory).args(["-c", script])).unwrap();
    let path = |name: &str| directory.join(name).display().to_string();
    let (ca, certificate, key) = (path("ca.pem"), path("both.pem"), path("both.key"));
    world.store.stop();
    let tls = ["--cert-file", &certificate, "--key-file", &key, "--client-cert-auth", "--trusted-ca-file", &ca];
    let url = "https://192.168.64.254:2379";
    world.store = Store::start_with(&world.lab.underlay, url, world.lab.directory(), &tls).unwrap();
    let [ca, certificate, key] = [("cafile", ca), ("certfile", certificate), ("keyfile", key)]
        .map(|(flag, file)| format!("-etcd-{flag}={file}"));
    for endpoints in ["192.168.64.254:2379", "HTTPS://192.168.64.254:2379/"] {
        let endpoints = format!("-etcd-endpoints={endpoints}");
        let log = ready(&mut world, &[&endpoints, &ca, &certificate, &key], &[]);
        assert!(!log.contains("WARN"), "{log}");
    }
}

/// How long it takes until `subnet.env` is there again.
fn time_to_come_back(path: &Path) -> Duration {
    let begun = Instant::now();
    wait_for("subnet.env", SOON, || fs::read_to_string(path).is_ok_and(|text| text.contains("FLANNEL_IPMASQ")))
        .unwrap();
    begun.elapsed()
}

#[test]
fn subnet_env_keeps_the_lines_of_others_and_comes_back_when_it_is_gone() {
    let mut world = World::new(1);
    let path = world.hosts[0].run_dir().join("subnet.env");
    let run_dir = world.hosts[0].run_dir();
    fs::create_dir_all(&run_dir).unwrap();
    let of_others = "# site\nSITE=a\n\nexport SITE_MTU=$FLANNEL_MTU";
    fs::write(&path, format!("FLANNEL_MTU=9000\nFLANNEL_IPV6_SUBNET=fc00::1/64\n{of_others}")).unwrap();
    let repaired = |world: &World| world.status(0)["status"]["drift"]["repaired"]["subnet_env"]["count"].clone();
    world.start(0, &[]);
    wait_for("subnet.env", SOON, || fs::read_to_string(&path).is_ok_and(|text| text.contains("FLANNEL_NETWORK")))
        .unwrap();
    let written = fs::read_to_string(&path).unwrap();
    let subnet = world.hosts[0].subnet().unwrap();
    let ours = format!(
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={}/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
        subnet.gateway
    );
    assert_eq!(written, format!("{ours}{of_others}"));
    world.wait_status(0, "the status", |status| status["pid"].is_u64());

    fs::remove_file(&path).unwrap();
    assert!(time_to_come_back(&path) < Duration::from_secs(2));
    assert_eq!(fs::read_to_string(&path).unwrap(), ours);
    world.wait_log(0, "repaired (subnet_env): ");
    world.wait_status(0, "the count", |status| status["drift"]["repaired"]["subnet_env"]["count"] == 1);

    // With the whole folder; the plugin wants the status beside it.
    fs::remove_dir_all(&run_dir).unwrap();
    assert!(time_to_come_back(&path) < Duration::from_secs(2));
    assert!(run_dir.join("flannel.1.status.json").exists() && run_dir.join("flannel.1.leases").exists());

    // Cut off: not at once, since somebody may be writing it.
    fs::write(&path, format!("{of_others}\nFLANNEL_NETWORK=10.5.0.0/16\n")).unwrap();
    time_to_come_back(&path);
    assert_eq!(fs::read_to_string(&path).unwrap(), format!("{ours}{of_others}\n"));
    world.wait_status(0, "the count", |status| status["drift"]["repaired"]["subnet_env"]["count"] == 3);

    // Another daemon's: left, and said.
    let of_another = ours.replace(&subnet.gateway.to_string(), "10.5.7.1");
    fs::write(&path, &of_another).unwrap();
    world.wait_status(0, "the other subnet", |status| {
        let problem = status["drift"]["waiting"]["subnet.env"].as_str().unwrap_or_default();
        problem.contains("names 10.5.7.0/24, which somebody else wrote")
    });
    assert_eq!(fs::read_to_string(&path).unwrap(), of_another);
    fs::write(&path, &ours).unwrap();
    world.wait_log(0, "the subnet.env is well again");
    assert_eq!(repaired(&world), 3);
}

#[test]
fn unknown_keys_of_the_config_are_said_once() {
    let mut world = World::without_config(1);
    let config = |more: &str| CONFIG.replacen('{', &format!(r#"{{{more}, "#), 1);
    let key = format!("{PREFIX}/config");
    world.store.put(&key, &config(r#""SubnetLenght": 24"#)).unwrap();
    world.start(0, &[]);
    world.hosts[0].wait_ready().unwrap();
    let first = "the key SubnetLenght is none of flannel's (did you mean SubnetLen?) and has no effect";
    world.wait_log(0, first);
    world.store.put(&key, &config(r#""SubnetLenght": 24"#)).unwrap();
    world.store.put(&key, &config(r#""Comment": "x""#)).unwrap();
    world.wait_log(0, "the key Comment is none of flannel's and has no effect");
    assert_eq!(world.hosts[0].agent.as_ref().unwrap().log().matches(first).count(), 1);
}
