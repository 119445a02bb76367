//! What is nobody's business: passwords, tokens and keys, which must not leave the host with what commands print.

use std::{ffi::OsString, sync::LazyLock};

use regex::{Captures, Regex};

use crate::cli::Cli;

/// What stands in the place of a secret.
pub(super) const HIDDEN: &str = "(hidden)";
/// A value this short is no secret, and would be found in too many words.
const SHORTEST: usize = 4;
/// Variables whose values are secrets, by what is in their names.
const NAMES: [&str; 6] = ["PASSWORD", "PASSWD", "SECRET", "TOKEN", "PRIVATE", "CREDENTIAL"];

/// User and password in a URL, private keys in PEM, and the values of keys that are secrets in JSON: of flannel's backends ipsec and
/// ali-vpc, and what others call theirs.
static PATTERNS: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    let patterns = [
        (r#"(?i)(://)[^/\s"'@]+(@)"#, "$1(hidden)$2"),
        (r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----)", "$1(hidden)$2"),
        (
            r#"(?i)(\\?"[^"\\]*(?:psk|accesskeyid|accesskeysecret|password|passwd|secret|token|privatekey)\\?"\s*:\s*\\?")(?:[^"\\]+)"#,
            "$1(hidden)",
        ),
    ];
    patterns.into_iter().filter_map(|(pattern, with)| Some((Regex::new(pattern).ok()?, with))).collect()
});

/// The secrets that this process was given.
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    pub(super) fn of(cli: &Cli, variables: impl Iterator<Item = (OsString, OsString)>) -> Self {
        let of_variables = variables.filter_map(|(name, value)| {
            let name = name.to_str()?.to_uppercase();
            NAMES.iter().any(|part| name.contains(part)).then(|| value.into_string().ok())?
        });
        let mut secrets: Vec<_> = of_variables.chain(cli.etcd().user.map(|(_, password)| password)).collect();
        secrets.retain(|secret| secret.len() >= SHORTEST);
        // The longest first: one may be in another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self(secrets)
    }

    /// The same without secrets.
    pub(super) fn hide(&self, text: &str) -> String {
        let known = self.0.iter().fold(text.to_owned(), |text, secret| text.replace(secret, HIDDEN));
        hide(&known)
    }
}

/// The same without what looks like a secret.
pub(super) fn hide(text: &str) -> String {
    let mut hidden = text.to_owned();
    for (pattern, with) in PATTERNS.iter() {
        hidden = pattern.replace_all(&hidden, *with).into_owned();
    }
    hidden
}

/// The bytes of sampled packets: what was in them belongs to pods.
pub(super) fn without_payload(text: &str) -> String {
    static BYTES: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r#"("bytes":\s*)"[0-9a-f]*""#).ok());
    match BYTES.as_ref() {
        Some(bytes) => {
            bytes.replace_all(text, |found: &Captures<'_>| format!("{}\"(left out)\"", &found[1])).into_owned()
        }
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_hidden_wherever_they_are() {
        for (text, hidden) in [
            ("connect to http://root:pa55@10.0.0.1:2379/x", "connect to http://(hidden)@10.0.0.1:2379/x"),
            ("http://10.0.0.1:2379/a@b", "http://10.0.0.1:2379/a@b"),
            (
                r#"{"Backend": {"Type": "ipsec", "PSK": "96bytes"}}"#,
                r#"{"Backend": {"Type": "ipsec", "PSK": "(hidden)"}}"#,
            ),
            (r#""{\"AccessKeySecret\": \"abc\"}""#, r#""{\"AccessKeySecret\": \"(hidden)\"}""#),
            (r#""token": "x.y", "tokens": 3"#, r#""token": "(hidden)", "tokens": 3"#),
            (
                "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----",
                "-----BEGIN EC PRIVATE KEY-----(hidden)-----END EC PRIVATE KEY-----",
            ),
        ] {
            assert_eq!(hide(text), hidden);
        }
        let secrets = Secrets(vec!["hunter22".to_owned()]);
        assert_eq!(secrets.hide("refused: user u, password hunter22"), "refused: user u, password (hidden)");
        assert_eq!(
            without_payload(r#"{"bytes": 12, "sample": {"bytes": "00ff"}}"#),
            r#"{"bytes": 12, "sample": {"bytes": "(left out)"}}"#
        );
    }
}
