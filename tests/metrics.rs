//! What Prometheus is told, judged by its own tools.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::PathBuf,
    process::{Command, Stdio},
};

use flannel_agent::operator::metrics::catalogue::{Kind, Metric};
use nix::libc;
use xtask::{
    lab::{Netns, PREFIX},
    process::{output, workspace},
    progress::wait_for,
    setup,
};

use crate::{
    sockets::within,
    world::{SOON, World, is_answered, lease_value},
};

/// Where the agents answer.
pub const PORT: u16 = 8081;
pub const HTTP: &str = "--healthz-port=8081";

/// Samples by their names and labels.
type Samples = BTreeMap<String, f64>;

/// What somebody answers a client that accepts this: head and body. [`None`] where nobody answers.
pub fn http(netns: &Netns, address: SocketAddr, path: &str, accept: &str) -> Option<(String, String)> {
    within(netns, || {
        let mut stream = TcpStream::connect_timeout(&address, SOON).ok()?;
        stream.set_read_timeout(Some(SOON)).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: node\r\nAccept: {accept}\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.to_owned(), body.to_owned()))
    })
}

/// What the agent of a host answers it: content type and body.
fn scrape(world: &World, host: usize, accept: &str) -> (String, String) {
    let address = SocketAddr::from((world.hosts[host].address, PORT));
    let (head, body) = http(&world.hosts[host].netns, address, "/metrics", accept).unwrap();
    assert!(head.contains(" 200 "), "{head}");
    let kind = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap();
    (kind.to_owned(), body)
}

/// What the command prints.
fn printed(world: &World, host: usize, arguments: &[&str]) -> String {
    output(world.agent_on(host).arg("metrics").args(arguments)).unwrap()
}

fn samples(text: &str) -> Samples {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.map(|line| line.rsplit_once(' ').unwrap());
    let samples: Vec<_> = pairs.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect();
    let number = samples.len();
    let samples: Samples = samples.into_iter().collect();
    assert_eq!(samples.len(), number, "each is there once");
    samples
}

/// The names and labels in the order in which they come.
fn order(text: &str) -> Vec<&str> {
    text.lines().map(|line| if line.starts_with('#') { line } else { line.rsplit_once(' ').unwrap().0 }).collect()
}

/// That promtool has nothing to say.
fn assert_clean(text: &str) {
    let mut check = Command::new(setup::prometheus("promtool"));
    check.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut check = check.spawn().expect("promtool; `cargo xtask setup` has it");
    let mut input = check.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let said = check.wait_with_output().unwrap();
    let words = [said.stdout, said.stderr].concat();
    assert!(said.status.success() && words.is_empty(), "{}", String::from_utf8_lossy(&words));
}

/// Where dashboard and alerts are.
pub fn deploy() -> PathBuf {
    workspace().join("flannel-agent/deploy")
}

/// The metrics that a text names.
fn named(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let metrics = words.filter(|word| word.starts_with("flannel_") || word.starts_with("process_"));
    metrics
        .map(|name| ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name))
        .collect()
}

