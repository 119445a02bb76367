//! The store, asked with the flags of a command.

use std::{net::Ipv4Addr, time::Duration};

use tokio::time::timeout;

use crate::{
    cli::Cli,
    config::NetworkConfig,
    registry::{Registry, RegistryError, StoreKind, StoreOptions},
};

/// For so long it may take to answer.
pub(super) const LIMIT: Duration = Duration::from_secs(3);

/// What became of asking it with the flags of this command.
pub(super) struct Asked {
    pub(super) kind: StoreKind,
    pub(super) endpoints: Vec<String>,
    /// The network config; or what is wrong, in words.
    pub(super) config: Result<NetworkConfig, String>,
    /// As the store has it.
    pub(super) text: String,
    /// Where it is, in words.
    pub(super) place: String,
    /// Whether it answered, whatever it said.
    pub(super) has_answered: bool,
    /// The address that it says this host is published with.
    pub(super) published: Option<Ipv4Addr>,
    /// For further questions; [`None`] where the flags can't be used.
    pub(super) registry: Option<Registry>,
}

impl Asked {
    pub(super) async fn ask(cli: &Cli) -> Self {
        let mut asked = Self {
            kind: match cli.store() {
                StoreOptions::Etcd(_) => StoreKind::Etcd,
                StoreOptions::Kubernetes(_) => StoreKind::Kubernetes,
            },
            endpoints: Vec::new(),
            config: Err(String::new()),
            text: String::new(),
            place: String::new(),
            has_answered: false,
            published: None,
            registry: None,
        };
        let mut registry = match Registry::new(cli.store()) {
            Ok(registry) => registry,
            Err(error) => return Self { config: Err(error.to_string()), ..asked },
        };
        (asked.endpoints, asked.place) = (registry.endpoints(), registry.config_place());
        let answer = timeout(LIMIT, async {
            // Of Kubernetes the config is a file, and this is what asks.
            let addresses = registry.host_addresses().await?;
            Ok::<_, RegistryError>((addresses, registry.network_config().await))
        });
        match answer.await {
            Err(_) => asked.config = Err(format!("{} does not answer within {LIMIT:?}", asked.endpoints.join(", "))),
            Ok(Err(error)) => asked.config = Err(error.to_string()),
            Ok(Ok((addresses, config))) => {
                asked.published = addresses.published.or(addresses.public_ip);
                asked.has_answered = config.as_ref().err().is_none_or(RegistryError::is_about_config);
                asked.config = config
                    .map(|(config, text)| {
                        asked.text = String::from_utf8_lossy(&text).into_owned();
                        config
                    })
                    .map_err(|error| error.to_string());
            }
        }
        asked.registry = Some(registry);
        asked
    }

    /// Whether leases are nodes'.
    pub(super) const fn is_kubernetes(&self) -> bool {
        matches!(self.kind, StoreKind::Kubernetes)
    }
}
