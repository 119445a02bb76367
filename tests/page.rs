//! The page to look at, in a browser on the host; and whom it is not shown to.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
};

use etherparse::PacketBuilder;
use nix::sys::signal::Signal;
use serde_json::Value;
use xtask::{
    lab::{Forward, Netns, PREFIX},
    process::{Process, workspace},
    progress::wait_for,
};

use crate::{
    browser::Browser,
    sockets::within,
    world::{SOON, World, agent, lease_value},
};

const PORT: u16 = 8471;
const FLAG: &str = "--http-ui=8471";
const URL: &str = "http://127.0.0.1:8471/";
/// Has the page keep what its policy refused and what went wrong.
const KEEP_ERRORS: &str = "globalThis.wrong = [];
    addEventListener('securitypolicyviolation', (event) => wrong.push(`${event.violatedDirective} ${event.blockedURI}`));
    addEventListener('error', (event) => wrong.push(event.message));
    addEventListener('unhandledrejection', (event) => wrong.push(String(event.reason)));";

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT);

/// The head and the body of an answer to a request with these lines.
fn ask(netns: &Netns, address: SocketAddr, lines: &str) -> Option<(String, String)> {
    within(netns, || answer(address, lines))
}

fn answer(address: SocketAddr, lines: &str) -> Option<(String, String)> {
    let mut stream = TcpStream::connect_timeout(&address, SOON).ok()?;
    stream.set_read_timeout(Some(SOON)).ok()?;
    write!(stream, "{}\r\nConnection: close\r\n\r\n", lines.replace('\n', "\r\n")).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.to_lowercase(), body.to_owned()))
}

