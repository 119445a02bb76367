//! A container runtime, as far as CNI goes: it runs the plugins of a network in their order, with their own previous
//! result each, and in the reverse order to detach (CNI SPEC.md, section 3).

use std::{
    cell::RefCell,
    fs,
    io::Write as _,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::{Value, json};
use xtask::{
    lab::{Host, Netns, Pod},
    progress::wait_for,
};

use crate::world::{SOON, agent};

/// Where Debian's containernetworking-plugins are.
pub const PLUGINS: &str = "/usr/lib/cni";

/// What a plugin said.
#[derive(Debug)]
pub struct Reply {
    pub code: Option<i32>,
    pub output: String,
    pub log: String,
}

impl Reply {
    /// The result, or the error result.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.output).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// That it succeeded.
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// That it failed with this code of the error result, and these words in it; nothing else is on its output.
    #[track_caller]
    pub fn failed(&self, code: u64, words: &str) {
        assert_ne!(self.code, Some(0), "{self:?}");
        let result = self.json();
        assert_eq!(result["code"], code, "{self:?}");
        assert!(result["msg"].as_str().unwrap().contains(words), "{self:?}");
    }
}

/// The runtime of a host.
pub struct Runtime {
    netns: String,
    /// Of what the plugins keep: `state`, `addresses`.
    pub directory: PathBuf,
    pub subnet_file: PathBuf,
    pub path: String,
    pub version: String,
    /// The plugins of the network.
    pub plugins: Vec<Value>,
    /// What the runtime tells all plugins that ask for it, of port mappings.
    pub port_mappings: RefCell<Value>,
}

impl Runtime {
    /// With the network that flannel's manifest has: this plugin, then `portmap`.
    pub fn new(host: &Host) -> Self {
        assert!(Path::new(PLUGINS).join("bridge").exists(), "`cargo xtask setup` installs containernetworking-plugins");
        let directory = host.run_dir().parent().unwrap().join("cni");
        let subnet_file = host.run_dir().join("subnet.env");
        // As where the daemon masquerades. `bridge` would translate what goes to other hosts' pods too, and leave rules
        // behind where the namespace goes first.
        let delegate = json!({ "hairpinMode": true, "isDefaultGateway": true, "ipMasq": false });
        let plugins = vec![
            json!({
                "type": "flannel",
                "subnetFile": subnet_file,
                "dataDir": directory.join("state"),
                "ipam": { "dataDir": directory.join("addresses") },
                "delegate": delegate,
            }),
            json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
        ];
        Self {
            netns: host.netns.name().to_owned(),
            path: format!("{}:{PLUGINS}", agent().parent().unwrap().display()),
            version: "1.0.0".to_owned(),
            directory,
            subnet_file,
            plugins,
            port_mappings: json!([]).into(),
        }
    }

    /// The same without `portmap`.
    pub fn alone(host: &Host) -> Self {
        let mut runtime = Self::new(host);
        runtime.plugins.truncate(1);
        runtime
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

    /// The configuration of one plugin, for one run of it.
    pub fn conf(&self, plugin: usize, previous: Option<&Value>) -> Value {
        let mut conf = self.plugins[plugin].clone();
        conf["name"] = "cbr0".into();
        conf["cniVersion"] = self.version.clone().into();
        if conf["capabilities"]["portMappings"] == true {
            conf["runtimeConfig"] = json!({ "portMappings": *self.port_mappings.borrow() });
        }
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        conf
    }

    /// Runs a plugin. An empty variable is left out.
    pub fn run(&self, plugin: &str, variables: &[(&str, &str)], input: &[u8]) -> Reply {
        let file = std::env::split_paths(&self.path).map(|path| path.join(plugin)).find(|file| file.exists()).unwrap();
        let mut command = std::process::Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns)).arg("--").arg(file);
        command.envs(variables.iter().filter(|(_, value)| !value.is_empty()).copied());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Some end without reading it.
        let _unread = child.stdin.take().unwrap().write_all(input);
        let output = child.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Reply { code: output.status.code(), output: text(output.stdout), log: text(output.stderr) }
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
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", ifname),
            ("CNI_PATH", &self.path),
        ];
        let conf = self.conf(plugin, previous);
        self.run(conf["type"].as_str().unwrap(), &variables, conf.to_string().as_bytes())
    }

    /// This plugin's ADD of `eth0` alone.
    pub fn add_alone(&self, id: &str, netns: &str) -> Reply {
        self.call("ADD", 0, id, netns, "eth0", None)
    }

    /// This plugin's DEL of `eth0` alone.
    pub fn del_alone(&self, id: &str, netns: &str) -> Reply {
        self.call("DEL", 0, id, netns, "eth0", None)
    }

    /// Attaches a container to the network; the result.
    pub fn add(&self, id: &str, netns: &Netns) -> Value {
        (0..self.plugins.len())
            .fold(None, |previous, plugin| {
                Some(self.call("ADD", plugin, id, &path(netns), "eth0", previous.as_ref()).succeeded().json())
            })
            .unwrap()
    }

    /// That all plugins find it attached as it should be.
    #[track_caller]
    pub fn check(&self, id: &str, netns: &Netns, result: &Value) {
        for plugin in 0..self.plugins.len() {
            let reply = self.call("CHECK", plugin, id, &path(netns), "eth0", Some(result));
            assert!(reply.code == Some(0) && reply.output.is_empty(), "{}: {reply:?}", self.plugins[plugin]["type"]);
        }
    }

    /// Detaches it; `netns` is empty where the container is gone.
    pub fn del(&self, id: &str, netns: &str, result: Option<&Value>) {
        for plugin in (0..self.plugins.len()).rev() {
            let reply = self.call("DEL", plugin, id, netns, "eth0", result).succeeded();
            assert_eq!(reply.output, "", "{reply:?}");
        }
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

/// Where a namespace is.
pub fn path(netns: &Netns) -> String {
    format!("/run/netns/{}", netns.name())
}

/// Makes a namespace, and a pod of it by the runtime's plugins.
pub fn pod(runtime: &Runtime, host: &Host, id: &str) -> (Pod, Value) {
    let netns = Netns::create(&format!("{}-{id}", host.netns.name())).unwrap();
    netns.ip("link set lo up").unwrap();
    let result = runtime.add(id, &netns);
    (Pod { address: address(&result), netns }, result)
}

/// The address in a result.
pub fn address(result: &Value) -> Ipv4Addr {
    result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
