//! What an operator can ask of the running agent: a socket in the run directory, one JSON line there and one back.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use flannel_common::vxlan::Vni;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixListener,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::warn;

/// How long either side waits for the other.
const LIMIT: Duration = Duration::from_secs(5);
/// No request is longer.
const MAX_REQUEST: u64 = 4096;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Let go of the peers that the guard holds.
    ReleaseGuard,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// So many peers were let go.
    Released {
        /// How many.
        peers: usize,
    },
    /// The request can't be served.
    Refused {
        /// Why not.
        reason: String,
    },
}

/// The socket does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It can't be made.
    #[error("listen at {path}: {source}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The agent was not reached, or did not answer.
    #[error("ask the agent at {path}: {source}; it may not be running (see flannel-agent status)")]
    Ask {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A request, and where its answer goes.
pub type Pending = (Request, oneshot::Sender<Reply>);

/// Where the socket of an overlay's agent is.
pub fn path(run_dir: &Path, vni: Vni) -> PathBuf {
    run_dir.join(format!("flannel.{vni}.sock"))
}

/// Takes requests until the receiver is gone. Only root may send any. The caller holds the overlay's lock, so a socket
/// that is there is a dead agent's.
///
/// # Errors
/// [`ControlError`] where the socket can't be made.
pub fn listen(path: &Path) -> Result<mpsc::Receiver<Pending>, ControlError> {
    let failed = |source| ControlError::Listen { path: path.to_owned(), source };
    if std::fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
        return Err(failed(io::Error::other("something that is no socket is in its place; remove it")));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let (sender, receiver) = mpsc::channel(8);
    tokio::spawn(async move {
        while !sender.is_closed() {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let sender = sender.clone();
                    tokio::spawn(timeout(LIMIT, serve(stream, sender)));
                }
                Err(error) => {
                    warn!("accept a request: {error}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    });
    Ok(receiver)
}

async fn serve(stream: tokio::net::UnixStream, sender: mpsc::Sender<Pending>) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let read = tokio::io::BufReader::new(reader.take(MAX_REQUEST)).read_line(&mut line).await;
    let reply = match read.map_err(|error| error.to_string()).and_then(|_| parse(&line)) {
        Ok(request) => {
            let (answer, answered) = oneshot::channel();
            let _gone = sender.send((request, answer)).await;
            answered.await.unwrap_or_else(|_| Reply::Refused { reason: "the agent is ending".to_owned() })
        }
        Err(reason) => Reply::Refused { reason },
    };
    let line = serde_json::to_string(&reply).unwrap_or_default() + "\n";
    if let Err(error) = writer.write_all(line.as_bytes()).await {
        warn!("answer a request: {error}");
    }
}

fn parse(line: &str) -> Result<Request, String> {
    serde_json::from_str(line).map_err(|error| error.to_string())
}

/// Asks the running agent.
///
/// # Errors
/// [`ControlError`].
pub fn ask(path: &Path, request: Request) -> Result<Reply, ControlError> {
    let exchange = || {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all((serde_json::to_string(&request)? + "\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    exchange().map_err(|source| ControlError::Ask { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_from_nonsense() {
        assert_eq!(parse(r#"{"request":"release_guard"}"#), Ok(Request::ReleaseGuard));
        for nonsense in ["", "{}", "release_guard", r#"{"request":"shutdown"}"#, "\u{1}"] {
            assert!(parse(nonsense).is_err(), "{nonsense}");
        }
    }
}
