//! What becomes of an object that is written: what a client can't set, what belongs to a subresource, and what is no valid
//! object (pkg/registry/core/node/strategy.go, pkg/apis/core/validation).

use std::net::IpAddr;

use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{request::Target, status::Status};

/// All annotations of an object together (apimachinery/pkg/api/validation/objectmeta.go).
const ANNOTATIONS_LIMIT: usize = 256 << 10;

/// The time, as objects hold it.
pub(super) fn timestamp() -> Value {
    let now = OffsetDateTime::now_utc();
    json!(now.replace_nanosecond(0).unwrap_or(now).format(&Rfc3339).unwrap_or_default())
}

/// A new uid, of version 4.
pub(super) fn uid() -> Value {
    let bytes = rand::random::<u128>() & !(0xf << 76) & !(0b11 << 62) | 0x4 << 76 | 0b10 << 62;
    let digits = format!("{bytes:032x}");
    json!([&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-"))
}

/// What an object is made as.
pub(super) fn create(target: &Target, mut new: Map<String, Value>) -> Result<Value, Status> {
    let mut metadata = take_metadata(&mut new);
    if metadata.get("resourceVersion").is_some_and(|version| version != "") {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    metadata.insert("name".to_owned(), json!(target.name));
    if !target.namespace.is_empty() {
        metadata.insert("namespace".to_owned(), json!(target.namespace));
    }
    metadata.insert("uid".to_owned(), uid());
    metadata.insert("creationTimestamp".to_owned(), timestamp());
    finish(target, metadata, new)
}

/// What an object becomes that a client wants to be `new`.
pub(super) fn update(target: &Target, old: &Value, mut new: Map<String, Value>) -> Result<Value, Status> {
    let modified = "the object has been modified; please apply your changes to the latest version and try again";
    let mut metadata = take_metadata(&mut new);
    let known = |field: &str| old["metadata"][field].clone();
    let given = metadata.get("resourceVersion").filter(|version| !version.is_null() && **version != "");
    if given.is_some_and(|version| *version != known("resourceVersion")) {
        return Err(Status::conflict(target, modified));
    }
    if let Some(uid) = metadata.get("uid").filter(|uid| !uid.is_null() && **uid != "" && **uid != known("uid")) {
        let (uid, known) = (uid.as_str().unwrap_or_default(), known("uid"));
        let known = known.as_str().unwrap_or_default();
        let cause = format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {known}");
        return Err(Status::conflict(target, &cause));
    }
    if metadata.get("name").is_some_and(|name| *name != known("name")) {
        let name = metadata.get("name").and_then(Value::as_str).unwrap_or_default();
        let message = format!("the name of the object ({name}) does not match the name on the URL ({})", target.name);
        return Err(Status::bad_request(message));
    }
    for field in ["uid", "name", "namespace", "creationTimestamp"] {
        let value = known(field);
        if !value.is_null() {
            metadata.insert(field.to_owned(), value);
        }
    }
    // The status is the subresource's, and only that is.
    let others = if target.subresource == "status" { "spec" } else { "status" };
    if target.resource.has_status {
        match old.get(others) {
            Some(value) => drop(new.insert(others.to_owned(), value.clone())),
            None => drop(new.shift_remove(others)),
        }
    }
    let new = finish(target, metadata, new)?;
    let was = &old["spec"]["podCIDRs"];
    if was.as_array().is_some_and(|list| !list.is_empty()) && *was != new["spec"]["podCIDRs"] {
        let cause = "node updates may not change podCIDR except from \"\" to valid";
        return Err(Status::invalid(target, "spec.podCIDRs", "FieldValueForbidden", &format!("Forbidden: {cause}")));
    }
    Ok(new)
}

fn finish(target: &Target, metadata: Map<String, Value>, mut fields: Map<String, Value>) -> Result<Value, Status> {
    fields.insert("metadata".to_owned(), Value::Object(metadata));
    let mut object = Value::Object(fields);
    complete(&mut object);
    validate(target, &object)?;
    Ok(object)
}

fn take_metadata(object: &mut Map<String, Value>) -> Map<String, Value> {
    match object.shift_remove("metadata") {
        Some(Value::Object(metadata)) => metadata,
        _ => Map::new(),
    }
}

/// The older form of a field, and the newer: where one is given, so is the other (pkg/apis/core/v1/conversion.go).
fn complete(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    match (spec.get("podCIDR").cloned(), spec.get("podCIDRs").and_then(|list| list.get(0)).cloned()) {
        (Some(one), None) if one != "" => drop(spec.insert("podCIDRs".to_owned(), json!([one]))),
        (one, Some(first)) if one.as_ref() != Some(&first) => drop(spec.insert("podCIDR".to_owned(), first)),
        _ => {}
    }
}

fn validate(target: &Target, object: &Value) -> Result<(), Status> {
    let annotations = object["metadata"]["annotations"].as_object();
    let length = |(key, value): (&String, &Value)| key.len() + value.as_str().map_or(0, str::len);
    if annotations.is_some_and(|annotations| annotations.iter().map(length).sum::<usize>() > ANNOTATIONS_LIMIT) {
        let error = format!("Too long: may not be more than {ANNOTATIONS_LIMIT} bytes");
        return Err(Status::invalid(target, "metadata.annotations", "FieldValueTooLong", &error));
    }
    if let Some((key, value)) =
        annotations.and_then(|annotations| annotations.iter().find(|(_, value)| !value.is_string()))
    {
        let message = format!(
            "json: cannot unmarshal {value} into Go struct field ObjectMeta.metadata.annotations ({key}) of type string"
        );
        return Err(Status::bad_request(message));
    }
    let Some(list) = object["spec"]["podCIDRs"].as_array() else { return Ok(()) };
    let invalid = |field: &str, error: String| Err(Status::invalid(target, field, "FieldValueInvalid", &error));
    let mut families = Vec::new();
    for (index, prefix) in list.iter().enumerate() {
        match prefix.as_str().and_then(family) {
            Some(family) => families.push(family),
            None => {
                let error = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
                return invalid(&format!("spec.podCIDRs[{index}]"), format!("Invalid value: {prefix}: {error}"));
            }
        }
    }
    families.sort_unstable();
    if families.windows(2).any(|pair| matches!(pair, [one, other] if one == other)) {
        let list = json!(list).to_string();
        return invalid(
            "spec.podCIDRs",
            format!("Invalid value: {list}: may specify no more than one CIDR for each IP family"),
        );
    }
    Ok(())
}

/// The address family of a prefix, if it is one.
fn family(prefix: &str) -> Option<u8> {
    let (address, length) = prefix.split_once('/')?;
    let (family, longest) = match address.parse().ok()? {
        IpAddr::V4(_) => (4, 32),
        IpAddr::V6(_) => (6, 128),
    };
    (length.parse::<u8>().ok()? <= longest).then_some(family)
}
