//! Lists, whole and in chunks of one revision
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#retrieving-large-results-sets-in-chunks>).

use std::ops::Bound;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::{BufMut as _, Bytes, BytesMut};
use hyper::StatusCode;
use serde_json::{Value, json};

use super::{
    answer::Answer,
    objects::{Key, Object, Objects, Snapshot},
    request::{Query, Target},
    status::Status,
};

/// Where a list goes on: the revision that it began at, and the first key that is not in it yet.
#[derive(Debug, PartialEq, Eq)]
struct Token {
    /// `None`: whatever is there now.
    revision: Option<u64>,
    start: (String, String),
}

impl Token {
    const VERSION: &str = "meta.k8s.io/v1";

    fn parse(text: &str) -> Result<Self, Status> {
        let parse = || {
            let value: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
            let revision = value["rv"].as_i64()?;
            let (namespace, name) = value["start"].as_str()?.rsplit_once('/')?;
            (value["v"] == Self::VERSION).then(|| Self {
                revision: u64::try_from(revision).ok(),
                start: (namespace.to_owned(), name.to_owned()),
            })
        };
        parse().ok_or_else(|| Status::bad_request("continue key is not valid: it is none of this server's"))
    }

    fn text(&self) -> String {
        let revision = self.revision.map_or(json!(-1), |revision| json!(revision));
        let start = format!("{}/{}", self.start.0, self.start.1);
        URL_SAFE_NO_PAD.encode(json!({"v": Self::VERSION, "rv": revision, "start": start}).to_string())
    }
}

/// Answers a list, or a chunk of one. `keep` is a fault's.
pub(super) fn list(
    objects: &Objects,
    target: &Target,
    query: &Query,
    partial: bool,
    keep: Option<usize>,
) -> Result<Answer, Status> {
    let (revision, snapshot, start, limit) = place(objects, query)?;
    let only = query.only_name()?;
    let plural = target.resource.plural;
    let (namespace, name) = start.unwrap_or_default();
    let wanted = |object: &&std::sync::Arc<Object>| {
        (target.namespace.is_empty() || target.namespace == object.key.1)
            && only.is_none_or(|only| only == object.key.2)
    };
    let from: Bound<Key> = Bound::Included((plural, namespace, name));
    let all = snapshot.range((from, Bound::Unbounded)).take_while(|(key, _)| key.0 == plural).map(|(_, object)| object);
    let rest: Vec<_> = all.filter(wanted).collect();
    let rest = rest.get(..keep.unwrap_or(rest.len()).min(rest.len())).unwrap_or_default();
    let (chunk, further) = rest.split_at(limit.unwrap_or(rest.len()).min(rest.len()));

    let mut metadata = json!({"resourceVersion": revision.to_string()});
    if let Some(next) = further.first() {
        let start = (next.key.1.clone(), next.key.2.clone());
        metadata["continue"] = json!(Token { revision: Some(revision), start }.text());
        // Of a list that a selector makes, nobody knows how many are left without looking.
        if only.is_none() {
            metadata["remainingItemCount"] = json!(further.len());
        }
    }
    let (kind, version) = match partial {
        true => ("PartialObjectMetadata", "meta.k8s.io/v1".to_owned()),
        false => (target.resource.kind, target.resource.api_version()),
    };
    let mut body = BytesMut::new();
    body.put_slice(
        format!("{{\"kind\":\"{kind}List\",\"apiVersion\":\"{version}\",\"metadata\":{metadata},\"items\":[")
            .as_bytes(),
    );
    for (index, object) in chunk.iter().enumerate() {
        if index > 0 {
            body.put_u8(b',');
        }
        if partial {
            body.put_slice(&object.partial());
        } else {
            body.put_u8(b'{');
            body.put_slice(object.untyped());
        }
    }
    body.put_slice(b"]}\n");
    Ok(Answer::json(StatusCode::OK, Bytes::from(body)))
}

/// The revision that is listed, its objects, where the list begins, and how many at most.
type Place = (u64, Snapshot, Option<(String, String)>, Option<usize>);

fn place(objects: &Objects, query: &Query) -> Result<Place, Status> {
    let limit =
        query.number("limit")?.filter(|limit| *limit > 0).map(|limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let wanted = query.number("resourceVersion")?;
    if let Some(token) = query.get("continue") {
        if wanted.is_some_and(|wanted| wanted > 0) {
            return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
        }
        let token = Token::parse(token)?;
        let Some(revision) = token.revision else {
            let (revision, snapshot) = objects.keep_now();
            return Ok((revision, snapshot, Some(token.start), limit));
        };
        return match objects.at(revision) {
            Some(snapshot) => Ok((revision, snapshot, Some(token.start), limit)),
            None => Err(Status::expired_continue(Token { revision: None, ..token }.text())),
        };
    }
    let (newest, _) = objects.now();
    let matching = query.get("resourceVersionMatch");
    match (wanted, matching) {
        (None, Some(_)) => {
            let message = "ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: \
                           resourceVersionMatch is forbidden unless resourceVersion is provided";
            Err(Status::unprocessable(message.to_owned()))
        }
        (Some(wanted), _) if wanted > newest => Err(Status::too_large_revision(wanted, newest)),
        (Some(wanted), Some("Exact")) => exactly(objects, wanted, limit),
        (Some(wanted), None) if wanted > 0 && limit.is_some() => exactly(objects, wanted, limit),
        // From the watch cache, which knows no chunks.
        (Some(0), _) => {
            let (revision, snapshot) = objects.now();
            Ok((revision, snapshot, None, None))
        }
        _ => {
            let (revision, snapshot) = objects.keep_now();
            Ok((revision, snapshot, None, limit))
        }
    }
}

fn exactly(objects: &Objects, wanted: u64, limit: Option<usize>) -> Result<Place, Status> {
    let expired = || Status::expired("The resourceVersion for the provided list is too old.".to_owned());
    Ok((wanted, objects.at(wanted).ok_or_else(expired)?, None, limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_as_they_were_written() {
        for revision in [Some(5), None] {
            let token = Token { revision, start: ("".to_owned(), "node-1".to_owned()) };
            assert_eq!(Token::parse(&token.text()).unwrap(), token);
        }
        for text in ["", "x", "e30", "eyJ2IjoieCJ9"] {
            assert!(Token::parse(text).is_err(), "{text}");
        }
    }
}
