//! Values as Go's packages read them, so that what flannel takes is taken: `strconv` for switches and numbers, `net` for
//! addresses. The errors say what is expected, for whoever knows what it is the value of.

use std::{
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
};

use ipnet::Ipv4Net;

/// What is expected instead.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {0}")]
pub struct Expected(String);

impl Expected {
    fn new(what: &str) -> Self {
        Self(what.to_owned())
    }
}

/// A switch (Go: `strconv.ParseBool`).
///
/// # Errors
/// Any other word than Go's.
pub fn boolean(text: &str) -> Result<bool, Expected> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(Expected::new("true or false")),
    }
}

/// A reader of numbers within a range, as Go's flags read them.
pub fn number<T: TryFrom<i64>>(range: RangeInclusive<i64>) -> impl Fn(&str) -> Result<T, Expected> + Clone {
    move |text| {
        let number = integer(text).filter(|number| range.contains(number));
        number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| match (*range.start(), *range.end()) {
            (i64::MIN, i64::MAX) => Expected::new("a number"),
            (i64::MIN, max) => Expected(format!("a number of at most {max}")),
            (min, max) => Expected(format!("a number from {min} to {max}")),
        })
    }
}

/// A number with or without the prefix of a base, and with underscores between its digits (Go: `strconv.ParseInt` with
/// base 0).
fn integer(text: &str) -> Option<i64> {
    let (sign, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = unsigned.to_ascii_lowercase();
    let has_prefix = lower.len() > 2 && matches!(lower.get(..2), Some("0x" | "0o" | "0b"));
    let (radix, digits) = match (has_prefix, lower.as_bytes()) {
        (true, [_, b'x', ..]) => (16, &lower[2..]),
        (true, [_, b'o', ..]) => (8, &lower[2..]),
        (true, _) => (2, &lower[2..]),
        (false, [b'0', _, ..]) => (8, &lower[1..]),
        (false, _) => (10, lower.as_str()),
    };
    // A prefix is a digit to the underscore behind it.
    let is_separated = match digits.strip_prefix('_') {
        Some(rest) => radix != 10 && !rest.starts_with('_'),
        None => true,
    };
    if !is_separated || digits.ends_with('_') || digits.contains("__") {
        return None;
    }
    let digits: String = digits.chars().filter(|digit| *digit != '_').collect();
    // A sign is read above, and at most once.
    if !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    let magnitude = i128::from_str_radix(&digits, radix).ok()?;
    i64::try_from(sign * magnitude).ok()
}

/// An IPv4 address (Go: `net.ParseIP`, of which flannel takes those that have a form of four bytes).
///
/// # Errors
/// Anything else.
pub fn ipv4(text: &str) -> Result<Ipv4Addr, Expected> {
    let address = match text.parse() {
        Ok(IpAddr::V4(address)) => Some(address),
        Ok(IpAddr::V6(address)) => address.to_ipv4_mapped(),
        Err(_) => None,
    };
    address.ok_or_else(|| Expected::new("an IPv4 address, as in 192.168.64.1"))
}

/// An IPv4 prefix as it is written, host bits and all (Go: `net.ParseCIDR`): the length may have zeros in front, the
/// address may not.
///
/// # Errors
/// Anything else.
pub fn cidr(text: &str) -> Result<Ipv4Net, Expected> {
    let parse = || {
        let (address, len) = text.split_once('/')?;
        if !len.bytes().all(|digit| digit.is_ascii_digit()) {
            return None;
        }
        Ipv4Net::new(address.parse().ok()?, len.parse().ok()?).ok()
    };
    parse().ok_or_else(|| Expected::new("an IPv4 prefix, as in 10.5.0.0/16"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_as_strconv_reads_them() {
        for text in ["1", "t", "T", "TRUE", "true", "True"] {
            assert_eq!(boolean(text), Ok(true), "{text}");
        }
        for text in ["0", "f", "F", "FALSE", "false", "False"] {
            assert_eq!(boolean(text), Ok(false), "{text}");
        }
        for text in ["", "yes", "no", "on", "off", "y", "n", "tRUE", " true", "2"] {
            assert!(boolean(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_as_strconv_reads_them() {
        for (text, number) in [
            ("0", 0),
            ("60", 60),
            ("-1", -1),
            ("+5", 5),
            ("0x1f", 31),
            ("0X1F", 31),
            ("0o17", 15),
            ("017", 15),
            ("00", 0),
            ("0b101", 5),
            ("1_000", 1000),
            ("0x_1f", 31),
            ("0_7", 7),
            ("-0x10", -16),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
        ] {
            assert_eq!(integer(text), Some(number), "{text}");
        }
        for text in [
            "",
            "-",
            "+",
            "x",
            "1.0",
            "1e2",
            "08",
            "0x",
            "0b",
            "0b2",
            "_1",
            "1_",
            "1__0",
            "0__7",
            "0x__1",
            "--1",
            "+-1",
            "0x-1",
            " 1",
            "1 ",
            "9223372036854775808",
            "１",
        ] {
            assert_eq!(integer(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_expected_is_said() {
        assert_eq!(
            number::<u32>(1..=60)("0").map_err(|error| error.to_string()),
            Err("expected a number from 1 to 60".to_owned())
        );
        assert_eq!(
            number::<i64>(i64::MIN..=65535)("").map_err(|error| error.to_string()),
            Err("expected a number of at most 65535".to_owned())
        );
        assert_eq!(number::<u32>(1..=60)("0x3c"), Ok(60));
    }

    #[test]
    fn addresses_as_net_reads_them() {
        assert_eq!(ipv4("10.1.2.3"), Ok([10, 1, 2, 3].into()));
        assert_eq!(ipv4("::ffff:10.1.2.3"), Ok([10, 1, 2, 3].into()));
        for text in ["", "10.1.2", "10.1.2.03", "10.1.2.256", "fd00::1", " 10.1.2.3", "10.1.2.3/24"] {
            assert!(ipv4(text).is_err(), "{text}");
        }
        let net = |text: &str| cidr(text).map(|net| net.to_string());
        assert_eq!(net("10.5.7.9/16"), Ok("10.5.7.9/16".to_owned()));
        assert_eq!(net("10.5.0.0/016"), Ok("10.5.0.0/16".to_owned()));
        for text in [
            "",
            "10.5.0.0",
            "10.5.0.0/",
            "10.5.0.0/33",
            "10.5.0.0/-1",
            "10.5.0.0/+16",
            "10.05.0.0/16",
            "fd00::/48",
            "10.5.0.0/16 ",
            "10.5.0.0/255.255.0.0",
        ] {
            assert!(net(text).is_err(), "{text}");
        }
    }
}
