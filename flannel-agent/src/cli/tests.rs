//! Command lines, variables, and what is said of them.

use super::*;

fn parse(args: &[&str], environment: &[(&str, &str)]) -> Result<Cli, UsageError> {
    let variable = |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
    Cli::parse_with(args.iter().map(OsString::from), variable)
}

fn cli(args: &[&str], environment: &[(&str, &str)]) -> Cli {
    let cli = parse(args, environment).expect("valid");
    assert_eq!(cli.notices, Vec::<String>::new());
    cli
}

fn refusal(args: &[&str]) -> String {
    parse(args, &[]).expect_err("refused").to_string()
}

fn notices(args: &[&str]) -> Vec<String> {
    parse(args, &[]).expect("valid").notices
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn flannels_defaults() {
    let cli = cli(&[], &[]);
    assert_eq!(cli.etcd().endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
    assert_eq!(cli.etcd().prefix, "/coreos.com/network");
    assert_eq!(cli.subnet_file().to_str(), Some("/run/flannel/subnet.env"));
    assert_eq!(cli.healthz(), None);
}

#[test]
fn health_probes_are_answered_at_a_port_and_anywhere() {
    let healthz = |args: &[&str]| cli(args, &[]).healthz().map(|address| address.to_string());
    assert_eq!(healthz(&["-healthz-port=8081"]).as_deref(), Some("0.0.0.0:8081"));
    assert_eq!(healthz(&["--healthz-ip=::1", "--healthz-port=8081"]).as_deref(), Some("[::1]:8081"));
    assert_eq!(healthz(&["--healthz-ip=127.0.0.1"]), None);
}

#[test]
fn the_page_is_on_loopback_unless_another_address_is_written_out() {
    let page = |value: &str| cli(&["-http-ui", value], &[]).http_ui.map(|address| address.to_string());
    assert_eq!(cli(&[], &[]).http_ui, None);
    for (value, address) in [
        ("8471", "127.0.0.1:8471"),
        ("localhost:8471", "127.0.0.1:8471"),
        ("127.0.0.2:8471", "127.0.0.2:8471"),
        ("[::1]:8471", "[::1]:8471"),
        ("192.168.64.1:8471", "192.168.64.1:8471"),
        ("0.0.0.0:8471", "0.0.0.0:8471"),
    ] {
        assert_eq!(page(value).as_deref(), Some(address), "{value}");
    }
    assert_eq!(page(""), None);
    for value in ["0", "65536", ":8471", "127.0.0.1", "127.0.0.1:0", "node1:8471", "::1:8471", "localhost:", "x"] {
        let expected = "expected a port of 127.0.0.1, or an address with a port, as in 127.0.0.1:8471";
        assert_eq!(
            refusal(&[&format!("--http-ui={value}")]),
            format!("invalid value {value:?} for --http-ui: {expected}"),
            "{value}"
        );
    }
}

#[test]
fn one_dash_is_as_good_as_two() {
    let cli = cli(&["-iface=eth0", "-iface", "10.0.0.1", "--etcd-prefix", "/x", "-v=4", "-public-ip=1.2.3.4"], &[]);
    assert_eq!(cli.selection().interfaces, ["eth0", "10.0.0.1"]);
    assert_eq!((cli.etcd().prefix.as_str(), cli.verbosity), ("/x", 4));
    assert_eq!(cli.selection().public_ip, Some([1, 2, 3, 4].into()));
}

#[test]
fn variables_count_where_the_flag_is_not_given() {
    let environment = [
        ("FLANNELD_ETCD_PREFIX", "/env"),
        ("FLANNELD_IFACE", "eth7"),
        ("FLANNELD_SUBNET_FILE", ""),
        ("FLANNELD_V", "5"),
        ("FLANNELD_IP_MASQ", "true"),
    ];
    let cli = cli(&["--etcd-prefix=/flag"], &environment);
    assert_eq!(cli.etcd().prefix, "/flag");
    assert_eq!(cli.selection().interfaces, ["eth7"]);
    assert_eq!(cli.subnet_file().to_str(), Some("/run/flannel/subnet.env"));
    assert_eq!((cli.verbosity, cli.packet_rules.ip_masq), (5, true));
}

#[test]
fn variables_may_require_each_other() {
    let environment = [("FLANNELD_ETCD_USERNAME", "u"), ("FLANNELD_ETCD_PASSWORD", "-p")];
    assert_eq!(cli(&[], &environment).etcd().user, Some(("u".to_owned(), "-p".to_owned())));
}

#[test]
fn a_bad_variable_costs_only_itself() {
    let environment = [("FLANNELD_PUBLIC_IP", "nonsense"), ("FLANNELD_ETCD_PREFIX", "/env")];
    let cli = parse(&[], &environment).expect("valid");
    assert_eq!(cli.etcd().prefix, "/env");
    assert_eq!(
        cli.notices,
        ["invalid value \"nonsense\" for FLANNELD_PUBLIC_IP: expected an IPv4 address, as in 192.168.64.1; going on \
             without it"]
    );
}

#[test]
fn the_lease_is_renewed_three_times_per_term_or_within_the_margin() {
    let interval = |args: &[&str]| cli(args, &[]).renew_interval().map(|interval| interval.as_secs()).ok();
    assert_eq!(interval(&[]), Some(86400 / 3));
    assert_eq!(interval(&["--subnet-lease-renew-margin=1439"]), Some(60));
    assert_eq!(interval(&["--subnet-lease-ttl=9"]), Some(3));
    assert_eq!(interval(&["--subnet-lease-renew-margin=0"]), None);
    assert_eq!(interval(&["--subnet-lease-renew-margin=1440"]), None);
}

#[test]
fn commands_take_the_directories() {
    let cli = cli(&["cleanup", "--run-dir=/tmp/r"], &[]);
    assert!(matches!(cli.command, Some(Command::Cleanup)));
    assert_eq!(cli.subnet_file().to_str(), Some("/tmp/r/subnet.env"));
}

/// Every flag of flannel v0.28.9 (main.go:113-178, and klog's three), with what it is by default or when a template
/// leaves it empty.
const NOTHING_ASKED_FOR: [&str; 48] = [
    "-etcd-endpoints=",
    "-etcd-prefix=/coreos.com/network",
    "-etcd-keyfile=",
    "-etcd-certfile=",
    "-etcd-cafile=",
    "-etcd-username=",
    "-etcd-password=",
    "-iface=",
    "-iface-regex=",
    "-iface-can-reach=",
    "-subnet-file=",
    "-public-ip=",
    "-public-ipv6=",
    "-subnet-lease-renew-margin=60",
    "-ip-masq=false",
    "-ip-masq-fully-random-disable=false",
    "-kube-subnet-mgr=false",
    "-kube-api-url=",
    "-kube-annotation-prefix=",
    "-kube-annotation-prefix=flannel.alpha.coreos.com",
    "-kubeconfig-file=",
    "-version=false",
    "-healthz-ip=",
    "-healthz-ip=0.0.0.0",
    "-healthz-port=0",
    "-iptables-resync=5",
    "-iptables-forward-rules=true",
    "-ip-blackhole-route=false",
    "-net-config-path=",
    "-net-config-path=/etc/kube-flannel/net-conf.json",
    "-set-node-network-unavailable=true",
    "-set-node-network-unavailable=false",
    "-set-node-network-unavailable",
    "-v=0",
    "-vmodule=",
    "-log_backtrace_at=",
    "-log_backtrace_at",
    "",
    "-subnet-lease-renew-margin=",
    "-ip-masq=",
    "-healthz-port=",
    "-iptables-resync=",
    "-iptables-forward-rules=",
    "-v=",
    "-iface",
    "",
    "-etcd-password",
    "",
];

#[test]
fn every_flag_of_flannels_is_taken_where_it_asks_for_nothing() {
    let but_given = |cli: Cli| format!("{:?}", Cli { given: Vec::new(), ..cli });
    let default = but_given(parse(&[], &[]).expect("valid"));
    assert_eq!(but_given(cli(&NOTHING_ASKED_FOR, &[])), default);
    let two_dashes: Vec<String> =
        NOTHING_ASKED_FOR.iter().map(|arg| if arg.is_empty() { String::new() } else { format!("-{arg}") }).collect();
    let two_dashes: Vec<&str> = two_dashes.iter().map(String::as_str).collect();
    assert_eq!(but_given(parse(&two_dashes, &[]).expect("valid")), default);
}

#[test]
fn every_flag_has_a_variable_and_an_empty_one_is_none() {
    let names: Vec<String> = Cli::command()
        .get_arguments()
        .filter_map(|arg| arg.get_long())
        .map(|long| format!("FLANNELD_{}", long.to_uppercase().replace('-', "_")))
        .collect();
    let empty: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    assert_eq!(format!("{:?}", cli(&[], &empty)), format!("{:?}", cli(&[], &[])));
    let set = [
        ("FLANNELD_LOG_BACKTRACE_AT", "a.go:1"),
        ("FLANNELD_BYPASS", "off"),
        ("FLANNELD_VERSION", "true"),
        ("FLANNELD_IFACE", "eth0,eth1"),
        ("FLANNELD_SUBNET_LEASE_TTL", "0x10"),
        ("EVENT_QUEUE_DEPTH", "none"),
        ("FLANNELD_NO_SUCH", "x"),
    ];
    let cli = parse(&[], &set).expect("valid");
    assert_eq!((cli.bypass, cli.version, cli.lease_ttl().as_secs()), (BypassFlag::Off, false, 16));
    assert_eq!(cli.selection().interfaces, ["eth0,eth1"]);
    assert_eq!(cli.notices.len(), 1, "{:?}", cli.notices);
}

#[test]
fn an_empty_flag_hides_its_variable_as_with_flannel() {
    let environment = [("FLANNELD_IFACE", "eth7"), ("FLANNELD_ETCD_PREFIX", "/env")];
    assert_eq!(cli(&["-iface="], &environment).selection().interfaces, Vec::<String>::new());
    assert_eq!(parse(&["-etcd-prefix="], &environment).expect("valid").etcd().prefix, "/coreos.com/network");
}

#[test]
fn the_last_of_two_counts_and_what_may_be_repeated_is_collected() {
    let cli = cli(
        &["--etcd-prefix=/a", "-etcd-prefix=/b", "-ip-masq", "-ip-masq=0", "-iface=", "-iface=a", "-iface", "b"],
        &[],
    );
    assert_eq!((cli.etcd().prefix.as_str(), cli.packet_rules.ip_masq), ("/b", false));
    assert_eq!(cli.selection().interfaces, ["a", "b"]);
    assert_eq!(
        notices(&["--etcd-prefix=/a", "--etcd-prefix="]),
        [
            "--etcd-prefix is empty, and the default /coreos.com/network counts; for keys at the root, as flannel has them \
         then, give \".\""
        ]
    );
    assert_eq!(
        parse(&["--etcd-prefix=/a", "--etcd-prefix="], &[]).expect("valid").etcd().prefix,
        "/coreos.com/network"
    );
}

#[test]
fn values_have_gos_forms() {
    let masq = |value: &str| parse(&[&format!("-ip-masq={value}")], &[]).map(|cli| cli.packet_rules.ip_masq).ok();
    for (value, is_on) in [("1", true), ("t", true), ("TRUE", true), ("0", false), ("F", false), ("False", false)] {
        assert_eq!(masq(value), Some(is_on), "{value}");
    }
    for value in ["yes", "on", "off", "tRUE"] {
        assert_eq!(masq(value), None, "{value}");
    }
    assert_eq!(cli(&["-subnet-lease-ttl=0x1_0"], &[]).lease_ttl().as_secs(), 16);
    assert_eq!(cli(&["-healthz-port=-1"], &[]).healthz(), None);
    assert_eq!(cli(&["-healthz-ip=localhost", "-healthz-port=1"], &[]).healthz(), Some(([127, 0, 0, 1], 1).into()));
    assert_eq!(cli(&["-v=-1"], &[]).verbosity, -1);
    assert_eq!(cli(&["-public-ip=::ffff:1.2.3.4"], &[]).selection().public_ip, Some([1, 2, 3, 4].into()));
    // Go takes what follows for the value, whatever it looks like.
    assert_eq!(
        cli(&["-etcd-username=u", "-etcd-password", "-p=q"], &[]).etcd().user,
        Some(("u".into(), "-p=q".into()))
    );
    assert_eq!(cli(&["-etcd-prefix", "a=b"], &[]).etcd().prefix, "a=b");
    assert!(cli(&["--"], &[]).command.is_none());
}

#[test]
fn what_is_refused_is_quoted_as_it_was_written() {
    let cases = [
        (&["-ifac=eth0"][..], "unknown flag -ifac (did you mean -iface?); flannel-agent --help lists them"),
        (
            &["--etcd-endpoint", "x"],
            "unknown flag --etcd-endpoint (did you mean --etcd-endpoints?); flannel-agent --help lists them",
        ),
        (&["-xyz"], "unknown flag -xyz; flannel-agent --help lists them"),
        (
            &["--remote=10.0.0.1:8888"],
            "--remote: flannel's server for hosts that do not reach etcd, which it had until 0.7, is not supported by this agent; give \
             each host --etcd-endpoints",
        ),
        (
            &["-logtostderr=true"],
            "-logtostderr: is none of flannel's since 0.8, and not supported by this agent, whose log always goes to stderr; leave it out",
        ),
        (&["---iface=x"], "bad flag syntax: ---iface=x"),
        (&["-=x"], "bad flag syntax: -=x"),
        (&["-iface"], "-iface needs a value, as in -iface=VALUE"),
        (
            &["-ip-masq", "false"],
            "unexpected argument \"false\": the value of -ip-masq goes behind \"=\", as in -ip-masq=false",
        ),
        (
            &["--ip-masq", "-iface=x", "eth0"],
            "unexpected argument \"eth0\": flags begin with a dash, and the commands are cleanup, counters, drops, status, peers, ping, explain, trace, capture, doctor, audit, metrics, config, version, bundle, completions, man, lease, docker-opts",
        ),
        (&["stauts"], "unexpected argument \"stauts\": did you mean status?"),
        (&["--ip-masq=maybe"], "invalid value \"maybe\" for --ip-masq: expected true or false"),
        (&["-healthz-port=x"], "invalid value \"x\" for -healthz-port: expected a number of at most 65535"),
        (&["-public-ip=x"], "invalid value \"x\" for -public-ip: expected an IPv4 address, as in 192.168.64.1"),
        (&["-healthz-ip=x"], "invalid value \"x\" for -healthz-ip: expected an IP address, as in 0.0.0.0"),
        (&["-iface-regex=("], "invalid value \"(\" for -iface-regex: expected a regular expression: unclosed group"),
        (&["-xdp=maybe"], "invalid value \"maybe\" for -xdp: expected auto or native or generic or off"),
        (&["-iptables-resync=0"], "invalid value \"0\" for -iptables-resync: expected a number from 1 to 4294967295"),
        (
            &["-etcd-endpoints=ftp://x"],
            "invalid value \"ftp://x\" for -etcd-endpoints: the endpoint \"ftp://x\" has the scheme \"ftp\"; expected http://HOST:PORT, https://HOST:PORT or HOST:PORT",
        ),
        (
            &["--public-ipv6=fd00::1"],
            "--public-ipv6: IPv6 between hosts is not supported by this agent; leave it out, or empty",
        ),
        (&["-etcd-certfile=c"], "-etcd-certfile is given without --etcd-keyfile: TLS to etcd takes both, or neither"),
        (
            &["--etcd-keyfile=k", "--etcd-certfile="],
            "--etcd-keyfile is given without --etcd-certfile: TLS to etcd takes both, or neither",
        ),
        (&["status", "-iface=x"], "-iface is no flag of the command status; flannel-agent status --help lists them"),
        (&["status", "-run-dri=x"], "unknown flag -run-dri (did you mean -run-dir?); flannel-agent --help lists them"),
    ];
    for (args, message) in cases {
        assert_eq!(refusal(args), message, "{args:?}");
    }
    let kubernetes = parse(&[], &[("FLANNELD_KUBE_SUBNET_MGR", "true")]).expect("taken");
    assert!(matches!(kubernetes.store(), StoreOptions::Kubernetes(_)));
}

#[test]
fn what_has_no_effect_is_said() {
    assert_eq!(
        notices(&["-kube-api-url=https://x", "-vmodule=vxlan=4"]),
        [
            "-kube-api-url has no effect without --kube-subnet-mgr, as with flannel",
            "-vmodule has no effect: it names source files of flannel's; more is logged with --v",
        ]
    );
    assert_eq!(notices(&["-etcd-username=u"]), ["-etcd-username is not used without --etcd-password, as with flannel"]);
    assert_eq!(parse(&["-etcd-username=u"], &[]).expect("valid").etcd().user, None);
    assert_eq!(
        notices(&["--etcd-endpoints=etcd,http://a:1"]),
        [
            "the endpoint \"etcd\" names no port; expected etcd:2379, or another port that etcd listens on; going on without it"
        ]
    );
    let tls = ["-etcd-certfile=c", "-etcd-keyfile=k"];
    let with = |endpoints: &str| notices(&[&format!("-etcd-endpoints={endpoints}"), tls[0], tls[1]]);
    assert_eq!(with("a:1,https://b:1"), Vec::<String>::new());
    assert_eq!(
        with("a:1,http://b:1"),
        ["http://b:1 is reached in clear text, in spite of -etcd-certfile: TLS is for endpoints with https://"]
    );
    assert_eq!(
        notices(&["-etcd-endpoints=a:1", "-etcd-cafile=ca"]),
        ["http://a:1 is reached in clear text, in spite of -etcd-cafile: TLS is for endpoints with https://"]
    );
}

#[test]
fn commands_have_their_letters_and_one_dash_too() {
    for line in [
        "status -o json",
        "status -ojson",
        "status --output=json",
        "status -output json",
        "-v=0 status -run-dir /tmp/r -o json",
    ] {
        let cli = cli(&line.split(' ').collect::<Vec<_>>(), &[]);
        assert!(matches!(cli.command, Some(Command::Status(ref options)) if options.output == Output::Json), "{line}");
    }
    let line = "docker-opts -f a -d b -i -c -k KEY -m";
    assert!(matches!(cli(&line.split(' ').collect::<Vec<_>>(), &[]).command, Some(Command::DockerOpts(_))));
    assert!(matches!(cli(&["docker-opts", "-icm"], &[]).command, Some(Command::DockerOpts(_))));
    // What asks the store takes the daemon's flags on both sides.
    for line in ["doctor --before-install -etcd-prefix=/x", "-etcd-prefix /x doctor", "doctor -etcd-prefix /x -o json"]
    {
        let cli = cli(&line.split(' ').collect::<Vec<_>>(), &[]);
        assert!(matches!(cli.command, Some(Command::Doctor(_))) && cli.etcd().prefix == "/x", "{line}");
    }
    assert_eq!(refusal(&["doctor", "-etcd-endpoints=x"]), refusal(&["-etcd-endpoints=x"]));
    let nested = cli(&["lease", "release-guard", "-run-dir=/tmp/r"], &[]);
    assert!(matches!(nested.command, Some(Command::Lease(LeaseCommand::ReleaseGuard))));
    // What a daemon could not do is no reason to leave something behind.
    assert!(cli(&["cleanup"], &[("FLANNELD_KUBE_SUBNET_MGR", "true")]).command.is_some());
}

#[test]
fn help_is_given_in_every_form() {
    for args in [&["-h"][..], &["-help"], &["--help"], &["-iface=x", "-h"], &["status", "-help"], &["help"]] {
        let UsageError::Clap(error) = parse(args, &[]).expect_err("help") else { panic!("{args:?}") };
        assert_eq!(error.exit_code(), 0, "{args:?}");
    }
}
