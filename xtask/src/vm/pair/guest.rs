//! The machine's side: does what it is asked by its serial port, with what the lab is made of.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddrV4,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{
    echo,
    protocol::{Answer, Place, Request},
    store_endpoint,
};
use crate::{
    lab::{
        Host, Netns, Pod, Store, address,
        services::{Service, ServiceRules},
    },
    process::Process,
};

/// What the machine is told when it boots.
#[derive(clap::Args)]
pub struct GuestOptions {
    /// Which of the two it is
    number: u8,
    /// The port that it is asked by
    port: PathBuf,
    /// The agent
    agent: PathBuf,
    /// Folder on its disk, for what outlasts a reset
    disk: PathBuf,
}

/// A machine.
struct Guest {
    host: Host,
    store: Option<Store>,
    agent: PathBuf,
}

/// Folder for what a reset takes.
const MEMORY: &str = "/run/pair";
const PINS: &str = "/sys/fs/bpf/flannel";

/// Does what is asked, until the machine ends.
///
/// # Errors
/// Where it can't be asked.
pub fn guest(options: &GuestOptions) -> Result<()> {
    let mut guest = Guest::new(options)?;
    let mut port = File::options().read(true).write(true).open(&options.port).context("open the serial port")?;
    let requests = BufReader::new(port.try_clone()?).lines();
    let mut answer = |answer: Answer| -> Result<()> {
        let line = format!("{}\n", serde_json::to_string(&answer)?);
        port.write_all(line.as_bytes()).context("answer")
    };
    answer(Ok(guest.host.name.clone()))?;
    for request in requests {
        let request = serde_json::from_str(&request.context("read a request")?)?;
        answer(guest.answer(request).map_err(|error| format!("{error:#}")))?;
    }
    Ok(())
}

impl Guest {
    fn new(options: &GuestOptions) -> Result<Self> {
        fs::create_dir_all(MEMORY).with_context(|| format!("create {MEMORY}"))?;
        let name = format!("node{}", options.number);
        // The machine's own namespace, by a name as those of a lab have.
        let netns = Netns::attach(&name, Path::new("/proc/1/ns/net"))?;
        let address = address(options.number);
        netns.ip(&format!("address add {address}/24 dev eth0"))?;
        netns.ip("link set eth0 up")?;
        fs::create_dir_all(options.disk.join(&name))
            .with_context(|| format!("create a folder in {:?}", options.disk))?;
        let host = Host::new(netns, &name, address, Default::default(), &options.disk, PINS.into());
        Ok(Self { host, store: None, agent: options.agent.clone() })
    }

    fn answer(&mut self, request: Request) -> Result<String> {
        const DONE: String = String::new();
        match request {
            Request::Exec(place, line) => match place {
                Place::Host => self.host.netns.exec(&line),
                Place::Pod => self.pod()?.netns.exec(&line),
            },
            Request::Agent(line) => {
                let mut command = self.host.agent_command(&self.agent);
                let output = command.args(line.split_whitespace()).output().context("start the agent")?;
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            }
            Request::StartAgent(arguments) => self.start_agent(&arguments).map(|()| DONE),
            Request::AgentLog => Ok(self.host.agent.as_ref().map(Process::log).unwrap_or_default()),
            Request::StartStore => self.start_store().map(|()| DONE),
            Request::StopStore => {
                self.store()?.stop();
                Ok(DONE)
            }
            Request::Put(key, value) => self.store()?.put(&key, &value).map(|()| DONE),
            Request::AddPod(port) => {
                self.host.set_cluster_rules()?;
                let pod = self.host.add_pod()?;
                echo::serve(pod, port)?;
                Ok(pod.address.to_string())
            }
            Request::Service(service, pod) => self.set_service(service, pod).map(|()| DONE),
            Request::Tcp(to, len) => echo::call(self.pod()?, to, len),
            Request::Udp(to, size, count) => echo::ask(self.pod()?, to, size, count),
            // Nothing is written to the disk, and no process ends.
            Request::Reset => fs::write("/proc/sysrq-trigger", "b").map(|()| DONE).context("reset the machine"),
        }
    }

    fn pod(&self) -> Result<&Pod> {
        self.host.pods.first().context("there is no pod yet")
    }

    fn store(&mut self) -> Result<&mut Store> {
        self.store.as_mut().context("etcd was not started yet")
    }

    fn start_store(&mut self) -> Result<()> {
        match &mut self.store {
            Some(store) => store.resume(),
            None => {
                let store = Store::start_with(&self.host.netns, &store_endpoint(), Path::new(MEMORY), &[])?;
                self.store = Some(store);
                Ok(())
            }
        }
    }

    fn start_agent(&mut self, arguments: &str) -> Result<()> {
        self.host.agent = None;
        let mut command = self.host.agent_command(&self.agent);
        command.args(["--etcd-endpoints", &store_endpoint(), "--iface=eth0"]).args(arguments.split_whitespace());
        self.host.agent = Some(Process::start(&mut command, &Path::new(MEMORY).join("agent.log"))?);
        Ok(())
    }

    fn set_service(&self, address: SocketAddrV4, pod: SocketAddrV4) -> Result<()> {
        let service = |protocol| Service { name: "echo", protocol, address, node_port: None, endpoints: vec![pod] };
        ServiceRules::Iptables.set(&self.host, &["tcp", "udp"].map(service))
    }
}
