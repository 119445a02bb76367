//! Where things are in etcd, as flannel and Go's client of etcd read it: the servers, and the path of the keys.

use std::str::FromStr;

use axum::http::uri::Authority;

/// A list of servers, as flannel takes it (Go: etcd's client/v3/internal/endpoint/endpoint.go).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    servers: Vec<Server>,
    /// What is in the list besides, and why it can't be used.
    unusable: Vec<EndpointError>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Server {
    scheme: Scheme,
    /// Host and port.
    authority: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
    /// TLS where there is a certificate for it.
    NotGiven,
}

/// An endpoint that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// A URL of something else.
    #[error("the endpoint {0:?} has the scheme {1:?}; expected http://HOST:PORT, https://HOST:PORT or HOST:PORT")]
    Scheme(String, String),
    /// No host, or what is none.
    #[error(
        "the endpoint {0:?} names no host; expected http://HOST:PORT, https://HOST:PORT or HOST:PORT, with commas between several"
    )]
    Host(String),
    /// Neither scheme nor port.
    #[error("the endpoint {0:?} names no port; expected {0}:2379, or another port that etcd listens on")]
    Port(String),
    /// Nothing at all.
    #[error(
        "no endpoint is given; expected http://HOST:PORT, https://HOST:PORT or HOST:PORT, with commas between several"
    )]
    None,
}

impl Endpoints {
    /// URLs for the client, each once. With a client's certificate those that have no scheme are reached by TLS.
    pub fn urls(&self, has_identity: bool) -> Vec<String> {
        let mut urls = Vec::new();
        for Server { scheme, authority } in &self.servers {
            let is_tls = *scheme == Scheme::Https || *scheme == Scheme::NotGiven && has_identity;
            let url = format!("{}://{authority}", if is_tls { "https" } else { "http" });
            if !urls.contains(&url) {
                urls.push(url);
            }
        }
        urls
    }

    /// What can't be used of the list, for those that run with the rest of it.
    pub fn unusable(&self) -> &[EndpointError] {
        &self.unusable
    }
}

impl FromStr for Endpoints {
    type Err = EndpointError;

    /// Takes what can be used; an error where that is nothing. Spaces and quotes around the list or its parts, as they
    /// come from templates and environment files, mean nothing; nor do empty parts.
    fn from_str(list: &str) -> Result<Self, Self::Err> {
        let (mut servers, mut unusable) = (Vec::new(), Vec::new());
        for part in bare(list).split(',').map(bare).filter(|part| !part.is_empty()) {
            match Server::parse(part) {
                Ok(server) => servers.push(server),
                Err(error) => unusable.push(error),
            }
        }
        match unusable.first() {
            Some(error) if servers.is_empty() => Err(error.clone()),
            None if servers.is_empty() => Err(EndpointError::None),
            _ => Ok(Self { servers, unusable }),
        }
    }
}

impl Server {
    fn parse(part: &str) -> Result<Self, EndpointError> {
        let (scheme, rest) = match part.split_once("://") {
            None => (Scheme::NotGiven, part),
            Some((scheme, rest)) => match scheme.to_ascii_lowercase().as_str() {
                "http" => (Scheme::Http, rest),
                "https" => (Scheme::Https, rest),
                _ => return Err(EndpointError::Scheme(part.to_owned(), scheme.to_owned())),
            },
        };
        // Path, query and user are no part of where it is.
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let authority = authority.rsplit_once('@').map_or(authority, |(_user, host)| host);
        let host = || EndpointError::Host(part.to_owned());
        let parsed: Authority = authority.parse().map_err(|_| host())?;
        let has_port = match authority.strip_prefix(parsed.host()) {
            _ if parsed.host().is_empty() => return Err(host()),
            Some("") => false,
            Some(port) if port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok()) => true,
            _ => return Err(host()),
        };
        if scheme == Scheme::NotGiven && !has_port {
            return Err(EndpointError::Port(part.to_owned()));
        }
        Ok(Self { scheme, authority: authority.to_owned() })
    }
}

/// Without spaces and quotes around it.
fn bare(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == '"' || c == '\'')
}

/// The path that flannel's keys are under: `--etcd-prefix`, as Go's `path.Join` makes keys of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// What stands before `config` and `subnets/...`: empty, or with a slash at its end.
    root: String,
}

impl Prefix {
    /// Reads the flag.
    pub fn new(flag: &str) -> Self {
        let key = join(flag, CONFIG);
        Self { root: key.strip_suffix(CONFIG).unwrap_or_default().to_owned() }
    }