fn code(netns: &Netns, address: SocketAddr, lines: &str) -> u16 {
    let (head, _) = ask(netns, address, lines).unwrap();
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_browser_shows_the_peers_and_what_is_to_be_looked_at_and_nothing_that_is_over() {
    let mut world = World::new(2).ready(&[FLAG]);
    world.wait_connected(0, 1);
    let subnet = world.lease_of(1).0.replace('-', "/");
    let row = format!("tr[data-subnet='{subnet}']");
    let cell = |number: u8| format!("{row} td:nth-child({number})");
    let mut page = Browser::open(&world.hosts[0].netns, URL, KEEP_ERRORS);
    page.wait("document.body.className === 'live'");
    page.wait(&format!("document.querySelector({row:?})?.dataset.state === 'ok'"));
    page.wait("document.querySelector('#well').textContent === 'all is well'");
    assert_eq!(page.text("#troubles"), "");
    assert_eq!(page.text(".this-host h2"), "flannel.1");
    assert!(page.text("dl").contains(&world.lease_of(0).0.replace('-', "/")), "{}", page.text("dl"));
    assert_eq!(page.text(&cell(3)), "192.168.64.2");
    assert!(page.text(".picture").contains(&subnet), "{}", page.text(".picture"));

    // Fifty packets in a second each way, of 84 bytes.
    let traffic = world.traffic(0, 1);
    let flows = |bits: u8| {
        format!("/^[1-9].* kbit.s$/.test(document.querySelector({:?}).innerText)", format!("{} span", cell(bits)))
    };
    page.wait(&flows(5));
    page.wait(&flows(7));
    page.wait(&format!("document.querySelector(\"{} path\").getAttribute('d').startsWith('M')", cell(6)));
    page.wait("document.querySelector('.picture .rate')?.textContent.endsWith('kbit/s')");
    traffic.assert_nothing_was_lost();

    // What others write into the store stays text.
    let hostile = "<img src=x onerror=wrong.push(1)>";
    world.store.put(&format!("{PREFIX}/subnets/{hostile}"), "{}").unwrap();
    page.wait("document.querySelector('#verdict').classList.contains('trouble')");
    assert!(page.text("#troubles").contains(hostile), "{}", page.text("#troubles"));
    assert_eq!(page.value("document.images.length"), 0);
    assert_eq!(page.text("#well"), "look at");

    // Its host goes down while it is sent to. (The neighbour is forgotten so that it is asked for now, and not in half a minute.)
    let log = world.lab.directory().join("ping.log");
    let mut ping = world.hosts[0].pods[0].netns.command("ping");
    let ping = Process::start(ping.args(["-i", "0.1", &world.hosts[1].pods[0].address.to_string()]), &log).unwrap();
    world.hosts[1].netns.ip("link set eth0 down").unwrap();
    world.hosts[0].netns.ip("neigh flush dev eth0").unwrap();
    page.wait(&format!("document.querySelector({row:?}).dataset.state === 'unresolved'"));
    assert!(page.text(&cell(1)).contains("192.168.64.2 does not answer ARP on eth0"), "{}", page.text(&cell(1)));
    page.wait(&format!(
        "document.querySelector('#troubles').innerText.includes('{subnet} by 192.168.64.2 does not answer')"
    ));
    drop(ping);
    assert!(page.text(".picture .bad text").contains(&subnet), "{}", page.text(".picture"));

    // Nothing is shown as current that is not: of an agent that hangs, and of one that is gone.
    let agent = world.hosts[0].agent.as_ref().unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    page.wait("document.body.className === 'stale'");
    assert!(page.text("#stale").starts_with("The agent has not answered since "), "{}", page.text("#stale"));
    assert_eq!(
        (page.text("#well"), page.text("#troubles")),
        ("not known: the agent does not answer".into(), "".into())
    );
    assert!(page.value("getComputedStyle(document.querySelector('main')).opacity").as_str().unwrap() < "0.5");
    agent.signal(Signal::SIGCONT).unwrap();
    page.wait("document.body.className === 'live'");
    world.hosts[0].agent = None;
    page.wait("document.body.className === 'stale'");
    world.start(0, &[FLAG]);
    page.wait("document.body.className === 'live' && document.querySelector('#verdict').classList.contains('trouble')");
    assert_eq!(page.value("document.querySelector('#stale').hidden"), true);
    assert_eq!(page.value("wrong"), Value::Array(Vec::new()));
}

#[test]
fn of_thousands_of_peers_the_worst_and_the_busiest_are_shown_and_all_can_be_looked_for() {
    let world = World::new(1).with_ready_agents(&[FLAG]);
    let key = format!("{PREFIX}/subnets/10.5.7.0-24");
    world.store.put(&key, &lease_value("192.168.64.77", "0a:00:00:00:00:02")).unwrap();
    // The agent's one peer, thousands of times.
    let multiplied = format!(
        "{KEEP_ERRORS}
        const ask = fetch;
        let round = 0;
        globalThis.fetch = async (...arguments) => {{
            const overview = await (await ask(...arguments)).json();
            const [overlay] = overview.overlays;
            const [peer] = overlay?.peers ?? [];
            round += 1;
            if (peer) overlay.peers = Array.from({{ length: 5000 }}, (_, number) => ({{
                ...peer,
                state: number === 4321 ? 'noRoute' : 'ok',
                reason: number === 4321 ? 'planted' : '',
                subnet: `10.${{100 + (number >> 8)}}.${{number & 255}}.0/24`,
                sent: {{ packets: round * 10, bytes: number === 4000 ? round * 1e9 : 0 }},
            }}));
            return {{ ok: true, json: async () => overview }};
        }};"
    );
    let mut page = Browser::open(&world.hosts[0].netns, URL, &multiplied);
    let subnets = "[...document.querySelectorAll('.peers tbody tr')].map((row) => row.dataset.subnet)";
    page.wait("document.querySelectorAll('.peers tbody tr').length === 200");
    page.wait(&format!("{subnets}.slice(0, 2).join() === '10.116.225.0/24,10.115.160.0/24'"));
    assert_eq!(page.text(".more"), "and 4,800 more with less trouble and traffic");
    assert_eq!(page.text(".counts"), "1 no route, 4,999 ok");
    let mut look_for = |words: &str| {
        let script = format!(
            "(() => {{ const input = document.querySelector('input'); input.value = {words:?};
            input.dispatchEvent(new Event('input')); return {subnets}.join(); }})()"
        );
        page.value(&script).as_str().unwrap().to_owned()
    };
    assert_eq!(look_for("planted"), "10.116.225.0/24");
    assert_eq!(look_for("No Route"), "10.116.225.0/24");
    // A pod's.
    assert_eq!(look_for("10.100.3.17"), "10.100.3.0/24");
    assert_eq!(look_for("nothing of this"), "");
    assert_eq!(page.text(".more"), "No peer matches.");
    assert_eq!(page.value("wrong"), Value::Array(Vec::new()));
}

