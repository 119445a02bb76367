//! Flags of flannel's for what this agent does not have. Each is taken where it asks for nothing of it, so that unit
//! files, manifests and templates need no change.

/// Flags that flannel had once, with what to do without. Today's refuses them too, and says that they are not defined.
const FORMER: [(&[&str], &str); 4] = [
    (
        &["listen", "remote", "remote-keyfile", "remote-certfile", "remote-cafile"],
        "flannel's server for hosts that do not reach etcd, which it had until 0.7, is not supported by this agent; give each host --etcd-endpoints",
    ),
    (
        &["networks", "subnet-dir"],
        "several networks in one process, which flannel had until 0.6, are not supported by this agent; run one agent for each, with its own \
         --etcd-prefix and --subnet-file",
    ),
    (
        &["auto-detect-ipv4", "auto-detect-ipv6"],
        "is none of flannel's any more, and not supported by this agent; name the interface with --iface or --iface-can-reach, or leave it out",
    ),
    (
        &[
            "logtostderr",
            "alsologtostderr",
            "stderrthreshold",
            "log_dir",
            "log_file",
            "log_file_max_size",
            "one_output",
            "skip_headers",
            "skip_log_headers",
            "add_dir_header",
        ],
        "is none of flannel's since 0.8, and not supported by this agent, whose log always goes to stderr; leave it out",
    ),
];

/// What to do without a flag that flannel had once; [`None`] for one that it never had.
pub(super) fn former(name: &str) -> Option<&'static str> {
    FORMER.iter().find(|(names, _)| names.contains(&name)).map(|(_, what)| *what)
}

/// Known, and without effect.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Flags of flannel's for what this agent does not have")]
pub(super) struct FlannelFlags {
    /// IPv6 between hosts: not supported
    #[arg(long, value_name = "IP")]
    public_ipv6: Option<String>,
    /// Verbosity of source files of flannel's: taken, and without effect
    #[arg(long, value_name = "FILE=LEVEL,...")]
    vmodule: Option<String>,
    /// Stack traces at a line of flannel's: taken, and without effect
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE")]
    log_backtrace_at: Option<String>,
}

impl FlannelFlags {
    /// What is asked for and is not there: the flag's name, and what to do.
    pub(super) fn unsupported(&self) -> Option<(&'static str, &'static str)> {
        let ipv6 = "IPv6 between hosts is not supported by this agent; leave it out, or empty";
        self.public_ipv6.as_ref().map(|_| ("public-ipv6", ipv6))
    }

    /// What is taken and has no effect though it asks for something: the flag's name, and why.
    pub(super) fn without_effect(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let source = "has no effect: it names source files of flannel's; more is logged with --v";
        [("vmodule", self.vmodule.is_some(), source), ("log_backtrace_at", self.log_backtrace_at.is_some(), source)]
            .into_iter()
            .filter(|(_, is_given, _)| *is_given)
            .map(|(name, _, why)| (name, why))
    }
}
