//! A JSON object as Go's decoder takes it (Go: encoding/json), with errors that name the key, its value and what is
//! expected.
//!
//! Keys have no case. Of a key that is there twice the last value counts; null leaves what was before. A number is whole
//! where Go's type is, and written without point and exponent. What belongs to no key is not looked at.

use std::{fmt, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::ConfigError;
use crate::{go_values, suggestion};

/// How much of a value an error quotes.
const QUOTED: usize = 80;

/// An object's members, as they are written.
#[derive(Debug)]
pub(super) struct Object<'a> {
    /// What its keys are called: a path that ends with a point, or nothing.
    path: &'static str,
    members: Vec<(String, &'a RawValue)>,
}

/// What a value may be. Each has an example, for those that are none.
trait Kind: Sized {
    const EXPECTED: &'static str;

    /// Reads it from JSON.
    fn read(json: &str) -> Option<Self>;

    /// Reads it from what should not have been a string.
    fn read_quoted(text: &str) -> Option<String>;
}

impl Kind for bool {
    const EXPECTED: &'static str = "true or false";

    fn read(json: &str) -> Option<Self> {
        json.parse().ok()
    }

    fn read_quoted(text: &str) -> Option<String> {
        text.trim().to_lowercase().parse::<Self>().ok().map(|value| value.to_string())
    }
}

impl Kind for i64 {
    const EXPECTED: &'static str = "a whole number";

    fn read(json: &str) -> Option<Self> {
        json.parse().ok()
    }

    fn read_quoted(text: &str) -> Option<String> {
        text.trim().parse::<Self>().ok().map(|value| value.to_string())
    }
}

impl Kind for String {
    const EXPECTED: &'static str = "a string";

    fn read(json: &str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    fn read_quoted(_text: &str) -> Option<String> {
        None
    }
}

impl<'a> Object<'a> {
    pub(super) fn parse(json: &'a str, path: &'static str) -> Result<Self, ConfigError> {
        if json.starts_with('\u{feff}') {
            return Err(ConfigError::Json("it begins with a byte order mark; remove that".to_owned()));
        }
        let Members(members) = serde_json::from_str(json).map_err(|error| ConfigError::Json(error.to_string()))?;
        Ok(Self { path, members })
    }

    /// The values of a key, without nulls.
    fn values(&self, key: &str) -> impl DoubleEndedIterator<Item = &'a str> {
        self.of(key).filter(|json| *json != "null")
    }

    fn of(&self, key: &str) -> impl DoubleEndedIterator<Item = &'a str> {
        let key = fold(key);
        self.members.iter().filter(move |(name, _)| fold(name) == key).map(|(_, value)| value.get())
    }

    /// The last value of a key as it is written, null too.
    pub(super) fn json(&self, key: &str) -> Option<&'a str> {
        self.of(key).next_back()
    }

    /// The value of a key that counts. All of them have to be of its kind, as with Go.
    fn get<T: Kind>(&self, key: &str, example: &str) -> Result<Option<T>, ConfigError> {
        let mut last = None;
        for json in self.values(key) {
            last = Some(T::read(json).ok_or_else(|| self.other_kind::<T>(key, json, example))?);
        }
        Ok(last)
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.get(key, "true")
    }

    pub(super) fn integer(&self, key: &str, example: &str) -> Result<Option<i64>, ConfigError> {
        self.get(key, example)
    }

    pub(super) fn string(&self, key: &str, example: &str) -> Result<Option<String>, ConfigError> {
        self.get(key, &format!("{example:?}"))
    }

    pub(super) fn address(&self, key: &'static str, example: &str) -> Result<Option<Ipv4Addr>, ConfigError> {
        let Some(text) = self.string(key, example)? else { return Ok(None) };
        let address = go_values::ipv4(&text).map_err(|_| ConfigError::InvalidAddress { key, value: quoted(&text) })?;
        // As flannel, which has no other way to say that there is none.
        Ok(Some(address).filter(|address| !address.is_unspecified()))
    }

    pub(super) fn prefix(&self, key: &'static str, example: &str) -> Result<Option<Ipv4Net>, ConfigError> {
        let Some(text) = self.string(key, example)? else { return Ok(None) };
        match go_values::cidr(&text) {
            Ok(net) => Ok(Some(net.trunc()).filter(|net| *net != Ipv4Net::default())),
            Err(_) => Err(ConfigError::InvalidCidr { key, value: quoted(&text) }),
        }
    }

    /// Keys that are none of these, each once, with what they may mean.
    pub(super) fn unknown<'k>(&self, known: &[&'k str]) -> Vec<(String, Option<&'k str>)> {
        let mut unknown: Vec<(String, Option<&str>)> = Vec::new();
        for (name, _) in &self.members {
            let is_known = known.iter().any(|key| fold(key) == fold(name));
            if !is_known && !unknown.iter().any(|(before, _)| before == name) {
                unknown.push((name.clone(), suggestion::closest(name, known.iter().copied())));
            }
        }
        unknown
    }

    fn other_kind<T: Kind>(&self, key: &str, json: &str, example: &str) -> ConfigError {
        let found = match json.as_bytes().first() {
            Some(b'"') => "is a string",
            Some(b'{') => "is an object",
            Some(b'[') => "is a list",
            Some(b't' | b'f') => "is true or false",
            _ if json.contains(['.', 'e', 'E']) => "is not written as a whole number",
            _ if json.starts_with('-') && json.len() > 1 => "is a negative number",
            _ => "is a number",
        };
        let meant = serde_json::from_str::<String>(json).ok().and_then(|text| T::read_quoted(&text));
        ConfigError::Kind {
            key: format!("{}{key}", self.path),
            value: quoted(json),
            found,
            expected: T::EXPECTED,
            example: format!("{key:?}: {}", meant.as_deref().unwrap_or(example)),
        }
    }
}

/// A value as an error names it, in one line.
fn quoted(text: &str) -> String {
    let short: String = text.chars().take(QUOTED).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(QUOTED).is_some() { short + "..." } else { short }
}

/// As Go compares keys: letters without case, among them the two that Unicode folds into ASCII's (long s, Kelvin).
fn fold(key: &str) -> String {
    let fold = |c: char| match c {
        'ſ' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    key.chars().map(fold).collect()
}

struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(InOrder).map(Members)
    }
}
