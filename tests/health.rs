//! What probes and the service manager are told.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixDatagram,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use xtask::{lab::PREFIX, process::Process, progress::wait_for};

use crate::{
    sockets::within,
    world::{CONFIG, SOON, World, agent},
};

const PORT: u16 = 8081;
/// The time after which a loop that is not heard hangs.
const SILENCE: Duration = Duration::from_secs(30);

/// Status and body; [`None`] without an answer.
fn probe(world: &World, path: &str) -> Option<(u16, String)> {
    let address = SocketAddr::from((world.hosts[0].address, PORT));
    let path = path.to_owned();
    within(&world.hosts[0].netns, move || {
        let limit = Duration::from_secs(1);
        let mut stream = TcpStream::connect_timeout(&address, limit).ok()?;
        stream.set_read_timeout(Some(limit)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node1\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    })
}

fn assert_probes(world: &World, healthz: u16, readyz: u16) {
    let answers = [probe(world, "/healthz"), probe(world, "/readyz")];
    let codes = answers.each_ref().map(|answer| answer.as_ref().map(|(code, _)| *code));
    assert_eq!(codes, [Some(healthz), Some(readyz)], "{answers:?}");
}

#[test]
fn a_store_that_is_away_fails_no_probe() {
    let mut world = World::without_config(1);
    world.store.stop();
    let port = format!("--healthz-port={PORT}");
    world.start(0, &[&port]);
    wait_for("an answer", SOON, || probe(&world, "/healthz").is_some()).unwrap();
    world.wait_log(0, "trying again");
    assert_eq!(probe(&world, "/healthz"), Some((200, "flanneld is running".to_owned())));
    assert_eq!(probe(&world, "/readyz"), Some((503, "flanneld is not ready yet".to_owned())));
    let (code, metrics) = probe(&world, "/metrics").unwrap();
    assert_eq!(code, 200);
    for line in ["flannel_agents_waiting 1", "flannel_agent_healthy 1", "flannel_agent_ready 0"] {
        assert!(metrics.lines().any(|told| told == line), "{line}: {metrics}");
    }
    assert!(!metrics.contains("vni="), "{metrics}");
    assert_eq!(probe(&world, "/elsewhere").map(|(code, _)| code), Some(404));

    world.store.resume().unwrap();
    world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    wait_for("readiness", SOON, || probe(&world, "/readyz").is_some_and(|(code, _)| code == 200)).unwrap();
    assert_eq!(probe(&world, "/readyz"), Some((200, "flanneld is ready".to_owned())));
    assert!(world.hosts[0].run_dir().join("subnet.env").exists());

    // It neither answers nor refuses. Longer than a loop may be silent.
    world.wait_status(0, "to be followed", |status| status["store"]["following"] == true);
    world.store.pause().unwrap();
    let start = Instant::now();
    while start.elapsed() < SILENCE + Duration::from_secs(5) {
        assert_probes(&world, 200, 200);
    }
    world.store.kill().unwrap();
    world.wait_status(0, "to be away", |status| status["store"]["following"] == false);
    assert_probes(&world, 200, 200);

    let agent = world.hosts[0].agent.as_ref().unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    assert_eq!(probe(&world, "/healthz"), None);
    agent.signal(Signal::SIGCONT).unwrap();
    wait_for("an answer", SOON, || probe(&world, "/healthz").is_some_and(|(code, _)| code == 200)).unwrap();
}

#[test]
fn an_address_that_is_taken_is_said() {
    let mut world = World::new(1);
    let port = format!("--healthz-port={PORT}");
    let taken = SocketAddr::from((world.hosts[0].address, PORT));
    let _listener = within(&world.hosts[0].netns, move || std::net::TcpListener::bind(taken).unwrap());
    world.start(0, &[&port]);
    assert_eq!(world.hosts[0].agent.as_mut().unwrap().wait(SOON).unwrap().code(), Some(1));
    world.wait_log(0, "listen at 0.0.0.0:8081 for health probes and scrapes");
    world.assert_untouched(0);
}

#[test]
fn the_service_manager_hears_of_readiness_and_then_of_life() {
    let mut world = World::without_config(1);
    let path = world.lab.directory().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let hear = |limit: Duration| {
        manager.set_read_timeout(Some(limit)).unwrap();
        let mut message = [0; 256];
        let len = manager.recv(&mut message).ok()?;
        Some(String::from_utf8_lossy(&message[..len]).into_owned())
    };
    let mut command = world.hosts[0].agent_command(&agent());
    command.args(["--etcd-endpoints", world.store.endpoint()]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "1000000");
    let log = world.lab.directory().join("notify.log");
    world.hosts[0].agent = Some(Process::start(&mut command, &log).unwrap());
    world.wait_log(0, "trying again");
    assert_eq!(hear(Duration::from_millis(1500)), None, "there is no network config yet");

    world.store.put(&format!("{PREFIX}/config"), CONFIG).unwrap();
    assert_eq!(hear(SOON).as_deref(), Some("READY=1\n"));
    assert!(world.hosts[0].run_dir().join("subnet.env").exists());
    let pins = std::fs::read_dir(world.hosts[0].pin_dir().join("1")).unwrap().flatten();
    let attached = pins.filter(|pin| pin.file_name().to_string_lossy().starts_with("to_overlay-"));
    assert_eq!(attached.count(), 1, "the programs are attached");

    let limit = Duration::from_secs(1);
    let hear_of_life = |count: usize| {
        for _ in 0..count {
            assert_eq!(hear(limit).as_deref(), Some("WATCHDOG=1\n"));
        }
    };
    hear_of_life(4);
    world.store.kill().unwrap();
    hear_of_life(4);

    let agent = world.hosts[0].agent.as_ref().unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    // One may have been on its way.
    let _before = hear(Duration::from_millis(10));
    assert_eq!(hear(2 * limit), None);
    agent.signal(Signal::SIGCONT).unwrap();
    hear_of_life(2);
}
