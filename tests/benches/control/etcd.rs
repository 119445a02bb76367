//! Leases in etcd, and flannel's scheme for the same.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    ops::Range,
    path::PathBuf,
    time::{Duration, Instant},
};

use etcd_client::{Client, PutOptions, Txn, TxnOp};
use futures_util::TryStreamExt as _;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, LinkVxlan, RouteMessageBuilder, packet_route::neighbour::NeighbourFlags};
use tokio::runtime::Runtime;
use xtask::lab::{Host, Lab, LeaseStore, PREFIX, Store};

use super::{Leases, Row, cost::thread_cpu};

const CONFIG: &str = r#"{"Network": "10.0.0.0/8", "SubnetLen": 21, "Backend": {"Type": "vxlan"}}"#;
/// Beyond the first hundred subnets, among which the agent chooses its own.
const FIRST_SLOT: u32 = 1000;
/// Beyond all that are there from the start.
const FIRST_NEW_SLOT: u32 = 7000;

/// An etcd that many hosts have leases in.
pub(super) struct Etcd {
    store: Store,
    /// For flannel's scheme.
    scheme: Host,
    runtime: Runtime,
    client: Client,
    leases: Vec<i64>,
}

impl Etcd {
    pub(super) fn start(lab: &Lab) -> (Store, Host) {
        let store = lab.store().unwrap();
        store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
        (store, lab.host("node2", 2).unwrap())
    }

    /// Fills it. This thread reaches it.
    pub(super) fn fill((store, scheme): (Store, Host), runtime: Runtime, count: u32) -> Self {
        let mut client = runtime.block_on(Client::connect([store.endpoint()], None)).unwrap();
        let leases = runtime.block_on(fill(&mut client, count));
        Self { store, scheme, runtime, client, leases }
    }
}

impl Leases for Etcd {
    fn store(&self) -> &dyn LeaseStore {
        &self.store
    }

    fn slots(&self) -> Range<u32> {
        FIRST_SLOT..FIRST_SLOT + self.leases.len() as u32
    }

    fn new_slots(&self, count: u32) -> Range<u32> {
        FIRST_NEW_SLOT..FIRST_NEW_SLOT + count
    }

    fn calls(&mut self) -> f64 {
        rpcs(&self.store)
    }

    fn announce(&mut self, slot: u32) {
        let (key, value) = lease(slot);
        self.runtime.block_on(self.client.put(key, value, None)).unwrap();
    }

    fn withdraw(&mut self, slots: Range<u32>) {
        let remove = |slot| TxnOp::delete(lease(slot).0, None);
        for slots in slots.collect::<Vec<_>>().chunks(100) {
            let deletions: Vec<_> = slots.iter().copied().map(remove).collect();
            self.runtime.block_on(self.client.txn(Txn::new().and_then(deletions))).unwrap();
        }
    }

    fn forget(&mut self, host: &Host) {
        let subnet = host.subnet().unwrap();
        let address = Ipv4Addr::from_bits(subnet.gateway.to_bits() - 1);
        let own = format!("{PREFIX}/subnets/{address}-{}", subnet.len);
        self.runtime.block_on(self.client.delete(own, None)).unwrap();
    }

    fn pass(&mut self, time: Duration) -> Vec<Row> {
        std::thread::sleep(time);
        Vec::new()
    }

    fn by_flannel(&self) -> Vec<Row> {
        flannels_scheme(&self.scheme, &self.leases)
    }
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

/// What flannel does at its start for the same peers, one after the other: TimeToLive of each lease
/// (pkg/subnet/etcd/registry.go, getSubnets), then neighbour, forwarding entry and route
/// (pkg/backend/vxlan/vxlan_network.go).
fn flannels_scheme(host: &Host, leases: &[i64]) -> Vec<Row> {
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
