//! Who asks, and what they may: tokens by the file that `--token-auth-file` names, rights by cluster roles and their
//! bindings (<https://kubernetes.io/docs/reference/access-authn-authz/rbac/>).

use std::{fs, path::Path};

use serde_json::Value;

use super::{objects::Objects, request::Target};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    /// `system:serviceaccount:kube-flannel:flannel`, say.
    pub(super) name: String,
    groups: Vec<String>,
}

impl User {
    /// The one whose token this is. The file is read each time, so that tokens can be replaced under the clients' hands; the
    /// real server reads it once.
    pub(super) fn of(authorization: Option<&str>, tokens: &Path) -> Option<Self> {
        let token = authorization?.strip_prefix("Bearer ")?.trim();
        let file = fs::read_to_string(tokens).ok()?;
        file.lines().find_map(|line| {
            // Token, name, uid, and groups in quotes.
            let mut fields = line.splitn(4, ',');
            let is_theirs = fields.next()?.trim() == token && !token.is_empty();
            let name = fields.next()?.trim().to_owned();
            let groups = fields.nth(1).unwrap_or_default().trim().trim_matches('"');
            let groups = groups.split(',').map(|group| group.trim().to_owned()).collect();
            is_theirs.then_some(Self { name, groups })
        })
    }

    /// Whether everything is theirs.
    pub(super) fn is_master(&self) -> bool {
        self.groups.iter().any(|group| group == "system:masters")
    }

    /// Whether they may do that.
    pub(super) fn may(&self, objects: &Objects, verb: &str, target: &Target) -> bool {
        if self.is_master() {
            return true;
        }
        let (_, objects) = objects.now();
        let of = |plural| objects.iter().filter(move |(key, _)| key.0 == plural).map(|(_, object)| object.value());
        of("clusterrolebindings").filter(|binding| self.is_bound(binding)).any(|binding| {
            of("clusterroles")
                .filter(|role| role["metadata"]["name"] == binding["roleRef"]["name"])
                .any(|role| elements(&role["rules"]).any(|rule| allows(rule, verb, target)))
        })
    }

    fn is_bound(&self, binding: &Value) -> bool {
        elements(&binding["subjects"]).any(|subject| {
            let name = subject["name"].as_str().unwrap_or_default();
            match subject["kind"].as_str() {
                Some("User") => name == self.name,
                Some("Group") => self.groups.iter().any(|group| group == name) || name == "system:authenticated",
                Some("ServiceAccount") => {
                    let namespace = subject["namespace"].as_str().unwrap_or_default();
                    self.name == format!("system:serviceaccount:{namespace}:{name}")
                }
                _ => false,
            }
        })
    }
}

fn allows(rule: &Value, verb: &str, target: &Target) -> bool {
    let has = |field: &str, wanted: &str| elements(&rule[field]).any(|value| value == "*" || value == wanted);
    let names = &rule["resourceNames"];
    has("verbs", verb)
        && has("apiGroups", target.resource.group)
        && has("resources", &target.full_resource())
        && (elements(names).next().is_none() || elements(names).any(|name| *name == target.name))
}

fn elements(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_are_those_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tokens");
        fs::write(&file, "t1,alice,1\nt2,bob,2,\"system:masters,others\"\n").unwrap();
        let of = |header| User::of(header, &file);
        assert_eq!(of(Some("Bearer t1")).unwrap().name, "alice");
        assert!(of(Some("Bearer t2")).unwrap().is_master());
        assert!(!of(Some("Bearer t1")).unwrap().is_master());
        for header in [None, Some("Bearer t3"), Some("Bearer "), Some("t1"), Some("Basic t1")] {
            assert_eq!(of(header), None, "{header:?}");
        }
    }

    #[test]
    fn a_rule_allows_what_it_names() {
        let target = |path| Target::parse(path).unwrap();
        let rule = json!({"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]});
        assert!(allows(&rule, "patch", &target("/api/v1/nodes/a/status")));
        assert!(!allows(&rule, "patch", &target("/api/v1/nodes/a")));
        assert!(!allows(&rule, "update", &target("/api/v1/nodes/a/status")));
        let rule = json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["get"], "resourceNames": ["a"]});
        assert!(allows(&rule, "get", &target("/api/v1/nodes/a")));
        assert!(!allows(&rule, "get", &target("/api/v1/nodes/b")));
    }
}
