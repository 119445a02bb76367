//! Where the API server is, and who asks, as this host is told (client-go: tools/clientcmd, BuildConfigFromFlags).

use std::path::{Path, PathBuf};

use http::Uri;
use kube::{
    Config,
    config::{AuthInfo, Kubeconfig, KubeconfigError},
};

use super::{KubernetesError, KubernetesOptions, client::causes};

/// What says it.
#[derive(Clone, Debug)]
pub(super) enum Access {
    /// A file, and the URL that counts in the place of its own.
    Kubeconfig {
        path: PathBuf,
        url: Option<Uri>,
        /// As it was at the start.
        first: Box<Config>,
    },
    /// Nothing but a URL: nobody in particular asks.
    Url(Uri),
    /// What every pod is given.
    InCluster,
}

impl Access {
    /// Finds it, and the API server's URL.
    pub(super) fn find(options: &KubernetesOptions) -> Result<(Self, String), KubernetesError> {
        let url = options.api_url.as_ref().map(|url| {
            let parsed = url.parse().ok().filter(is_url);
            parsed.ok_or_else(|| KubernetesError::Url(url.clone()))
        });
        let access = match (&options.kubeconfig, url.transpose()?) {
            (Some(path), url) => {
                let first = Box::new(read(path, url.as_ref())?);
                Self::Kubeconfig { path: path.clone(), url, first }
            }
            (None, Some(url)) => Self::Url(url),
            (None, None) => Self::InCluster,
        };
        let url = access.config()?.cluster_url.to_string();
        Ok((access, url.trim_end_matches('/').to_owned()))
    }

    /// Read anew each time: tokens and certificates are renewed.
    pub(super) fn config(&self) -> Result<Config, KubernetesError> {
        match self {
            // One that is being replaced counts as it was.
            Self::Kubeconfig { path, url, first } => Ok(read(path, url.as_ref()).unwrap_or_else(|_| (**first).clone())),
            Self::Url(url) => Ok(completed(Config::new(url.clone()))),
            Self::InCluster => Config::incluster().map_err(|error| KubernetesError::NotInCluster(causes(&error))),
        }
    }
}

/// Whether it names a host, by itself or behind a scheme that API servers have.
fn is_url(url: &Uri) -> bool {
    url.host().is_some_and(|host| !host.is_empty()) && matches!(url.scheme_str(), None | Some("http" | "https"))
}

fn read(path: &Path, url: Option<&Uri>) -> Result<Config, KubernetesError> {
    let problem = |problem: String| KubernetesError::Kubeconfig { path: path.to_owned(), problem };
    let mut kubeconfig = Kubeconfig::read_from(path).map_err(|error| problem(unreadable(&error)))?;
    let current = kubeconfig.current_context.clone();
    let context = kubeconfig.contexts.iter().find(|context| Some(&context.name) == current.as_ref());
    let context = context.and_then(|context| context.context.clone()).unwrap_or_default();
    let mut has_proxy = false;
    for named in kubeconfig.clusters.iter_mut().filter(|named| named.name == context.cluster) {
        let Some(cluster) = named.cluster.as_mut() else { continue };
        has_proxy |= cluster.proxy_url.as_ref().is_some_and(|proxy| !proxy.is_empty());
        if let Some(url) = url {
            cluster.server = Some(url.to_string());
        }
    }
    if has_proxy {
        return Err(problem(
            "its proxy-url can't be used: the agent takes no proxy on the way to the API server".to_owned(),
        ));
    }
    let mut config = Config::try_from(kubeconfig).map_err(|error| problem(causes(&error)))?;
    trim_token(&mut config.auth_info);
    if !is_url(&config.cluster_url) {
        return Err(problem(format!("its server {} is no URL such as https://10.0.0.1:6443", config.cluster_url)));
    }
    Ok(completed(config))
}

/// Why a kubeconfig can't be read. The parser would quote the text around the place, which may be a token.
fn unreadable(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::Parse(error) => match error.location() {
            Some(place) => format!("it is no kubeconfig: line {}, column {}", place.line(), place.column()),
            None => "it is no kubeconfig".to_owned(),
        },
        error => causes(error),
    }
}

/// As client-go, takes a token without the line's end that many files have behind it. One that has none is read again by
/// the client as its file changes; this one after a failure.
fn trim_token(user: &mut AuthInfo) {
    let Some(file) = &user.token_file else { return };
    if let Ok(text) = std::fs::read_to_string(file)
        && text.trim() != text
        && let Ok(AuthInfo { token, .. }) = serde_json::from_value(serde_json::json!({ "token": text.trim() }))
    {
        (user.token, user.token_file) = (token, None);
    }
}

