//! What an operator can ask of the running agent: a socket in the run directory, one JSON line there and one back.

use std::{
    io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use flannel_common::vxlan::Vni;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

/// How long the agent waits for who asks.
const LIMIT: Duration = Duration::from_secs(5);
/// How often one is looked for that does not listen yet.
const PERIOD: Duration = Duration::from_millis(50);
/// No request is longer.
const MAX_REQUEST: u64 = 4096;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Release the peers that the guard holds.
    ReleaseGuard,
    /// Say how the agent is. Its loops are not asked, so that one that hangs does not keep it from an answer.
    Condition,
}

/// How an agent is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Whether the datapath is made, and container runtimes are told of the subnet.
    pub is_ready: bool,
    /// A loop that hangs, and for how many seconds it was not heard.
    pub silent: Option<(String, u64)>,
    /// Why its status could not be written the last time.
    pub unwritten: Option<String>,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// So many peers were released.
    Released {
        /// How many.
        peers: usize,
    },
    /// How the agent is.
    Condition(Condition),
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

/// What the agent's main loop is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Release the peers that the guard holds.
    ReleaseGuard,
}

/// A task, and where its answer goes.
pub type Pending = (Task, oneshot::Sender<Reply>);

/// Where the socket of an overlay's agent is.
pub fn path(run_dir: &Path, vni: Vni) -> PathBuf {
    run_dir.join(format!("flannel.{vni}.sock"))
}

/// Takes requests until the receiver is gone, and answers by itself how the agent is. Only root may send any. The caller holds the overlay's lock, so a socket
/// that is there is a dead agent's.
///
/// # Errors
/// [`ControlError`] where the socket can't be made.
pub fn listen(
    path: &Path,
    condition: impl Fn() -> Condition + Send + Sync + 'static,
) -> Result<mpsc::Receiver<Pending>, ControlError> {
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
    let condition = Arc::new(condition);
    tokio::spawn(async move {
        while !sender.is_closed() {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (sender, condition) = (sender.clone(), Arc::clone(&condition));
                    tokio::spawn(timeout(LIMIT, serve(stream, sender, move || condition())));
                }
                Err(error) => {
                    warn!("accept a request: {error}");
                    sleep(Duration::from_secs(1)).await;
                }
            }
        }
    });
    Ok(receiver)
}

async fn serve(stream: UnixStream, sender: mpsc::Sender<Pending>, condition: impl Fn() -> Condition) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let read = BufReader::new(reader.take(MAX_REQUEST)).read_line(&mut line).await;
    let reply = match read.map_err(|error| error.to_string()).and_then(|_| parse(&line)) {
        Ok(Request::Condition) => Reply::Condition(condition()),
        Ok(Request::ReleaseGuard) => {
            let (answer, answered) = oneshot::channel();
            let _gone = sender.send((Task::ReleaseGuard, answer)).await;
            answered.await.unwrap_or_else(|_| Reply::Refused { reason: "the agent is ending".to_owned() })
        }
        Err(reason) => Reply::Refused { reason },
    };
    let line = serde_json::to_string(&reply).unwrap_or_default() + "\n";
    if let Err(error) = writer.write_all(line.as_bytes()).await {
        // Who asked has waited as long as it wanted to.
        debug!("answer a request: {error}");
    }
}

fn parse(line: &str) -> Result<Request, String> {
    serde_json::from_str(line).map_err(|error| error.to_string())
}

/// Asks the running agent. One that does not listen yet is waited for as long as `begins`, an answer as long as `limit`.
///
/// # Errors
/// [`ControlError::Ask`], with [`io::ErrorKind::TimedOut`] where it takes requests and does not answer.
pub async fn ask(path: &Path, request: Request, begins: Duration, limit: Duration) -> Result<Reply, ControlError> {
    let until = Instant::now() + begins;
    let exchange = async {
        let stream = loop {
            match UnixStream::connect(path).await {
                Err(error) if is_passing(&error) && Instant::now() < until => sleep(PERIOD).await,
                connected => break connected?,
            }
        };
        let answer = timeout(limit, exchange(stream, request)).await;
        answer.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"))))
    };
    exchange.await.map_err(|source| ControlError::Ask { path: path.to_owned(), source })
}

async fn exchange(stream: UnixStream, request: Request) -> io::Result<Reply> {
    let (reader, mut writer) = stream.into_split();
    writer.write_all((serde_json::to_string(&request)? + "\n").as_bytes()).await?;
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).await?;
    Ok(serde_json::from_str(&line)?)
}

/// Whether who is not reached may be so in a moment. Where as many wait as may, which an agent that hangs lets happen, Linux says
/// that it would block (`unix_stream_connect`); then it does not answer.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_from_nonsense() {
        assert_eq!(parse(r#"{"request":"release_guard"}"#), Ok(Request::ReleaseGuard));
        assert_eq!(parse(r#"{"request":"condition"}"#), Ok(Request::Condition));
        for nonsense in ["", "{}", "release_guard", r#"{"request":"shutdown"}"#, "\u{1}"] {
            assert!(parse(nonsense).is_err(), "{nonsense}");
        }
    }
}
