//! The output: pcapng (draft-ietf-opsawg-pcapng), whole blocks only.

use std::{
    borrow::Cow,
    fs::{File, OpenOptions},
    io::{self, IsTerminal as _, Write as _},
    os::{fd::AsFd as _, unix::fs::OpenOptionsExt as _},
    path::Path,
    time::Duration,
};

use nix::{libc, poll::PollFlags};
use pcap_file::{
    DataLink, Endianness, PcapError,
    pcapng::{
        PcapNgWriter,
        blocks::{
            enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption},
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
            interface_statistics::{InterfaceStatisticsBlock, InterfaceStatisticsOption},
        },
    },
};

use super::{
    CaptureError,
    frame::Part,
    stop::Stop,
    tap::{Direction, Statistics, now},
};

/// Stands for the standard output.
const STDOUT: &str = "-";
/// `if_tsresol`: nanoseconds.
const NANOSECONDS: u8 = 9;
/// What the statistics of an interface take at the end.
const STATISTICS_LEN: u64 = 64;

/// A packet of an interface of the file.
pub(super) struct Record<'a> {
    /// Its number, as [`CaptureFile::add_interface`] gave it.
    pub(super) interface: u32,
    pub(super) part: Part<'a>,
    pub(super) comment: Option<&'static str>,
}

/// The file, or the standard output.
pub(super) struct CaptureFile {
    name: String,
    file: File,
    is_regular: bool,
    /// Blocks that are not written yet.
    writer: PcapNgWriter<Vec<u8>>,
    /// Octets.
    written: u64,
    limit: u64,
    /// Of each packet.
    snaplen: u32,
    interfaces: u32,
}

