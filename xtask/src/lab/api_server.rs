//! A Kubernetes API server: the double that `cargo xtask api-server` is, or, where the variable `KUBE_APISERVER` names a
//! program, the real one, with the etcd that `KUBE_ETCD` names behind it. Tests see no difference but [`ApiServer::double`].

use std::{
    ffi::OsString,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::Netns;
use crate::{
    process::{Process, output, output_with_input},
    progress::wait_for,
};

const PORT: u16 = 6443;
/// A real one makes its own objects first.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The real one's store, in the same namespace.
const ETCD: &str = "http://127.0.0.1:22379";
/// What separates the body from the status in what curl prints.
const MARK: &str = "\n--status-- ";

/// Somebody with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    name: &'static str,
    group: &'static str,
}

impl User {
    /// May everything.
    pub const ADMIN: Self = Self { name: "admin", group: "system:masters" };
    /// The agent's service account, by its name in flannel's manifest.
    pub const AGENT: Self = Self { name: "system:serviceaccount:kube-flannel:flannel", group: "" };
    /// May nothing, unless it is told.
    pub const STRANGER: Self = Self { name: "stranger", group: "" };

    const ALL: [Self; 3] = [Self::ADMIN, Self::AGENT, Self::STRANGER];

    /// The name that messages give.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Without colons, for files.
    fn short(self) -> &'static str {
        self.name.rsplit(':').next().unwrap_or_default()
    }

    fn first_token(self) -> String {
        format!("{}-token", self.short())
    }
}

/// An API server.
#[derive(Debug)]
pub struct ApiServer {
    process: Option<Process>,
    etcd: Option<Process>,
    netns: String,
    address: Ipv4Addr,
    directory: PathBuf,
    arguments: Vec<String>,
}

