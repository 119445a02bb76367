//! Packets of a device, by tcpdump, and what tshark makes of them.

use std::{fmt, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use tempfile::NamedTempFile;

use super::Netns;
use crate::{
    process::{Process, output},
    progress::wait_for,
};

const LIMIT: Duration = Duration::from_secs(10);
/// Length of a capture file's own header.
const FILE_HEADER: usize = 24;

/// What passes a device of a namespace.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Option<Process>,
    file: NamedTempFile,
    _log: NamedTempFile,
}

/// A packet in the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnelled {
    /// From which host to which.
    pub outer: [String; 2],
    /// The network.
    pub vni: String,
    /// From which pod to which.
    pub inner: [String; 2],
    /// What is said.
    pub info: String,
}

impl fmt::Display for Tunnelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { outer, vni, inner, info } = self;
        write!(f, "{} > {} VNI {vni}: {} > {} {info}", outer[0], outer[1], inner[0], inner[1])
    }
}

impl Capture {
    /// Begins with what the filter takes; files are in a folder.
    ///
    /// # Errors
    /// Where tcpdump does not begin.
    pub fn start(netns: &Netns, device: &str, filter: &str, directory: &Path) -> Result<Self> {
        let file = tempfile::Builder::new().suffix(".pcap").tempfile_in(directory)?;
        let log = NamedTempFile::new_in(directory)?;
        let mut command = netns.command("tcpdump");
        command.args(["-Z", "root", "-i", device, "--immediate-mode", "-U", "-w"]).arg(file.path()).arg(filter);
        let tcpdump = Process::start(&mut command, log.path())?;
        wait_for("tcpdump to listen", LIMIT, || tcpdump.log().contains("listening on"))?;
        Ok(Self { tcpdump: Some(tcpdump), file, _log: log })
    }

    /// Ends with the first packet that contains these bytes.
    ///
    /// # Errors
    /// Where none comes.
    pub fn end_with(&mut self, bytes: &str) -> Result<()> {
        wait_for(&format!("a packet with {bytes:?}"), LIMIT, || {
            let captured = fs::read(self.file.path()).unwrap_or_default();
            let packets = captured.get(FILE_HEADER..).unwrap_or_default();
            !packets.is_empty() && String::from_utf8_lossy(packets).contains(bytes)
        })?;
        self.tcpdump = None;
        Ok(())
    }

    /// Ends when there are so many packets.
    ///
    /// # Errors
    /// Where they don't come.
    pub fn end_after(&mut self, packets: usize) -> Result<()> {
        wait_for(&format!("{packets} packets"), LIMIT, || {
            let listed = output(Command::new("tcpdump").args(["-n", "-t", "-r"]).arg(self.file.path()));
            listed.is_ok_and(|lines| lines.lines().count() >= packets)
        })?;
        self.tcpdump = None;
        Ok(())
    }

    /// What tshark prints of it, told so.
    ///
    /// # Errors
    /// Where tshark fails.
    pub fn decoded(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("tshark");
        output(command.args(["-d", "udp.port==8472,vxlan"]).args(arguments).arg("-r").arg(self.file.path()))
    }

    /// The packets in tunnels that a display filter takes.
    ///
    /// # Errors
    /// Where tshark fails, or one is none in a tunnel.
    pub fn tunnelled(&self, filter: &str) -> Result<Vec<Tunnelled>> {
        let fields = ["ip.src", "ip.dst", "vxlan.vni", "_ws.col.Info"].map(|field| ["-e", field]);
        let arguments = [&["-Y", filter, "-T", "fields"], fields.as_flattened()].concat();
        self.decoded(&arguments)?.lines().map(|line| tunnelled(line).with_context(|| line.to_owned())).collect()
    }
}

/// Of addresses, tshark prints the outer and the inner one.
fn tunnelled(line: &str) -> Option<Tunnelled> {
    let mut columns = line.split('\t');
    let mut addresses = || {
        let (outer, inner) = columns.next()?.split_once(',')?;
        Some((outer.to_owned(), inner.to_owned()))
    };
    let ((from, inner_from), (to, inner_to)) = (addresses()?, addresses()?);
    let (vni, info) = (columns.next()?.to_owned(), columns.next()?.trim().to_owned());
    Some(Tunnelled { outer: [from, to], vni, inner: [inner_from, inner_to], info })
}
