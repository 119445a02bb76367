//! From a request to its answer.

use std::{convert::Infallible, path::PathBuf, sync::Arc};

use http_body_util::{BodyExt as _, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header};
use serde_json::{Map, Value, json};

use super::{
    access::User,
    answer::{Answer, Body, Delivery},
    faults::{Control, Fault},
    listing,
    objects::{Key, Object, Objects},
    patch,
    request::{Form, Query, Target, Verb},
    resources::{Resource, discovery},
    status::Status,
    strategy, watching,
};

/// The largest body (apiserver/pkg/server/config.go).
const BODY_LIMIT: usize = 3 << 20;

/// What all requests share.
#[derive(Debug)]
pub(super) struct Server {
    /// The objects.
    pub(super) objects: Arc<Objects>,
    /// Faults and counters.
    pub(super) control: Arc<Control>,
    /// The file of tokens.
    pub(super) tokens: PathBuf,
}

impl From<anyhow::Error> for Status {
    fn from(error: anyhow::Error) -> Self {
        eprintln!("{error:#}");
        Self::fault(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl Server {
    /// Answers a request.
    pub(super) async fn serve(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let response = match self.answer(request).await {
            Ok(response) => response,
            Err(status) => Answer::from(status).into_response(Delivery::Whole),
        };
        Ok(response)
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let text = |name| head.headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
        let path = head.uri.path().trim_end_matches('/');
        let Some(user) = User::of(text(header::AUTHORIZATION), &self.tokens) else {
            self.control.count("", format!("refused {}", StatusCode::UNAUTHORIZED.as_u16()), 1);
            return Err(Status::unauthorized());
        };
        let body = Limited::new(body, BODY_LIMIT).collect().await.map_err(|_| Status::too_large())?.to_bytes();
        if let Some(order) = path.strip_prefix("/double/") {
            let answer = if user.is_master() {
                self.order(&head.method, order, &body)?
            } else {
                Status::forbidden_path(&user.name, path).into()
            };
            return Ok(answer.into_response(Delivery::Whole));
        }
        if matches!(path, "/healthz" | "/livez" | "/readyz") {
            return Ok(Answer::text(StatusCode::OK, "ok").into_response(Delivery::Whole));
        }
        let Some(target) = Target::parse(path) else {
            let found = discovery(path).filter(|_| head.method == Method::GET);
            let answer = found.map_or_else(Answer::no_such_path, |value| Answer::value(&value));
            return Ok(answer.into_response(Delivery::Whole));
        };
        let query = Query::parse(head.uri.query());
        let verb = Verb::of(&head.method, &target, &query)?;
        let resource = target.full_resource();
        let chunk = if verb == Verb::List && query.get("continue").is_some() { " continued" } else { "" };
        self.control.count(&user.name, format!("{} {resource}{chunk}", verb.name()), 1);
        let fault = self.control.fault(&user.name, verb, &resource);
        if let Some(fault) = &fault
            && let Some(answer) = befall(fault).await
        {
            return Ok(answer.into_response(Delivery::Whole));
        }
        if !user.may(&self.objects, verb.name(), &target) {
            return Err(Status::forbidden(&target, &user.name, verb.name()));
        }
        let form = Form::negotiate(text(header::ACCEPT))?;
        let content_type = text(header::CONTENT_TYPE).unwrap_or_default();
        let answer = match verb {
            Verb::Watch => {
                let partial = form.is_partial(target.resource)?;
                return watching::watch(&self.objects, &self.control, &user.name, &target, &query, partial);
            }
            Verb::List => {
                let partial = form.is_partial_list(target.resource)?;
                let keep = fault.as_ref().and_then(|fault| fault.keep);
                listing::list(&self.objects, &target, &query, partial, keep)?
            }
            Verb::Create => self.create(target, form, content_type, &body)?,
            Verb::Get | Verb::Update | Verb::Patch => self.one(verb, &target, form, content_type, &body)?,
            Verb::Delete => self.delete(&target, &body)?,
        };
        Ok(answer.into_response(fault.map_or(Delivery::Whole, |fault| fault.delivery())))
    }

    /// What is asked for under `/double/`.
    fn order(&self, method: &Method, path: &str, body: &[u8]) -> Result<Answer, Status> {
        match (method, path) {
            (&Method::POST, "forget") => {
                self.objects.forget();
                Ok(Answer::value(&json!({})))
            }
            // As it is, also where no API server would have it.
            (&Method::PUT, path) => {
                let path =
                    path.strip_prefix("objects").and_then(Target::parse).filter(|target| !target.name.is_empty());
                let Some(target) = path else { return Ok(Answer::no_such_path()) };
                let value = Value::Object(parse(body)?);
                let object = self.objects.change::<Status>(target.resource, &key(&target), |_| Ok(Some(value)))?;
                Ok(object.map_or_else(Answer::no_such_path, |object| Answer::json(StatusCode::OK, object.text())))
            }
            (_, path) => match self.control.order(path, body) {
                Some(result) => Ok(Answer::value(&result.map_err(|error| Status::bad_request(error.to_string()))?)),
                None => Ok(Answer::no_such_path()),
            },
        }
    }

    fn create(&self, mut target: Target, form: Form, content_type: &str, body: &[u8]) -> Result<Answer, Status> {
        let new = parse_as(&target, content_type, body)?;
        let name = new.get("metadata").and_then(|metadata| metadata["name"].as_str()).unwrap_or_default();
        name.clone_into(&mut target.name);
        if name.is_empty() {
            let error = "Required value: name or generateName is required";
            return Err(Status::invalid(&target, "metadata.name", "FieldValueRequired", error));
        }
        if target.resource.namespaced {
            let namespace = (
                Resource::by_plural("namespaces").map_or("", |found| found.plural),
                String::new(),
                target.namespace.clone(),
            );
            if self.objects.get(&namespace).is_none() {
                return Err(Status::no_namespace(&target.namespace));
            }
        }
        let partial = form.is_partial(target.resource)?;
        let made = self.objects.change(target.resource, &key(&target), |known| match known {
            Some(_) => Err(Status::already_exists(&target)),
            None => strategy::create(&target, new).map(Some),
        })?;
        shown(made, &target, partial, StatusCode::CREATED)
    }

    fn one(&self, verb: Verb, target: &Target, form: Form, content_type: &str, body: &[u8]) -> Result<Answer, Status> {
        let partial = form.is_partial(target.resource)?;
        let object = match verb {
            Verb::Get => self.objects.get(&key(target)),
            verb => self.objects.change(target.resource, &key(target), |known| {
                let old = known.ok_or_else(|| Status::not_found(target))?.value();
                let new = if verb == Verb::Patch {
                    let mut patched = old.clone();
                    patch::apply(&mut patched, content_type, body)?;
                    match patched {
                        Value::Object(new) => new,
                        _ => return Err(Status::unprocessable("the patched object is no object".to_owned())),
                    }
                } else {
                    parse_as(target, content_type, body)?
                };
                strategy::update(target, &old, new).map(Some)
            })?,
        };
        shown(object, target, partial, StatusCode::OK)
    }

    fn delete(&self, target: &Target, body: &[u8]) -> Result<Answer, Status> {
        let options = if body.is_empty() { Map::new() } else { parse(body)? };
        let mut uid = Value::Null;
        self.objects.change(target.resource, &key(target), |known| {
            let old = known.ok_or_else(|| Status::not_found(target))?.value();
            let metadata = &old["metadata"];
            uid = metadata["uid"].clone();
            let Some(wanted) = options.get("preconditions") else { return Ok(None) };
            for field in ["uid", "resourceVersion"] {
                if wanted.get(field).is_some_and(|wanted| !wanted.is_null() && *wanted != metadata[field]) {
                    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                    let (wanted, known) = (text(&wanted[field]), text(&metadata[field]));
                    let name = if field == "uid" { "UID" } else { "ResourceVersion" };
                    let cause = format!(
                        "Precondition failed: {name} in precondition: {wanted}, {name} in object meta: {known}"
                    );
                    return Err(Status::conflict(target, &cause));
                }
            }
            Ok(None)
        })?;
        let mut details = target.details();
        details["uid"] = uid;
        Ok(Answer::value(&json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
        })))
    }
}

/// What a fault does before anything else. An answer, if that is all.
async fn befall(fault: &Fault) -> Option<Answer> {
    if fault.hang {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(fault.delay()).await;
    match fault.code()? {
        StatusCode::TOO_MANY_REQUESTS => Some(Answer::too_many_requests(fault.retry_after.unwrap_or(1))),
        code => Some(Answer::from(Status::fault(code)).with_retry_after(fault.retry_after)),
    }
}

fn key(target: &Target) -> Key {
    (target.resource.plural, target.namespace.clone(), target.name.clone())
}

fn shown(object: Option<Arc<Object>>, target: &Target, partial: bool, code: StatusCode) -> Result<Answer, Status> {
    let object = object.ok_or_else(|| Status::not_found(target))?;
    Ok(Answer::json(code, if partial { object.partial() } else { object.text() }))
}

fn parse(body: &[u8]) -> Result<Map<String, Value>, Status> {
    serde_json::from_slice(body)
        .map_err(|error| Status::bad_request(format!("couldn't get version/kind; json parse error: {error}")))
}

/// An object of the target's kind.
fn parse_as(target: &Target, content_type: &str, body: &[u8]) -> Result<Map<String, Value>, Status> {
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    if !matches!(media_type, "" | "application/json") {
        return Err(Status::unsupported_media_type(&["application/json"]));
    }
    let object = parse(body)?;
    let (kind, version) = (target.resource.kind, target.resource.api_version());
    let is = |field: &str, wanted: &str| object.get(field).is_none_or(|value| value == wanted);
    if is("kind", kind) && is("apiVersion", &version) {
        return Ok(object);
    }
    let given = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default();
    let (given_version, given_kind) = (given("apiVersion"), given("kind"));
    let message =
        format!("{given_version}, Kind={given_kind} in body does not match the expected {version}, Kind={kind}");
    Err(Status::bad_request(message))
}
