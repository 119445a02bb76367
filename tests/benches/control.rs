//! `cargo xtask bench control`: how fast and how large the agent is with many leases, and beside it what it takes to
//! program the same peers by flannel's scheme: an RPC and three netlink objects for each.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Parser;
use etcd_client::{Client, PutOptions, Txn, TxnOp};
use flannel_agent::dataplane::{PinDirectory, PinnedSubnets};
use flannel_common::vxlan::Vni;
use futures_util::TryStreamExt as _;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, LinkVxlan, RouteMessageBuilder, packet_route::neighbour::NeighbourFlags};
use xtask::{
    lab::{Host, Lab, PREFIX, Store, remove_leftovers},
    progress::wait_for,
};

const NAME: &str = "flannel-control";
const CONFIG: &str = r#"{"Network": "10.0.0.0/8", "SubnetLen": 21, "Backend": {"Type": "vxlan"}}"#;
/// Beyond the first hundred subnets, among which the agent chooses its own.
const FIRST_SLOT: u32 = 1000;
/// Beyond all that are there from the start.
const FIRST_NEW_SLOT: u32 = 7000;
/// How many leases are put one by one.
const PUTS: u32 = 500;
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Options {
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Numbers of leases
    #[arg(long, value_delimiter = ',', default_value = "10,1000,5000")]
    leases: Vec<u32>,
    /// Where the results are written as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let options = Options::parse();
    let directory = std::env::temp_dir().join(NAME);
    remove_leftovers(NAME, &directory).unwrap();
    let mut results = serde_json::Map::new();
    for count in &options.leases {
        let result = measure(*count, options.rounds, &directory);
        print_rows(*count, options.rounds, &result);
        let rows = result.iter().map(|(name, values)| ((*name).to_owned(), serde_json::json!(values)));
        results.insert(count.to_string(), rows.collect::<serde_json::Map<_, _>>().into());
    }
    if let Some(path) = options.json {
        fs::write(path, serde_json::to_string_pretty(&results).unwrap()).unwrap();
    }
    remove_leftovers(NAME, &directory).unwrap();
}

/// Values of all rounds, by what was measured.
type Values = Vec<(&'static str, Vec<f64>)>;

fn print_rows(count: u32, rounds: usize, values: &[(&str, Vec<f64>)]) {
    println!("\n{:<48}{:>10}   min..max of {rounds} rounds", format!("{count} leases"), "median");
    for (name, values) in values {
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let (median, min, max) = (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]);
        println!("  {name:<46} {median:10.2}   {min:.2}..{max:.2}");
    }
}

fn measure(count: u32, rounds: usize, directory: &Path) -> Values {
    let lab = Lab::new(NAME, directory).unwrap();
    let store = lab.store().unwrap();
    store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    let mut host = lab.host("node1", 1).unwrap();
    let scheme = lab.host("node2", 2).unwrap();
    let mut values = Values::new();
    enter(&host);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut client = runtime.block_on(Client::connect([store.endpoint()], None)).unwrap();
    let leases = runtime.block_on(fill(&mut client, count));
    for _ in 0..rounds {
        let ours = agent(&mut host, &store, &runtime, &mut client, count);
        for (name, value) in ours.into_iter().chain(flannels_scheme(&scheme, &leases)) {
            match values.iter_mut().find(|(known, _)| *known == name) {
                Some((_, values)) => values.push(value),
                None => values.push((name, vec![value])),
            }
        }
    }
    values
}

fn subnet(slot: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a00_0000 + slot * (1 << 11))
}

fn peer(slot: u32) -> (Ipv4Addr, [u8; 6]) {
    let [high, low] = (slot as u16).to_be_bytes();
    (Ipv4Addr::new(172, 16, high, low), [0x0a, 0, 0, 0, high, low])
}

fn lease(slot: u32) -> (String, String) {
    let (address, [a, b, c, d, e, f]) = peer(slot);
    let value = format!(
        r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"}}}}"#
    );
    (format!("{PREFIX}/subnets/{}-21", subnet(slot)), value)
}

