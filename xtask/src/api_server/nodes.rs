//! Nodes by the thousand, as large as real ones, with flannel's annotations and a kubelet that reports.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};

use super::{
    objects::{Key, Objects},
    resources::Resource,
    strategy,
};

/// As many images as a kubelet reports (`--node-status-max-images`).
const IMAGES: usize = 50;

/// Makes nodes `node-00001` and so on, as far as there are none yet: pods in `10.<n / 256>.<n % 256>.0/24`, the VTEP
/// `172.16.<n / 256>.<n % 256>` with the MAC `0a:00:00:00:<n>`.
pub(super) fn generate(objects: &Objects, count: u16) -> anyhow::Result<()> {
    let Some(resource) = Resource::by_plural("nodes") else { return Ok(()) };
    let template = template().to_string();
    let missing =
        (1..=count).map(|number| (number, key(resource, number))).filter(|(_, key)| objects.get(key).is_none());
    let texts: Vec<_> = missing.map(|(number, key)| (key, text(&template, number))).collect();
    objects.fill(resource, texts.into_iter())
}

/// Has each of those nodes report once in `period`.
pub(super) async fn heartbeats(objects: Arc<Objects>, count: u16, period: Duration) {
    let Some(resource) = Resource::by_plural("nodes") else { return };
    let mut ticks = interval(period / u32::from(count.max(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in (1..=count).cycle() {
        ticks.tick().await;
        let reported = objects.change::<anyhow::Error>(resource, &key(resource, number), |known| {
            let Some(known) = known else { return Ok(None) };
            let mut node = known.value();
            for condition in node["status"]["conditions"].as_array_mut().into_iter().flatten() {
                // The network's is not the kubelet's.
                if condition["type"] != "NetworkUnavailable" {
                    condition["lastHeartbeatTime"] = strategy::timestamp();
                }
            }
            Ok(Some(node))
        });
        if let Err(error) = reported {
            eprintln!("{error:#}");
        }
    }
}

fn key(resource: &Resource, number: u16) -> Key {
    (resource.plural, String::new(), format!("node-{number:05}"))
}

fn text(template: &str, number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    template
        .replace("{name}", &format!("node-{number:05}"))
        .replace("{numbers}", &format!("{high}.{low}"))
        .replace("{digits}", &format!("{high:02x}:{low:02x}"))
        .replace("{uid}", strategy::uid().as_str().unwrap_or_default())
}

/// A node with its names left open.
fn template() -> Value {
    let now = strategy::timestamp();
    let annotations = json!({
        "flannel.alpha.coreos.com/backend-data": "{\"VNI\":1,\"VtepMAC\":\"0a:00:00:00:{digits}\"}",
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": "172.16.{numbers}",
        "kubeadm.alpha.kubernetes.io/cri-socket": "unix:///run/containerd/containerd.sock",
        "node.alpha.kubernetes.io/ttl": "300",
        "volumes.kubernetes.io/controller-managed-attach-detach": "true",
    });
    let labels = json!({
        "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": "{name}", "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": "m5.2xlarge", "topology.kubernetes.io/region": "eu-central-1",
        "topology.kubernetes.io/zone": "eu-central-1a",
    });
    let managed = |manager: &str, subresource: &str, fields: &Value| {
        json!({
            "manager": manager, "operation": "Update", "apiVersion": "v1", "time": now, "fieldsType": "FieldsV1",
            "fieldsV1": fields, "subresource": subresource,
        })
    };
    let keys_of = |object: &Value| {
        let keys = object.as_object().into_iter().flat_map(|object| object.keys());
        keys.map(|key| (format!("f:{key}"), json!({}))).collect::<serde_json::Map<_, _>>()
    };
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": status, "lastHeartbeatTime": now, "lastTransitionTime": now,
            "reason": reason, "message": message,
        })
    };
    let kubelet_fields = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"].map(|kind| {
        let fields = json!({"f:lastHeartbeatTime": {}, "f:lastTransitionTime": {}, "f:message": {}, "f:reason": {}, "f:status": {}});
        (format!("k:{{\"type\":\"{kind}\"}}"), fields)
    });
    let kubelet_fields: serde_json::Map<_, _> = kubelet_fields.into_iter().collect();
    let resources = json!({
        "cpu": "8", "ephemeral-storage": "101430960Ki", "hugepages-1Gi": "0", "hugepages-2Mi": "0",
        "memory": "32386352Ki", "pods": "110",
    });
    json!({
        "metadata": {
            "name": "{name}", "uid": "{uid}", "resourceVersion": "{revision}", "creationTimestamp": now,
            "labels": labels, "annotations": annotations,
            "managedFields": [
                managed("kubelet", "", &json!({"f:metadata": {"f:annotations": {}, "f:labels": keys_of(&labels)}})),
                managed("kube-controller-manager", "", &json!({"f:spec": {"f:podCIDR": {}, "f:podCIDRs": {"v:\"\"": {}}}})),
                managed("flanneld", "status", &json!({"f:metadata": {"f:annotations": keys_of(&annotations)}})),
                managed("kubelet", "status", &json!({"f:status": {"f:conditions": kubelet_fields, "f:images": {}}})),
            ],
        },
        "spec": {
            "podCIDR": "10.{numbers}.0/24", "podCIDRs": ["10.{numbers}.0/24"],
            "providerID": "aws:///eu-central-1a/i-{uid}",
        },
        "status": {
            "capacity": resources, "allocatable": resources,
            "conditions": [
                condition("NetworkUnavailable", "False", "FlannelIsUp", "Flannel is running on this node"),
                condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
                condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
                condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
                condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
            ],
            "addresses": [
                {"type": "InternalIP", "address": "172.16.{numbers}"},
                {"type": "Hostname", "address": "{name}"},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": {
                "machineID": "{uid}", "systemUUID": "{uid}", "bootID": "{uid}", "kernelVersion": "6.1.0-30-amd64",
                "osImage": "Debian GNU/Linux 12 (bookworm)", "containerRuntimeVersion": "containerd://1.7.25",
                "kubeletVersion": "v1.32.0", "kubeProxyVersion": "v1.32.0", "operatingSystem": "linux",
                "architecture": "amd64",
            },
            "images": (0..IMAGES).map(|number| json!({
                "names": [
                    format!("registry.example/team/service-{number:02}@sha256:{:064x}", number * 0x9e37_79b9),
                    format!("registry.example/team/service-{number:02}:v1.{number}.0"),
                ],
                "sizeBytes": 80_000_000 + number,
            })).collect::<Vec<_>>(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_as_large_as_real_ones() {
        let directory = tempfile::tempdir().unwrap();
        let objects = Objects::open(directory.path()).unwrap();
        generate(&objects, 300).unwrap();
        let (revision, all) = objects.now();
        assert_eq!((revision, all.len()), (301, 300));
        let last = all.values().last().unwrap();
        let node = last.value();
        assert_eq!(node["spec"]["podCIDR"], "10.1.44.0/24");
        assert_eq!(node["metadata"]["resourceVersion"], "301");
        let data = node["metadata"]["annotations"]["flannel.alpha.coreos.com/backend-data"].as_str().unwrap();
        assert_eq!(data, r#"{"VNI":1,"VtepMAC":"0a:00:00:00:01:2c"}"#);
        assert!((12 << 10..14 << 10).contains(&last.text().len()), "{}", last.text().len());
        assert!(!last.text().windows(2).any(|pair| pair == b"{n"));
        // There are some.
        generate(&objects, 301).unwrap();
        assert_eq!(objects.now().0, 302);
    }
}
