//! The protocol that the Kubernetes store is kept by, on the double of the API server: judged by curl and kubectl. Where
//! `KUBE_APISERVER` (and `KUBE_ETCD`) name programs, the same against the real one, but for faults.

use std::{path::PathBuf, time::Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::{
    lab::{ApiServer, Netns, User},
    process::Process,
    progress::wait_for,
};

use crate::world::{SOON, names};

const NODES: &str = "/api/v1/nodes";
const PARTIAL: &str = "Accept: application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
const PARTIAL_LIST: &str = "Accept: application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
const STRATEGIC: &str = "Content-Type: application/strategic-merge-patch+json";
const MERGE: &str = "Content-Type: application/merge-patch+json";

/// An API server in a namespace of its own. The fields go in this order.
struct Place {
    server: ApiServer,
    _netns: Netns,
    directory: TempDir,
}

impl Place {
    fn new(arguments: &[&str]) -> Self {
        let (name, directory) = names();
        let netns = Netns::create(&format!("{name}-api")).unwrap();
        netns.ip("link set lo up").unwrap();
        let server = ApiServer::start(&netns, [127, 0, 0, 1].into(), directory.path(), arguments).unwrap();
        Self { server, _netns: netns, directory }
    }

    fn with_nodes(count: u8) -> Self {
        let place = Self::new(&[]);
        for number in 1..=count {
            place.server.add_node(&format!("node{number}"), &format!("10.244.{number}.0/24")).unwrap();
        }
        place
    }

    /// A request as the administrator that must succeed.
    fn get(&self, path: &str, headers: &[&str]) -> Value {
        let (code, body) = self.server.request(User::ADMIN, "GET", path, headers, "").unwrap();
        assert_eq!(code, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Any request, and the answer's code and object.
    fn ask(&self, user: User, method: &str, path: &str, headers: &[&str], body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (code, body) = self.server.request(user, method, path, headers, &body).unwrap();
        (code, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }

    fn revision(&self) -> String {
        self.get(&format!("{NODES}?limit=1"), &[])["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
    }

    fn annotate(&self, node: &str, value: &str) -> String {
        let patch = json!({"metadata": {"annotations": {"x": value}}});
        let (code, node) = self.ask(User::ADMIN, "PATCH", &format!("{NODES}/{node}"), &[MERGE], &patch);
        assert_eq!(code, 200, "{node}");
        node["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
    }

    fn watch(&self, parameters: &str, headers: &[&str]) -> Watch {
        self.watch_as(User::ADMIN, parameters, headers)
    }

    fn watch_as(&self, user: User, parameters: &str, headers: &[&str]) -> Watch {
        let number = std::fs::read_dir(self.directory.path()).unwrap().count();
        let log: PathBuf = self.directory.path().join(format!("watch-{number}"));
        let path = format!("{NODES}?watch=true{parameters}");
        Watch(self.server.watch(user, &path, headers, &log).unwrap())
    }

    /// Wants the rest of this to be the double's.
    fn is_double() -> bool {
        let double = ApiServer::is_double();
        if !double {
            println!("the rest is about the double");
        }
        double
    }

    fn order(&self, path: &str, body: &Value) {
        self.server.double("POST", path, body).unwrap();
    }
}

/// A watch with curl.
struct Watch(Process);

impl Watch {
    fn events(&self) -> Vec<Value> {
        let text = self.0.log();
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no event: {line}"))).collect()
    }

    fn wait(&self, count: usize) -> Vec<Value> {
        let waited = wait_for("events", SOON, || self.events().len() >= count);
        assert!(waited.is_ok(), "{count} events: {}", self.0.log());
        self.events()
    }

    /// Waits for its end.
    fn end(mut self) -> Vec<Value> {
        self.0.wait(SOON).unwrap();
        self.events()
    }
}

/// The types of events and the names of what they are of.
fn outline(events: &[Value]) -> Vec<String> {
    let of = |event: &Value| {
        let name = event["object"]["metadata"]["name"].as_str().unwrap_or_default();
        format!("{} {name}", event["type"].as_str().unwrap()).trim_end().to_owned()
    };
    events.iter().map(of).collect()
}

fn names_of(list: &Value) -> Vec<&str> {
    list["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].as_str().unwrap()).collect()
}

#[test]
fn kubectl_works_with_the_api_server() {
    let place = Place::new(&[]);
    let kubectl = |words: &str| place.server.kubectl(&words.split(' ').collect::<Vec<_>>()).unwrap();
    let node =
        json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "a"}, "spec": {"podCIDR": "10.244.0.0/24"}});
    let create = ["create", "--validate=false", "-f", "-"];
    let said = place.server.kubectl_as(User::ADMIN, &create, &node.to_string()).unwrap();
    assert_eq!(said, "node/a created\n");
    let error = place.server.kubectl_as(User::ADMIN, &create, &node.to_string()).unwrap_err().to_string();
    assert!(error.contains("(AlreadyExists)") && error.contains("nodes \"a\" already exists"), "{error}");
    kubectl("annotate node a flannel.alpha.coreos.com/public-ip-overwrite=203.0.113.7");
    kubectl("label node a zone=z");
    kubectl(r#"patch node a -p {"spec":{"unschedulable":true}}"#);
    kubectl(r#"patch node a --type=json -p [{"op":"remove","path":"/metadata/labels/zone"}]"#);
    assert!(kubectl("get nodes").lines().any(|line| line.starts_with("a ")));
    let node: Value = serde_json::from_str(&kubectl("get node a -o json")).unwrap();
    assert_eq!(node["spec"]["podCIDRs"], json!(["10.244.0.0/24"]));
    assert_eq!(node["spec"]["unschedulable"], true);
    assert_eq!(node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip-overwrite"], "203.0.113.7");
    assert_eq!(node["metadata"]["labels"]["zone"], Value::Null);
    // It waits until the node is gone, by a watch.
    assert_eq!(kubectl("delete node a"), "node \"a\" deleted\n");
    let error = place.server.kubectl(&["get", "node", "a"]).unwrap_err().to_string();
    assert!(error.contains("nodes \"a\" not found"), "{error}");
    let version = kubectl("version");
    assert_eq!(version.contains("double"), ApiServer::is_double(), "{version}");
}

#[test]
fn a_list_in_chunks_is_of_one_revision() {
    let place = Place::with_nodes(7);
    let first = place.get(&format!("{NODES}?limit=3"), &[]);
    assert_eq!((&first["kind"], &first["apiVersion"]), (&json!("NodeList"), &json!("v1")));
    assert_eq!(names_of(&first), ["node1", "node2", "node3"]);
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    // The type is the list's.
    assert_eq!(first["items"][0]["kind"], Value::Null);
    // What changes meanwhile is not in it.
    place.annotate("node7", "later");
    assert_eq!(place.ask(User::ADMIN, "DELETE", &format!("{NODES}/node5"), &[], &Value::Null).0, 200);
    place.server.add_node("node44", "10.244.44.0/24").unwrap();
    let token = first["metadata"]["continue"].as_str().unwrap();
    let second = place.get(&format!("{NODES}?limit=3&continue={token}"), &[]);
    assert_eq!(names_of(&second), ["node4", "node5", "node6"]);
    assert_eq!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    let token = second["metadata"]["continue"].as_str().unwrap();
    let third = place.get(&format!("{NODES}?limit=3&continue={token}"), &[PARTIAL_LIST]);
    assert_eq!(names_of(&third), ["node7"]);
    assert_eq!(third["metadata"]["continue"].as_str().unwrap_or_default(), "");
    assert_eq!(third["metadata"]["remainingItemCount"], Value::Null);
    assert_eq!(third["items"][0]["metadata"]["annotations"], Value::Null);
    // A new list has it.
    let all = place.get(NODES, &[PARTIAL_LIST]);
    assert_eq!(all["kind"], "PartialObjectMetadataList");
    assert_eq!(names_of(&all), ["node1", "node2", "node3", "node4", "node44", "node6", "node7"]);
    let last = &all["items"][6];
    assert_eq!((&last["kind"], &last["apiVersion"]), (&json!("PartialObjectMetadata"), &json!("meta.k8s.io/v1")));
    assert_eq!((&last["metadata"]["annotations"]["x"], &last["spec"]), (&json!("later"), &Value::Null));
    // What may come from a cache knows no chunks.
    assert_eq!(place.get(&format!("{NODES}?limit=3&resourceVersion=0"), &[])["items"].as_array().unwrap().len(), 7);
    let (code, status) = place.ask(
        User::ADMIN,
        "GET",
        &format!("{NODES}?limit=3&continue={token}&resourceVersion=1"),
        &[],
        &Value::Null,
    );
    assert_eq!(code, 400, "{status}");

    if !Place::is_double() {
        return;
    }
    place.annotate("node1", "newer");
    place.order("forget", &Value::Null);
    let (code, status) = place.ask(User::ADMIN, "GET", &format!("{NODES}?limit=3&continue={token}"), &[], &Value::Null);
    assert_eq!((code, &status["reason"]), (410, &json!("Expired")));
    // It can be gone on with from where it was, with what is there now.
    let token = status["metadata"]["continue"].as_str().unwrap();
    let rest = place.get(&format!("{NODES}?continue={token}"), &[]);
    assert_eq!(names_of(&rest), ["node7"]);
    assert_eq!(rest["items"][0]["metadata"]["annotations"]["x"], "later");
}

#[test]
fn a_watch_tells_each_change_from_a_revision_on() {
    let place = Place::with_nodes(2);
    let revision = place.revision();
    place.annotate("node1", "1");
    let watch = place.watch(&format!("&resourceVersion={revision}"), &[PARTIAL]);
    watch.wait(1);
    place.annotate("node2", "2");
    place.server.add_node("node3", "10.244.3.0/24").unwrap();
    assert_eq!(place.ask(User::ADMIN, "DELETE", &format!("{NODES}/node1"), &[], &Value::Null).0, 200);
    let events = watch.wait(4);
    assert_eq!(outline(&events), ["MODIFIED node1", "MODIFIED node2", "ADDED node3", "DELETED node1"]);
    let revisions: Vec<u64> = events
        .iter()
        .map(|event| {
            let object = &event["object"];
            assert_eq!((&object["kind"], &object["spec"]), (&json!("PartialObjectMetadata"), &Value::Null));
            object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
        })
        .collect();
    assert!(revisions.is_sorted() && revisions[3] > revisions[2], "{revisions:?}");
    // Without a revision it begins with all that there is; of one name with that one.
    let all = place.watch("&timeoutSeconds=1", &[]).end();
    assert_eq!(outline(&all), ["ADDED node2", "ADDED node3"]);
    assert_eq!(all[0]["object"]["spec"]["podCIDR"], "10.244.2.0/24");
    let one = place.watch("&timeoutSeconds=1&fieldSelector=metadata.name%3Dnode3", &[]).end();
    assert_eq!(outline(&one), ["ADDED node3"]);
}

#[test]
fn a_watch_ends_with_a_bookmark_that_the_next_begins_at() {
    let mut place = Place::with_nodes(1);
    let begun = place.revision();
    place.annotate("node1", "1");
    let newest = place.annotate("node1", "2");
    let start = Instant::now();
    let watch =
        place.watch(&format!("&resourceVersion={newest}&allowWatchBookmarks=true&timeoutSeconds=4"), &[PARTIAL]);
    let events = watch.end();
    assert!((3..8).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert_eq!(outline(&events), ["BOOKMARK"]);
    let bookmark = &events[0]["object"];
    assert_eq!(bookmark["kind"], "PartialObjectMetadata");
    let bookmark = bookmark["metadata"]["resourceVersion"].as_str().unwrap();
    assert!(bookmark.parse::<u64>().unwrap() >= newest.parse().unwrap());

    let watch = place.watch(&format!("&resourceVersion={bookmark}"), &[]);
    place.annotate("node1", "3");
    assert_eq!(watch.wait(1)[0]["object"]["metadata"]["annotations"]["x"], "3");

    // A server that has just started knows nothing of the past.
    place.server.kill().unwrap();
    place.server.resume().unwrap();
    assert_eq!(place.get(NODES, &[])["items"][0]["metadata"]["annotations"]["x"], "3");
    let events = place.watch(&format!("&resourceVersion={begun}&timeoutSeconds=20"), &[]).end();
    let gone = &events[0]["object"];
    assert_eq!(outline(&events), ["ERROR"]);
    assert_eq!((&gone["code"], &gone["reason"], &gone["kind"]), (&json!(410), &json!("Expired"), &json!("Status")));
    assert!(gone["message"].as_str().unwrap().starts_with(&format!("too old resource version: {begun} (")), "{gone}");
}

#[test]
fn refusals_are_in_the_words_of_kubernetes() {
    let place = Place::with_nodes(1);
    place.server.allow(User::AGENT, &ApiServer::flannels_rules()).unwrap();
    let node = format!("{NODES}/node1");
    let (agent, status_path) = (User::AGENT, format!("{node}/status"));
    let check =
        |user: User, method: &str, path: &str, headers: &[&str], body: Value, code: u16, reason: &str, text: &str| {
            let (given, status) = place.ask(user, method, path, headers, &body);
            let message = status["message"].as_str().unwrap_or_default();
            assert!(
                given == code && status["reason"] == reason && status["code"] == code && message.contains(text),
                "{method} {path}: {given}: {status}"
            );
        };
    let none = || Value::Null;
    let by = |user: &str, what: &str| format!("User \"{user}\" cannot {what} in API group \"\"");
    let text = format!("nodes is forbidden: {} at the cluster scope", by("stranger", "list resource \"nodes\""));
    check(User::STRANGER, "GET", NODES, &[], none(), 403, "Forbidden", &text);
    let text =
        format!("nodes \"node1\" is forbidden: {} at the cluster scope", by(agent.name(), "patch resource \"nodes\""));
    check(agent, "PATCH", &node, &[MERGE], json!({}), 403, "Forbidden", &text);
    let text = by("stranger", "patch resource \"nodes/status\"");
    check(User::STRANGER, "PATCH", &status_path, &[STRATEGIC], json!({}), 403, "Forbidden", &text);
    let text =
        format!("pods \"p\" is forbidden: {} in the namespace \"default\"", by("stranger", "get resource \"pods\""));
    check(User::STRANGER, "GET", "/api/v1/namespaces/default/pods/p", &[], none(), 403, "Forbidden", &text);
    check(agent, "GET", "/api/v1/namespaces/default/pods/p", &[], none(), 404, "NotFound", "pods \"p\" not found");
    check(agent, "GET", &format!("{NODES}/x"), &[], none(), 404, "NotFound", "nodes \"x\" not found");
    let protobuf = "Accept: application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v2";
    check(
        agent,
        "GET",
        NODES,
        &[protobuf],
        none(),
        406,
        "NotAcceptable",
        "only the following media types are accepted: ",
    );
    check(agent, "GET", NODES, &[PARTIAL], none(), 406, "NotAcceptable", "the requested object is a list");
    check(
        agent,
        "PATCH",
        &status_path,
        &[],
        json!({}),
        415,
        "UnsupportedMediaType",
        "application/strategic-merge-patch+json",
    );
    let streaming = format!("{NODES}?watch=true&sendInitialEvents=true&timeoutSeconds=1");
    check(agent, "GET", &streaming, &[], none(), 422, "Invalid", "sendInitialEvents");
    let stale = json!({"metadata": {"resourceVersion": "1"}});
    let text = "Operation cannot be fulfilled on nodes \"node1\": the object has been modified";
    check(agent, "PATCH", &status_path, &[STRATEGIC], stale, 409, "Conflict", text);
    let moved = json!({"spec": {"podCIDR": "10.244.9.0/24", "podCIDRs": ["10.244.9.0/24"]}});
    let text = "node updates may not change podCIDR except from \"\" to valid";
    check(User::ADMIN, "PATCH", &node, &[MERGE], moved, 422, "Invalid", text);
    let nonsense = json!({"metadata": {"name": "y"}, "spec": {"podCIDR": "abc"}});
    check(User::ADMIN, "POST", NODES, &[], nonsense, 422, "Invalid", "abc");
    let long = json!({"metadata": {"annotations": {"x": "y".repeat(256 << 10)}}});
    check(User::ADMIN, "PATCH", &node, &[MERGE], long, 422, "Invalid", "metadata.annotations: Too long");
}

#[test]
fn tokens_are_replaced() {
    let mut place = Place::with_nodes(1);
    place.server.allow(User::AGENT, &ApiServer::flannels_rules()).unwrap();
    let list = |place: &Place| place.ask(User::AGENT, "GET", NODES, &[], &Value::Null);
    assert_eq!(list(&place).0, 200);
    let admin = (User::ADMIN, "admin-token".to_owned());
    place.server.replace_tokens(&[admin, (User::AGENT, "second".to_owned())]).unwrap();
    let (code, status) = list(&place);
    assert_eq!((code, &status["reason"], &status["message"]), (401, &json!("Unauthorized"), &json!("Unauthorized")));
    std::fs::write(place.server.token_file(User::AGENT), "second\n").unwrap();
    assert_eq!(list(&place).0, 200);
}

/// What an agent writes, with its rights.
#[test]
fn the_status_is_patched_and_nothing_else() {
    let place = Place::with_nodes(1);
    place.server.allow(User::AGENT, &ApiServer::flannels_rules()).unwrap();
    let patch = |patch: &Value| {
        let (code, node) = place.ask(User::AGENT, "PATCH", &format!("{NODES}/node1/status"), &[STRATEGIC], patch);
        assert_eq!(code, 200, "{node}");
        node
    };
    let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": "Test"});
    patch(&json!({"status": {"conditions": [condition("Ready", "True")]}}));
    let written = json!({
        "metadata": {"annotations": {"flannel.alpha.coreos.com/public-ip": "192.0.2.1", "other": "x"}},
        "spec": {"unschedulable": true},
        "status": {"conditions": [condition("NetworkUnavailable", "False")]},
    });
    let node = patch(&written);
    assert_eq!(node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"], "192.0.2.1");
    assert_eq!(node["spec"]["unschedulable"], Value::Null);
    let kinds = |node: &Value| {
        let mut kinds: Vec<_> = node["status"]["conditions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["type"].as_str().unwrap().to_owned())
            .collect();
        kinds.sort();
        kinds
    };
    assert_eq!(kinds(&node), ["NetworkUnavailable", "Ready"]);
    // What changes nothing makes no revision, and wakes no watch.
    assert_eq!(patch(&written)["metadata"]["resourceVersion"], node["metadata"]["resourceVersion"]);
    let node = patch(&json!({
        "metadata": {"annotations": {"other": null}},
        "status": {"conditions": [condition("Ready", "False")]},
    }));
    assert_eq!(node["metadata"]["annotations"], json!({"flannel.alpha.coreos.com/public-ip": "192.0.2.1"}));
    assert_eq!(kinds(&node), ["NetworkUnavailable", "Ready"]);
    // And by the node itself the status is not to be had.
    let status = json!({"status": {"conditions": [condition("Ready", "Unknown")]}});
    let (code, node) = place.ask(User::ADMIN, "PATCH", &format!("{NODES}/node1"), &[MERGE], &status);
    let ready = node["status"]["conditions"].as_array().unwrap().iter().find(|one| one["type"] == "Ready").unwrap();
    assert_eq!((code, &ready["status"]), (200, &json!("False")));
    // A pod says on which node it is.
    let spec = json!({"nodeName": "node1", "containers": [{"name": "c", "image": "i"}]});
    place.server.post("/api/v1/namespaces/default/pods", &json!({"metadata": {"name": "p"}, "spec": spec})).unwrap();
    let (code, pod) = place.ask(User::AGENT, "GET", "/api/v1/namespaces/default/pods/p", &[], &Value::Null);
    assert_eq!((code, &pod["spec"]["nodeName"]), (200, &json!("node1")));
}

#[test]
fn the_double_fails_as_it_is_told_and_counts() {
    if !Place::is_double() {
        return;
    }
    let place = Place::with_nodes(4);
    place.server.allow(User::AGENT, &ApiServer::flannels_rules()).unwrap();
    let list = || place.ask(User::AGENT, "GET", NODES, &[], &Value::Null);
    let agents = |fault: Value| {
        let mut fault = fault;
        fault["user"] = json!(User::AGENT.name());
        fault["verb"] = json!("list");
        place.order("faults", &fault);
    };
    agents(json!({"times": 2, "status": 500}));
    agents(json!({"times": 1, "status": 503, "retryAfter": 7}));
    agents(json!({"times": 1, "keep": 2}));
    agents(json!({"times": 1, "keep": 0}));
    assert_eq!([(); 3].map(|()| list().0), [500, 500, 503]);
    assert_eq!(names_of(&list().1), ["node1", "node2"]);
    assert_eq!(names_of(&list().1), [""; 0]);
    assert_eq!(names_of(&list().1).len(), 4);
    // Not a Status, but text.
    agents(json!({"times": 1, "status": 429, "retryAfter": 3}));
    let (code, body) = place.server.request(User::AGENT, "GET", NODES, &["Expect:"], "").unwrap();
    assert_eq!((code, body.as_str()), (429, "Too many requests, please try again later.\n"));
    agents(json!({"times": 1, "cut": true}));
    assert!(place.server.request(User::AGENT, "GET", NODES, &[], "").is_err());
    agents(json!({"times": 1, "delayMs": 300}));
    let start = Instant::now();
    assert_eq!(list().0, 200);
    assert!(start.elapsed().as_millis() >= 300);

    let revision = place.revision();
    let watch = || place.watch_as(User::AGENT, &format!("&resourceVersion={revision}&allowWatchBookmarks=true"), &[]);
    let watching = |count: i64| {
        let waited =
            wait_for("watches", SOON, || place.server.counter(User::AGENT, "watching nodes").unwrap() == count);
        waited.unwrap();
    };
    let silent = watch();
    watching(1);
    place.order("silence-watches", &Value::Null);
    let open = watch();
    watching(2);
    place.order("bookmark", &Value::Null);
    assert_eq!(outline(&open.wait(1)), ["BOOKMARK"]);
    place.annotate("node1", "1");
    assert_eq!(outline(&open.wait(2)), ["BOOKMARK", "MODIFIED node1"]);
    assert_eq!(silent.events().len(), 0);
    place.order("close-watches", &Value::Null);
    assert_eq!(open.end().len(), 2);
    drop(silent);
    watching(0);
    place.order("forget", &Value::Null);
    assert_eq!(outline(&watch().end()), ["ERROR"]);
    let odd = json!({"metadata": {"name": "odd"}, "spec": {"podCIDR": "abc", "podCIDRs": ["abc"]}});
    place.server.double("PUT", "objects/api/v1/nodes/odd", &odd).unwrap();
    assert_eq!(place.get(&format!("{NODES}/odd"), &[])["spec"]["podCIDR"], "abc");
    assert_eq!(place.server.counter(User::AGENT, "list nodes").unwrap(), 9);
    assert_eq!(place.server.counter(User::AGENT, "watch nodes").unwrap(), 3);
    assert_eq!(place.ask(User::AGENT, "POST", "/double/forget", &[], &Value::Null).0, 403);
}

#[test]
fn the_double_has_thousands_of_nodes_with_kubelets() {
    if !Place::is_double() {
        return;
    }
    let place = Place::new(&["--nodes", "1000", "--heartbeat", "10"]);
    let first = place.get(&format!("{NODES}?limit=500"), &[]);
    assert_eq!(first["metadata"]["remainingItemCount"], 500);
    assert!(first.to_string().len() > 500 * (12 << 10));
    let revision = first["metadata"]["resourceVersion"].as_str().unwrap();
    // A hundred a second; as metadata, these are small.
    let watch = place.watch(&format!("&resourceVersion={revision}"), &[PARTIAL]);
    let events = watch.wait(20);
    assert!(events.iter().all(|event| event["type"] == "MODIFIED" && event.to_string().len() < 4 << 10));
}
