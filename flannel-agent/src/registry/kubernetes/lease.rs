//! This host's own lease: the podCIDR that somebody else gives its node, and the annotations that say how it is reached.
//! It has no term, and nobody renews it.

use std::{net::Ipv4Addr, time::Duration};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::{
    Kubernetes, KubernetesError,
    annotations::Announcement,
    client::{Call, escape},
    node::{Metadata, Node, Pod, Spec},
};
use crate::{
    config::NetworkConfig,
    lease::{LeaseKey, MacAddress, beginning},
    registry::{Grant, HostAddresses, LeaseRequest, OwnLease, OwnLeaseState},
};

/// The least time between two writes of the annotations. Where what is found is another host's, its agent believes that
/// the node is its own: then it is longer each time, so that peers do not turn to and fro between the two.
pub(super) const WRITE_PERIOD: Duration = Duration::from_secs(5);
const LONGEST_PERIOD: Duration = Duration::from_secs(60);
/// What changes them again within this time answers the write before.
const ANSWER_PERIOD: Duration = Duration::from_secs(180);

/// Type, status and reason of the condition that flannel sets.
const CONDITION: (&str, &str, &str) = ("NetworkUnavailable", "False", "FlannelIsUp");

/// This host's node, with what counts of no other.
#[derive(Debug, Deserialize)]
struct OwnNode {
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: OwnStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OwnStatus {
    conditions: Vec<Condition>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
}

impl Condition {
    fn is_flannels(&self) -> bool {
        (self.kind.as_str(), self.status.as_str(), self.reason.as_str()) == CONDITION
    }
}

impl Kubernetes {
    /// This host's node: the one that is named, or the pod's.
    pub(super) async fn own_name(&mut self) -> Result<String, KubernetesError> {
        if let Some(name) = &self.node_name {
            return Ok(name.clone());
        }
        // Checked at the start.
        let (namespace, pod) = self.options.pod.clone().unwrap_or_default();
        let call = Call { verb: "get", resource: "pods", name: &format!("{namespace}/{pod}") };
        let found: Pod =
            self.get(call, &format!("/api/v1/namespaces/{}/pods/{}", escape(&namespace), escape(&pod))).await?;
        let name = found.spec.node_name;
        if name.is_empty() {
            return Err(KubernetesError::Unscheduled { namespace, pod });
        }
        info!("this host is the node {name}");
        self.node_name = Some(name.clone());
        Ok(name)
    }

    /// A node, whole.
    pub(super) async fn node(&mut self, name: &str) -> Result<Node, KubernetesError> {
        self.get(Call { verb: "get", resource: "nodes", name }, &format!("/api/v1/nodes/{}", escape(name))).await
    }

    async fn own_node(&mut self) -> Result<(String, OwnNode), KubernetesError> {
        let name = self.own_name().await?;
        let call = Call { verb: "get", resource: "nodes", name: &name };
        let node: OwnNode = match self.get(call, &format!("/api/v1/nodes/{}", escape(&name))).await {
            Err(KubernetesError::NotFound { url, .. }) => return Err(KubernetesError::NoNode { name, url }),
            node => node?,
        };
        self.is_complete = node.status.conditions.iter().any(Condition::is_flannels);
        Ok((name, node))
    }

    /// What the node's annotations say of this host's addresses.
    pub async fn host_addresses(&mut self) -> Result<HostAddresses, KubernetesError> {
        let (name, mut node) = self.own_node().await?;
        let announcement = self.names.read(node.metadata.annotations.take().unwrap_or_default());
        let usable = |what: &str, address: Option<Result<Ipv4Addr, &str>>| match address? {
            Ok(address) => Some(address),
            Err(text) => {
                warn!(
                    "the annotation {}{what} of the node {name} is no IPv4 address and is not used: {:?}",
                    self.names.prefix(),
                    beginning(text)
                );
                None
            }
        };
        Ok(HostAddresses {
            public_ip: usable("node-public-ip", announcement.node_public_ip()),
            published: usable("public-ip-overwrite", announcement.overwrite()),
        })
    }