#[test]
fn only_who_asks_for_this_host_is_answered() {
    let mut world = World::new(1);
    world.start(0, &[FLAG]);
    world.hosts[0].wait_ready().unwrap();
    let netns = &world.hosts[0].netns;
    let (head, body) = ask(netns, LOOPBACK, "GET / HTTP/1.1\nHost: localhost:8471").unwrap();
    assert!(head.starts_with("http/1.1 200") && body.starts_with("<!DOCTYPE html>"), "{head}");
    for header in [
        "content-security-policy: default-src 'none'; script-src 'self';",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
        "content-type: text/html",
    ] {
        assert!(head.contains(header), "{header}: {head}");
    }
    assert!(!body.contains("<script>") && !body.contains("style=") && !body.contains("http:"), "{body}");
    let overview = "GET /api/v1/overview HTTP/1.1\nHost:";
    for (request, expected) in [
        (format!("{overview} 127.0.0.1:8471"), 200),
        (format!("{overview} [::1]:1"), 200),
        ("HEAD /api/v1/overview HTTP/1.1\nHost: localhost".to_owned(), 200),
        (format!("{overview} rebound.example:8471"), 421),
        (format!("{overview} localhost.rebound.example"), 421),
        // The connection did not come to that.
        (format!("{overview} 192.168.64.1:8471"), 421),
        ("GET http://rebound.example/api/v1/overview HTTP/1.1\nHost: localhost".to_owned(), 421),
        ("GET /api/v1/overview HTTP/1.0".to_owned(), 400),
        ("POST / HTTP/1.1\nHost: localhost\nContent-Length: 0".to_owned(), 405),
        ("DELETE /api/v1/overview HTTP/1.1\nHost: localhost".to_owned(), 405),
        ("OPTIONS /api/v1/overview HTTP/1.1\nHost: localhost\nOrigin: http://a".to_owned(), 405),
        ("GET /elsewhere HTTP/1.1\nHost: localhost".to_owned(), 404),
    ] {
        assert_eq!(code(netns, LOOPBACK, &request), expected, "{request}");
    }
    let (head, body) = ask(netns, LOOPBACK, "HEAD / HTTP/1.1\nHost: localhost").unwrap();
    assert!(body.is_empty() && head.contains("content-length: "), "{head}");
    let (head, _) = ask(netns, LOOPBACK, "POST / HTTP/1.1\nHost: localhost").unwrap();
    assert!(head.contains("allow: get, head") && !head.contains("access-control"), "{head}");

    // By loopback only, unless another address is written out.
    let address = SocketAddr::from((world.hosts[0].address, PORT));
    let on_host = "GET /api/v1/overview HTTP/1.1\nHost: 192.168.64.1:8471";
    assert_eq!(ask(netns, address, on_host), None);
    assert!(!world.hosts[0].agent.as_ref().unwrap().log().contains("is no loopback address"));
    world.start(0, &[&format!("--http-ui={address}")]);
    wait_for("an answer", SOON, || ask(&world.hosts[0].netns, address, on_host).is_some()).unwrap();
    assert_eq!(code(&world.hosts[0].netns, address, on_host), 200);
    assert_eq!(code(&world.hosts[0].netns, address, &on_host.replace("64.1:", "64.2:")), 421);
    world
        .wait_log(0, "--http-ui=192.168.64.1:8471 is no loopback address: who reaches it sees leases, peers and drops");
}

