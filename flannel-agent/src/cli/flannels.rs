//! Flags of flannel's for what this agent does not have. Each is taken where it asks for nothing of it, so that unit
//! files, manifests and templates need no change.

use clap::ArgAction;

use crate::go_values;

/// Known, and without effect.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Flags of flannel's for what this agent does not have")]
pub(super) struct FlannelFlags {
    /// Leases from the Kubernetes API: not supported
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    kube_subnet_mgr: bool,
    /// Taken, and without effect, as with flannel's without --kube-subnet-mgr
    #[arg(long, value_name = "URL")]
    kube_api_url: Option<String>,
    /// The same
    #[arg(long, value_name = "PREFIX", default_value = "flannel.alpha.coreos.com")]
    kube_annotation_prefix: String,
    /// The same
    #[arg(long, value_name = "FILE")]
    kubeconfig_file: Option<String>,
    /// The same
    #[arg(long, value_name = "FILE", default_value = "/etc/kube-flannel/net-conf.json")]
    net_config_path: String,
    /// The same
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    set_node_network_unavailable: bool,
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
        if self.kube_subnet_mgr {
            return Some((
                "kube-subnet-mgr",
                "leases from the Kubernetes API are not supported by this agent; leave it out, or set it to false, for leases from etcd",
            ));
        }
        let ipv6 = "IPv6 between hosts is not supported by this agent; leave it out, or empty";
        self.public_ipv6.as_ref().map(|_| ("public-ipv6", ipv6))
    }

    /// What is taken and has no effect though it asks for something: the flag's name, and why.
    pub(super) fn without_effect(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let kubernetes = "has no effect without leases from the Kubernetes API, as with flannel";
        let source = "has no effect: it names source files of flannel's; more is logged with --v";
        [
            ("kube-api-url", self.kube_api_url.is_some(), kubernetes),
            ("kubeconfig-file", self.kubeconfig_file.is_some(), kubernetes),
            ("vmodule", self.vmodule.is_some(), source),
            ("log_backtrace_at", self.log_backtrace_at.is_some(), source),
        ]
        .into_iter()
        .filter(|(_, is_given, _)| *is_given)
        .map(|(name, _, why)| (name, why))
    }
}
