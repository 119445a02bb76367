//! What was last known of the store, kept in the run directory, so that a host comes up as it was where the store is
//! away, and so that an empty answer after a restart is an answer that lacks something.

use std::{
    collections::BTreeMap,
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use flannel_common::vxlan::Vni;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    atomic_file::{self, WriteError},
    lease::Peer,
    registry::{HostAddresses, OwnLease},
};

const SUFFIX: &str = ".leases";
/// Hexadecimal digits of the checksum, and the newline after them.
const HEADER_LEN: usize = 9;

/// The lease table as one agent knew it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LastKnown {
    /// Which lease table it is: of etcd, `--etcd-prefix`.
    pub prefix: String,
    /// The address that this host was published with.
    pub public_ip: Ipv4Addr,
    /// What the store said of this host's addresses.
    #[serde(default, skip_serializing_if = "HostAddresses::is_empty")]
    pub host: HostAddresses,
    /// The network configuration as the store had it.
    pub config: String,
    /// This host's lease.
    pub lease: OwnLease,
    /// Who leased the other subnets.
    pub peers: BTreeMap<Ipv4Net, Peer>,
}

/// Why a file says nothing.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It can't be read.
    #[error("read: {0}")]
    Read(#[from] io::Error),
    /// It is damaged.
    #[error("its checksum does not fit its content")]
    Checksum,
    /// Another version wrote it.
    #[error("its content is not understood: {0}")]
    Content(#[from] serde_json::Error),
}

impl LastKnown {
    /// Where that of an overlay is kept.
    pub fn path(run_dir: &Path, vni: Vni) -> PathBuf {
        run_dir.join(format!("flannel.{vni}{SUFFIX}"))
    }

    /// Keeps it. Mode 0600: it is nobody else's business, and nobody else's to write.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn write(&self, run_dir: &Path, vni: Vni) -> Result<(), WriteError> {
        atomic_file::write(&Self::path(run_dir, vni), self.render().as_bytes(), 0o600)
    }

    /// What this host last knew of that lease table, and that is as wanted. A file that is damaged is said and passed over.
    pub fn find(run_dir: &Path, prefix: &str, is_wanted: impl Fn(&Self) -> bool) -> Option<Self> {
        let files = fs::read_dir(run_dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let files = files.filter(|path| path.to_string_lossy().ends_with(SUFFIX));
        let known = files.filter_map(|path| {
            Self::read(&path).inspect_err(|error| warn!("{} is passed over: {error}", path.display())).ok()
        });
        known.into_iter().find(|known| known.prefix == prefix && is_wanted(known))
    }

    fn read(path: &Path) -> Result<Self, Unusable> {
        Self::parse(&atomic_file::read(path)?)
    }

    fn render(&self) -> String {
        let content = serde_json::to_value(self).unwrap_or_default().to_string();
        format!("{:08x}\n{content}", crc32fast::hash(content.as_bytes()))
    }

    /// Reads a file's content.
    ///
    /// # Errors
    /// [`Unusable::Checksum`] or [`Unusable::Content`].
    pub fn parse(bytes: &[u8]) -> Result<Self, Unusable> {
        let (header, content) = bytes.split_at_checked(HEADER_LEN).ok_or(Unusable::Checksum)?;
        if header != format!("{:08x}\n", crc32fast::hash(content)).as_bytes() {
            return Err(Unusable::Checksum);
        }
        Ok(serde_json::from_slice(content)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lease::MacAddress;

    fn known() -> LastKnown {
        let lease = r#"{"key": "10.5.1.0-24", "vtepMac": "02:00:00:00:00:01", "etcdLease": 7}"#;
        let peer = Peer { public_ip: [192, 168, 64, 2].into(), vtep_mac: MacAddress([2, 0, 0, 0, 0, 2]) };
        let subnet = |n| Ipv4Net::new_assert([10, 5, n, 0].into(), 24);
        LastKnown {
            prefix: "/coreos.com/network".to_owned(),
            public_ip: [192, 168, 64, 1].into(),
            host: HostAddresses::default(),
            config: r#"{"Network": "10.5.0.0/16"}"#.to_owned(),
            lease: serde_json::from_str(lease).expect("lease"),
            peers: BTreeMap::from([(subnet(2), peer)]),
        }
    }

    #[test]
    fn found_by_prefix_and_address() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let known = known();
        // Agents before and after this one read it.
        assert!(
            known.render().contains(r#""lease":{"key":"10.5.1.0-24","vtepMac":"02:00:00:00:00:01","etcdLease":7}"#)
        );
        known.write(directory.path(), Vni::DEFAULT).expect("written");
        let find = |prefix: &str, last| {
            LastKnown::find(directory.path(), prefix, |known| known.public_ip == Ipv4Addr::new(192, 168, 64, last))
        };
        assert_eq!(find("/coreos.com/network", 1), Some(known));
        assert_eq!(find("/other", 1), None);
        assert_eq!(find("/coreos.com/network", 2), None);
        assert_eq!(LastKnown::find(&directory.path().join("none"), "/other", |_| true), None);
    }

    proptest! {
        #[test]
        fn damage_is_noticed(position: prop::sample::Index, bit in 0u8..8, cut: prop::sample::Index) {
            let whole = known().render().into_bytes();
            prop_assert_eq!(LastKnown::parse(&whole).ok(), Some(known()));
            let mut changed = whole.clone();
            changed[position.index(whole.len())] ^= 1 << bit;
            prop_assert!(LastKnown::parse(&changed).is_err());
            prop_assert!(LastKnown::parse(&whole[..cut.index(whole.len())]).is_err());
        }
    }
}
