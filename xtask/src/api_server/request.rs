//! What a request asks for: <https://kubernetes.io/docs/reference/using-api/api-concepts/>.

use std::{collections::BTreeMap, time::Duration};

use hyper::Method;
use serde_json::{Value, json};

use super::{resources::Resource, status::Status};

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Its kind.
    pub(super) resource: &'static Resource,
    /// Its namespace, or `""`: none, or all.
    pub(super) namespace: String,
    /// Its name, or `""`: all.
    pub(super) name: String,
    /// `status`, or `""`.
    pub(super) subresource: String,
}

impl Target {
    /// The target of a path.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let parts: Vec<_> = path.strip_prefix('/')?.split('/').collect();
        let (group, version, parts) = match *parts.as_slice() {
            ["api", version, ref parts @ ..] => ("", version, parts),
            ["apis", group, version, ref parts @ ..] => (group, version, parts),
            _ => return None,
        };
        let (namespace, parts) = match *parts {
            ["namespaces", namespace, plural, ref rest @ ..] => {
                let resource = Resource::find(group, version, plural).filter(|resource| resource.namespaced)?;
                (namespace, (resource, rest))
            }
            [plural, ref rest @ ..] => ("", (Resource::find(group, version, plural)?, rest)),
            [] => return None,
        };
        let (resource, rest) = parts;
        let (name, subresource) = match *rest {
            [] => ("", ""),
            [name] => (name, ""),
            [name, "status"] if resource.has_status => (name, "status"),
            _ => return None,
        };
        let is_whole = !resource.namespaced || !namespace.is_empty() || name.is_empty();
        is_whole.then(|| Self {
            resource,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            subresource: subresource.to_owned(),
        })
    }

    /// With the subresource, as rules name it.
    pub(super) fn full_resource(&self) -> String {
        match self.subresource.as_str() {
            "" => self.resource.plural.to_owned(),
            subresource => format!("{}/{subresource}", self.resource.plural),
        }
    }

    /// What a `Status` says of it.
    pub(super) fn details(&self) -> Value {
        let mut details = serde_json::Map::new();
        for (key, value) in
            [("name", self.name.as_str()), ("group", self.resource.group), ("kind", self.resource.plural)]
        {
            if !value.is_empty() {
                details.insert(key.to_owned(), json!(value));
            }
        }
        Value::Object(details)
    }
}

/// What is to be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    /// Read one.
    Get,
    /// Read all.
    List,
    /// Follow them.
    Watch,
    /// Make one.
    Create,
    /// Replace one.
    Update,
    /// Change a part of one.
    Patch,
    /// Remove one.
    Delete,
}

impl Verb {
    /// The one of a request.
    pub(super) fn of(method: &Method, target: &Target, query: &Query) -> Result<Self, Status> {
        match (method, target.name.is_empty()) {
            (&Method::GET, false) => Ok(Self::Get),
            (&Method::GET, true) if query.flag("watch")? => Ok(Self::Watch),
            (&Method::GET, true) => Ok(Self::List),
            (&Method::POST, true) => Ok(Self::Create),
            (&Method::PUT, false) => Ok(Self::Update),
            (&Method::PATCH, false) => Ok(Self::Patch),
            (&Method::DELETE, false) if target.subresource.is_empty() => Ok(Self::Delete),
            _ => Err(Status::method_not_allowed()),
        }
    }

    /// As rules name it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
        }
    }
}

/// The part of the URL after `?`.
#[derive(Clone, Debug, Default)]
pub(super) struct Query(BTreeMap<String, String>);

impl Query {
    /// From its text.
    pub(super) fn parse(text: Option<&str>) -> Self {
        Self(form_urlencoded::parse(text.unwrap_or_default().as_bytes()).into_owned().collect())
    }

    /// A value; empty is as none.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// A number.
    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Status> {
        let Some(text) = self.get(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| {
            let cause = format!("strconv.ParseUint: parsing \"{text}\": invalid syntax");
            Status::bad_request(format!("Invalid value: \"{text}\": {cause} ({name})"))
        })
    }

    /// A flag, as Go reads one; `watch=` is a true one, too.
    pub(super) fn flag(&self, name: &str) -> Result<bool, Status> {
        match self.0.get(name).map(|text| text.to_ascii_lowercase()).as_deref() {
            Some("" | "1" | "t" | "true") => Ok(true),
            None | Some("0" | "f" | "false") => Ok(false),
            Some(text) => Err(Status::bad_request(format!("{name}: invalid flag \"{text}\""))),
        }
    }

    /// A number of seconds.
    pub(super) fn seconds(&self, name: &str) -> Result<Option<Duration>, Status> {
        Ok(self.number(name)?.filter(|seconds| *seconds > 0).map(Duration::from_secs))
    }

