//! The command line: flannel's flags and `FLANNELD_*` variables (flannel: main.go), and ours beside them.
//!
//! * `arguments` — from Go's form of flags, and from variables, to clap's
//! * `kubernetes` — flags of leases from Kubernetes
//! * `flannels` — flags of flannel's for what this agent does not have
//! * `settings` — each flag with the value that counts
//! * `error` — what is wrong with a command line
//! * `reference` — the documentation of all of it (in tests)

mod arguments;
mod error;
mod flannels;
mod kubernetes;
mod settings;

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{ArgAction, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use flannel_common::packet::is_unicast;
use ipnet::Ipv4Net;
use regex::Regex;

use self::arguments::{Arguments, Given};
pub use self::{
    error::UsageError,
    settings::{Origin, Setting},
};
use crate::{
    bypass::BypassFlag,
    dataplane::BpfLogLevel,
    device::external::Selection,
    docker_opts, go_values,
    log::LogFormat,
    netfilter,
    operator::{self, bundle, doctor, ping::Target},
    registry::{
        StoreOptions,
        etcd::{EtcdOptions, address::Endpoints},
    },
    routes::RoutesFlag,
    xdp::XdpFlag,
};

/// What the exit codes mean; printed by `--help`.
const EXIT_CODES: &str = "Exit codes: 0 stopped as asked; 1 failed; 2 usage: a flag or a variable; 3 `status`, `ping`, `doctor` or `audit` found something to look at; 77 the host lacks something (capability, \
                          kernel feature, bpf file system, interface); 78 bad configuration on this host.\n\
                          Flags have one dash or two; a switch has its value behind `=`. Each can be given as an environment \
                          variable, such as --etcd-prefix as FLANNELD_ETCD_PREFIX. An empty text is none.";

/// Where flannel's keys are by default.
const DEFAULT_PREFIX: &str = "/coreos.com/network";

/// How a host goes back to flannel's daemon.
pub const ROLL_BACK: &str = "Back to flannel's daemon: stop the agent, run `flannel-agent cleanup`, start flanneld. Where flanneld was started first, \
                             cleanup removes only what flanneld does not use.";

/// flannel over an eBPF VXLAN dataplane. Without a command: the daemon.
#[derive(Debug, Parser)]
#[command(name = "flannel-agent", after_help = EXIT_CODES, disable_version_flag = true)]
pub struct Cli {
    /// What to do; the daemon without one.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Print the version and exit
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    pub version: bool,
    /// Log verbosity: 0 information, 1 to 4 debugging, 5 and above tracing
    #[arg(long = "v", default_value = "0", value_name = "LEVEL", global = true)]
    #[arg(value_parser = go_values::number::<i32>(i32::MIN.into()..=i32::MAX.into()))]
    pub verbosity: i32,
    /// Form of the log
    #[arg(long, value_enum, default_value_t, global = true)]
    pub log_format: LogFormat,
    /// Comma-separated etcd endpoints; without a scheme: TLS where there is a client certificate
    #[arg(long, value_name = "URL,...", default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379")]
    etcd_endpoints: Endpoints,
    /// The path in etcd that the network config and the leases are under
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PREFIX)]
    etcd_prefix: String,
    /// Key of the client certificate
    #[arg(long, value_name = "FILE")]
    etcd_keyfile: Option<PathBuf>,
    /// Client certificate for etcd
    #[arg(long, value_name = "FILE")]
    etcd_certfile: Option<PathBuf>,
    /// Certificate of the authority that signed etcd's
    #[arg(long, value_name = "FILE")]
    etcd_cafile: Option<PathBuf>,
    /// User for etcd
    #[arg(long, value_name = "NAME")]
    etcd_username: Option<String>,
    /// Password for etcd
    #[arg(long, value_name = "PASSWORD")]
    etcd_password: Option<String>,
    /// Interface or IPv4 address for traffic between hosts; may be repeated, the first that exists is taken
    #[arg(long, value_name = "NAME|IP")]
    iface: Vec<String>,
    /// Pattern for the address or name of that interface; may be repeated
    #[arg(long, value_name = "REGEX", value_parser = pattern)]
    iface_regex: Vec<Regex>,
    /// Take the interface that reaches this address
    #[arg(long, value_name = "IP", value_parser = go_values::ipv4)]
    iface_can_reach: Option<Ipv4Addr>,
    /// Address that other hosts reach this one at
    #[arg(long, value_name = "IP", value_parser = go_values::ipv4)]
    public_ip: Option<Ipv4Addr>,
    /// How many minutes before its end the lease is renewed at the latest; it is renewed three times per term in any case
    #[arg(long, value_name = "MINUTES", default_value = "60", value_parser = go_values::number::<i64>(i64::MIN..=i64::MAX))]
    subnet_lease_renew_margin: i64,
    /// For how many seconds etcd keeps the lease of a host that is silent
    #[arg(long, value_name = "SECONDS", default_value = "86400", value_parser = go_values::number::<u32>(5..=u32::MAX.into()))]
    subnet_lease_ttl: u32,
    /// Address that /healthz, /readyz and /metrics are answered at
    #[arg(long, value_name = "IP", default_value = "0.0.0.0", value_parser = listening_address)]
    healthz_ip: IpAddr,
    /// Port that /healthz, /readyz and /metrics are answered at; 0 for none
    #[arg(long, value_name = "PORT", default_value = "0", value_parser = go_values::number::<i64>(i64::MIN..=65535))]
    healthz_port: i64,
    /// Where a page to look at is served, over HTTP and for operators: a port of 127.0.0.1, or an address with a port; nowhere without
    #[arg(long, value_name = "PORT|ADDRESS:PORT", value_parser = page_address)]
    pub http_ui: Option<SocketAddr>,
    /// Metrics of each peer too: some five lines for each
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean, global = true)]
    pub metrics_per_peer: bool,
    /// Prefix that hosts of the overlay may send from, and this host receives for, beside the leases: what is behind hosts and
    /// is no pod; may be repeated
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = prefix)]
    pub accept_source: Vec<Ipv4Net>,
    /// For how many seconds peers are kept that vanish from etcd all at once, unless `lease release-guard` says otherwise
    #[arg(long, value_name = "SECONDS", default_value = "900", value_parser = go_values::number::<u32>(0..=u32::MAX.into()))]
    lease_guard_grace: u32,
    /// Whether packets of established flows between pods bypass the host's stack: auto leaves to it what somebody has to see
    /// packet by packet (a queue, a filter, a program, a capture, a rule that limits), on does so only for a pod's own queue and
    /// settings and names the others, off leaves everything to it
    #[arg(long, value_enum, default_value_t)]
    pub bypass: BypassFlag,
    /// For how many milliseconds they may, before one takes the stack again
    #[arg(long, value_name = "MILLISECONDS", default_value = "1000", value_parser = go_values::number::<u32>(1..=60_000))]
    bypass_revalidate: u32,
    /// Who takes packets out of the tunnel before the kernel aggregates them
    #[arg(long, value_enum, default_value_t)]
    pub xdp: XdpFlag,
    /// Which routes lead into the overlay
    #[arg(long, value_enum, default_value_t)]
    pub routes: RoutesFlag,
    /// Packet rules
    #[command(flatten)]
    pub packet_rules: netfilter::Flags,
    /// Where the subnet is written for container runtimes (default: subnet.env in --run-dir)
    #[arg(long, value_name = "FILE", global = true)]
    subnet_file: Option<PathBuf>,
    /// Directory on a bpf file system for what must outlive the agent
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/flannel", global = true)]
    pub bpf_pin_dir: PathBuf,
    /// Directory for the agent's own files
    #[arg(long, value_name = "DIR", default_value = "/run/flannel", global = true)]
    pub run_dir: PathBuf,
    /// Log of the eBPF programs, for debugging
    #[arg(long, value_enum, default_value_t)]
    pub bpf_log_level: BpfLogLevel,
    /// Leases from Kubernetes
    #[command(flatten)]
    kubernetes: kubernetes::KubernetesFlags,
    /// What flannel has and this agent does not
    #[command(flatten)]
    flannels: flannels::FlannelFlags,
    /// What is to be said of the command line, once there is a log.
    #[arg(skip)]
    pub notices: Vec<String>,
    /// As they were given: variables, then flags.
    #[arg(skip)]
    given: Vec<Given>,
}

