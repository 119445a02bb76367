//! `subnet.env`: how container runtimes learn this host's subnet and MTU. Byte for byte flannel's
//! (flannel: pkg/subnet/subnet.go).

use std::{net::Ipv4Addr, path::Path};

use ipnet::Ipv4Net;

use crate::atomic_file::{self, WriteError};

/// What `subnet.env` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The overlay's Network.
    pub network: Ipv4Net,
    /// This host's lease.
    pub subnet: Ipv4Net,
    /// MTU of the overlay in bytes.
    pub mtu: u32,
    /// Whether the agent masquerades what leaves the overlay.
    pub ip_masq: bool,
}

impl SubnetEnv {
    /// The file's content.
    pub fn render(&self) -> String {
        let Self { network, subnet, mtu, ip_masq } = self;
        let gateway = Ipv4Addr::from_bits(subnet.network().to_bits() + 1);
        let len = subnet.prefix_len();
        format!(
            "FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={gateway}/{len}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={ip_masq}\n"
        )
    }

    /// Writes the file, mode 0644.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn write(&self, path: &Path) -> Result<(), WriteError> {
        atomic_file::write(path, self.render().as_bytes(), 0o644)
    }
}

/// The subnet that an earlier `subnet.env` names, host bits cleared. [`None`] where there is no file, or none that
/// says one; it is a wish, so nothing hangs on it.
pub fn previous_subnet(path: &Path) -> Option<Ipv4Net> {
    subnet_in(&String::from_utf8(atomic_file::read(path).ok()?).ok()?)
}

/// The same of a file's content.
pub fn subnet_in(content: &str) -> Option<Ipv4Net> {
    let value = content.lines().find_map(|line| line.trim().strip_prefix("FLANNEL_SUBNET="))?;
    // flannel takes the value only where it is one subnet.
    value.trim().parse::<Ipv4Net>().ok().map(|subnet| subnet.trunc())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn env() -> SubnetEnv {
        SubnetEnv {
            network: "10.42.0.0/16".parse().expect("CIDR"),
            subnet: "10.42.7.0/24".parse().expect("CIDR"),
            mtu: 1450,
            ip_masq: false,
        }
    }

    #[test]
    fn flannels_bytes() {
        assert_eq!(
            env().render(),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        );
    }

    #[test]
    fn written_and_read_back() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("run/flannel/subnet.env");
        env().write(&path).expect("written");
        assert_eq!(fs::read_to_string(&path).expect("read"), env().render());
        assert_eq!(previous_subnet(&path), Some(env().subnet));
    }

    #[test]
    fn a_file_that_says_nothing_useful_is_no_wish() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("subnet.env");
        assert_eq!(previous_subnet(&path), None);
        for content in ["", "FLANNEL_SUBNET=", "FLANNEL_SUBNET=10.1.1.1", "FLANNEL_SUBNET=10.1.1.1/24,10.2.1.1/24"] {
            fs::write(&path, content).expect("written");
            assert_eq!(previous_subnet(&path), None, "{content}");
        }
    }
}
