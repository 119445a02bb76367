//! What of a Node object counts here (Kubernetes: pkg/apis/core/types.go). The rest, some 12 KiB of each, is passed over
//! as it is read.

use std::collections::HashMap;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Deserialize;

use crate::lease::LeaseKey;

/// A node, or of a metadata-only answer its metadata.
#[derive(Debug, Deserialize)]
pub(super) struct Node {
    pub(super) metadata: Metadata,
    #[serde(default)]
    pub(super) spec: Spec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Metadata {
    pub(super) name: String,
    /// Of two nodes of one name, it is another.
    pub(super) uid: String,
    pub(super) resource_version: String,
    /// RFC 3339, in UTC: the order of the texts is that of the times.
    pub(super) creation_timestamp: Option<String>,
    pub(super) annotations: Option<HashMap<String, String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Spec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

/// One part of a list.
#[derive(Debug, Deserialize)]
pub(super) struct NodeList {
    pub(super) metadata: ListMetadata,
    #[serde(default)]
    pub(super) items: Vec<Node>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ListMetadata {
    pub(super) resource_version: String,
    /// Asks for the part after this one; empty at the last.
    #[serde(rename = "continue")]
    pub(super) next: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Pod {
    #[serde(default)]
    pub(super) spec: PodSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct PodSpec {
    pub(super) node_name: String,
}

/// What is known of the prefixes that a node's pods have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PodCidrs {
    /// Nothing yet: only its metadata were read.
    Unread,
    /// They could not be read, for this reason.
    Unreadable(String),
    /// Nobody has given it any.
    Unassigned,
    /// This lease, for as long as the node lives (Kubernetes: ValidateNodeUpdate).
    Lease(LeaseKey),
    /// None that a lease can have, for this reason.
    Invalid(String),
}

/// The prefixes of a node's pods are none that a lease can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPodCidr {
    /// Not a prefix.
    #[error("its podCIDR {0:?} is no prefix such as 10.244.1.0/24")]
    Form(String),
    /// Two of one family, or three.
    #[error("pod cidrs should be IPv4/IPv6 only or dualstack: they are {0}")]
    Families(String),
    /// None of IPv4.
    #[error("it has no IPv4 podCIDR: they are {0}")]
    NoIpv4(String),
}

impl Spec {
    /// The lease that they are. [`None`] where nobody has given the node any yet.
    pub(super) fn lease_key(&self) -> Result<Option<LeaseKey>, InvalidPodCidr> {
        let given = self.pod_cidrs.iter().flatten().chain(self.pod_cidr.iter().filter(|_| self.lacks_list()));
        let given: Vec<&String> = given.filter(|cidr| !cidr.is_empty()).collect();
        let all = || given.iter().map(|cidr| format!("{cidr:.64}")).collect::<Vec<_>>().join(", ");
        let (mut ipv4, mut ipv6): (Option<Ipv4Net>, Option<Ipv6Net>) = (None, None);
        for cidr in &given {
            let form = || InvalidPodCidr::Form(cidr.chars().take(64).collect());
            let is_second = match cidr.parse().map_err(|_| form())? {
                // A lease's key has a length of five bits.
                IpNet::V4(prefix) if prefix.prefix_len() == 32 => return Err(form()),
                IpNet::V4(prefix) => ipv4.replace(prefix.trunc()).is_some(),
                IpNet::V6(prefix) => ipv6.replace(prefix.trunc()).is_some(),
            };
            if is_second {
                return Err(InvalidPodCidr::Families(all()));
            }
        }
        match (ipv4, given.is_empty()) {
            (Some(subnet), _) => Ok(Some(LeaseKey { subnet, ipv6_subnet: ipv6 })),
            (None, true) => Ok(None),
            (None, false) => Err(InvalidPodCidr::NoIpv4(all())),
        }
    }

    /// The same of a node that was read whole.
    pub(super) fn pod_cidrs(&self) -> PodCidrs {
        match self.lease_key() {
            Ok(Some(key)) => PodCidrs::Lease(key),
            Ok(None) => PodCidrs::Unassigned,
            Err(error) => PodCidrs::Invalid(error.to_string()),
        }
    }

    /// Before 1.16 there was only one.
    fn lacks_list(&self) -> bool {
        self.pod_cidrs.as_ref().is_none_or(Vec::is_empty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease_key(spec: &str) -> Result<Option<String>, InvalidPodCidr> {
        let spec: Spec = serde_json::from_str(spec).expect("spec");
        spec.lease_key().map(|key| key.map(|key| key.to_string()))
    }

    #[test]
    fn pod_cidrs_are_leases() {
        for (spec, key) in [
            ("{}", None),
            (r#"{"podCIDR": "", "podCIDRs": []}"#, None),
            (r#"{"podCIDR": "10.244.1.0/24"}"#, Some("10.244.1.0-24")),
            (r#"{"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}"#, Some("10.244.1.0-24")),
            (r#"{"podCIDRs": ["fd00:1::/64", "10.244.1.7/25"]}"#, Some("10.244.1.0-25&fd00:1::-64")),
        ] {
            assert_eq!(lease_key(spec).expect(spec).as_deref(), key, "{spec}");
        }
        let two = r#"{"podCIDRs": ["10.244.1.0/24", "10.244.2.0/24"]}"#;
        assert!(matches!(lease_key(two), Err(InvalidPodCidr::Families(_))));
        assert!(matches!(lease_key(r#"{"podCIDR": "fd00::/64"}"#), Err(InvalidPodCidr::NoIpv4(_))));
        for cidr in ["abc", "10.244.1.0", "10.244.1.0/33", "10.244.1.1/32"] {
            let spec = format!(r#"{{"podCIDR": "{cidr}"}}"#);
            assert_eq!(lease_key(&spec), Err(InvalidPodCidr::Form(cidr.to_owned())));
        }
    }
}
