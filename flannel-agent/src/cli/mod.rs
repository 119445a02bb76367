//! The command line: flannel's flags and `FLANNELD_*` variables (flannel: main.go), and ours beside them.

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use regex::Regex;

use crate::{
    dataplane::BpfLogLevel, device::external::Selection, docker_opts, netfilter, registry::etcd::EtcdOptions,
    xdp::XdpFlag,
};

/// What the exit codes mean; printed by `--help`.
const EXIT_CODES: &str = "Exit codes: 0 stopped as asked; 1 failed; 2 usage; 3 `status` found something to look at; 77 the host lacks something (capability, \
                          kernel feature, bpf file system, interface); 78 bad configuration on this host.\n\
                          Every flag can be given as an environment variable: --etcd-prefix as FLANNELD_ETCD_PREFIX.";

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
    pub version: bool,
    /// Log verbosity: 0 information, 1 to 4 debugging, 5 and above tracing
    #[arg(long = "v", default_value_t = 0, value_name = "LEVEL", global = true)]
    pub verbosity: u8,
    /// Comma-separated etcd endpoints
    #[arg(long, value_delimiter = ',', default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379")]
    etcd_endpoints: Vec<String>,
    /// The path in etcd that the network config and the leases are under
    #[arg(long, default_value = "/coreos.com/network")]
    etcd_prefix: String,
    /// Key of the client certificate
    #[arg(long, value_name = "FILE", requires = "etcd_certfile")]
    etcd_keyfile: Option<PathBuf>,
    /// Client certificate for etcd
    #[arg(long, value_name = "FILE", requires = "etcd_keyfile")]
    etcd_certfile: Option<PathBuf>,
    /// Certificate of the authority that signed etcd's
    #[arg(long, value_name = "FILE")]
    etcd_cafile: Option<PathBuf>,
    /// User for etcd
    #[arg(long, value_name = "NAME", requires = "etcd_password")]
    etcd_username: Option<String>,
    /// Password for etcd
    #[arg(long, value_name = "PASSWORD", requires = "etcd_username")]
    etcd_password: Option<String>,
    /// Interface or IPv4 address for traffic between hosts; may be repeated, the first that exists is taken
    #[arg(long, value_name = "NAME|IP")]
    iface: Vec<String>,
    /// Pattern for the address or name of that interface; may be repeated
    #[arg(long, value_name = "REGEX")]
    iface_regex: Vec<Regex>,
    /// Take the interface that reaches this address
    #[arg(long, value_name = "IP")]
    iface_can_reach: Option<Ipv4Addr>,
    /// Address that other hosts reach this one at
    #[arg(long, value_name = "IP")]
    public_ip: Option<Ipv4Addr>,
    /// How many minutes before its end the lease is renewed at the latest; it is renewed three times per term in any case
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    pub subnet_lease_renew_margin: u32,
    /// For how many seconds etcd keeps the lease of a host that is silent
    #[arg(long, value_name = "SECONDS", default_value_t = 86400, value_parser = clap::value_parser!(u32).range(5..))]
    subnet_lease_ttl: u32,
    /// Address that /healthz and /readyz are answered at
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    healthz_ip: IpAddr,
    /// Port that /healthz and /readyz are answered at; 0 for none
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    healthz_port: u16,
    /// For how many seconds peers are kept that vanish from etcd all at once, unless `lease release-guard` says otherwise
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    lease_guard_grace: u32,
    /// Whether packets of established flows between pods pass the host's stack by
    #[arg(long, value_enum, default_value_t)]
    pub bypass: Switch,
    /// For how many milliseconds they may, before one takes the stack again
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    bypass_revalidate: u32,
    /// Who takes packets out of the tunnel before the kernel aggregates them
    #[arg(long, value_enum, default_value_t)]
    pub xdp: XdpFlag,
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
    },
    /// Print what this host leases, how it stands with etcd, and what is to be looked at; exit code 3 where something is
    Status {
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Print the same, with the counters, as metrics for Prometheus
    Metrics,
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
}

/// On or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// It is done.
    #[default]
    On,
    /// It is not.
    Off,
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
#[error("Invalid subnet-lease-renew-margin option, out of acceptable range")]
pub struct InvalidMargin;

