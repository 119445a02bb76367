//! A watch's answer, line by line.

use futures_util::StreamExt as _;
use http_body_util::{BodyDataStream, BodyExt as _};
use kube::client::Body;

use super::client::causes;

/// Longer than an object can be.
const MAX_LINE: usize = 16 << 20;

/// The lines of an answer that goes on.
pub(super) struct Lines {
    body: BodyDataStream<Body>,
    buffer: Vec<u8>,
    /// How much of it has no end of a line.
    searched: usize,
}

/// Why there is no further line.
#[derive(Debug, thiserror::Error)]
pub(super) enum LineError {
    #[error("the stream was cut off: {0}")]
    Broken(String),
    #[error("the stream ended within a line")]
    Truncated,
    #[error("a line has more than {} bytes", MAX_LINE)]
    Length,
}

impl Lines {
    pub(super) fn new(body: Body) -> Self {
        Self { body: body.into_data_stream(), buffer: Vec::new(), searched: 0 }
    }

    /// The next one; [`None`] where the server ended the stream. Can be cancelled without loss.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + end + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            if self.searched > MAX_LINE {
                return Err(LineError::Length);
            }
            match self.body.next().await {
                Some(Ok(part)) => self.buffer.extend_from_slice(&part),
                Some(Err(error)) => return Err(LineError::Broken(causes(&error))),
                None if self.buffer.iter().all(u8::is_ascii_whitespace) => return Ok(None),
                None => return Err(LineError::Truncated),
            }
        }
    }
}
