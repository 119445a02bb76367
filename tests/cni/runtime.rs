//! The lab's container runtime, with what a test expects of it.

use std::{
    fs,
    net::Ipv4Addr,
    ops::{Deref, DerefMut},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use serde_json::Value;
use xtask::{
    lab::{
        Host, Netns, Pod,
        cni::{self, Reply},
    },
    progress::wait_for,
};

use crate::world::{SOON, agent};

/// The folder of the delegates.
pub fn delegates() -> &'static str {
    cni::delegates().expect("`cargo xtask setup` installs containernetworking-plugins").to_str().unwrap()
}

/// What a test expects of a plugin.
pub trait Expected {
    /// The result, or the error result.
    fn json(&self) -> Value;

    /// That it succeeded.
    fn succeeded(self) -> Self;

    /// That it failed with this code of the error result, and these words in it; nothing else is on its output.
    fn failed(&self, code: u64, words: &str);
}

impl Expected for Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.output).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    #[track_caller]
    fn failed(&self, code: u64, words: &str) {
        assert_ne!(self.code, Some(0), "{self:?}");
        let result = self.json();
        assert_eq!(result["code"], code, "{self:?}");
        assert!(result["msg"].as_str().unwrap().contains(words), "{self:?}");
    }
}

/// The runtime of a host.
pub struct Runtime(cni::Runtime);

impl Deref for Runtime {
    type Target = cni::Runtime;

    fn deref(&self) -> &cni::Runtime {
        &self.0
    }
}

impl DerefMut for Runtime {
    fn deref_mut(&mut self) -> &mut cni::Runtime {
        &mut self.0
    }
}

impl Runtime {
    /// With the network that flannel's manifest has: this plugin, then `portmap`.
    pub fn new(host: &Host) -> Self {
        Self(cni::Runtime::new(host, agent().parent().unwrap()).unwrap())
    }

    /// The same without `portmap`.
    pub fn alone(host: &Host) -> Self {
        Self(Self::new(host).0.alone())
    }

    /// Sets a key of this plugin's configuration.
    pub fn set(&mut self, key: &str, value: Value) {
        self.plugins[0][key] = value;
    }

    /// A plugin in a shell's language, before all others of its name.
    pub fn script(&mut self, name: &str, script: &str) {
        let directory = self.directory.join("scripts");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        if !self.path.contains(directory.to_str().unwrap()) {
            self.path = format!("{}:{}", directory.display(), self.path);
        }
    }

    /// Runs a plugin. An empty variable is left out.
    pub fn run(&self, plugin: &str, variables: &[(&str, &str)], input: &[u8]) -> Reply {
        self.0.run(plugin, variables, input).unwrap()
    }

    /// Runs one plugin of the network.
    pub fn call(
        &self,
        command: &str,
        plugin: usize,
        id: &str,
        netns: &str,
        ifname: &str,
        previous: Option<&Value>,
    ) -> Reply {
        self.0.call(command, plugin, id, netns, ifname, previous).unwrap()
    }

    /// This plugin's ADD of `eth0` alone.
    pub fn add_alone(&self, id: &str, netns: &str) -> Reply {
        self.call("ADD", 0, id, netns, "eth0", None)
    }

    /// This plugin's DEL of `eth0` alone.
    pub fn del_alone(&self, id: &str, netns: &str) -> Reply {
        self.call("DEL", 0, id, netns, "eth0", None)
    }

    /// That all plugins find it attached as it should be.
    #[track_caller]
    pub fn check(&self, id: &str, netns: &Netns, result: &Value) {
        for plugin in 0..self.plugins.len() {
            let reply = self.call("CHECK", plugin, id, &netns.path(), "eth0", Some(result));
            assert!(reply.code == Some(0) && reply.output.is_empty(), "{}: {reply:?}", self.plugins[plugin]["type"]);
        }
    }

    /// Detaches it; `netns` is empty where the container is gone.
    pub fn del(&self, id: &str, netns: &str, result: Option<&Value>) {
        assert_eq!(self.0.del(id, netns, result).unwrap(), "");
    }

    /// What is kept of attachments, by name.
    pub fn states(&self) -> Vec<String> {
        names(&self.directory.join("state"))
    }

    /// The reserved addresses.
    pub fn addresses(&self) -> Vec<String> {
        let mut names = names(&self.directory.join("addresses/cbr0"));
        names.retain(|name| name.parse::<Ipv4Addr>().is_ok());
        names
    }

    /// That the host has no attachment left: no state, no address, no port of the bridge.
    #[track_caller]
    pub fn assert_nothing_is_left(&self, host: &Host) {
        assert_eq!(self.states(), [] as [String; 0]);
        assert_eq!(self.addresses(), [] as [String; 0]);
        // The kernel removes those of a namespace that is gone in its own time.
        let has_ports = || {
            let links = host.netns.ip_json("link show type veth").unwrap();
            links.as_array().unwrap().iter().any(|link| !link["master"].is_null())
        };
        wait_for("the bridge's ports to be gone", SOON, || !has_ports()).unwrap();
    }
}

/// Makes a namespace, and a pod of it by the runtime's plugins.
pub fn pod(runtime: &Runtime, host: &Host, id: &str) -> (Pod, Value) {
    let netns = Netns::create(&format!("{}-{id}", host.netns.name())).unwrap();
    netns.ip("link set lo up").unwrap();
    let result = runtime.add(id, &netns).unwrap();
    (Pod { address: cni::address(&result).unwrap(), netns }, result)
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
