//! `subnet.env` as a runtime reads it, also one of flannel's own with two families and several networks.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// What it says. Host bits of the subnets are cleared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetFile {
    /// The overlay's networks, IPv4 first.
    pub networks: Vec<IpNet>,
    /// This host's subnets, at most one of each family, IPv4 first.
    pub subnets: Vec<IpNet>,
    /// MTU of the overlay in bytes.
    pub mtu: u32,
    /// Whether the daemon masquerades what leaves the overlay.
    pub ip_masq: bool,
}

/// It can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SubnetFileError {
    /// It is not there, or can't be read.
    #[error("open {}: {}", path.display(), reason(source))]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A value is none.
    #[error("{key} in {}: {value:?} is not valid", path.display())]
    Content {
        /// In which file.
        path: PathBuf,
        /// Of what.
        key: String,
        /// What it is.
        value: String,
    },
    /// It does not say all.
    #[error("{} is missing {}", path.display(), keys.join(", "))]
    Missing {
        /// Which.
        path: PathBuf,
        /// What it lacks.
        keys: Vec<&'static str>,
    },
}

impl SubnetFile {
    /// Reads it.
    ///
    /// # Errors
    /// [`SubnetFileError`].
    pub fn read(path: &Path) -> Result<Self, SubnetFileError> {
        let text = fs::read(path).map_err(|source| SubnetFileError::Open { path: path.to_owned(), source })?;
        Self::parse(path, &String::from_utf8_lossy(&text))
    }

    /// From the file's content.
    ///
    /// # Errors
    /// All but [`SubnetFileError::Open`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, SubnetFileError> {
        let (mut networks, mut networks6) = (Vec::new(), Vec::new());
        let (mut subnet, mut subnet6, mut mtu, mut ip_masq) = (None, None, None, None);
        for line in text.lines() {
            let (key, value) = line.split_once('=').unwrap_or((line, ""));
            let bad =
                || SubnetFileError::Content { path: path.to_owned(), key: key.to_owned(), value: value.to_owned() };
            match key {
                "FLANNEL_NETWORK" => networks = networks_in::<Ipv4Net>(value).ok_or_else(bad)?,
                "FLANNEL_IPV6_NETWORK" => networks6 = networks_in::<Ipv6Net>(value).ok_or_else(bad)?,
                "FLANNEL_SUBNET" => subnet = Some(value.parse::<Ipv4Net>().map_err(|_| bad())?),
                "FLANNEL_IPV6_SUBNET" => subnet6 = Some(value.parse::<Ipv6Net>().map_err(|_| bad())?),
                "FLANNEL_MTU" => mtu = Some(value.parse().map_err(|_| bad())?),
                "FLANNEL_IPMASQ" => ip_masq = Some(value == "true"),
                _ => {}
            }
        }
        networks.append(&mut networks6);
        let subnets: Vec<IpNet> =
            subnet.map(IpNet::V4).into_iter().chain(subnet6.map(IpNet::V6)).map(|subnet| subnet.trunc()).collect();
        let mut keys = Vec::new();
        if networks.is_empty() {
            keys.extend(["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"]);
        }
        if subnets.is_empty() {
            keys.extend(["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]);
        }
        match (mtu, ip_masq) {
            (Some(mtu), Some(ip_masq)) if keys.is_empty() => Ok(Self { networks, subnets, mtu, ip_masq }),
            _ => {
                keys.extend(mtu.is_none().then_some("FLANNEL_MTU"));
                keys.extend(ip_masq.is_none().then_some("FLANNEL_IPMASQ"));
                Err(SubnetFileError::Missing { path: path.to_owned(), keys })
            }
        }
    }
}

/// A comma-separated list, each once.
fn networks_in<T: std::str::FromStr + Into<IpNet>>(value: &str) -> Option<Vec<IpNet>> {
    let mut networks = Vec::new();
    for network in value.split(',') {
        let network: IpNet = network.trim().parse::<T>().ok()?.into();
        if !networks.contains(&network.trunc()) {
            networks.push(network.trunc());
        }
    }
    Some(networks)
}

/// As flannel's plugin words it.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file or directory".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SubnetFile, String> {
        SubnetFile::parse(Path::new("/run/x.env"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn both_families_and_several_networks() {
        let file = parse(
            "FLANNEL_NETWORK=10.5.0.0/16,10.6.0.0/16,10.5.0.0/16\nFLANNEL_SUBNET=10.5.7.1/24\n\
             FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42:3::1/64\n\
             FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\nOTHER=1\n\n",
        )
        .expect("valid");
        let nets = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(nets(&file.networks), ["10.5.0.0/16", "10.6.0.0/16", "2001:cafe:42::/56"]);
        assert_eq!(nets(&file.subnets), ["10.5.7.0/24", "2001:cafe:42:3::/64"]);
        assert_eq!((file.mtu, file.ip_masq), (1450, true));
    }

    #[test]
    fn what_is_missing_is_named_as_flannel_does() {
        assert_eq!(
            parse(""),
            Err("/run/x.env is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, \
                 FLANNEL_MTU, FLANNEL_IPMASQ"
                .to_owned())
        );
        let rest = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.7.1/24\n";
        assert_eq!(parse(rest), Err("/run/x.env is missing FLANNEL_MTU, FLANNEL_IPMASQ".to_owned()));
    }

    #[test]
    fn what_can_t_be_read_is_named() {
        for (line, key) in [
            ("FLANNEL_NETWORK", "FLANNEL_NETWORK"),
            ("FLANNEL_SUBNET=10.5.7.1", "FLANNEL_SUBNET"),
            ("FLANNEL_SUBNET=fd00::1/64", "FLANNEL_SUBNET"),
            ("FLANNEL_NETWORK=10.5.0.0/16,", "FLANNEL_NETWORK"),
            ("FLANNEL_MTU=-1", "FLANNEL_MTU"),
        ] {
            let error = parse(line).expect_err("refused");
            assert!(error.starts_with(&format!("{key} in /run/x.env: ")), "{error}");
        }
    }
}