/// Puts leases, each with an etcd lease of its own as hosts do.
async fn fill(client: &mut Client, count: u32) -> Vec<i64> {
    let mut leases = Vec::new();
    let slots: Vec<_> = (FIRST_SLOT..FIRST_SLOT + count).collect();
    for slots in slots.chunks(100) {
        let mut puts = Vec::new();
        for slot in slots {
            let granted = client.lease_grant(86400, None).await.unwrap().id();
            let (key, value) = lease(*slot);
            puts.push(TxnOp::put(key, value, Some(PutOptions::new().with_lease(granted))));
            leases.push(granted);
        }
        client.txn(Txn::new().and_then(puts)).await.unwrap();
    }
    leases
}

/// A start of the agent on a host where it never ran, and then one lease after the other.
fn agent(
    host: &mut Host,
    store: &Store,
    runtime: &tokio::runtime::Runtime,
    client: &mut Client,
    count: u32,
) -> Vec<(&'static str, f64)> {
    let binary = agent_binary();
    let pins = PinDirectory::new(host.pin_dir(), Vni::DEFAULT);
    let calls = rpcs(store);
    let start = Instant::now();
    host.start_agent(&binary, store, &[]).unwrap();
    let mut map = None;
    let complete = wait_for("all peers in the map", LIMIT, || {
        map = PinnedSubnets::open(&pins).ok();
        map.as_ref().is_some_and(|map| map.count().unwrap() == count as usize)
    });
    assert!(complete.is_ok(), "{}", host.agent.as_ref().unwrap().log());
    let to_map = start.elapsed();
    host.wait_ready().unwrap();
    let (ready, map, pid) = (start.elapsed(), map.unwrap(), host.agent.as_ref().unwrap().id());
    // What it calls after that is over when it has written what it knows.
    let known = host.run_dir().join("flannel.1.leases");
    wait_for("the start to be over", LIMIT, || known.exists()).unwrap();
    let cpu_at_start = cpu(pid);
    let calls = rpcs(store) - calls;

    let mut latencies: Vec<f64> = Vec::new();
    for slot in FIRST_NEW_SLOT..FIRST_NEW_SLOT + PUTS {
        let (key, value) = lease(slot);
        let start = Instant::now();
        runtime.block_on(client.put(key, value, None)).unwrap();
        while !map.has(slot).unwrap() {
            assert!(start.elapsed() < LIMIT, "the lease of slot {slot} does not come into the map");
            std::thread::sleep(Duration::from_micros(20));
        }
        latencies.push(start.elapsed().as_secs_f64() * 1e3);
    }
    latencies.sort_by(f64::total_cmp);
    let at = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize];
    let cpu_of_puts = cpu(pid) - cpu_at_start;

    let idle = Duration::from_secs(20);
    let before = cpu(pid);
    std::thread::sleep(idle);
    let idle_share = (cpu(pid) - before) / idle.as_secs_f64() * 100.0;
    let [resident, peak] = ["VmRSS:", "VmHWM:"].map(|field| memory(pid, field));

    // As it was before, for the next round.
    let remove = |slot| TxnOp::delete(lease(slot).0, None);
    for slots in (FIRST_NEW_SLOT..FIRST_NEW_SLOT + PUTS).collect::<Vec<_>>().chunks(100) {
        let deletions: Vec<_> = slots.iter().copied().map(remove).collect();
        runtime.block_on(client.txn(Txn::new().and_then(deletions))).unwrap();
    }
    host.agent = None;
    let own = format!("{PREFIX}/subnets/{}", subnet_of(host));
    xtask::process::output(host.agent_command(&binary).arg("cleanup")).unwrap();
    runtime.block_on(client.delete(own, None)).unwrap();
    vec![
        ("agent: start to all peers in the map, ms", to_map.as_secs_f64() * 1e3),
        ("agent: start to subnet.env, ms", ready.as_secs_f64() * 1e3),
        ("agent: RPCs of the start", calls),
        ("agent: CPU of the start, ms", cpu_at_start * 1e3),
        ("agent: resident memory, MiB", resident),
        ("agent: resident memory at most, MiB", peak),
        ("agent: put to map, p50, ms", at(0.5)),
        ("agent: put to map, p99, ms", at(0.99)),
        ("agent: CPU per put, ms", cpu_of_puts * 1e3 / f64::from(PUTS)),
        ("agent: CPU when nothing happens, % of a core", idle_share),
        ("agent: kernel objects for the peers", 0.0),
    ]
}

