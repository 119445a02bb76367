//! The resources that there are, and how clients learn of them.

use serde_json::{Value, json};

/// A kind of object.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resource {
    /// The API group; `""` is the core's.
    pub(super) group: &'static str,
    /// The group's version.
    pub(super) version: &'static str,
    /// The name in paths.
    pub(super) plural: &'static str,
    singular: &'static str,
    /// The name in objects.
    pub(super) kind: &'static str,
    short: &'static [&'static str],
    /// Whether its objects are in namespaces.
    pub(super) namespaced: bool,
    /// Whether it has the subresource `status`.
    pub(super) has_status: bool,
}

const RBAC: &str = "rbac.authorization.k8s.io";

/// All of them: what an agent asks for, and what that takes.
pub(super) static RESOURCES: [Resource; 5] = [
    Resource {
        group: "",
        version: "v1",
        plural: "nodes",
        singular: "node",
        kind: "Node",
        short: &["no"],
        namespaced: false,
        has_status: true,
    },
    Resource {
        group: "",
        version: "v1",
        plural: "pods",
        singular: "pod",
        kind: "Pod",
        short: &["po"],
        namespaced: true,
        has_status: true,
    },
    Resource {
        group: "",
        version: "v1",
        plural: "namespaces",
        singular: "namespace",
        kind: "Namespace",
        short: &["ns"],
        namespaced: false,
        has_status: false,
    },
    Resource {
        group: RBAC,
        version: "v1",
        plural: "clusterroles",
        singular: "clusterrole",
        kind: "ClusterRole",
        short: &[],
        namespaced: false,
        has_status: false,
    },
    Resource {
        group: RBAC,
        version: "v1",
        plural: "clusterrolebindings",
        singular: "clusterrolebinding",
        kind: "ClusterRoleBinding",
        short: &[],
        namespaced: false,
        has_status: false,
    },
];

impl Resource {
    /// The one of that group, version and name in paths.
    pub(super) fn find(group: &str, version: &str, plural: &str) -> Option<&'static Self> {
        RESOURCES
            .iter()
            .find(|resource| (resource.group, resource.version, resource.plural) == (group, version, plural))
    }

    /// The one of that name in paths.
    pub(super) fn by_plural(plural: &str) -> Option<&'static Self> {
        RESOURCES.iter().find(|resource| resource.plural == plural)
    }

    /// `v1`, `rbac.authorization.k8s.io/v1`.
    pub(super) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    /// As messages name it: with its group.
    pub(super) fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.to_owned() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// The path of a group's version.
    fn root(&self) -> String {
        if self.group.is_empty() { "api/v1".to_owned() } else { format!("apis/{}/{}", self.group, self.version) }
    }
}

/// What a path of discovery answers: <https://kubernetes.io/docs/reference/using-api/api-concepts/#discovery-api>.
pub(super) fn discovery(path: &str) -> Option<Value> {
    let group_version =
        |resource: &Resource| json!({"groupVersion": resource.api_version(), "version": resource.version});
    let rbac = &RESOURCES[3];
    let group = || {
        let version = group_version(rbac);
        json!({"name": RBAC, "versions": [version], "preferredVersion": version})
    };
    match path {
        "/version" => Some(version()),
        "/api" => Some(json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [],
        })),
        "/apis" => Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group()]})),
        "/apis/rbac.authorization.k8s.io" => {
            let mut group = group();
            group["kind"] = json!("APIGroup");
            group["apiVersion"] = json!("v1");
            Some(group)
        }
        "/openapi/v3" => {
            let path = |resource: &Resource| {
                let root = resource.root();
                (root.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{root}?hash=double")}))
            };
            let paths: serde_json::Map<_, _> = [&RESOURCES[0], rbac].map(path).into_iter().collect();
            Some(json!({"paths": paths}))
        }
        path => {
            let (root, of): (_, fn(&[&Resource]) -> Value) = match path.strip_prefix("/openapi/v3/") {
                Some(root) => (root, schema),
                None => (path.strip_prefix('/')?, list),
            };
            let resources: Vec<_> = RESOURCES.iter().filter(|resource| resource.root() == root).collect();
            if resources.is_empty() { None } else { Some(of(&resources)) }
        }
    }
}

/// An `APIResourceList`.
fn list(resources: &[&Resource]) -> Value {
    let mut entries = Vec::new();
    for resource in resources {
        entries.push(json!({
            "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
            "kind": resource.kind, "shortNames": resource.short,
            "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
        }));
        if resource.has_status {
            entries.push(json!({
                "name": format!("{}/status", resource.plural), "singularName": "",
                "namespaced": resource.namespaced, "kind": resource.kind, "verbs": ["get", "patch", "update"],
            }));
        }
    }
    let version = resources.first().map(|resource| resource.api_version());
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": entries})
}

/// The part of an OpenAPI document that kubectl looks into: whether the server validates fields itself.
fn schema(resources: &[&Resource]) -> Value {
    let parameters: Vec<_> = ["dryRun", "fieldManager", "fieldValidation", "force"]
        .iter()
        .map(|name| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}}))
        .collect();
    let path = |resource: &&Resource| {
        let place = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
        let path = format!("/{}{place}/{}/{{name}}", resource.root(), resource.plural);
        let kind = json!({"group": resource.group, "version": resource.version, "kind": resource.kind});
        let patch = json!({"parameters": parameters, "responses": {}, "x-kubernetes-group-version-kind": kind});
        (path, json!({"patch": patch}))
    };
    let paths: serde_json::Map<_, _> = resources.iter().map(path).collect();
    json!({"openapi": "3.0.0", "info": version_info(), "paths": paths, "components": {"schemas": {}}})
}

fn version_info() -> Value {
    json!({"title": "the flannel project's double of an API server", "version": VERSION})
}

const VERSION: &str = "v1.32.0+flannel-test-double";

/// kubectl wants a version of Kubernetes; all else says what this is.
fn version() -> Value {
    json!({
        "major": "1", "minor": "32", "gitVersion": VERSION, "gitCommit": "", "gitTreeState": "a test double, not Kubernetes",
        "buildDate": "", "goVersion": "", "compiler": "", "platform": "linux/amd64",
    })
}
