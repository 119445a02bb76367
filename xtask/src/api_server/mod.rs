//! `cargo xtask api-server`: a double of the Kubernetes API server, for the lab and the tests. It speaks the protocol as far
//! as an agent that keeps leases in nodes needs it, and `kubectl` to prepare and look; nothing that is behind it in a
//! cluster (controllers, kubelets, admission) is there.
//!
//! # Layout
//!
//! * `serving` — from a request to its answer
//! * `request`, `answer`, `status` — what is asked for, what is sent back, and in which words it is refused
//! * `resources` — which there are, and discovery
//! * `access` — tokens and roles
//! * `objects` — the objects, their revisions and their past
//! * `listing`, `watching`, `patch`, `strategy` — the verbs that take more than a look
//! * `nodes` — nodes by the thousand
//! * `faults` — what only the double does: faults, and counters
//!
//! # The paths of the double's own
//!
//! For users of the group `system:masters`, under `/double/`; bodies and answers are JSON.
//!
//! * `GET counters`: by user, how often they did what (`list nodes`, `list nodes continued`, `patch nodes/status`), and how
//!   many watches they have open (`watching nodes`)
//! * `POST faults`: what befalls requests, the oldest that fits first: `verb`, `resource`, `user` and `times` say which;
//!   `delayMs`, `hang`, `status` with `retryAfter`, `keep` (the items of a list), `cut`, `pauseMs` what
//! * `POST clear`: no faults any more
//! * `POST close-watches`, `POST silence-watches`: those that are open end, or say nothing more
//! * `POST bookmark`: all watches that allow them get one now
//! * `POST forget`: revisions before now are too old
//! * `PUT objects/<path>`: an object as it is, also one that no API server would take

mod access;
mod answer;
mod faults;
mod listing;
mod nodes;
mod objects;
mod patch;
mod request;
mod resources;
mod serving;
mod status;
mod strategy;
mod watching;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

use self::{faults::Control, objects::Objects, resources::Resource, serving::Server};

/// Namespaces that each cluster has.
const NAMESPACES: [&str; 3] = ["default", "kube-public", "kube-system"];

/// Options of `cargo xtask api-server`.
#[derive(clap::Args)]
pub struct Options {
    /// Where it listens
    #[arg(long)]
    listen: SocketAddr,
    /// Folder for what is to outlast a restart
    #[arg(long)]
    data_dir: PathBuf,
    /// The server's certificates in PEM
    #[arg(long)]
    tls_cert_file: PathBuf,
    /// The key of the first
    #[arg(long)]
    tls_private_key_file: PathBuf,
    /// Who has which token: lines of token,user,uid,"group1,group2"
    #[arg(long)]
    token_auth_file: PathBuf,
    /// Make that many nodes
    #[arg(long, default_value_t = 0)]
    nodes: u16,
    /// Each of these reports once in so many seconds
    #[arg(long)]
    heartbeat: Option<u64>,
}

/// Serves until it is ended by a signal.
///
/// # Errors
/// Where files can't be read, or the address can't be had.
pub fn run(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: &Options) -> Result<()> {
    let tls = tls(options)?;
    std::fs::create_dir_all(&options.data_dir).with_context(|| format!("create {:?}", options.data_dir))?;
    let objects = Arc::new(Objects::open(&options.data_dir)?);
    make_namespaces(&objects)?;
    nodes::generate(&objects, options.nodes)?;
    if let Some(seconds) = options.heartbeat {
        tokio::spawn(nodes::heartbeats(objects.clone(), options.nodes, Duration::from_secs(seconds)));
    }
    let tokens = options.token_auth_file.clone();
    let server = Arc::new(Server { objects, control: Arc::new(Control::default()), tokens });
    let listener = TcpListener::bind(options.listen).await.with_context(|| format!("listen on {}", options.listen))?;
    println!("a double of the Kubernetes API server listens on https://{}", options.listen);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(connection(server.clone(), tls.clone(), stream))),
            Err(error) => eprintln!("accept: {error}"),
        }
    }
}

async fn connection(server: Arc<Server>, tls: TlsAcceptor, stream: TcpStream) {
    let served = async {
        stream.set_nodelay(true)?;
        let stream = tls.accept(stream).await?;
        let service = service_fn(move |request| server.clone().serve(request));
        auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await
    };
    if let Err(error) = served.await {
        eprintln!("a connection ended: {error}");
    }
}

fn tls(options: &Options) -> Result<TlsAcceptor> {
    let path = &options.tls_cert_file;
    let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = certificates.with_context(|| format!("read {path:?}"))?;
    let path = &options.tls_private_key_file;
    let key = PrivateKeyDer::from_pem_file(path).with_context(|| format!("read {path:?}"))?;
    let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(certificates, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn make_namespaces(objects: &Objects) -> Result<()> {
    let resource = Resource::by_plural("namespaces").context("there are namespaces")?;
    for name in NAMESPACES {
        let key = (resource.plural, String::new(), name.to_owned());
        if objects.get(&key).is_none() {
            let metadata = json!({"name": name, "uid": strategy::uid(), "creationTimestamp": strategy::timestamp()});
            objects.change::<anyhow::Error>(resource, &key, |_| Ok(Some(json!({"metadata": metadata}))))?;
        }
    }
    Ok(())
}