/// What the agent does besides being the daemon.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Remove everything that the agent made on this host: programs, maps, flannel.VNI with its route, subnet.env. What
    /// flannel's daemon uses by then stays
    #[command(after_help = ROLL_BACK)]
    Cleanup,
    /// Print what became of the packets, by reason; also when the agent is not running
    Counters,
    /// Print what was dropped, by reason, with the latest packets of each; also when the agent is not running
    Drops {
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
        /// How many packets of each reason are shown
        #[arg(long, value_name = "COUNT", default_value_t = 8)]
        samples: usize,
        /// Print each packet as it is dropped from now on, and why, until Ctrl-C; with -o json a line each
        #[arg(long, conflicts_with = "samples")]
        follow: bool,
    },
    /// Print what this host leases, how it stands with etcd, and what is to be looked at; exit code 3 where something is
    Status(operator::status::Options),
    /// Print each peer, how it is reached, when it was last heard, and what is wrong with it, trouble first; also when the agent
    /// is not running
    Peers {
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Ask a peer by ICMP echo, past the tunnel and through it: whether it answers, how fast, and which packets fit on the way; exit
    /// code 3 where something is to be looked at
    Ping {
        /// VTEP address, subnet, or address of a pod
        #[arg(value_name = "PEER|SUBNET|POD")]
        target: Target,
        /// Bytes of IPv4 of each packet through the overlay (default: small ones, and the largest that the overlay has)
        #[arg(short, long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(28..))]
        size: Option<u16>,
        /// How many requests of each kind
        #[arg(short, long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
        count: u16,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Explain a reason that `drops` or `counters` name: what usually causes it, where to look and what mends it, and what the latest
    /// packets of it have to do with leases, peers and pods; also when the agent is not running
    Explain(operator::explain::Options),
    /// Print what becomes of a packet on this host: what each program does with it and what the tables answer, and where the stack
    /// sends it. Nothing is sent, counted or noted; also when the agent is not running
    Trace(operator::trace::Options),
    /// Write the packets between this host and its peers to a file (pcapng), as they are on the wire and as they are in the tunnel, those
    /// that bypass the host's stack too, until one of the bounds is met; also when the agent is not running
    Capture(operator::capture::Options),
    /// Look at this host for what stands in the overlay's way: kernel, rights, UDP port, MTU, packet rules, other networks, settings,
    /// store; exit code 3 where something does. Takes the daemon's flags, too
    Doctor(doctor::Options),
    /// Count the kernel's objects that are ours, against what they may be and what flannel's daemon would have; exit code 3 where there are
    /// more
    Audit {
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Print the same as status, with the counters, as metrics in Prometheus' text format; also when the agent is not running
    Metrics {
        /// Write them to this file in one step, for node_exporter's textfile collector, which reads names that end in .prom
        #[arg(long, value_name = "FILE")]
        textfile: Option<PathBuf>,
    },
    /// What the agent goes by: flags, variables and the network config
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print version, build, kernel, the layout of the maps, and what the kernel has of what the programs need
    Version {
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Put what support needs into one archive, without secrets. Takes the daemon's flags, too
    Bundle(bundle::Options),
    /// Print completions for a shell
    Completions {
        /// Which
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write one for each command into a directory
    Man {
        /// The directory
        directory: Option<PathBuf>,
    },
    /// What concerns leases
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Write the options of Docker's daemon from subnet.env, as flannel's mk-docker-opts.sh does
    DockerOpts(docker_opts::Options),
}

/// What concerns leases.
#[derive(Debug, Subcommand)]
pub enum LeaseCommand {
    /// Have the running agent remove the peers that etcd no longer names and that it holds back
    ReleaseGuard,
    /// Print this host's lease: until when it is, by which key the store has it, and how many other hosts have one. Takes the daemon's
    /// flags, too
    Show {
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
}

/// What the agent goes by.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print each flag with the value that counts, and the network config. Takes the daemon's flags, too
    Show {
        /// With where each value is from
        #[arg(long)]
        origin: bool,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Say what a network config means, and what is wrong with it; exit code 1 where the agent would refuse it. Takes the daemon's flags,
    /// too
    Validate {
        /// A file with one, or with a ConfigMap in JSON that has one; `-` for the standard input. Without: the one that is in the store
        file: Option<PathBuf>,
    },
}

/// Form of a command's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// flannel's message for the same.
#[derive(Debug, thiserror::Error)]
#[error(
    "Invalid subnet-lease-renew-margin option, out of acceptable range: it is {0}, and has to be 1 to 1439 (minutes)"
)]
pub struct InvalidMargin(i64);

impl Cli {
    /// The command line of this process. Says what is wrong with it, or what was asked for, and exits, where it can't
    /// be acted on.
    pub fn from_process() -> Self {
        Self::parse_with(std::env::args_os().skip(1), |name| std::env::var_os(name))
            .unwrap_or_else(|error| error.exit())
    }

    /// Parses arguments and environment as flannel does: a variable counts where its flag is not given, an empty
    /// variable is none, and one that can't be used is passed over with a notice.
    fn parse_with(
        args: impl Iterator<Item = OsString>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, UsageError> {
        let definition = Self::command();
        let Arguments { flags, command, help } = Arguments::read(&definition, args)?;
        let (variables, bad) = arguments::variables(&definition, &flags, variable);
        let given: Vec<Given> = variables.into_iter().chain(flags).collect();
        let mut line = vec![OsString::from("flannel-agent")];
        line.extend(arguments::for_clap(&definition, &given));
        line.extend(command);
        line.extend(help.then(|| OsString::from("--help")));
        let mut cli = Self::from_arg_matches(&definition.try_get_matches_from(line)?)?;
        cli.notices = bad;
        match &cli.command {
            None if !cli.version => cli.review(&given)?,
            // It shows what a daemon would go by, and what it would refuse.
            Some(Command::Config(ConfigCommand::Show { .. })) => {
                if let Err(error) = cli.review(&given) {
                    cli.notices.push(error.to_string());
                }
            }
            _ => {}
        }
        cli.given = given;
        Ok(cli)
    }

    /// What can't be, and what is to be said, of a daemon with these flags.
    fn review(&mut self, given: &[Given]) -> Result<(), UsageError> {
        let written = |name: &str| {
            let last = given.iter().rfind(|flag| flag.name == name);
            last.map_or_else(|| format!("--{name}"), |flag| flag.written.clone())
        };
        if let Some((name, what)) = self.flannels.unsupported() {
            return Err(UsageError::Unsupported { written: written(name), what });
        }
        match (&self.etcd_certfile, &self.etcd_keyfile) {
            (Some(_), None) => {
                return Err(UsageError::Identity { given: written("etcd-certfile"), missing: "--etcd-keyfile" });
            }
            (None, Some(_)) => {
                return Err(UsageError::Identity { given: written("etcd-keyfile"), missing: "--etcd-certfile" });
            }
            _ => {}
        }
        let without_effect = self.kubernetes.without_effect().chain(self.flannels.without_effect());
        let without_effect = without_effect.map(|(name, why)| format!("{} {why}", written(name)));
        self.notices.extend(without_effect);
        if given.iter().rfind(|flag| flag.name == "etcd-prefix").is_some_and(|flag| flag.value.is_empty()) {
            self.notices.push(format!(
                "{} is empty, and the default {DEFAULT_PREFIX} counts; for keys at the root, as flannel has them then, give \".\"",
                written("etcd-prefix")
            ));
        }
        match (&self.etcd_username, &self.etcd_password) {
            (Some(_), None) => self
                .notices
                .push(format!("{} is not used without --etcd-password, as with flannel", written("etcd-username"))),
            (None, Some(_)) => self
                .notices
                .push(format!("{} is not used without --etcd-username, as with flannel", written("etcd-password"))),
            _ => {}
        }
        self.notices.extend(self.etcd_endpoints.unusable().iter().map(|error| format!("{error}; going on without it")));
        let clear: Vec<String> =
            self.etcd().endpoints.into_iter().filter(|endpoint| !endpoint.starts_with("https://")).collect();
        let file = ["etcd-certfile", "etcd-cafile"]
            .into_iter()
            .zip([&self.etcd_certfile, &self.etcd_cafile])
            .find_map(|(name, file)| file.as_ref().map(|_| written(name)));
        if let (Some(file), false) = (file, clear.is_empty()) {
            self.notices.push(format!(
                "{} is reached in clear text, in spite of {file}: TLS is for endpoints with https://",
                clear.join(",")
            ));
        }
        Ok(())
    }

    /// How etcd is reached.
    pub fn etcd(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: self.etcd_endpoints.urls(self.etcd_certfile.is_some() && self.etcd_keyfile.is_some()),
            prefix: self.etcd_prefix.clone(),
            ca_file: self.etcd_cafile.clone(),
            identity: self.etcd_certfile.clone().zip(self.etcd_keyfile.clone()),
            user: self.etcd_username.clone().zip(self.etcd_password.clone()),
        }
    }

    /// How the store is reached.
    pub fn store(&self) -> StoreOptions {
        if self.kubernetes.kube_subnet_mgr {
            StoreOptions::Kubernetes(self.kubernetes.options())
        } else {
            StoreOptions::Etcd(self.etcd())
        }
    }

    /// Whether leases are from Kubernetes.
    pub const fn is_of_kubernetes(&self) -> bool {
        self.kubernetes.kube_subnet_mgr
    }

    /// The term of the lease.
    pub fn lease_ttl(&self) -> Duration {
        Duration::from_secs(self.subnet_lease_ttl.into())
    }

    /// How often the lease is renewed: three times per term, and earlier where the margin is wider than the rest.
    ///
    /// # Errors
    /// [`InvalidMargin`].
    pub fn renew_interval(&self) -> Result<Duration, InvalidMargin> {
        // flannel's range; its term is a day.
        let margin = match self.subnet_lease_renew_margin {
            margin @ 1..=1439 => Duration::from_secs(margin.unsigned_abs() * 60),
            margin => return Err(InvalidMargin(margin)),
        };
        let third = self.lease_ttl() / 3;
        Ok(match self.lease_ttl().checked_sub(margin) {
            Some(rest) if !rest.is_zero() => third.min(rest),
            _ => third,
        })
    }

    /// For how long a mass removal is held back.
    pub fn guard_grace(&self) -> Duration {
        Duration::from_secs(self.lease_guard_grace.into())
    }

    /// For how long a flow may bypass the stack after the stack let a packet of it out; zero for never.
    pub fn bypass_time(&self) -> Duration {
        match self.bypass {
            BypassFlag::Auto | BypassFlag::On => Duration::from_millis(self.bypass_revalidate.into()),
            BypassFlag::Off => Duration::ZERO,
        }
    }

    /// Where health probes are answered; [`None`] for nowhere.
    pub fn healthz(&self) -> Option<SocketAddr> {
        let port = u16::try_from(self.healthz_port).ok().filter(|port| *port != 0)?;
        Some(SocketAddr::new(self.healthz_ip, port))
    }

    /// How the external interface is chosen.
    pub fn selection(&self) -> Selection {
        Selection {
            interfaces: self.iface.clone(),
            patterns: self.iface_regex.clone(),
            can_reach: self.iface_can_reach,
            public_ip: self.public_ip,
            published: None,
        }
    }

    /// Where `subnet.env` is.
    pub fn subnet_file(&self) -> PathBuf {
        self.subnet_file.clone().unwrap_or_else(|| self.run_dir.join("subnet.env"))
    }
}

/// A pattern; the reason why it is none in one line.
fn pattern(text: &str) -> Result<Regex, String> {
    Regex::new(text).map_err(|error| {
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default();
        format!("expected a regular expression: {}", reason.strip_prefix("error: ").unwrap_or(reason))
    })
}

/// A prefix of addresses that a host could have.
fn prefix(text: &str) -> Result<Ipv4Net, String> {
    let prefix: Ipv4Net = text.trim().parse().map_err(|_| "expected an IPv4 prefix such as 10.20.0.0/16".to_owned())?;
    match prefix.trunc() {
        truncated if truncated != prefix => Err(format!("has bits behind its length; the prefix is {truncated}")),
        // Its first address but for the network's own.
        _ if !is_unicast(prefix.addr().to_bits() | 1) => Err("no host has these addresses".to_owned()),
        _ => Ok(prefix),
    }
}

/// Where to listen.
fn listening_address(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        text => text.parse().map_err(|_| "expected an IP address, as in 0.0.0.0".to_owned()),
    }
}

/// Where the page is served. A port alone is one of loopback, also where Go's ":8080" would be one of every address.
fn page_address(text: &str) -> Result<SocketAddr, String> {
    let expected = || "expected a port of 127.0.0.1, or an address with a port, as in 127.0.0.1:8471".to_owned();
    let text = text.trim();
    let address = match (text.parse(), text.strip_prefix("localhost:")) {
        (Ok(port), _) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        (_, Some(port)) => SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse().map_err(|_| expected())?)),
        (_, None) => text.parse().map_err(|_| expected())?,
    };
    if address.port() == 0 { Err(expected()) } else { Ok(address) }
}

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