    /// The only name that a list or watch is about. Other selectors are refused rather than ignored.
    pub(super) fn only_name(&self) -> Result<Option<&str>, Status> {
        if let Some(selector) = self.get("labelSelector") {
            return Err(Status::bad_request(format!("this double knows no label selectors: {selector:?}")));
        }
        let Some(selector) = self.get("fieldSelector") else { return Ok(None) };
        match selector.split_once('=') {
            Some(("metadata.name", name)) => Ok(Some(name.trim_start_matches('='))),
            _ => Err(Status::bad_request(format!(
                "this double knows the field selector metadata.name only: {selector:?}"
            ))),
        }
    }
}

/// The form in which objects are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As they are.
    Whole,
    /// Their metadata.
    Partial,
    /// A list of their metadata.
    PartialList,
}

const JSON: &str = "application/json";

impl Form {
    /// The first of the header `Accept` that there is. Tables there are none: kubectl makes its own.
    pub(super) fn negotiate(accept: Option<&str>) -> Result<Self, Status> {
        let accept = accept.filter(|accept| !accept.trim().is_empty()).unwrap_or(JSON);
        accept
            .split(',')
            .find_map(Self::of_range)
            .ok_or_else(|| Status::not_acceptable(format!("only the following media types are accepted: {JSON}")))
    }

    fn of_range(range: &str) -> Option<Self> {
        let mut parts = range.split(';').map(str::trim);
        if !matches!(parts.next()?, JSON | "application/*" | "*/*") {
            return None;
        }
        let parameters: BTreeMap<_, _> = parts.filter_map(|part| part.split_once('=')).collect();
        let get = |name| parameters.get(name).copied();
        match (get("as"), get("g"), get("v")) {
            (None, None, None) => Some(Self::Whole),
            (Some("PartialObjectMetadata"), Some("meta.k8s.io"), Some("v1")) => Some(Self::Partial),
            (Some("PartialObjectMetadataList"), Some("meta.k8s.io"), Some("v1")) => Some(Self::PartialList),
            _ => None,
        }
    }

    /// For one object, or each of a watch: whether only its metadata is wanted.
    pub(super) fn is_partial(self, resource: &Resource) -> Result<bool, Status> {
        match self {
            Self::Whole => Ok(false),
            Self::Partial => Ok(true),
            Self::PartialList => Err(Status::not_acceptable(format!(
                "you requested PartialObjectMetadataList, but the requested object is not a list (*v1.{})",
                resource.kind
            ))),
        }
    }

    /// The same for a list.
    pub(super) fn is_partial_list(self, resource: &Resource) -> Result<bool, Status> {
        match self {
            Self::Whole => Ok(false),
            Self::PartialList => Ok(true),
            Self::Partial => Err(Status::not_acceptable(format!(
                "you requested PartialObjectMetadata, but the requested object is a list (*v1.{}List)",
                resource.kind
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read() {
        let parse = |path| Target::parse(path).map(|target| (target.full_resource(), target.namespace, target.name));
        let is = |resource: &str, namespace: &str, name: &str| {
            Some((resource.to_owned(), namespace.to_owned(), name.to_owned()))
        };
        assert_eq!(parse("/api/v1/nodes"), is("nodes", "", ""));
        assert_eq!(parse("/api/v1/nodes/a/status"), is("nodes/status", "", "a"));
        assert_eq!(parse("/api/v1/namespaces/x"), is("namespaces", "", "x"));
        assert_eq!(parse("/api/v1/namespaces/x/pods/y"), is("pods", "x", "y"));
        assert_eq!(parse("/api/v1/pods"), is("pods", "", ""));
        assert_eq!(parse("/apis/rbac.authorization.k8s.io/v1/clusterroles/z"), is("clusterroles", "", "z"));
        for path in
            ["", "/", "/api/v1", "/api/v2/nodes", "/api/v1/pods/y", "/api/v1/namespaces/x/nodes/y", "/api/v1/nodes/a/b"]
        {
            assert_eq!(parse(path), None, "{path}");
        }
    }

    #[test]
    fn the_first_form_that_there_is_is_taken() {
        let of = |accept: &str| Form::negotiate(Some(accept)).ok();
        let partial = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
        assert_eq!(of(partial), Some(Form::Partial));
        assert_eq!(of(&format!("application/vnd.kubernetes.protobuf, {partial}")), Some(Form::Partial));
        assert_eq!(of("application/json;as=Table;v=v1;g=meta.k8s.io,application/json"), Some(Form::Whole));
        assert_eq!(of("application/json; as=PartialObjectMetadataList; v=v1; g=meta.k8s.io"), Some(Form::PartialList));
        assert_eq!(of("*/*"), Some(Form::Whole));
        assert_eq!(of("application/vnd.kubernetes.protobuf"), None);
        assert_eq!(of("application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v2"), None);
    }
}
