//! Why a network configuration can't be used.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::BackendType;

/// What a Network looks like.
pub(super) const NETWORK_EXAMPLE: &str = r#""Network": "10.5.0.0/16""#;
/// What a Backend looks like.
pub(super) const BACKEND_EXAMPLE: &str = r#""Backend": {"Type": "vxlan"}"#;

/// Those of flannel's that this agent does not have, on all platforms (flannel: pkg/backend; the clouds' own until 0.26).
const OF_FLANNEL: [&str; 8] = ["aws-vpc", "ali-vpc", "extension", "gce", "ipip", "ipsec", "tencent-vpc", "wireguard"];

/// Whose a backend is, where it is flannel's.
fn whose(kind: &str) -> String {
    let kind = kind.to_lowercase();
    match OF_FLANNEL.contains(&kind.as_str()) {
        true => format!("; {kind} is flannel's, and this agent does not have it"),
        false => String::new(),
    }
}

/// Why a configuration can't be used. Where flannel has a message for the case, it is in it word for word, with the key, its
/// value and what is expected beside it.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// A key has a value of another kind.
    #[error("{key}: {value} {found}, expected {expected} (as in {example})")]
    Kind {
        /// With what it is part of.
        key: String,
        /// As it is written.
        value: String,
        /// What it is.
        found: &'static str,
        /// What it should be.
        expected: &'static str,
        /// A member that could be.
        example: String,
    },
    /// No Network.
    #[error("please define a correct Network parameter in the flannel config{hint} (as in {NETWORK_EXAMPLE})")]
    NoNetwork {
        /// What may have been meant for it.
        hint: String,
    },
    /// A key that should be an IPv4 prefix.
    #[error("invalid CIDR address: {value} ({key}; expected an IPv4 prefix, as in {NETWORK_EXAMPLE})")]
    InvalidCidr {
        /// Which.
        key: &'static str,
        /// What it is.
        value: String,
    },
    /// A key that should be an IPv4 address.
    #[error("invalid IP address format: {value:?} ({key}; expected an IPv4 address, as in {key:?}: \"10.5.1.0\")")]
    InvalidAddress {
        /// Which.
        key: &'static str,
        /// What it is.
        value: String,
    },
    /// Network is longer than /28.
    #[error("network is too small. Minimum useful network prefix is /28 (Network: {0})")]
    NetworkTooSmall(Ipv4Net),
    /// SubnetLen is longer than /30.
    #[error("SubnetLen must be less than /31 (SubnetLen: {0})")]
    SubnetLenTooLong(i64),
    /// Fewer than four subnets.
    #[error("network must be able to accommodate at least four subnets (SubnetLen: {len}, Network: {network})")]
    TooFewSubnets {
        /// SubnetLen.
        len: i64,
        /// What is to be cut.
        network: Ipv4Net,
    },
    /// SubnetMin or SubnetMax lies elsewhere.
    #[error("{key} is not in the range of the Network ({key}: {address}, Network: {network})")]
    OutOfRange {
        /// Which.
        key: &'static str,
        /// What it is.
        address: Ipv4Addr,
        /// Where it should be.
        network: Ipv4Net,
    },
    /// SubnetMin or SubnetMax is not a subnet's address.
    #[error(
        "{key} is not on a SubnetLen boundary: {address} (the subnet of length {len} that it lies in begins with {subnet})"
    )]
    OffBoundary {
        /// Which.
        key: &'static str,
        /// What it is.
        address: Ipv4Addr,
        /// SubnetLen.
        len: u8,
        /// What it could be.
        subnet: Ipv4Addr,
    },
    /// SubnetMin is greater than SubnetMax: flannel accepts this and runs out of subnets.
    #[error("SubnetMin {0} is greater than SubnetMax {1}")]
    EmptyRange(Ipv4Addr, Ipv4Addr),
    /// Backend is no object, or is none that can be read.
    #[error("error decoding Backend property of config: {0}")]
    Backend(String),
    /// A backend that is none of ours.
    #[error("unknown backend type: {0} (Backend.Type{whose}; this agent has {labels}: {BACKEND_EXAMPLE})", whose = whose(.0), labels = BackendType::labels())]
    UnknownBackend(String),
    /// VNI, Port or MTU out of range.
    #[error("{key}: {value} is out of range, expected {expected}")]
    Range {
        /// Which.
        key: &'static str,
        /// What it is.
        value: i64,
        /// What it can be.
        expected: String,
    },
    /// Something of flannel's that this agent does not have.
    #[error("{0} is not supported by this agent; remove it from the flannel config")]
    Unsupported(&'static str),
}
