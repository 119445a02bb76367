//! What a request is refused with: `Status` objects with the words of Kubernetes' own
//! (apimachinery/pkg/api/errors/errors.go).

use bytes::Bytes;
use hyper::StatusCode;
use serde_json::{Value, json};

use super::{answer::Answer, request::Target};

/// A refusal: the object that is sent, with the code in it.
#[derive(Clone, Debug)]
pub(super) struct Status(Value);

impl Status {
    fn new(code: StatusCode, reason: &str, message: String, details: Value) -> Self {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason,
        });
        if !details.is_null() {
            status["details"] = details;
        }
        status["code"] = json!(code.as_u16());
        Self(status)
    }

    /// 400.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message.into(), Value::Null)
    }

    /// 401.
    pub(super) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized".to_owned(), Value::Null)
    }

    /// 403, of a resource.
    pub(super) fn forbidden(target: &Target, user: &str, verb: &str) -> Self {
        let named = if target.name.is_empty() { String::new() } else { format!(" \"{}\"", target.name) };
        let resource = target.resource;
        let place = match target.namespace.as_str() {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace \"{namespace}\""),
        };
        let message = format!(
            "{}{named} is forbidden: User \"{user}\" cannot {verb} resource \"{}\" in API group \"{}\" {place}",
            resource.qualified(),
            target.full_resource(),
            resource.group
        );
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message, target.details())
    }

    /// 403, of a path that is no resource.
    pub(super) fn forbidden_path(user: &str, path: &str) -> Self {
        let message = format!("forbidden: User \"{user}\" cannot get path \"{path}\"");
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message, json!({}))
    }

    /// 404, of an object.
    pub(super) fn not_found(target: &Target) -> Self {
        let message = format!("{} \"{}\" not found", target.resource.qualified(), target.name);
        Self::new(StatusCode::NOT_FOUND, "NotFound", message, target.details())
    }

    /// 404, of the namespace that something is to be made in.
    pub(super) fn no_namespace(name: &str) -> Self {
        let details = json!({"name": name, "kind": "namespaces"});
        Self::new(StatusCode::NOT_FOUND, "NotFound", format!("namespaces \"{name}\" not found"), details)
    }

    /// 405.
    pub(super) fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource".to_owned();
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message, json!({}))
    }

    /// 406.
    pub(super) fn not_acceptable(message: String) -> Self {
        Self::new(StatusCode::NOT_ACCEPTABLE, "NotAcceptable", message, Value::Null)
    }

    /// 409, of something that there is.
    pub(super) fn already_exists(target: &Target) -> Self {
        let message = format!("{} \"{}\" already exists", target.resource.qualified(), target.name);
        Self::new(StatusCode::CONFLICT, "AlreadyExists", message, target.details())
    }

    /// 409, of something that is not as it was expected to be.
    pub(super) fn conflict(target: &Target, cause: &str) -> Self {
        let message =
            format!("Operation cannot be fulfilled on {} \"{}\": {cause}", target.resource.qualified(), target.name);
        Self::new(StatusCode::CONFLICT, "Conflict", message, target.details())
    }

    /// 410.
    pub(super) fn expired(message: String) -> Self {
        Self::new(StatusCode::GONE, "Expired", message, Value::Null)
    }

    /// 410 for a list that can be gone on with, though not as of one revision.
    pub(super) fn expired_continue(token: String) -> Self {
        let mut status = Self::expired(
            "The provided continue parameter is too old to display a consistent list result. You can start a new list \
             without the continue parameter, or use the continue token in this response to retrieve the remainder of \
             the results. Continuing with the provided token results in an inconsistent list - objects that were \
             created, modified, or deleted between the time the first chunk was returned and now may show up in the \
             list."
                .to_owned(),
        );
        status.0["metadata"]["continue"] = json!(token);
        status
    }

    /// 413.
    pub(super) fn too_large() -> Self {
        let message = "request body is too large".to_owned();
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message, Value::Null)
    }

    /// 415.
    pub(super) fn unsupported_media_type(accepted: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", message, Value::Null)
    }

    /// 422 for one field.
    pub(super) fn invalid(target: &Target, field: &str, reason: &str, error: &str) -> Self {
        let (kind, name) = (target.resource.kind, &target.name);
        let cause = json!({"reason": reason, "message": error, "field": field});
        let details = json!({"name": name, "group": target.resource.group, "kind": kind, "causes": [cause]});
        let message = format!("{kind} \"{name}\" is invalid: {field}: {error}");
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message, details)
    }

    /// 422 for a patch that can't be applied.
    pub(super) fn unprocessable(message: String) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message, json!({}))
    }

    /// 504 for a revision that is still to come.
    pub(super) fn too_large_revision(wanted: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {wanted}, current: {current}");
        let cause = json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
        let details = json!({"causes": [cause], "retryAfterSeconds": 1});
        Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", format!("Timeout: {message}"), details)
    }

    /// A refusal without a cause, as a fault.
    pub(super) fn fault(code: StatusCode) -> Self {
        let (reason, message) = match code {
            StatusCode::UNAUTHORIZED => return Self::unauthorized(),
            StatusCode::INTERNAL_SERVER_ERROR => {
                ("InternalError", "Internal error occurred: the double was told to fail")
            }
            StatusCode::SERVICE_UNAVAILABLE => {
                ("ServiceUnavailable", "the server is currently unable to handle the request")
            }
            StatusCode::GATEWAY_TIMEOUT => ("Timeout", "Timeout: request did not complete within the allotted timeout"),
            StatusCode::CONFLICT => {
                let message = "Operation cannot be fulfilled: the object has been modified; please apply your changes to \
                               the latest version and try again";
                ("Conflict", message)
            }
            StatusCode::GONE => ("Expired", "The resourceVersion for the provided list is too old."),
            _ => ("Unknown", "the double was told to answer this"),
        };
        Self::new(code, reason, message.to_owned(), Value::Null)
    }

    /// As the object of an event of type `ERROR`.
    pub(super) fn value(&self) -> &Value {
        &self.0
    }
}

impl From<Status> for Answer {
    fn from(status: Status) -> Self {
        let code = status.0["code"].as_u64().and_then(|code| u16::try_from(code).ok());
        let code = code.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::json(code, Bytes::from(status.0.to_string()))
    }
}