impl ApiServer {
    /// Starts one on an address, with certificates and tokens of its own in a folder of its own, and further arguments for
    /// the double.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn start(netns: &Netns, address: Ipv4Addr, directory: &Path, arguments: &[&str]) -> Result<Self> {
        let mut server = Self {
            process: None,
            etcd: None,
            netns: netns.name().to_owned(),
            address,
            directory: directory.join("api-server"),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
        };
        fs::create_dir_all(&server.directory).with_context(|| format!("create {:?}", server.directory))?;
        server.make_certificates()?;
        server.write_tokens(&User::ALL.map(|user| (user, user.first_token())))?;
        for user in User::ALL {
            fs::write(server.token_file(user), user.first_token())?;
            fs::write(server.kubeconfig(user), server.kubeconfig_text(user))?;
        }
        server.resume()?;
        Ok(server)
    }

    /// Whether it is the double.
    pub fn is_double() -> bool {
        real().is_none()
    }

    /// Starts it again after [`Self::stop`] or [`Self::kill`].
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn resume(&mut self) -> Result<()> {
        let mut command = match real() {
            Some(program) => self.real_command(&program)?,
            None => self.double_command()?,
        };
        let mut process = Process::start(&mut command, &self.directory.join("log"))?;
        let ready = wait_for("the API server", START_LIMIT, || {
            !matches!(process.status(), Ok(None))
                || self.request(User::ADMIN, "GET", "/readyz", &[], "").is_ok_and(|(code, _)| code == 200)
        });
        anyhow::ensure!(
            ready.is_ok() && matches!(process.status(), Ok(None)),
            "the API server did not start:\n{}",
            process.log()
        );
        self.process = Some(process);
        Ok(())
    }

    fn double_command(&self) -> Result<Command> {
        let mut command = self.command(program()?);
        command
            .args(["api-server", "--listen", &format!("{}:{PORT}", self.address)])
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(["--tls-cert-file", "server.pem", "--tls-private-key-file", "server.key"])
            .args(["--token-auth-file", "tokens.csv"])
            .args(&self.arguments)
            .current_dir(&self.directory);
        Ok(command)
    }

    fn real_command(&mut self, program: &OsString) -> Result<Command> {
        if self.etcd.is_none() {
            let mut etcd = self.command(std::env::var_os("KUBE_ETCD").unwrap_or_else(|| "etcd".into()));
            etcd.arg("--data-dir").arg(self.data_dir());
            etcd.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
            etcd.args(["--listen-peer-urls", "http://127.0.0.1:0"]);
            self.etcd = Some(Process::start(&mut etcd, &self.directory.join("etcd.log"))?);
        }
        let mut command = self.command(program);
        command
            .args(["--etcd-servers", ETCD, "--bind-address", &self.address.to_string()])
            .args(["--secure-port", &PORT.to_string(), "--cert-dir", "."])
            .args(["--tls-cert-file", "server.pem", "--tls-private-key-file", "server.key"])
            .args(["--token-auth-file", "tokens.csv", "--anonymous-auth=false", "--authorization-mode=RBAC"])
            // Neither is there: who would make the accounts, and the nodes' taints.
            .arg("--disable-admission-plugins=ServiceAccount,TaintNodesByCondition")
            .args(["--service-account-issuer", "https://kubernetes.default.svc"])
            .args(["--service-account-key-file", "server.key", "--service-account-signing-key-file", "server.key"])
            .args(["--service-cluster-ip-range", "10.96.0.0/16"])
            .current_dir(&self.directory);
        Ok(command)
    }

    /// Ends it and keeps its data.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Ends it as a power failure would, and keeps what it has written.
    ///
    /// # Errors
    /// Where it is gone already.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.process = None;
        Ok(())
    }

    /// Stops it from answering, with its connections left open.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Has it answer again.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn unpause(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Begins anew without any data.
    ///
    /// # Errors
    /// Where it does not come up.
    pub fn wipe(&mut self) -> Result<()> {
        self.end();
        fs::remove_dir_all(self.data_dir()).with_context(|| format!("remove {:?}", self.data_dir()))?;
        self.resume()
    }

    /// Copies its data into a folder that is not there yet, as a backup, and goes on.
    ///
    /// # Errors
    /// Where they can't be copied, or it does not come up.
    pub fn save(&mut self, backup: &Path) -> Result<()> {
        self.end();
        copy(&self.data_dir(), backup)?;
        self.resume()
    }

    /// Goes on with the data of a backup.
    ///
    /// # Errors
    /// Where they can't be copied, or it does not come up.
    pub fn restore(&mut self, backup: &Path) -> Result<()> {
        self.end();
        fs::remove_dir_all(self.data_dir()).with_context(|| format!("remove {:?}", self.data_dir()))?;
        copy(backup, &self.data_dir())?;
        self.resume()
    }

    /// Ends it with what is behind it.
    fn end(&mut self) {
        self.stop();
        self.etcd = None;
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("the API server is not running")?.signal(signal)
    }

    fn data_dir(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// Its process.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn id(&self) -> Result<u32> {
        self.process.as_ref().map(Process::id).context("the API server is not running")
    }

    /// Its URL.
    pub fn endpoint(&self) -> String {
        format!("https://{}:{PORT}", self.address)
    }

    /// The file of the authority that signed its certificate.
    pub fn authority(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// A file with a user's token, as a pod has one.
    pub fn token_file(&self, user: User) -> PathBuf {
        self.directory.join(format!("{}.token", user.short()))
    }

    /// A kubeconfig of a user's.
    pub fn kubeconfig(&self, user: User) -> PathBuf {
        self.directory.join(format!("{}.kubeconfig", user.short()))
    }

    /// Has the server take these tokens and no others. The real one reads them when it starts, and is started again.
    ///
    /// # Errors
    /// Where the file can't be written.
    pub fn replace_tokens(&mut self, tokens: &[(User, String)]) -> Result<()> {
        self.write_tokens(tokens)?;
        if Self::is_double() {
            return Ok(());
        }
        self.stop();
        self.resume()
    }

    fn write_tokens(&self, tokens: &[(User, String)]) -> Result<()> {
        let line = |(user, token): &(User, String)| format!("{token},{0},{0},\"{1}\"\n", user.name, user.group);
        let path = self.directory.join("tokens.csv");
        fs::write(&path, tokens.iter().map(line).collect::<String>()).with_context(|| format!("write {path:?}"))
    }

    /// Lets a user do what the rules of a cluster role say.
    ///
    /// # Errors
    /// Where the server refuses.
    pub fn allow(&self, user: User, rules: &Value) -> Result<()> {
        let name = user.short();
        let group = "rbac.authorization.k8s.io";
        let role = json!({"metadata": {"name": name}, "rules": rules});
        let binding = json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
            "subjects": [{"apiGroup": group, "kind": "User", "name": user.name}],
        });
        for (resource, object) in [("clusterroles", role), ("clusterrolebindings", binding)] {
            self.post(&format!("/apis/{group}/v1/{resource}"), &object)?;
        }
        Ok(())
    }

    /// The rules of flannel's manifest (Documentation/kube-flannel.yml).
    pub fn flannels_rules() -> Value {
        json!([
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
        ])
    }

    /// Makes a node as a kubelet and a controller manager leave it.
    ///
    /// # Errors
    /// Where the server refuses.
    pub fn add_node(&self, name: &str, pod_cidr: &str) -> Result<()> {
        let node = json!({"metadata": {"name": name}, "spec": {"podCIDR": pod_cidr, "podCIDRs": [pod_cidr]}});
        self.post("/api/v1/nodes", &node)
    }

    /// Makes an object, as the administrator.
    ///
    /// # Errors
    /// Where the server refuses.
    pub fn post(&self, path: &str, object: &Value) -> Result<()> {
        let (code, answer) = self.request(User::ADMIN, "POST", path, &[], &object.to_string())?;
        anyhow::ensure!(code == 201, "POST {path}: {code}: {answer}");
        Ok(())
    }

    /// Sends a request with curl: the status code, and the body. Headers are whole lines.
    ///
    /// # Errors
    /// Where there is no answer, or only a part of one.
    pub fn request(&self, user: User, method: &str, path: &str, headers: &[&str], body: &str) -> Result<(u16, String)> {
        let mut curl = self.curl(user, path);
        curl.args(["--max-time", "30", "-X", method, "-w", &format!("{MARK}%{{http_code}}")]);
        if !body.is_empty() {
            curl.args(["--data-binary", "@-"]);
            if !headers.iter().any(|header| header.starts_with("Content-Type:")) {
                curl.args(["-H", "Content-Type: application/json"]);
            }
        }
        for header in headers {
            curl.args(["-H", header]);
        }
        let text = output_with_input(&mut curl, body)?;
        let (body, code) = text.rsplit_once(MARK).context("curl prints no status")?;
        Ok((code.parse()?, body.to_owned()))
    }

    /// Opens a watch with curl, whose events are lines of the process's log.
    ///
    /// # Errors
    /// Where curl can't be started.
    pub fn watch(&self, user: User, path: &str, headers: &[&str], log: &Path) -> Result<Process> {
        let mut curl = self.curl(user, path);
        curl.arg("--no-buffer");
        for header in headers {
            curl.args(["-H", header]);
        }
        Process::start(&mut curl, log)
    }

    fn curl(&self, user: User, path: &str) -> Command {
        let token = fs::read_to_string(self.token_file(user)).unwrap_or_default();
        let mut curl = self.command("curl");
        curl.args(["-sS", "--connect-timeout", "10", "--cacert"]).arg(self.authority());
        curl.args(["-H", &format!("Authorization: Bearer {}", token.trim())]).arg(format!("{}{path}", self.endpoint()));
        curl
    }

    /// Runs `kubectl` as the administrator, and returns what it printed.
    ///
    /// # Errors
    /// Where it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_as(User::ADMIN, arguments, "")
    }

    /// The same as a user, with something to read on its standard input.
    ///
    /// # Errors
    /// Where it fails.
    pub fn kubectl_as(&self, user: User, arguments: &[&str], input: &str) -> Result<String> {
        let mut kubectl = self.command("kubectl");
        kubectl.env("HOME", &self.directory).arg("--kubeconfig").arg(self.kubeconfig(user)).args(arguments);
        output_with_input(&mut kubectl, input)
    }

    /// Asks for one of the double's own paths, which no real server has.
    ///
    /// # Errors
    /// Where it refuses.
    pub fn double(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (code, answer) = self.request(User::ADMIN, method, &format!("/double/{path}"), &[], &body)?;
        anyhow::ensure!(code == 200, "{method} /double/{path}: {code}: {answer}");
        Ok(serde_json::from_str(&answer)?)
    }

    /// How often a user did something, of the double: `list nodes`, say.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn counter(&self, user: User, what: &str) -> Result<i64> {
        Ok(self.double("GET", "counters", &Value::Null)?[user.name][what].as_i64().unwrap_or(0))
    }

    fn make_certificates(&self) -> Result<()> {
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
        let script = format!(
            "openssl req -x509 {key} -subj /CN=kubernetes-ca -keyout ca.key -out ca.pem
             openssl req -x509 -CA ca.pem -CAkey ca.key {key} -subj /CN=kube-apiserver -keyout server.key -out server.pem \
               -addext subjectAltName=IP:{},IP:127.0.0.1,DNS:kubernetes -addext basicConstraints=critical,CA:FALSE",
            self.address
        );
        output(Command::new("sh").current_dir(&self.directory).args(["-ec", &script])).map(drop)
    }

    /// JSON is YAML, too.
    fn kubeconfig_text(&self, user: User) -> String {
        let name = "lab";
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": name,
            "clusters": [{"name": name, "cluster": {
                "server": self.endpoint(), "certificate-authority": self.authority(),
            }}],
            "users": [{"name": name, "user": {"tokenFile": self.token_file(user)}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        })
        .to_string()
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns)).arg("--").arg(program);
        command
    }
}

/// The real server's program, where there is one to be used.
fn real() -> Option<OsString> {
    std::env::var_os("KUBE_APISERVER").filter(|program| !program.is_empty())
}

/// This program, or where this is a test or a benchmark, the one that was built with it.
fn program() -> Result<PathBuf> {
    let this = std::env::current_exe()?;
    let found = this.ancestors().skip(1).take(2).map(|folder| folder.join("xtask")).find(|program| program.is_file());
    found.with_context(|| format!("no program xtask beside {this:?}; `cargo build --package xtask` makes one"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    output(Command::new("cp").arg("-a").arg(from).arg(to)).map(drop)
}