    /// A key below it.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.root)
    }

    /// What a key is called below it.
    pub fn name_of<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(&self.root)
    }

    /// A name for it that two prefixes share only if their keys are the same. Versions that put a slash in front of
    /// every prefix had the same name for the same keys.
    pub fn identity(&self) -> &str {
        match self.root.as_str() {
            "" => ".",
            root => root.strip_suffix('/').unwrap_or(root),
        }
    }
}

/// The name of the network config's key.
const CONFIG: &str = "config";

/// Go's `path.Join`: empty elements are left out, the rest is cleaned.
fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { clean(name) } else { clean(&format!("{prefix}/{name}")) }
}

/// Go's `path.Clean`: single slashes, no `.`, no `..` that has something to take away, no slash at the end.
fn clean(path: &str) -> String {
    let is_rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
            // The root has no parent.
            ".." if is_rooted => {}
            part => parts.push(part),
        }
    }
    match (is_rooted, parts.join("/")) {
        (true, path) => format!("/{path}"),
        (false, path) if path.is_empty() => ".".to_owned(),
        (false, path) => path,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn urls(list: &str, has_identity: bool) -> String {
        list.parse::<Endpoints>().expect(list).urls(has_identity).join(" ")
    }

    #[test]
    fn endpoints_as_gos_client_takes_them() {
        for (list, plain, with_identity) in [
            ("http://127.0.0.1:4001,http://127.0.0.1:2379", "http://127.0.0.1:4001 http://127.0.0.1:2379", ""),
            ("10.0.0.2:2379", "http://10.0.0.2:2379", "https://10.0.0.2:2379"),
            ("etcd:2379,https://b:2379", "http://etcd:2379 https://b:2379", "https://etcd:2379 https://b:2379"),
            ("HTTP://a:2379,HttpS://b:2379", "http://a:2379 https://b:2379", ""),
            ("http://a:2379/", "http://a:2379", ""),
            ("https://a:2379/v2/keys?x#y", "https://a:2379", ""),
            ("http://user:word@a:2379", "http://a:2379", ""),
            ("https://etcd.example", "https://etcd.example", ""),
            (
                "http://[fd00::1]:2379,[::1]:2379",
                "http://[fd00::1]:2379 http://[::1]:2379",
                "http://[fd00::1]:2379 https://[::1]:2379",
            ),
            (" http://a:2379 , http://b:2379 ", "http://a:2379 http://b:2379", ""),
            (r#""http://a:2379, http://b:2379""#, "http://a:2379 http://b:2379", ""),
            ("'http://a:2379','http://b:2379'", "http://a:2379 http://b:2379", ""),
            ("http://a:2379,\n  http://b:2379\n", "http://a:2379 http://b:2379", ""),
            (",http://a:2379,,http://a:2379,", "http://a:2379", ""),
        ] {
            assert_eq!(urls(list, false), plain);
            assert_eq!(urls(list, true), if with_identity.is_empty() { plain } else { with_identity });
        }
    }

    #[test]
    fn what_can_t_be_used_is_named_with_what_is_expected() {
        let host =
            "names no host; expected http://HOST:PORT, https://HOST:PORT or HOST:PORT, with commas between several";
        for (list, message) in [
            ("ftp://a:21", r#"the endpoint "ftp://a:21" has the scheme "ftp"; expected http://HOST:PORT, https://HOST:PORT or HOST:PORT"#.to_owned()),
            ("etcd", r#"the endpoint "etcd" names no port; expected etcd:2379, or another port that etcd listens on"#.to_owned()),
            ("http://", format!(r#"the endpoint "http://" {host}"#)),
            ("http://:2379", format!(r#"the endpoint "http://:2379" {host}"#)),
            ("http://a:2379 http://b:2379", format!(r#"the endpoint "http://a:2379 http://b:2379" {host}"#)),
            ("http://a:x", format!(r#"the endpoint "http://a:x" {host}"#)),
            ("http://a:66000", format!(r#"the endpoint "http://a:66000" {host}"#)),
            ("fd00::1:2379", format!(r#"the endpoint "fd00::1:2379" {host}"#)),
            (",", "no endpoint is given; expected http://HOST:PORT, https://HOST:PORT or HOST:PORT, with commas between several".to_owned()),
        ] {
            assert_eq!(list.parse::<Endpoints>().expect_err(list).to_string(), message);
        }
    }

    #[test]
    fn the_rest_of_a_list_is_used() {
        let endpoints: Endpoints = "etcd,http://a:2379".parse().expect("one can be used");
        assert_eq!(endpoints.urls(false), ["http://a:2379"]);
        assert_eq!(endpoints.unusable(), [EndpointError::Port("etcd".to_owned())]);
    }

    /// The pairs of Go's own test (path/path_test.go).
    #[test]
    fn paths_are_cleaned_as_go_cleans_them() {
        for (path, cleaned) in [
            ("", "."),
            ("abc", "abc"),
            ("abc/def", "abc/def"),
            ("a/b/c", "a/b/c"),
            (".", "."),
            ("..", ".."),
            ("../..", "../.."),
            ("../../abc", "../../abc"),
            ("/abc", "/abc"),
            ("/", "/"),
            ("abc/", "abc"),
            ("abc/def/", "abc/def"),
            ("a/b/c/", "a/b/c"),
            ("./", "."),
            ("../", ".."),
            ("../../", "../.."),
            ("/abc/", "/abc"),
            ("abc//def//ghi", "abc/def/ghi"),
            ("//abc", "/abc"),
            ("///abc", "/abc"),
            ("//abc//", "/abc"),
            ("abc//", "abc"),
            ("abc/./def", "abc/def"),
            ("/./abc/def", "/abc/def"),
            ("abc/.", "abc"),
            ("abc/def/ghi/../jkl", "abc/def/jkl"),
            ("abc/def/../ghi/../jkl", "abc/jkl"),
            ("abc/def/..", "abc"),
            ("abc/def/../..", "."),
            ("/abc/def/../..", "/"),
            ("abc/def/../../..", ".."),
            ("/abc/def/../../..", "/"),
            ("abc/def/../../../ghi/jkl/../../../mno", "../../mno"),
            ("abc/./../def", "def"),
            ("abc//./../def", "def"),
            ("abc/../../././../def", "../../def"),
            ("/../abc", "/abc"),
            ("...", "..."),
            ("a/.../..", "a"),
        ] {
            assert_eq!(clean(path), cleaned, "{path:?}");
        }
    }

    #[test]
    fn keys_are_flannels_to_the_byte() {
        for (flag, config, lease) in [
            ("/coreos.com/network", "/coreos.com/network/config", "/coreos.com/network/subnets/10.5.1.0-24"),
            ("coreos.com/network", "coreos.com/network/config", "coreos.com/network/subnets/10.5.1.0-24"),
            ("//coreos.com//network/", "/coreos.com/network/config", "/coreos.com/network/subnets/10.5.1.0-24"),
            ("./x", "x/config", "x/subnets/10.5.1.0-24"),
            ("/a/../b", "/b/config", "/b/subnets/10.5.1.0-24"),
            ("..", "../config", "../subnets/10.5.1.0-24"),
            ("/", "/config", "/subnets/10.5.1.0-24"),
            (".", "config", "subnets/10.5.1.0-24"),
            ("", "config", "subnets/10.5.1.0-24"),
            ("(", "(/config", "(/subnets/10.5.1.0-24"),
        ] {
            let prefix = Prefix::new(flag);
            assert_eq!(
                (prefix.key("config"), prefix.key("subnets/10.5.1.0-24")),
                (config.to_owned(), lease.to_owned())
            );
            assert_eq!(prefix.name_of(lease), Some("subnets/10.5.1.0-24"));
        }
    }

    #[test]
    fn what_was_known_of_the_same_keys_is_found_again() {
        // What versions that put a slash in front wrote for these flags, of which the first three have those keys still.
        for (flag, before, is_same) in [
            ("/coreos.com/network", "/coreos.com/network", true),
            ("//coreos.com//network/", "/coreos.com/network", true),
            ("/", "", true),
            ("coreos.com/network", "/coreos.com/network", false),
            ("", "", false),
            ("/a/../b", "/a/../b", false),
        ] {
            assert_eq!(Prefix::new(flag).identity() == before, is_same, "{flag}");
        }
    }

    proptest! {
        #[test]
        fn a_clean_path_is_clean(path in "[a./]{0,12}") {
            let cleaned = clean(&path);
            prop_assert_eq!(clean(&cleaned), cleaned.clone());
            prop_assert_eq!(cleaned.starts_with('/'), path.starts_with('/'));
            prop_assert!(cleaned == "/" || !cleaned.ends_with('/'));
            prop_assert!(!cleaned.contains("//") && !cleaned.contains("/./") && !cleaned.starts_with("./"));
            let parts: Vec<&str> = cleaned.split('/').skip_while(|part| *part == "..").collect();
            prop_assert!(!parts.contains(&".."));
        }

        #[test]
        fn prefixes_share_an_identity_only_where_they_share_keys(one in "[ab./]{0,8}", two in "[ab./]{0,8}") {
            let (one, two) = (Prefix::new(&one), Prefix::new(&two));
            prop_assert_eq!(one.identity() == two.identity(), one.key("config") == two.key("config"));
        }
    }
}