    /// Takes the podCIDR as this host's lease, and has the node announce it.
    pub async fn acquire(
        &mut self,
        config: &NetworkConfig,
        request: &LeaseRequest,
    ) -> Result<OwnLease, KubernetesError> {
        let (name, mut node) = self.own_node().await?;
        let invalid = |source| KubernetesError::PodCidr { name: name.clone(), source };
        let key = node.spec.lease_key().map_err(invalid)?;
        let key = key.ok_or_else(|| KubernetesError::NoPodCidr(name.clone()))?;
        if !config.network.contains(&key.subnet) {
            return Err(KubernetesError::OutsideNetwork { network: config.network, subnet: key.subnet, name });
        }
        let now = self.names.read(node.metadata.annotations.take().unwrap_or_default());
        // A device that is gone (a reboot) is made again with the MAC that the peers know.
        let vtep_mac = request.vtep_mac.or_else(|| now.vtep_mac());
        let vtep_mac = vtep_mac.unwrap_or_else(|| MacAddress::random(&mut rand::rng()));
        self.write(&name, &now, request, vtep_mac).await?;
        Ok(OwnLease { key, vtep_mac, grant: Grant::NodeUid(node.metadata.uid), version: 0 })
    }

    /// Looks whether the node is still the one whose podCIDR this host has, and announces it as it should.
    pub async fn renew(
        &mut self,
        lease: &mut OwnLease,
        request: &LeaseRequest,
    ) -> Result<OwnLeaseState, KubernetesError> {
        let (name, mut node) = match self.own_node().await {
            Err(KubernetesError::NoNode { .. }) => return Ok(OwnLeaseState::Expired),
            node => node?,
        };
        let key: Option<LeaseKey> = node.spec.lease_key().ok().flatten();
        if key != Some(lease.key) || lease.grant != Grant::NodeUid(node.metadata.uid) {
            return Ok(OwnLeaseState::Expired);
        }
        let now = self.names.read(node.metadata.annotations.take().unwrap_or_default());
        let own = request.backend.of_host(request.public_ip, lease.vtep_mac);
        if let Some((public_ip, vtep_mac)) = now.rival(&own) {
            let is_answer = self.written.is_some_and(|written| written.elapsed() < ANSWER_PERIOD);
            self.write_period = if is_answer { (self.write_period * 2).min(LONGEST_PERIOD) } else { WRITE_PERIOD };
            warn!(
                "somebody, or another host, with the address {public_ip} and the MAC {vtep_mac}, announces itself as the node {name}: two \
                 agents must not have one NODE_NAME; the annotations are written again, at most once in {:?}",
                self.write_period
            );
        }
        if self.write(&name, &now, request, lease.vtep_mac).await? {
            warn!("somebody changed the annotations of the node {name}; they are written again");
        }
        Ok(OwnLeaseState::Held)
    }

    /// Has the node name another address of this host.
    pub async fn announce(
        &mut self,
        lease: &OwnLease,
        request: &LeaseRequest,
        public_ip: Ipv4Addr,
    ) -> Result<bool, KubernetesError> {
        let (name, mut node) = self.own_node().await?;
        let now = self.names.read(node.metadata.annotations.take().unwrap_or_default());
        let request = LeaseRequest { public_ip, ..request.clone() };
        // It is this host that changed: nobody is answered.
        self.write_period = WRITE_PERIOD;
        self.write(&name, &now, &request, lease.vtep_mac).await?;
        Ok(true)
    }

    /// Writes what differs. `false` where nothing does.
    async fn write(
        &mut self,
        name: &str,
        now: &Announcement,
        request: &LeaseRequest,
        vtep_mac: MacAddress,
    ) -> Result<bool, KubernetesError> {
        let attributes = request.backend.of_host(request.public_ip, vtep_mac);
        let Some(patch) = self.names.patch(now, &attributes) else { return Ok(false) };
        if let Some(written) = self.written {
            sleep_until(written + self.write_period).await;
        }
        let call = Call { verb: "patch", resource: "nodes/status", name };
        self.patch(call, &format!("/api/v1/nodes/{}/status", escape(name)), &patch).await?;
        self.written = Some(Instant::now());
        Ok(true)
    }

    /// Tells the scheduler that packets of this node's pods can flow, where it does not know from an agent before.
    pub async fn complete(&mut self) -> Result<(), KubernetesError> {
        if !self.options.set_node_network_unavailable || self.is_complete {
            return Ok(());
        }
        let name = self.own_name().await?;
        let now = Time(Timestamp::now());
        let condition = json!({
            "type": CONDITION.0,
            "status": CONDITION.1,
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
            "reason": CONDITION.2,
            "message": "Flannel is running on this node",
        });
        let patch = json!({ "status": { "conditions": [condition] } });
        let call = Call { verb: "patch", resource: "nodes/status", name: &name };
        self.patch(call, &format!("/api/v1/nodes/{}/status", escape(&name)), &patch).await?;
        self.is_complete = true;
        Ok(())
    }
}