#[test]
fn each_reader_is_told_in_its_format() {
    let world = World::new(2).ready(&[HTTP, "--metrics-per-peer"]);
    world.wait_connected(0, 1);
    let (kind, text) = scrape(&world, 0, "*/*");
    assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8");
    assert_clean(&text);
    let (kind, open_metrics) = scrape(&world, 0, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5");
    assert_eq!(kind, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(open_metrics.ends_with("\n# EOF\n") && !text.contains("# EOF"), "{open_metrics}");
    assert!(
        open_metrics.contains("# TYPE flannel_lease_renewals counter\nflannel_lease_renewals_total{"),
        "{open_metrics}"
    );

    let path = world.hosts[0].directory().join("textfile/flannel.prom");
    assert_eq!(printed(&world, 0, &["--textfile", path.to_str().unwrap()]), "");
    let written = std::fs::read_to_string(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    assert_clean(&written);
    assert_clean(&printed(&world, 0, &["--metrics-per-peer"]));
    // node_exporter has some of these of its own.
    assert!(!written.contains("process_"), "{written}");
}

#[test]
fn the_same_comes_in_the_same_order() {
    let world = World::new(2).ready(&[HTTP]);
    world.wait_connected(0, 1);
    let [first, second] = [(); 2].map(|()| printed(&world, 0, &[]));
    assert_eq!(order(&first), order(&second));
    let (_, over_http) = scrape(&world, 0, "*/*");
    let of_process =
        |line: &&str| !Metric::ALL.iter().any(|metric| metric.is_of_process() && line.contains(metric.name()));
    assert_eq!(order(&over_http).into_iter().filter(of_process).collect::<Vec<_>>(), order(&first));
}

/// Has the kernel count the runs of programs as long as this is open (`BPF_ENABLE_STATS`).
fn count_runs() -> OwnedFd {
    const ENABLE_STATS: libc::c_long = 32;
    const RUN_TIME: u32 = 0;
    let attributes = [RUN_TIME; 1];
    // SAFETY: the kernel reads so many bytes of the attributes, and returns a descriptor that is nobody else's.
    unsafe {
        let descriptor = libc::syscall(libc::SYS_bpf, ENABLE_STATS, attributes.as_ptr(), size_of_val(&attributes));
        assert!(descriptor >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(descriptor as i32)
    }
}

/// Each metric is told, as it is documented, and nothing else; and only what is told is what dashboard and alerts look at.
#[test]
fn what_is_told_is_what_is_documented() {
    let world = World::new(2).ready(&[HTTP, "--metrics-per-peer"]);
    world.wait_connected(0, 1);
    let _counting = count_runs();
    let mut text = String::new();
    let waited = wait_for("the programs' runs", SOON, || {
        assert!(is_answered(&world.hosts[0].pods[0].netns, &world.hosts[1].pods[0].address.to_string()));
        text = scrape(&world, 0, "*/*").1;
        text.contains("\nflannel_program_runs_total{")
    });
    assert!(waited.is_ok(), "{text}");
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let told: BTreeSet<_> = types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect();
    let kind = |metric: &Metric| match metric.kind() {
        Kind::Counter => "counter",
        Kind::Gauge | Kind::Info => "gauge",
        Kind::Histogram => "histogram",
    };
    let known: BTreeSet<_> =
        Metric::ALL.iter().map(|metric| (metric.name().to_owned(), kind(metric).to_owned())).collect();
    assert_eq!(told, known);
    let names: BTreeSet<_> = told.iter().map(|(name, _)| name.as_str()).collect();
    for file in ["alerts.yaml", "alerts.test.yaml", "grafana-dashboard.json"] {
        let text = std::fs::read_to_string(deploy().join(file)).unwrap();
        let named = named(&text);
        assert!(!named.is_empty() && named.is_subset(&names), "{file}: {:?}", named.difference(&names));
    }
    for (sample, _) in samples(&text) {
        let (name, labels) = sample.split_once('{').unwrap_or((&sample, ""));
        let metric = Metric::ALL.iter().find(|metric| {
            name == metric.name()
                || metric.kind() == Kind::Histogram && name.starts_with(&format!("{}_", metric.name()))
        });
        let names: Vec<_> = labels.split("\",").filter_map(|pair| Some(pair.split_once("=\"")?.0)).collect();
        let names: Vec<_> = names.into_iter().filter(|name| *name != "le").collect();
        assert_eq!(names, metric.unwrap().labels(), "{sample}");
    }
}

#[test]
fn what_cannot_be_read_fails_no_scrape() {
    let world = World::new(1).ready(&[HTTP]);
    let told = |text: &str, sample: &str| samples(text).get(sample).copied();
    let status = r#"flannel_metrics_source_up{source="status"}"#;
    let renewals = r#"flannel_lease_renewals_total{vni="1"}"#;
    let (_, text) = scrape(&world, 0, "*/*");
    assert_eq!((told(&text, status), told(&text, renewals)), (Some(1.0), Some(0.0)), "{text}");
    let all = samples(&text);
    let sources: Vec<_> = all.iter().filter(|(name, _)| name.starts_with("flannel_metrics_source_up")).collect();
    assert!(sources.len() > 5 && sources.iter().all(|(_, is_up)| **is_up == 1.0), "{text}");

    // Of another overlay's agent.
    std::fs::write(world.hosts[0].run_dir().join("flannel.9.status.json"), "{").unwrap();
    let command = world.agent_on(0).arg("metrics").output().unwrap();
    assert!(command.status.success());
    let said = String::from_utf8_lossy(&command.stderr);
    assert!(said.contains("flannel.9.status.json is not understood"), "{said}");
    let text = String::from_utf8(command.stdout).unwrap();
    assert_eq!((told(&text, status), told(&text, renewals)), (Some(0.0), Some(0.0)), "{text}");
    // What was read a moment ago may be told once more.
    wait_for("a scrape", SOON, || told(&scrape(&world, 0, "*/*").1, status) == Some(0.0)).unwrap();
    let (_, text) = scrape(&world, 0, "*/*");
    assert_eq!((told(&text, status), told(&text, renewals)), (Some(0.0), Some(0.0)), "{text}");
}

#[test]
fn peers_are_counted_by_their_states() {
    let world = World::with_any_subnet(2).ready(&[HTTP, "--metrics-per-peer"]);
    world.wait_connected(0, 1);
    world.hosts[0].netns.ip("route add unreachable 192.0.2.9").unwrap();
    let [third, _] = world.free_octets();
    let key = format!("{PREFIX}/subnets/10.5.{third}.0-24");
    world.store.put(&key, &lease_value("192.0.2.9", "0a:00:00:00:00:02")).unwrap();
    let state = |state: &str| format!("flannel_peers_by_state{{vni=\"1\",state=\"{state}\"}}");
    let mut text = String::new();
    let is_told = |text: &mut String| {
        *text = printed(&world, 0, &["--metrics-per-peer"]);
        let samples = samples(text);
        // The agent writes how many there are a moment after they are in the maps.
        [&state("ok"), &state("no_route")].iter().all(|name| samples[*name] == 1.0)
            && samples[r#"flannel_peers{vni="1"}"#] == 2.0
    };
    let waited = wait_for("both", SOON, || is_told(&mut text));
    assert!(waited.is_ok(), "{text}");
    let samples = samples(&text);
    assert_eq!(samples[&state("silent")], 0.0);
    assert_eq!(samples[r#"flannel_peers_never_heard{vni="1"}"#], 1.0);
    let now = flannel_agent::status::now() as f64;
    let heard = samples[r#"flannel_peers_oldest_heard_timestamp_seconds{vni="1"}"#];
    assert!((now - 60.0..=now).contains(&heard), "{heard} at {now}");
    let peer = format!(r#"vni="1",subnet="10.5.{third}.0/24",vtep="192.0.2.9""#);
    assert_eq!(samples[&format!("flannel_peer_state{{{peer},state=\"no_route\"}}")], 1.0);
    assert!(!samples.contains_key(&format!("flannel_peer_last_heard_timestamp_seconds{{{peer}}}")));
    let other = world.lease_of(1).0.replace('-', "/");
    let peer = format!(r#"vni="1",subnet="{other}",vtep="192.168.64.2""#);
    assert!(samples[&format!("flannel_peer_packets_total{{{peer},direction=\"sent\"}}")] > 0.0);
    assert!(samples[&format!("flannel_peer_bytes_total{{{peer},direction=\"received\"}}")] > 0.0);
    // Hooks of both ends and of the pod, all in place.
    for program in ["from_overlay", "from_pod", "from_underlay", "to_overlay", "to_pod"] {
        let hook =
            |state: &str| samples[&format!("flannel_hooks{{vni=\"1\",program=\"{program}\",state=\"{state}\"}}")];
        assert!(hook("attached") >= 1.0 && hook("missing") + hook("unknown") == 0.0, "{text}");
    }
    assert!(!printed(&world, 0, &[]).contains("flannel_peer_"));
}

#[test]
fn it_is_measured_how_soon_a_peer_is_in_the_maps_and_when_the_lease_ends() {
    const TERM: f64 = 60.0;
    let world = World::with_any_subnet(1).ready(&["--subnet-lease-ttl=60"]);
    let expiry = |samples: &Samples| samples[r#"flannel_lease_expiry_timestamp_seconds{vni="1"}"#];
    let now = || flannel_agent::status::now() as f64;
    let first = samples(&printed(&world, 0, &[]));
    assert!((now()..=now() + TERM).contains(&expiry(&first)), "{} at {}", expiry(&first), now());

    let count = |samples: &Samples| samples[r#"flannel_convergence_seconds_count{vni="1"}"#];
    let before = count(&first);
    for (third, address) in world.free_octets().into_iter().zip(["192.168.64.77", "192.168.64.78"]) {
        let key = format!("{PREFIX}/subnets/10.5.{third}.0-24");
        world.store.put(&key, &lease_value(address, "0a:00:00:00:00:02")).unwrap();
    }
    let mut told = Samples::new();
    let is_told = |told: &mut Samples| {
        *told = samples(&printed(&world, 0, &[]));
        count(told) == before + 2.0
    };
    let waited = wait_for("both changes", SOON, || is_told(&mut told));
    assert!(waited.is_ok(), "{told:#?}");
    let seconds = told[r#"flannel_convergence_seconds_sum{vni="1"}"#];
    assert!(seconds > 0.0 && seconds < SOON.as_secs_f64(), "{seconds}");
    assert_eq!(told[r#"flannel_convergence_seconds_bucket{vni="1",le="+Inf"}"#], count(&told));
    // Renewed three times in a term.
    let waited = wait_for("a renewal", 2 * SOON, || {
        let samples = samples(&printed(&world, 0, &[]));
        samples[r#"flannel_lease_renewals_total{vni="1"}"#] > 0.0 && expiry(&samples) > expiry(&first)
    });
    waited.unwrap();
}
