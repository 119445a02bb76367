//! `subnet.env`: how container runtimes learn this host's subnet and MTU. Byte for byte flannel's
//! (flannel: pkg/subnet/subnet.go).

use std::{fs, io, io::Write as _, net::Ipv4Addr, os::unix::fs::PermissionsExt as _, path::Path};

use ipnet::Ipv4Net;

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

/// The file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {call}: {source}")]
pub struct WriteError {
    path: String,
    call: &'static str,
    source: io::Error,
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

    /// Writes the file atomically, mode 0644, in a directory of mode 0755 that is made where it is missing.
    ///
    /// # Errors
    /// [`WriteError`] with the call that failed. The file is then as it was.
    pub fn write(&self, path: &Path) -> Result<(), WriteError> {
        let failed = |call| move |source| WriteError { path: path.display().to_string(), call, source };
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(directory).map_err(failed("create the directory"))?;
        let mut file = tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(directory)
            .map_err(failed("create a file beside it"))?;
        // The mode given at creation is subject to the umask.
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed("chmod"))?;
        file.write_all(self.render().as_bytes()).map_err(failed("write"))?;
        file.as_file().sync_all().map_err(failed("fsync"))?;
        file.persist(path).map_err(|error| failed("rename")(error.error))?;
        Ok(())
    }
}

/// The subnet that an earlier `subnet.env` names, host bits cleared. [`None`] where there is no file, or none that
/// says one; it is a wish, so nothing hangs on it.
pub fn previous_subnet(path: &Path) -> Option<Ipv4Net> {
    let content = fs::read_to_string(path).ok()?;
    let value = content.lines().find_map(|line| line.trim().strip_prefix("FLANNEL_SUBNET="))?;
    // flannel takes the value only where it is one subnet.
    value.trim().parse::<Ipv4Net>().ok().map(|subnet| subnet.trunc())
}

#[cfg(test)]
mod tests {
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
    fn written_with_its_mode_and_read_back() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("run/flannel/subnet.env");
        env().write(&path).expect("written");
        assert_eq!(fs::read_to_string(&path).expect("read"), env().render());
        assert_eq!(fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(path.parent().expect("parent")).expect("listing").count(), 1);
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
