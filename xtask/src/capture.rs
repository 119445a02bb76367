//! Packets of a device, captured by `tcpdump` and decoded by `tshark`.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use tempfile::NamedTempFile;

use crate::{
    lab::Netns,
    process::{Process, output},
    progress::wait_for,
};

/// The next packets of a device that a filter takes.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    packets: NamedTempFile,
    _log: NamedTempFile,
}

impl Capture {
    /// Waits for so many packets from now on.
    ///
    /// # Errors
    /// Where `tcpdump` can't listen.
    pub fn start(netns: &Netns, device: &str, filter: &str, count: usize, directory: &Path) -> Result<Self> {
        let packets = tempfile::Builder::new().suffix(".pcap").tempfile_in(directory)?;
        let log = NamedTempFile::new_in(directory)?;
        let mut capture = netns.command("tcpdump");
        capture.args(["-Z", "root", "-i", device, "-c", &count.to_string(), "-w"]).arg(packets.path()).arg(filter);
        let process = Process::start(&mut capture, log.path())?;
        wait_for("tcpdump to listen", Duration::from_secs(5), || process.log().contains("listening on"))?;
        Ok(Self { process, packets, _log: log })
    }

    /// What `tshark` says of them, once all are there.
    ///
    /// # Errors
    /// Where they don't come within two seconds.
    pub fn decoded(mut self, arguments: &[&str]) -> Result<String> {
        self.process.wait(Duration::from_secs(2)).with_context(|| format!("not all came: {}", self.process.log()))?;
        let mut tshark = Command::new("tshark");
        output(tshark.args(["-d", "udp.port==8472,vxlan"]).args(arguments).arg("-r").arg(self.packets.path()))
    }
}
