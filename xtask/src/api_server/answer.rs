//! What is sent back.

use std::{io, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{Response, StatusCode, body::Frame, header};

/// A body that may take its time, and may break.
pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// How large the pieces are in which a slow body is sent.
const PIECE: usize = 16 << 10;

/// An answer whose body is known.
#[derive(Debug)]
pub(super) struct Answer {
    code: StatusCode,
    content_type: &'static str,
    retry_after: Option<u64>,
    body: Bytes,
}

/// How it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// At once.
    Whole,
    /// Half of it, and then the connection (HTTP/1) or the stream (HTTP/2) is broken.
    Cut,
    /// In pieces, with a pause before each.
    Slow(Duration),
}

impl Answer {
    /// JSON.
    pub(super) fn json(code: StatusCode, body: Bytes) -> Self {
        Self { code, content_type: "application/json", retry_after: None, body }
    }

    /// A value, as JSON.
    pub(super) fn value(value: &serde_json::Value) -> Self {
        Self::json(StatusCode::OK, Bytes::from(value.to_string()))
    }

    /// Text.
    pub(super) fn text(code: StatusCode, body: &'static str) -> Self {
        let content_type = "text/plain; charset=utf-8";
        Self { code, content_type, retry_after: None, body: Bytes::from_static(body.as_bytes()) }
    }

    /// For a path that is nothing.
    pub(super) fn no_such_path() -> Self {
        Self::text(StatusCode::NOT_FOUND, "404 page not found\n")
    }

    /// What is sent where there are too many requests (apiserver/pkg/server/filters/maxinflight.go): not a `Status`.
    pub(super) fn too_many_requests(retry_after: u64) -> Self {
        let answer = Self::text(StatusCode::TOO_MANY_REQUESTS, "Too many requests, please try again later.\n");
        Self { retry_after: Some(retry_after), ..answer }
    }

    /// The same with a header `Retry-After`, in seconds.
    pub(super) fn with_retry_after(self, retry_after: Option<u64>) -> Self {
        Self { retry_after, ..self }
    }

    /// As a response of the HTTP library.
    pub(super) fn into_response(self, delivery: Delivery) -> Response<Body> {
        let length = self.body.len();
        let body = match delivery {
            Delivery::Whole => Full::new(self.body).map_err(|never| match never {}).boxed_unsync(),
            Delivery::Cut => {
                let half = Ok(Frame::data(self.body.slice(..length / 2)));
                StreamBody::new(stream::iter([half, Err(io::Error::other("cut, as asked for"))])).boxed_unsync()
            }
            Delivery::Slow(pause) => {
                let pieces: Vec<_> =
                    (0..length).step_by(PIECE).map(|start| self.body.slice(start..length.min(start + PIECE))).collect();
                StreamBody::new(stream::iter(pieces).then(move |piece| async move {
                    tokio::time::sleep(pause).await;
                    Ok(Frame::data(piece))
                }))
                .boxed_unsync()
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = self.code;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(self.content_type));
        if delivery == Delivery::Cut {
            // Else a body without its end would be one that ends where the connection does.
            headers.insert(header::CONTENT_LENGTH, length.into());
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}