/// Without a scheme, a server that nothing is said of for TLS is one without (client-go: rest/url_utils.go).
fn completed(mut config: Config) -> Config {
    let user = &config.auth_info;
    let has_tls = config.root_cert.is_some()
        || config.accept_invalid_certs
        || user.client_certificate.is_some()
        || user.client_certificate_data.is_some();
    if config.cluster_url.scheme().is_none()
        && let Ok(url) = format!("{}://{}", if has_tls { "https" } else { "http" }, config.cluster_url).parse()
    {
        config.cluster_url = url;
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(api_url: Option<&str>, kubeconfig: Option<&Path>) -> KubernetesOptions {
        KubernetesOptions {
            api_url: api_url.map(str::to_owned),
            kubeconfig: kubeconfig.map(Path::to_owned),
            annotation_prefix: "flannel.alpha.coreos.com".to_owned(),
            net_config: PathBuf::new(),
            set_node_network_unavailable: true,
            node_name: Some("node1".to_owned()),
            pod: None,
        }
    }

    /// client-go: rest/url_utils_test.go.
    #[test]
    fn a_server_without_a_scheme_has_no_tls_unless_something_is_said_of_it() {
        let found = |url: &str| Access::find(&options(Some(url), None)).map(|(_, url)| url);
        for (given, url) in [
            ("https://10.0.0.1:6443/", "https://10.0.0.1:6443"),
            ("http://10.0.0.1:8080", "http://10.0.0.1:8080"),
            ("10.0.0.1:8080", "http://10.0.0.1:8080"),
            ("localhost", "http://localhost"),
            ("https://host/k8s/clusters/c-1", "https://host/k8s/clusters/c-1"),
        ] {
            assert_eq!(found(given).expect(given), url);
        }
        for nonsense in ["ftp://10.0.0.1", "/api", "https://", "no url"] {
            assert!(matches!(found(nonsense), Err(KubernetesError::Url(_))), "{nonsense}");
        }
    }

    #[test]
    fn a_kubeconfig_says_where_and_who() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("kubeconfig");
        let write = |cluster: &str, context: &str| {
            let text = format!(
                "{{apiVersion: v1, kind: Config, current-context: {context}, clusters: [{{name: c, cluster: {{{cluster}}}}}], \
                 users: [{{name: u, user: {{token: t}}}}], contexts: [{{name: x, context: {{cluster: c, user: u}}}}]}}"
            );
            std::fs::write(&path, text).expect("written");
        };
        let found = |url| Access::find(&options(url, Some(&path)));
        write("server: 'https://10.0.0.1:6443'", "x");
        assert_eq!(found(None).expect("found").1, "https://10.0.0.1:6443");
        assert_eq!(found(Some("https://10.0.0.2:6443")).expect("found").1, "https://10.0.0.2:6443");
        write("insecure-skip-tls-verify: false", "x");
        assert_eq!(found(Some("http://10.0.0.3")).expect("found").1, "http://10.0.0.3");
        write("server: '10.0.0.1:6443', insecure-skip-tls-verify: true", "x");
        let (access, url) = found(None).expect("found");
        assert_eq!(url, "https://10.0.0.1:6443");
        // Cut off while it is written.
        std::fs::write(&path, "{apiVersion: v1").expect("written");
        assert_eq!(access.config().expect("as before").cluster_url.host(), Some("10.0.0.1"));
        for (cluster, context, problem) in [
            ("server: 'https://10.0.0.1:6443', certificate-authority: /nowhere/ca.pem", "x", "/nowhere/ca.pem"),
            ("server: 'https://10.0.0.1:6443', proxy-url: 'http://10.0.0.9:3128'", "x", "proxy-url"),
            ("server: ''", "x", "failed to parse cluster url"),
            ("server: 'https://10.0.0.1:6443'", "y", "failed to load current context: y"),
        ] {
            write(cluster, context);
            let error = found(None).expect_err(problem).to_string();
            assert!(error.contains(problem) && error.ends_with("; check --kubeconfig-file"), "{error}");
        }
        // What can't be read is not told on: it may be a secret.
        for text in
            ["users:\n- name: u\n  user:\n   token: s3cret\n  - x\n", "s3cret", "users: [{user: {token: [s3cret]}}]"]
        {
            std::fs::write(&path, text).expect("written");
            let error = found(None).expect_err(text).to_string();
            assert!(!error.contains("s3cret") && error.contains("kubeconfig"), "{error}");
        }
        std::fs::remove_file(&path).expect("removed");
        assert!(found(None).expect_err("none").to_string().contains("No such file or directory"));
    }
}
