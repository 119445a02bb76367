//! Flags of leases from Kubernetes (flannel: main.go, pkg/subnet/kube/kube.go).

use std::{env, path::PathBuf};

use clap::ArgAction;

use crate::{go_values, registry::kubernetes::KubernetesOptions};

/// flannel's, with its defaults.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Leases from Kubernetes")]
pub(super) struct KubernetesFlags {
    /// Leases from Kubernetes instead of etcd: the podCIDR of this host's node, which NODE_NAME names, or the pod of POD_NAME
    /// and POD_NAMESPACE is on
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    pub(super) kube_subnet_mgr: bool,
    /// URL of the API server, in the place of the kubeconfig's; without both: the one of the cluster that this pod is in
    #[arg(long, value_name = "URL")]
    kube_api_url: Option<String>,
    /// Where the API server is, and who asks
    #[arg(long, value_name = "FILE")]
    kubeconfig_file: Option<PathBuf>,
    /// What the annotations of nodes begin with
    #[arg(long, value_name = "PREFIX", default_value = "flannel.alpha.coreos.com")]
    kube_annotation_prefix: String,
    /// The network config, where leases are from Kubernetes
    #[arg(long, value_name = "FILE", default_value = "/etc/kube-flannel/net-conf.json")]
    net_config_path: PathBuf,
    /// Whether the node's condition NetworkUnavailable is set to False once packets can flow
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = go_values::boolean)]
    set_node_network_unavailable: bool,
}

impl KubernetesFlags {
    /// With the variables that flannel reads beside them.
    pub(super) fn options(&self) -> KubernetesOptions {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        KubernetesOptions {
            api_url: self.kube_api_url.clone(),
            kubeconfig: self.kubeconfig_file.clone(),
            annotation_prefix: self.kube_annotation_prefix.clone(),
            net_config: self.net_config_path.clone(),
            set_node_network_unavailable: self.set_node_network_unavailable,
            node_name: variable("NODE_NAME"),
            pod: variable("POD_NAMESPACE").zip(variable("POD_NAME")),
        }
    }

    /// What is taken and has no effect though it asks for something: the flag's name, and why.
    pub(super) fn without_effect(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let why = "has no effect without --kube-subnet-mgr, as with flannel";
        [("kube-api-url", self.kube_api_url.is_some()), ("kubeconfig-file", self.kubeconfig_file.is_some())]
            .into_iter()
            .filter(|(_, is_given)| *is_given && !self.kube_subnet_mgr)
            .map(move |(name, _)| (name, why))
    }
}
