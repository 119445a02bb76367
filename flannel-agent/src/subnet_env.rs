//! `subnet.env`: how container runtimes learn this host's subnet and MTU. What is ours of it is byte for byte flannel's
//! (flannel: pkg/subnet/subnet.go); what others added to the file stays.

use std::{fs, io, io::Read as _, net::Ipv4Addr, path::Path};

use ipnet::Ipv4Net;
use tracing::warn;

use crate::{
    atomic_file::{self, WriteError},
    go_values,
};

/// flannel's keys. Those of IPv6 are not written, and are of a daemon before this one: nothing routes that subnet now.
const KEYS: [&str; 6] =
    [NETWORK, SUBNET, "FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ"];
const NETWORK: &str = "FLANNEL_NETWORK";
const SUBNET: &str = "FLANNEL_SUBNET";
/// What is larger is no file of variables.
const MAX_SIZE: u64 = 64 << 10;

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

/// How the file stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It says what it should, or what only somebody else can mean: another MTU, say.
    AsItShould,
    /// There is none.
    Gone,
    /// It lacks what a runtime needs, and names no other subnet.
    Incomplete,
    /// Somebody wrote another subnet.
    OfAnother(Ipv4Net),
}

impl SubnetEnv {
    /// What is ours of the file's content.
    pub fn render(&self) -> String {
        let Self { network, subnet, mtu, ip_masq } = self;
        let gateway = Ipv4Addr::from_bits(subnet.network().to_bits() + 1);
        let len = subnet.prefix_len();
        format!("{NETWORK}={network}\n{SUBNET}={gateway}/{len}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={ip_masq}\n")
    }

    /// Writes the file, mode 0644. What is ours comes first, so that a last line without its end stays whole; the lines of
    /// others stay as they are, in their order.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn write(&self, path: &Path) -> Result<(), WriteError> {
        let before = match read(path) {
            Ok(before) => before,
            Err(Unreadable::Io(_)) => Vec::new(),
            Err(error) => {
                warn!("{} was {error}; it is written anew", path.display());
                Vec::new()
            }
        };
        atomic_file::write(path, &self.render_over(&before), 0o644)
    }

    fn render_over(&self, before: &[u8]) -> Vec<u8> {
        let lines = before.split_inclusive(|byte| *byte == b'\n');
        let of_others = lines.filter(|line| !KEYS.contains(&key_of(&String::from_utf8_lossy(line))));
        self.render().into_bytes().into_iter().chain(of_others.flatten().copied()).collect()
    }

    /// How the file stands beside what it should say.
    pub fn state(&self, path: &Path) -> State {
        let content = match read(path) {
            Ok(content) => content,
            Err(Unreadable::Io(error)) if error.kind() == io::ErrorKind::NotFound => return State::Gone,
            // It was replaced by something that is not to be touched, or can't be read just now.
            Err(Unreadable::Io(_)) => return State::AsItShould,
            Err(_) => return State::Incomplete,
        };
        let content = String::from_utf8_lossy(&content);
        match subnet_in(&content) {
            Some(subnet) if subnet != self.subnet => State::OfAnother(subnet),
            Some(_) if self.render().lines().all(|line| value_in(&content, key_of(line)).is_some()) => {
                State::AsItShould
            }
            _ => State::Incomplete,
        }
    }
}

/// Why a file says nothing.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("larger than {MAX_SIZE} bytes")]
    TooLarge,
    #[error("no text")]
    Binary,
}

fn read(path: &Path) -> Result<Vec<u8>, Unreadable> {
    let file = atomic_file::open(path, fs::OpenOptions::new().read(true))?;
    let mut content = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut content)?;
    match content {
        content if content.len() as u64 > MAX_SIZE => Err(Unreadable::TooLarge),
        content if content.contains(&0) => Err(Unreadable::Binary),
        content => Ok(content),
    }
}

/// The name of a line's variable, as shells and Go's readers of such files take it.
fn key_of(line: &str) -> &str {
    let line = line.trim();
    let line = line.strip_prefix("export ").unwrap_or(line);
    line.split_once('=').map_or("", |(key, _)| key.trim())
}

/// The last value that a variable is given.
fn value_in<'a>(content: &'a str, key: &str) -> Option<&'a str> {
    let line = content.lines().rfind(|line| key_of(line) == key)?;
    let value = line.split_once('=').map(|(_, value)| value.trim())?;
    let quoted = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    Some(quoted('"').or_else(|| quoted('\'')).unwrap_or(value))
}

/// The subnet that an earlier `subnet.env` names, host bits cleared. [`None`] where there is no file, or none that
/// says one; it is a wish, so nothing hangs on it.
pub fn previous_subnet(path: &Path) -> Option<Ipv4Net> {
    subnet_in(&String::from_utf8_lossy(&read(path).ok()?))
}

