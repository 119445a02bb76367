//! A container runtime, as far as CNI goes: it runs the plugins of a network in their order, with their own previous
//! result each, and in the reverse order to detach (CNI SPEC.md, section 3).

use std::{
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Host, Netns};

/// Where distributions put the plugins of containernetworking-plugins.
const FOLDERS: [&str; 3] = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];
/// The interface of a pod.
const IFNAME: &str = "eth0";

/// What a plugin asks for the annotations of a pod by, of containerd and CRI-O.
pub const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// The folder of the plugins that ours delegates to, `bridge` and `host-local`, where they are installed.
pub fn delegates() -> Option<&'static Path> {
    let has_both = |folder: &&Path| ["bridge", "host-local"].iter().all(|plugin| folder.join(plugin).exists());
    FOLDERS.into_iter().map(Path::new).find(has_both)
}

/// What a plugin said.
#[derive(Debug)]
pub struct Reply {
    /// Its exit code.
    pub code: Option<i32>,
    /// The result or error result.
    pub output: String,
    /// What it wrote to standard error.
    pub log: String,
}

impl Reply {
    /// What it said where it succeeded.
    ///
    /// # Errors
    /// Where it did not.
    pub fn into_output(self) -> Result<String> {
        anyhow::ensure!(self.code == Some(0), "the plugin failed: {self:?}");
        Ok(self.output)
    }
}

/// The runtime of a host.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// The host's namespace.
    netns: String,
    /// Of what the plugins keep: `state`, `addresses`.
    pub directory: PathBuf,
    /// The agent's.
    pub subnet_file: PathBuf,
    /// Where plugins are looked for: `CNI_PATH`.
    pub path: String,
    /// The network's `cniVersion`.
    pub version: String,
    /// The plugins of the network.
    pub plugins: Vec<Value>,
    /// What the runtime tells all plugins that ask for it, of port mappings.
    pub port_mappings: Value,
    /// What it tells those that ask for a pod's annotations.
    pub annotations: Value,
}

impl Runtime {
    /// With the network that flannel's manifest has: our plugin, which is in the folder `ours`, then `portmap`.
    ///
    /// # Errors
    /// Where the plugins that it delegates to are not installed.
    pub fn new(host: &Host, ours: &Path) -> Result<Self> {
        let delegates = delegates().context("`cargo xtask setup` installs containernetworking-plugins")?;
        let directory = host.directory().join("cni");
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
        Ok(Self {
            netns: host.netns.path(),
            path: format!("{}:{}", ours.display(), delegates.display()),
            version: "1.0.0".to_owned(),
            directory,
            subnet_file,
            plugins,
            port_mappings: json!([]),
            annotations: json!({}),
        })
    }

    /// The same without `portmap`.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.plugins.truncate(1);
        self
    }

    /// The configuration of one plugin, for one run of it.
    pub fn conf(&self, plugin: usize, previous: Option<&Value>) -> Value {
        let mut conf = self.plugins[plugin].clone();
        conf["name"] = "cbr0".into();
        conf["cniVersion"] = self.version.clone().into();
        for (capability, value) in [("portMappings", &self.port_mappings), (POD_ANNOTATIONS, &self.annotations)] {
            if conf["capabilities"][capability] == true {
                conf["runtimeConfig"][capability] = value.clone();
            }
        }
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        conf
    }

    /// Runs a plugin. An empty variable is left out.
    ///
    /// # Errors
    /// Where it can't be run.
    pub fn run(&self, plugin: &str, variables: &[(&str, &str)], input: &[u8]) -> Result<Reply> {
        let file = std::env::split_paths(&self.path).map(|path| path.join(plugin)).find(|file| file.exists());
        let file = file.with_context(|| format!("no plugin {plugin} in {}", self.path))?;
        let mut command = std::process::Command::new("nsenter");
        command.arg(format!("--net={}", self.netns)).arg("--").arg(file);
        command.envs(variables.iter().filter(|(_, value)| !value.is_empty()).copied());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // Some end without reading it.
            let _unread = stdin.write_all(input);
        }
        let output = child.wait_with_output()?;
        let (text, log) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        Ok(Reply { code: output.status.code(), output: text, log })
    }

    /// Runs one plugin of the network.
    ///
    /// # Errors
    /// Where it can't be run.
    pub fn call(
        &self,
        command: &str,
        plugin: usize,
        id: &str,
        netns: &str,
        ifname: &str,
        previous: Option<&Value>,
    ) -> Result<Reply> {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", ifname),
            ("CNI_PATH", &self.path),
        ];
        let conf = self.conf(plugin, previous);
        self.run(conf["type"].as_str().unwrap_or_default(), &variables, conf.to_string().as_bytes())
    }

    /// Attaches a container to the network; the result.
    ///
    /// # Errors
    /// Where a plugin fails.
    pub fn add(&self, id: &str, netns: &Netns) -> Result<Value> {
        let mut result = None;
        for plugin in 0..self.plugins.len() {
            let reply = self.call("ADD", plugin, id, &netns.path(), IFNAME, result.as_ref())?;
            result = Some(serde_json::from_str(&reply.into_output()?)?);
        }
        result.context("the network has no plugin")
    }

    /// Detaches it; `netns` is empty where the container is gone. What the plugins said, which is to be nothing.
    ///
    /// # Errors
    /// Where a plugin fails.
    pub fn del(&self, id: &str, netns: &str, result: Option<&Value>) -> Result<String> {
        let plugins = (0..self.plugins.len()).rev();
        plugins.map(|plugin| self.call("DEL", plugin, id, netns, IFNAME, result)?.into_output()).collect()
    }
}

/// The address in a result.
///
/// # Errors
/// Where there is none.
pub fn address(result: &Value) -> Result<Ipv4Addr> {
    let address = result["ips"][0]["address"].as_str().and_then(|text| text.split('/').next());
    Ok(address.with_context(|| format!("no address in {result}"))?.parse()?)
}
