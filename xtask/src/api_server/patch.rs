//! Patches: merge, JSON and strategic merge
//! (<https://github.com/kubernetes/community/blob/master/contributors/devel/sig-api-machinery/strategic-merge-patch.md>,
//! apimachinery/pkg/util/strategicpatch).

use serde_json::{Map, Value};

use super::status::Status;

const MERGE: &str = "application/merge-patch+json";
const JSON: &str = "application/json-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// How lists are merged whose elements have a key, by their path (`patchMergeKey` in core/v1/types.go).
const KEYS: [(&str, &str); 5] = [
    ("status.conditions", "type"),
    ("status.addresses", "type"),
    ("metadata.ownerReferences", "uid"),
    ("spec.containers", "name"),
    ("spec.volumes", "name"),
];
/// Lists that are merged as sets.
const SETS: [&str; 2] = ["spec.podCIDRs", "metadata.finalizers"];

/// Applies a patch of a media type.
pub(super) fn apply(object: &mut Value, content_type: &str, patch: &[u8]) -> Result<(), Status> {
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    let read = |error: serde_json::Error| Status::bad_request(format!("error decoding patch: {error}"));
    match media_type {
        MERGE => {
            let patch: Value = serde_json::from_slice(patch).map_err(read)?;
            if !patch.is_object() {
                return Err(Status::bad_request("error decoding patch: it is no object"));
            }
            json_patch::merge(object, &patch);
            Ok(())
        }
        JSON => {
            let patch: json_patch::Patch = serde_json::from_slice(patch).map_err(read)?;
            json_patch::patch(object, &patch).map_err(|error| {
                Status::unprocessable(format!(
                    "the server rejected our request due to an error in our request: {error}"
                ))
            })
        }
        STRATEGIC => {
            let patch: Map<String, Value> = serde_json::from_slice(patch).map_err(read)?;
            let Some(object) = object.as_object_mut() else { return Ok(()) };
            merge(object, patch, "").map_err(Status::unprocessable)
        }
        _ => Err(Status::unsupported_media_type(&[JSON, MERGE, STRATEGIC])),
    }
}

fn merge(object: &mut Map<String, Value>, mut patch: Map<String, Value>, path: &str) -> Result<(), String> {
    match directive(&mut patch)?.as_deref() {
        None | Some("merge") => {}
        Some("replace") => {
            *object = patch;
            return Ok(());
        }
        Some("delete") => {
            object.clear();
            return Ok(());
        }
        Some(other) => return Err(format!("Unknown patch type: {other}")),
    }
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = value.as_array().cloned().unwrap_or_default();
            if let Some(Value::Array(items)) = object.get_mut(list) {
                items.retain(|item| !gone.contains(item));
            }
            continue;
        }
        // The order of a merged list is nobody's concern here.
        if key.starts_with("$setElementOrder/") {
            continue;
        }
        if key.starts_with('$') {
            return Err(format!("this double knows no directive {key}"));
        }
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match value {
            Value::Null => drop(object.shift_remove(&key)),
            Value::Object(patch) => {
                let inner = object.entry(key).or_insert_with(|| Value::Object(Map::new()));
                match inner {
                    Value::Object(inner) => merge(inner, patch, &path)?,
                    other => *other = cleaned(patch, &path)?,
                }
            }
            Value::Array(patch) => {
                merge_list(object.entry(key).or_insert_with(|| Value::Array(Vec::new())), patch, &path)?
            }
            value => drop(object.insert(key, value)),
        }
    }
    Ok(())
}

/// What becomes of a patch where there was nothing: its nulls and directives do not stay.
fn cleaned(patch: Map<String, Value>, path: &str) -> Result<Value, String> {
    let mut object = Map::new();
    merge(&mut object, patch, path)?;
    Ok(Value::Object(object))
}