impl Cli {
    /// The command line of this process. Says what is wrong with it, or what was asked for, and exits, where it can't
    /// be acted on.
    pub fn from_process() -> Self {
        let (cli, warnings) = Self::parse_with(std::env::args_os().collect(), |name| std::env::var(name).ok())
            .unwrap_or_else(|e| e.exit());
        for warning in warnings {
            eprintln!("{warning}");
        }
        cli
    }

    /// Parses arguments and environment as flannel does: long flags may have one dash, a variable counts where its
    /// flag is not given, an empty variable is none, and one that can't be used is passed over with a warning.
    fn parse_with(
        args: Vec<OsString>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<(Self, Vec<String>), clap::Error> {
        let command = Self::command();
        let flags: Vec<String> = command.get_arguments().filter_map(|arg| arg.get_long()).map(str::to_owned).collect();
        let mut args: Vec<OsString> = args.into_iter().map(|arg| with_two_dashes(arg, &flags)).collect();
        let mut warnings = Vec::new();

        let given: Vec<String> = args.iter().filter_map(|arg| flag_name(arg.to_str()?)).map(str::to_owned).collect();
        let mut from_environment = Vec::new();
        for flag in flags.iter().filter(|flag| !given.contains(flag) && *flag != "version" && *flag != "help") {
            let name = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
            let Some(value) = variable(&name).filter(|value| !value.is_empty()) else { continue };
            from_environment.push((name, OsString::from(format!("--{flag}={value}"))));
        }
        // Each alone first, so that a bad one costs only itself. What it requires may be another variable.
        from_environment.retain(|(name, arg)| {
            let alone = [OsString::from("flannel-agent"), arg.clone()];
            let kind = command.clone().try_get_matches_from(alone).err().map(|error| error.kind());
            let is_bad = kind.is_some_and(|kind| kind != clap::error::ErrorKind::MissingRequiredArgument);
            if is_bad {
                warnings.push(format!("{name} has a value that can't be used and is passed over"));
            }
            !is_bad
        });
        args.splice(1..1, from_environment.into_iter().map(|(_, arg)| arg));
        let matches = command.try_get_matches_from(args)?;
        Ok((Self::from_arg_matches(&matches)?, warnings))
    }

    /// How etcd is reached.
    pub fn etcd(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: self.etcd_endpoints.clone(),
            prefix: self.etcd_prefix.clone(),
            ca_file: self.etcd_cafile.clone(),
            identity: self.etcd_certfile.clone().zip(self.etcd_keyfile.clone()),
            user: self.etcd_username.clone().zip(self.etcd_password.clone()),
        }
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
            margin @ 1..=1439 => Duration::from_secs(u64::from(margin) * 60),
            _ => return Err(InvalidMargin),
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

    /// For how long a flow may pass the stack by after the stack let a packet of it out; zero for never.
    pub fn bypass_time(&self) -> Duration {
        match self.bypass {
            Switch::On => Duration::from_millis(self.bypass_revalidate.into()),
            Switch::Off => Duration::ZERO,
        }
    }

    /// Where health probes are answered; [`None`] for nowhere.
    pub fn healthz(&self) -> Option<SocketAddr> {
        (self.healthz_port != 0).then(|| SocketAddr::new(self.healthz_ip, self.healthz_port))
    }

    /// How the external interface is chosen.
    pub fn selection(&self) -> Selection {
        Selection {
            interfaces: self.iface.clone(),
            patterns: self.iface_regex.clone(),
            can_reach: self.iface_can_reach,
            public_ip: self.public_ip,
        }
    }

    /// Where `subnet.env` is.
    pub fn subnet_file(&self) -> PathBuf {
        self.subnet_file.clone().unwrap_or_else(|| self.run_dir.join("subnet.env"))
    }
}

/// Go's flag package takes `-name` and `--name` alike.
fn with_two_dashes(arg: OsString, flags: &[String]) -> OsString {
    match arg.to_str() {
        Some(text) if !text.starts_with("--") => match flag_name(text) {
            Some(name) if flags.iter().any(|flag| flag == name) => OsString::from(format!("-{text}")),
            _ => arg,
        },
        _ => arg,
    }
}

fn flag_name(arg: &str) -> Option<&str> {
    let name = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    Some(name.split_once('=').map_or(name, |(name, _)| name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str], environment: &[(&str, &str)]) -> Result<(Cli, Vec<String>), clap::Error> {
        let args = std::iter::once("flannel-agent").chain(args.iter().copied()).map(OsString::from).collect();
        let variable =
            |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Cli::parse_with(args, variable)
    }

    fn cli(args: &[&str], environment: &[(&str, &str)]) -> Cli {
        let (cli, warnings) = parse(args, environment).expect("valid");
        assert_eq!(warnings, Vec::<String>::new());
        cli
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flannels_defaults() {
        let cli = cli(&[], &[]);
        assert_eq!(cli.etcd().endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
        assert_eq!(cli.etcd().prefix, "/coreos.com/network");
        assert_eq!(cli.subnet_file().to_str(), Some("/run/flannel/subnet.env"));
        assert_eq!(cli.healthz(), None);
    }

    #[test]
    fn health_probes_are_answered_at_a_port_and_anywhere() {
        let healthz = |args: &[&str]| cli(args, &[]).healthz().map(|address| address.to_string());
        assert_eq!(healthz(&["-healthz-port=8081"]).as_deref(), Some("0.0.0.0:8081"));
        assert_eq!(healthz(&["--healthz-ip=::1", "--healthz-port=8081"]).as_deref(), Some("[::1]:8081"));
        assert_eq!(healthz(&["--healthz-ip=127.0.0.1"]), None);
    }

    #[test]
    fn one_dash_is_as_good_as_two() {
        let cli = cli(&["-iface=eth0", "-iface", "10.0.0.1", "--etcd-prefix", "/x", "-v=4", "-public-ip=1.2.3.4"], &[]);
        assert_eq!(cli.selection().interfaces, ["eth0", "10.0.0.1"]);
        assert_eq!((cli.etcd().prefix.as_str(), cli.verbosity), ("/x", 4));
        assert_eq!(cli.selection().public_ip, Some([1, 2, 3, 4].into()));
    }

    #[test]
    fn variables_count_where_the_flag_is_not_given() {
        let environment = [
            ("FLANNELD_ETCD_PREFIX", "/env"),
            ("FLANNELD_IFACE", "eth7"),
            ("FLANNELD_SUBNET_FILE", ""),
            ("FLANNELD_V", "5"),
            ("FLANNELD_IP_MASQ", "true"),
        ];
        let cli = cli(&["--etcd-prefix=/flag"], &environment);
        assert_eq!(cli.etcd().prefix, "/flag");
        assert_eq!(cli.selection().interfaces, ["eth7"]);
        assert_eq!(cli.subnet_file().to_str(), Some("/run/flannel/subnet.env"));
        assert_eq!((cli.verbosity, cli.packet_rules.ip_masq), (5, true));
    }

    #[test]
    fn variables_may_require_each_other() {
        let environment = [("FLANNELD_ETCD_USERNAME", "u"), ("FLANNELD_ETCD_PASSWORD", "-p")];
        assert_eq!(cli(&[], &environment).etcd().user, Some(("u".to_owned(), "-p".to_owned())));
    }

    #[test]
    fn a_bad_variable_costs_only_itself() {
        let environment = [("FLANNELD_PUBLIC_IP", "nonsense"), ("FLANNELD_ETCD_PREFIX", "/env")];
        let (cli, warnings) = parse(&[], &environment).expect("valid");
        assert_eq!(cli.etcd().prefix, "/env");
        assert_eq!(warnings, ["FLANNELD_PUBLIC_IP has a value that can't be used and is passed over"]);
    }

    #[test]
    fn the_lease_is_renewed_three_times_per_term_or_within_the_margin() {
        let interval = |args: &[&str]| cli(args, &[]).renew_interval().map(|interval| interval.as_secs()).ok();
        assert_eq!(interval(&[]), Some(86400 / 3));
        assert_eq!(interval(&["--subnet-lease-renew-margin=1439"]), Some(60));
        assert_eq!(interval(&["--subnet-lease-ttl=9"]), Some(3));
        assert_eq!(interval(&["--subnet-lease-renew-margin=0"]), None);
        assert_eq!(interval(&["--subnet-lease-renew-margin=1440"]), None);
    }

    #[test]
    fn bad_flags_are_refused() {
        for args in [&["--no-such-flag"][..], &["--public-ip=x"], &["--iface-regex=("], &["--etcd-keyfile=/k"]] {
            assert_eq!(parse(args, &[]).expect_err("refused").exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn commands_take_the_directories() {
        let cli = cli(&["cleanup", "--run-dir=/tmp/r"], &[]);
        assert!(matches!(cli.command, Some(Command::Cleanup)));
        assert_eq!(cli.subnet_file().to_str(), Some("/tmp/r/subnet.env"));
    }
}