impl CaptureFile {
    /// Makes the file, which must not be there yet, readable by its owner only.
    pub(super) fn create(path: &Path, limit: u64, snaplen: u32) -> Result<Self, CaptureError> {
        let is_regular = path != Path::new(STDOUT);
        let (name, file) = if is_regular {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            (path.display().to_string(), file)
        } else if io::stdout().is_terminal() {
            return Err(CaptureError::Terminal);
        } else {
            ("the standard output".to_owned(), io::stdout().as_fd().try_clone_to_owned().map(File::from))
        };
        let file = file.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => CaptureError::Exists(name.clone()),
            _ => CaptureError::Create { name: name.clone(), error },
        })?;
        let writer = PcapNgWriter::with_endianness(Vec::new(), Endianness::Little)
            .map_err(|error| CaptureError::Encode(error.to_string()))?;
        Ok(Self { name, file, is_regular, writer, written: 0, limit, snaplen, interfaces: 0 })
    }

    /// Describes an interface. Its number.
    pub(super) fn add_interface(
        &mut self,
        name: &str,
        description: &str,
        link_type: DataLink,
    ) -> Result<u32, CaptureError> {
        let options = vec![
            InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
            InterfaceDescriptionOption::IfDescription(Cow::Borrowed(description)),
            InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
        ];
        let block = InterfaceDescriptionBlock { linktype: link_type, snaplen: self.snaplen, options };
        self.writer.write_pcapng_block(block).map_err(encode)?;
        self.interfaces += 1;
        Ok(self.interfaces - 1)
    }

    /// Adds packets that belong together. `false` where the file would be larger than it may be: nothing is added then.
    pub(super) fn add(
        &mut self,
        records: &[Record<'_>],
        time: Duration,
        direction: Direction,
    ) -> Result<bool, CaptureError> {
        let before = self.writer.get_ref().len();
        for Record { interface, part, comment } in records {
            let flags = match direction {
                Direction::Received => 1,
                Direction::Sent => 2,
            };
            let mut options = vec![EnhancedPacketOption::Flags(flags)];
            options.extend(comment.map(|comment| EnhancedPacketOption::Comment(Cow::Borrowed(comment))));
            let kept = part.bytes.len().min(self.snaplen as usize);
            let block = EnhancedPacketBlock {
                interface_id: *interface,
                timestamp: time,
                original_len: part.len as u32,
                data: Cow::Borrowed(&part.bytes[..kept]),
                options,
            };
            self.writer.write_pcapng_block(block).map_err(encode)?;
        }
        let at_end = u64::from(self.interfaces) * STATISTICS_LEN;
        if self.len() + at_end > self.limit {
            self.writer.get_mut().truncate(before);
            return Ok(false);
        }
        Ok(true)
    }

    /// Adds what was counted of an interface.
    pub(super) fn add_statistics(&mut self, interface: u32, counted: Statistics) -> Result<(), CaptureError> {
        let options = vec![
            InterfaceStatisticsOption::IsbFilterAccept(counted.accepted),
            InterfaceStatisticsOption::IsbOsDrop(counted.dropped),
        ];
        // Nanoseconds since 1970 are less than 64 bits until 2554; the upper half comes first.
        let timestamp = (now().as_nanos() as u64).rotate_left(32);
        let block = InterfaceStatisticsBlock { interface_id: interface, timestamp, options };
        self.writer.write_pcapng_block(block).map(drop).map_err(encode)
    }

    /// Writes what was added. Where that fails, the file ends behind the last block that was written whole.
    pub(super) fn flush(&mut self, stop: &Stop) -> Result<(), CaptureError> {
        let blocks = std::mem::take(self.writer.get_mut());
        let written = if self.is_regular { self.file.write_all(&blocks) } else { self.write_to_reader(&blocks, stop)? };
        match written {
            Ok(()) => {
                self.written += blocks.len() as u64;
                Ok(())
            }
            Err(error) => {
                if self.is_regular {
                    // It failed already; what is told is why.
                    let _rest = self.file.set_len(self.written);
                }
                Err(CaptureError::Write { name: self.name.clone(), error })
            }
        }
    }

    /// Writes what somebody reads, who may have stopped to: no longer than the capture goes on.
    fn write_to_reader(&self, blocks: &[u8], stop: &Stop) -> Result<io::Result<()>, CaptureError> {
        // A pipe that is ready has room for so much (pipe(7)).
        for chunk in blocks.chunks(libc::PIPE_BUF) {
            loop {
                let output = std::iter::once((self.file.as_fd(), PollFlags::POLLOUT));
                let woken = stop.wait(output, "wait for the reader of the standard output")?;
                if woken.is_ready {
                    break;
                }
                if woken.is_signalled || stop.left().is_zero() {
                    return Err(CaptureError::Stalled);
                }
            }
            if let Err(error) = (&self.file).write_all(chunk) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    /// Octets by now.
    pub(super) fn len(&self) -> u64 {
        self.written + self.writer.get_ref().len() as u64
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn encode(error: PcapError) -> CaptureError {
    CaptureError::Encode(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::{
        os::{fd::OwnedFd, unix::net::UnixStream},
        time::Instant,
    };

    use pcap_file::pcapng::{Block, PcapNgReader};

    use super::*;

    fn create(directory: &Path, limit: u64) -> Result<CaptureFile, CaptureError> {
        CaptureFile::create(&directory.join("file"), limit, 60)
    }

    fn soon() -> Stop {
        Stop::new(Duration::from_millis(100)).unwrap()
    }

    #[test]
    fn a_file_is_whole_and_no_larger_than_it_may_be() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = create(directory.path(), 4096).unwrap();
        let interface = file.add_interface("eth0", "packets on the link", DataLink::ETHERNET).unwrap();
        let bytes = [7; 100];
        let time = Duration::new(1_700_000_000, 123_456_789);
        let mut added = 0;
        let record = || Record { interface, part: Part { bytes: &bytes, len: 150 }, comment: Some("said") };
        while file.add(&[record(), record()], time, Direction::Sent).unwrap() {
            added += 2;
        }
        file.add_statistics(interface, Statistics { accepted: 9, dropped: 3 }).unwrap();
        file.flush(&soon()).unwrap();
        let written = std::fs::read(directory.path().join("file")).unwrap();
        assert_eq!(written.len() as u64, file.len());
        assert!((3800..=4096).contains(&written.len()), "{}", written.len());

        let mut reader = PcapNgReader::new(written.as_slice()).unwrap();
        let (mut packets, mut dropped) = (0, false);
        while let Some(block) = reader.next_block() {
            match block.unwrap() {
                Block::EnhancedPacket(packet) => {
                    packets += 1;
                    assert_eq!((packet.data.len(), packet.original_len, packet.timestamp), (60, 150, time));
                    let comment = EnhancedPacketOption::Comment("said".into());
                    assert_eq!(packet.options, [EnhancedPacketOption::Flags(2), comment]);
                }
                Block::InterfaceStatistics(statistics) => {
                    dropped = statistics.options.contains(&InterfaceStatisticsOption::IsbOsDrop(3));
                }
                _ => {}
            }
        }
        assert_eq!((packets, dropped), (added, true));
    }

    #[test]
    fn nothing_is_overwritten_or_followed() {
        let directory = tempfile::tempdir().unwrap();
        drop(create(directory.path(), 4096).unwrap());
        assert!(matches!(create(directory.path(), 4096), Err(CaptureError::Exists(_))));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &link).unwrap();
        assert!(matches!(CaptureFile::create(&link, 4096, 60), Err(CaptureError::Exists(_))));
        let nowhere = directory.path().join("nowhere/file");
        assert!(matches!(CaptureFile::create(&nowhere, 4096, 60), Err(CaptureError::Create { .. })));
    }

    #[test]
    fn a_file_that_can_not_be_written_says_so() {
        // Its writes fail with ENOSPC.
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut file = CaptureFile { file: full, ..create(directory.path(), 4096).unwrap() };
        assert!(matches!(file.flush(&soon()), Err(CaptureError::Write { .. })));
    }

    #[test]
    fn who_does_not_read_is_not_waited_for_longer_than_the_capture_lasts() {
        let (stream, _reader) = UnixStream::pair().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = create(directory.path(), u64::MAX).unwrap();
        let mut file = CaptureFile { file: OwnedFd::from(stream).into(), is_regular: false, ..file };
        file.writer.get_mut().extend(vec![0; 8 << 20]);
        let begun = Instant::now();
        assert!(matches!(file.flush(&soon()), Err(CaptureError::Stalled)));
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}