fn merge_list(list: &mut Value, patch: Vec<Value>, path: &str) -> Result<(), String> {
    let Value::Array(items) = list else {
        *list = Value::Array(patch);
        return Ok(());
    };
    if SETS.contains(&path) {
        for item in patch {
            if !items.contains(&item) {
                items.push(item);
            }
        }
        return Ok(());
    }
    let Some((_, merge_key)) = KEYS.iter().find(|(list, _)| *list == path) else {
        *items = patch;
        return Ok(());
    };
    if patch.iter().any(|item| item.get("$patch").is_some_and(|directive| directive == "replace")) {
        *items = patch.into_iter().filter(|item| item.get("$patch").is_none()).collect();
        return Ok(());
    }
    for item in patch {
        let Value::Object(mut item) = item else { return Err(format!("{path}: an element is no object")) };
        let directive = directive(&mut item)?;
        let Some(key) = item.get(*merge_key).cloned() else {
            return Err(format!("map: {} does not contain declared merge key: {merge_key}", Value::Object(item)));
        };
        let position = items.iter().position(|known| known.get(*merge_key) == Some(&key));
        match (directive.as_deref(), position) {
            (Some("delete"), Some(position)) => drop(items.remove(position)),
            (Some("delete"), None) => {}
            (None | Some("merge"), Some(position)) => {
                if let Some(known) = items.get_mut(position).and_then(Value::as_object_mut) {
                    merge(known, item, path)?;
                }
            }
            (None | Some("merge"), None) => items.push(cleaned(item, path)?),
            (Some(other), _) => return Err(format!("Unknown patch type: {other}")),
        }
    }
    Ok(())
}

fn directive(patch: &mut Map<String, Value>) -> Result<Option<String>, String> {
    match patch.shift_remove("$patch") {
        None => Ok(None),
        Some(Value::String(directive)) => Ok(Some(directive)),
        Some(other) => Err(format!("Unknown patch type: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn strategic(mut object: Value, patch: &Value) -> Result<Value, Status> {
        apply(&mut object, STRATEGIC, patch.to_string().as_bytes()).map(|()| object)
    }

    #[test]
    fn conditions_are_merged_by_type_and_annotations_by_key() {
        let object = json!({
            "metadata": {"annotations": {"a": "1", "b": "2"}},
            "status": {"conditions": [{"type": "Ready", "status": "True", "x": 1}], "images": [1, 2]},
        });
        let patch = json!({
            "metadata": {"annotations": {"b": null, "c": "3"}},
            "status": {
                "$setElementOrder/conditions": [{"type": "Ready"}, {"type": "NetworkUnavailable"}],
                "conditions": [{"type": "NetworkUnavailable", "status": "False"}, {"type": "Ready", "status": "False"}],
                "images": [3],
            },
        });
        let patched = strategic(object, &patch).unwrap();
        let is = json!({
            "metadata": {"annotations": {"a": "1", "c": "3"}},
            "status": {
                "conditions": [
                    {"type": "Ready", "status": "False", "x": 1},
                    {"type": "NetworkUnavailable", "status": "False"},
                ],
                "images": [3],
            },
        });
        assert_eq!(patched, is);
    }

    #[test]
    fn directives_delete_and_replace() {
        let object =
            json!({"status": {"conditions": [{"type": "A"}, {"type": "B"}]}, "spec": {"podCIDRs": ["a", "b"]}});
        let patch =
            json!({"status": {"conditions": [{"$patch": "delete", "type": "A"}]}, "spec": {"podCIDRs": ["b", "c"]}});
        let patched = strategic(object.clone(), &patch).unwrap();
        assert_eq!(patched, json!({"status": {"conditions": [{"type": "B"}]}, "spec": {"podCIDRs": ["a", "b", "c"]}}));
        let patch =
            json!({"status": {"$patch": "replace", "x": 1}, "spec": {"$deleteFromPrimitiveList/podCIDRs": ["a"]}});
        let patched = strategic(object.clone(), &patch).unwrap();
        assert_eq!(patched, json!({"status": {"x": 1}, "spec": {"podCIDRs": ["b"]}}));
        assert!(strategic(object.clone(), &json!({"status": {"conditions": [{"status": "x"}]}})).is_err());
        assert!(strategic(object, &json!({"$retainKeys": ["status"]})).is_err());
    }

    #[test]
    fn other_media_types_are_refused() {
        let mut object = json!({"a": 1});
        assert!(apply(&mut object, "application/json", b"{}").is_err());
        apply(&mut object, "application/merge-patch+json; charset=utf-8", br#"{"a": null, "b": 2}"#).unwrap();
        apply(&mut object, JSON, br#"[{"op": "add", "path": "/c", "value": 3}]"#).unwrap();
        assert_eq!(object, json!({"b": 2, "c": 3}));
        assert!(apply(&mut object, JSON, br#"[{"op": "test", "path": "/c", "value": 4}]"#).is_err());
    }
}