#[test]
fn what_it_shows_is_what_the_commands_print_and_is_read_once_for_all() {
    let mut world = World::without_config(1);
    world.start(0, &[FLAG]);
    let overview = |world: &World| -> Option<Value> {
        let (_, body) = ask(&world.hosts[0].netns, LOOPBACK, "GET /api/v1/overview HTTP/1.1\nHost: localhost")?;
        Some(serde_json::from_str(&body).unwrap())
    };
    let waits = || overview(&world).is_some_and(|overview| overview["waiting"][0]["reason"].is_string());
    wait_for("an agent that waits", SOON, waits).unwrap();
    let told = overview(&world).unwrap();
    assert_eq!((&told["isWell"], &told["overlays"]), (&Value::Bool(false), &Value::Array(Vec::new())));
    world.store.put(&format!("{PREFIX}/config"), crate::world::CONFIG).unwrap();
    world.hosts[0].wait_ready().unwrap();
    let key = format!("{PREFIX}/subnets/10.5.7.0-24");
    world.store.put(&key, &lease_value("192.168.64.77", "0a:00:00:00:00:02")).unwrap();
    let has_peer = || overview(&world).is_some_and(|overview| overview["overlays"][0]["peers"][0].is_object());
    wait_for("the peer", SOON, has_peer).unwrap();
    assert_eq!(overview(&world).unwrap()["apiVersion"], "flannel-agent/v1");
    let mut last = (Value::Null, Value::Null, Value::Null);
    let waited = wait_for("the same of all", SOON, || {
        let text = xtask::process::output(world.agent_on(0).args(["peers", "-o", "json"])).unwrap();
        let peers: Value = serde_json::from_str(&text).unwrap();
        last = (overview(&world).unwrap(), world.status(0), peers);
        let (told, status, peers) = (&last.0["overlays"][0], &last.1, &last.2["overlays"][0]);
        (&told["troubles"], &told["peers"]) == (&status["troubles"], &peers["peers"]) && last.0["isWell"] == true
    });
    assert!(waited.is_ok(), "{last:#?}");

    // Eight at once are told of few readings.
    let netns = &world.hosts[0].netns;
    let started = std::time::Instant::now();
    let mut readings: Vec<_> = std::thread::scope(|scope| {
        let asking = (0..8).map(|_| {
            scope.spawn(|| (0..8).map(|_| overview(&world).unwrap()["elapsedMs"].clone()).collect::<Vec<_>>())
        });
        let asking: Vec<_> = asking.collect();
        asking.into_iter().flat_map(|asked| asked.join().unwrap()).map(|elapsed| elapsed.as_u64().unwrap()).collect()
    });
    readings.sort_unstable();
    readings.dedup();
    let most = 1 + started.elapsed().as_millis() as usize / 900 + 1;
    assert!(readings.len() <= most, "{readings:?}");

    // The machine of a lab reaches it by a port of its own.
    let forward = Forward::start(netns, 0, LOOPBACK).unwrap();
    let (head, body) = answer(forward.address(), "GET / HTTP/1.1\nHost: 127.0.0.1").unwrap();
    assert!(head.starts_with("http/1.1 200") && body.contains("/page.js"), "{head}");
    let address = forward.address();
    drop(forward);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_port_that_is_taken_is_said_in_a_line_and_costs_the_pods_nothing() {
    let mut world = World::with_agents(2);
    world.wait_connected(0, 1);
    let _listener = within(&world.hosts[0].netns, || TcpListener::bind(LOOPBACK).unwrap());
    let traffic = world.traffic(0, 1);
    world.start(0, &[FLAG]);
    assert_eq!(world.hosts[0].agent.as_mut().unwrap().wait(SOON).unwrap().code(), Some(1));
    let log = world.hosts[0].agent.as_ref().unwrap().log();
    let errors: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{log}");
    assert!(
        errors[0].contains("listen at 127.0.0.1:8471 for the page: ") && errors[0].ends_with("check --http-ui"),
        "{log}"
    );
    traffic.assert_nothing_was_lost();
}

/// Has an agent see a name of its own of the host, as in a container.
fn named(name: &str, command: &Command) -> Command {
    let mut named = Command::new("unshare");
    named.args(["--uts", "sh", "-c", "hostname \"$0\"; exec \"$@\"", name]);
    named.arg(command.get_program()).args(command.get_args());
    named
}

#[test]
#[ignore = "draws the picture of docs/page.md"]
fn picture() {
    const HOSTS: u8 = 6;
    let mut world = World::new(HOSTS).ready(&[]);
    let store = world.store.endpoint().to_owned();
    let mut command = world.hosts[0].agent_command(&agent());
    command.args(["--etcd-endpoints", &store, FLAG]);
    let log = world.lab.directory().join("node1.log");
    world.hosts[0].agent = None;
    world.hosts[0].agent = Some(Process::start(&mut named("node1", &command), &log).unwrap());
    let mut traffic = Vec::new();
    for (host, rate) in [(1, "400M"), (2, "25M"), (3, "900k"), (5, "60k")] {
        world.wait_connected(0, host);
        let [from, to] = [0, host].map(|host| &world.hosts[host].pods[0]);
        let log = |what: &str| world.lab.directory().join(format!("{what}{host}.log"));
        let mut server = to.netns.command("iperf3");
        traffic.push(Process::start(server.args(["-s", "-1"]), &log("server")).unwrap());
        let listens = || to.netns.exec("ss -Hltn sport = 5201").is_ok_and(|text| !text.trim().is_empty());
        wait_for("the server", SOON, listens).unwrap();
        let mut client = from.netns.command("iperf3");
        client.args(["-c", &to.address.to_string(), "-t", "120", "-l", "8k", "-b", rate]);
        client.args(if host == 2 { &["-R"][..] } else { &[] });
        traffic.push(Process::start(&mut client, &log("client")).unwrap());
    }
    world.wait_connected(0, 4);
    let lost = world.hosts[4].pods[0].address.to_string();
    let mut page = Browser::open(&world.hosts[0].netns, URL, KEEP_ERRORS);
    let mut ping = world.hosts[0].pods[0].netns.command("ping");
    let log = world.lab.directory().join("lost.log");
    traffic.push(Process::start(ping.args(["-i", "0.2", &lost]), &log).unwrap());
    world.hosts[4].netns.ip("link set eth0 down").unwrap();
    world.hosts[0].netns.ip("neigh flush to 192.168.64.5").unwrap();
    // No host of the overlay sends this, and no pod that.
    let stranger = within(&world.lab.underlay, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap());
    let pod = within(&world.hosts[0].pods[0].netns, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap());
    let mut vxlan = vec![8, 0, 0, 0, 0, 0, 1, 0];
    let inner =
        PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 5, 1, 2], world.hosts[0].pods[0].address.octets(), 64);
    inner.udp(40_000, 53).write(&mut vxlan, b"forged").unwrap();
    let mut round = 0_u32;
    // Until a sparkline is half drawn.
    let is_drawn = "document.querySelector('#troubles').innerText.includes('does not answer')
        && document.querySelector('tr[data-state=ok] .line').getAttribute('d').split(',').length > 30";
    wait_for("what is drawn", 3 * SOON, || {
        round += 1;
        if round.is_multiple_of(40) {
            stranger.send_to(&vxlan, (world.hosts[0].address, 8472)).unwrap();
        }
        if round.is_multiple_of(200) {
            pod.send_to(&vxlan, (world.hosts[1].address, 8472)).unwrap();
        }
        page.holds(is_drawn)
    })
    .unwrap();
    let docs = workspace().join("flannel-agent/docs");
    page.picture(&docs.join("page.png"), 1280, "light");
    for (width, scheme) in [(800, "light"), (1600, "dark")] {
        page.picture(&std::env::temp_dir().join(format!("page-{width}-{scheme}.png")), width, scheme);
    }
}