/// The same of a file's content.
pub fn subnet_in(content: &str) -> Option<Ipv4Net> {
    // flannel passes over those of a list that are none, and takes the value only where one is left.
    let mut subnets = value_in(content, SUBNET)?.split(',').filter_map(|subnet| go_values::cidr(subnet).ok());
    let subnet = subnets.next()?;
    subnets.next().is_none().then(|| subnet.trunc())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn env() -> SubnetEnv {
        SubnetEnv {
            network: "10.42.0.0/16".parse().expect("CIDR"),
            subnet: "10.42.7.0/24".parse().expect("CIDR"),
            mtu: 1450,
            ip_masq: false,
        }
    }

    const OURS: &str =
        "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n";

    fn file() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("run/flannel/subnet.env");
        (directory, path)
    }

    fn rewritten(before: &[u8]) -> Vec<u8> {
        let (_directory, path) = file();
        atomic_file::write(&path, before, 0o644).expect("written");
        env().write(&path).expect("written again");
        fs::read(&path).expect("read")
    }

    #[test]
    fn flannels_bytes() {
        assert_eq!(env().render(), OURS);
    }

    #[test]
    fn written_and_read_back() {
        let (_directory, path) = file();
        env().write(&path).expect("written");
        assert_eq!(fs::read_to_string(&path).expect("read"), OURS);
        assert_eq!(previous_subnet(&path), Some(env().subnet));
    }

    #[test]
    fn lines_of_others_stay() {
        for (before, after) in [
            ("", ""),
            (OURS, ""),
            ("FLANNEL_MTU=9000\nA=1\n# FLANNEL_MTU=1\n\nB=2", "A=1\n# FLANNEL_MTU=1\n\nB=2"),
            ("A=1\nexport FLANNEL_SUBNET=10.1.1.1/24\n FLANNEL_MTU = 1\nMY_FLANNEL_MTU=1\n", "A=1\nMY_FLANNEL_MTU=1\n"),
            ("FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_OTHER=1\n", "FLANNEL_OTHER=1\n"),
            ("no variable\nA=1\r\n", "no variable\nA=1\r\n"),
        ] {
            let content = env().render_over(before.as_bytes());
            assert_eq!(String::from_utf8(content).expect("text"), format!("{OURS}{after}"));
        }
        assert_eq!(rewritten(b"A=\xff\xfe\n"), [OURS.as_bytes(), b"A=\xff\xfe\n"].concat());
    }

    #[test]
    fn what_is_no_file_of_variables_is_written_anew() {
        assert_eq!(rewritten(b"\0\0\0A=1\n"), OURS.as_bytes());
        assert_eq!(rewritten(&b"A=1\n".repeat(MAX_SIZE as usize)), OURS.as_bytes());
    }

    #[test]
    fn what_is_missing_is_noticed_and_what_others_mean_is_left() {
        let (_directory, path) = file();
        assert_eq!(env().state(&path), State::Gone);
        let another = State::OfAnother("10.42.9.0/24".parse().expect("CIDR"));
        for (content, state) in [
            (OURS.to_owned(), State::AsItShould),
            (format!("A=1\n{OURS}B=2"), State::AsItShould),
            (OURS.replace("1450", "1400"), State::AsItShould),
            (OURS.replace(".7.1", ".9.1"), another.clone()),
            ("FLANNEL_SUBNET=10.42.9.1/24\n".to_owned(), another),
            (OURS.replace("FLANNEL_MTU", "X"), State::Incomplete),
            (OURS.replace("FLANNEL_SUBNET", "X"), State::Incomplete),
            ("A=1\n".to_owned(), State::Incomplete),
            ("\0".to_owned(), State::Incomplete),
            (String::new(), State::Incomplete),
        ] {
            atomic_file::write(&path, content.as_bytes(), 0o644).expect("written");
            assert_eq!(env().state(&path), state, "{content:?}");
        }
    }

    #[test]
    fn the_subnet_before_is_read_as_flannel_reads_it() {
        for (content, subnet) in [
            ("FLANNEL_SUBNET=10.1.1.1/24", Some("10.1.1.0/24")),
            ("A=1\nexport FLANNEL_SUBNET=\"10.1.1.1/24\"\n", Some("10.1.1.0/24")),
            ("FLANNEL_SUBNET=10.1.1.1/24\nFLANNEL_SUBNET=10.1.2.1/24\n", Some("10.1.2.0/24")),
            ("FLANNEL_SUBNET=10.1.1.1/24,none", Some("10.1.1.0/24")),
            ("FLANNEL_SUBNET=10.1.1.1/24,10.2.1.1/24", None),
            ("FLANNEL_SUBNET=10.1.1.1", None),
            ("FLANNEL_SUBNET=", None),
            ("", None),
        ] {
            assert_eq!(subnet_in(content).map(|subnet| subnet.to_string()).as_deref(), subnet, "{content}");
        }
    }

    proptest! {
        #[test]
        fn rewriting_twice_is_rewriting_once(before in "(FLANNEL_MTU=1|FLANNEL_SUBNET=x|A=1|B|\\n| |=){0,12}") {
            let once = env().render_over(before.as_bytes());
            prop_assert!(once.starts_with(OURS.as_bytes()));
            prop_assert_eq!(env().render_over(&once), once);
        }
    }
}