fn subnet_of(host: &Host) -> String {
    let subnet = host.subnet().unwrap();
    format!("{}-{}", Ipv4Addr::from_bits(subnet.gateway.to_bits() - 1), subnet.len)
}

/// What flannel does at its start for the same peers, one after the other: TimeToLive of each lease
/// (pkg/subnet/etcd/registry.go, getSubnets), then neighbour, forwarding entry and route
/// (pkg/backend/vxlan/vxlan_network.go).
fn flannels_scheme(host: &Host, leases: &[i64]) -> Vec<(&'static str, f64)> {
    let netns = PathBuf::from(format!("/run/netns/{}", host.netns.name()));
    let work = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let endpoint = format!("http://{}:2379", xtask::lab::address(254));
            let mut client = Client::connect([endpoint], None).await.unwrap();
            let start = Instant::now();
            for lease in leases {
                client.lease_time_to_live(*lease, None).await.unwrap();
            }
            let asked = start.elapsed();
            setns(File::open(netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            let index = vxlan_device(&handle).await;
            let (start, cpu_before) = (Instant::now(), thread_cpu());
            for slot in (FIRST_SLOT..).take(leases.len()) {
                program(&handle, index, slot).await;
            }
            let (programmed, cpu) = (start.elapsed(), thread_cpu() - cpu_before);
            handle.link().del(index).execute().await.unwrap();
            vec![
                ("flannel's scheme: TimeToLive of each lease, ms", asked.as_secs_f64() * 1e3),
                ("flannel's scheme: three objects per peer, ms", programmed.as_secs_f64() * 1e3),
                ("flannel's scheme: CPU of these, ms", cpu * 1e3),
                ("flannel's scheme: kernel objects for the peers", 3.0 * leases.len() as f64),
            ]
        })
    };
    // In a thread of its own, whose namespace goes with it.
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}

async fn vxlan_device(handle: &Handle) -> u32 {
    let local = xtask::lab::address(2);
    let device = LinkVxlan::new("flannel.1", 1).local(local).port(8472).learning(false).up().build();
    handle.link().add(device).execute().await.unwrap();
    let mut links = handle.link().get().match_name("flannel.1").execute();
    links.try_next().await.unwrap().unwrap().header.index
}

async fn program(handle: &Handle, index: u32, slot: u32) {
    let (address, mac) = peer(slot);
    let neighbour = handle.neighbours().add(index, subnet(slot).into()).link_layer_address(&mac).replace();
    neighbour.execute().await.unwrap();
    let forwarding = handle.neighbours().add_bridge(index, &mac).destination(address.into());
    forwarding.flags(NeighbourFlags::Own).replace().execute().await.unwrap();
    let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(subnet(slot), 21).gateway(subnet(slot));
    handle.route().add(route.output_interface(index).onlink().build()).replace().execute().await.unwrap();
}

fn enter(host: &Host) {
    setns(File::open(format!("/run/netns/{}", host.netns.name())).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
}

/// The release build, beside the folder of this bench's.
fn agent_binary() -> PathBuf {
    let path = xtask::process::workspace().join("target/release/flannel-agent");
    assert!(path.exists(), "{path:?} is not built; `cargo xtask bench control` builds it");
    path
}

/// How many calls etcd has been made.
fn rpcs(store: &Store) -> f64 {
    let address = store.endpoint().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let started = text.lines().filter(|line| line.starts_with("grpc_server_started_total{"));
    started.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// A field of `/proc/<pid>/status`, in MiB.
fn memory(pid: u32, field: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}

/// CPU seconds that a process has used, to the nanosecond: the ticks of `/proc/<pid>/stat` are ten milliseconds.
fn cpu(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    threads.map(|thread| schedstat(&thread.path().join("schedstat"))).sum()
}

fn thread_cpu() -> f64 {
    schedstat(Path::new("/proc/thread-self/schedstat"))
}

fn schedstat(path: &Path) -> f64 {
    // A thread may just have ended.
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}
