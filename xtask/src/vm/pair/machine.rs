//! One of the two, from outside: it is booted, asked, and reset.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    nic::Nic,
    protocol::{Answer, Place, Request},
    wire::Wire,
};
use crate::{
    process::output,
    vm::{KERNEL_ARGUMENTS, Kernel, last_words, machine},
};

/// What both are made of.
pub(super) struct Parts<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a Path,
    pub(super) nic: Nic,
    pub(super) wire: &'a Wire,
    /// Folder for disks and consoles.
    pub(super) directory: &'a Path,
    /// Folder for sockets, whose paths may not be long.
    pub(super) sockets: &'a Path,
    /// What times are multiplied by.
    pub(super) patience: u32,
    /// When all has to be over.
    pub(super) deadline: Instant,
}

/// A machine. Its first serial port is the kernel's console, by the second it is asked.
pub(super) struct Machine<'a> {
    /// 1 or 2.
    pub(super) number: u8,
    parts: &'a Parts<'a>,
    emulator: Emulator,
    commands: BufReader<UnixStream>,
    /// It was asked in vain: the next answer would be that of a question before.
    is_late: bool,
    /// What its kernels said, one file for each boot.
    consoles: Vec<PathBuf>,
}

/// A machine that boots.
pub(super) struct Booting<'a> {
    number: u8,
    parts: &'a Parts<'a>,
    emulator: Emulator,
    listener: UnixListener,
    consoles: Vec<PathBuf>,
}

/// The process, ended when dropped.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// How much a disk holds.
const DISK: u64 = 64 << 20;
/// How long an answer, or a boot, may take.
const LIMIT: Duration = Duration::from_secs(30);

impl<'a> Booting<'a> {
    /// Boots a machine with an empty disk.
    pub(super) fn first(parts: &'a Parts<'a>, number: u8) -> Result<Self> {
        let disk = disk(parts, number);
        let file = fs::File::create(&disk).with_context(|| format!("create {disk:?}"))?;
        file.set_len(DISK)?;
        output(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&disk))?;
        Self::again(parts, number, Vec::new())
    }

    fn again(parts: &'a Parts<'a>, number: u8, mut consoles: Vec<PathBuf>) -> Result<Self> {
        let console = parts.directory.join(format!("console-{}-{number}-{}.log", parts.nic.device(), consoles.len()));
        let socket = parts.sockets.join(format!("machine{number}"));
        let _of_the_boot_before = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).with_context(|| format!("listen at {socket:?}"))?;
        listener.set_nonblocking(true)?;

        let mut command = machine(parts.kernel, parts.initramfs);
        // Read by the shell that is the first process, as a variable.
        command.args(["-append", &format!("{KERNEL_ARGUMENTS} number={number}")]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-chardev").arg(format!("socket,id=commands,path={}", socket.display()));
        command.args(["-serial", "chardev:commands"]);
        command.arg("-drive").arg(format!("file={},format=raw,if=virtio", disk(parts, number).display()));
        command.arg("-netdev").arg(format!("tap,id=wire,ifname={},script=no,downscript=no", Wire::port(number)));
        // Its ROM would only boot from the network.
        let nic = format!("{},netdev=wire,mac=02:00:00:00:64:{number:02x},romfile=", parts.nic.device());
        command.args(["-device", &nic]);
        let mut command = parts.wire.within(&command);
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("start {command:?}"))?;
        consoles.push(console);
        Ok(Self { number, parts, emulator: Emulator(child), listener, consoles })
    }

    /// Waits until it can be asked.
    pub(super) fn ready(self) -> Result<Machine<'a>> {
        let Self { number, parts, mut emulator, listener, consoles } = self;
        let start = Instant::now();
        let commands = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("wait for the emulator"),
            }
            if let Some(status) = emulator.0.try_wait()? {
                bail!("the emulator of machine {number} ended: {status}");
            }
            anyhow::ensure!(start.elapsed() < LIMIT, "the emulator of machine {number} does not connect");
            std::thread::sleep(Duration::from_millis(10));
        };
        commands.set_nonblocking(false)?;
        let commands = BufReader::new(commands);
        let mut machine = Machine { number, parts, emulator, commands, is_late: false, consoles };
        machine.answer("boot")?;
        Ok(machine)
    }
}

impl<'a> Machine<'a> {
    /// Has it do something.
    pub(super) fn ask(&mut self, request: &Request) -> Result<String> {
        anyhow::ensure!(!self.is_late, "machine {} still has another question to answer", self.number);
        let line = format!("{}\n", serde_json::to_string(request)?);
        self.commands.get_mut().write_all(line.as_bytes()).with_context(|| self.last_words("it takes no command"))?;
        self.answer(&format!("{request:?}"))
    }

    fn answer(&mut self, what: &str) -> Result<String> {
        let rest = self.parts.deadline.saturating_duration_since(Instant::now());
        let limit = rest.min(LIMIT * self.parts.patience).max(Duration::from_secs(1));
        self.commands.get_ref().set_read_timeout(Some(limit))?;
        let mut line = String::new();
        match self.commands.read_line(&mut line) {
            Ok(len) if len > 0 => {}
            Ok(_) => bail!(self.last_words(&format!("it ended meanwhile: {what}"))),
            Err(error) => {
                self.is_late = true;
                return Err(error).context(self.last_words(&format!("no answer in {limit:?} to {what}")));
            }
        }
        let answer: Answer = serde_json::from_str(&line).with_context(|| format!("the answer {line:?}"))?;
        answer.map_err(|error| anyhow::anyhow!("machine {}: {error}", self.number))
    }

    /// Runs a command line in it.
    pub(super) fn exec(&mut self, place: Place, line: &str) -> Result<String> {
        self.ask(&Request::Exec(place, line.to_owned()))
    }

    /// What the agent's `status` says of its overlay.
    pub(super) fn status(&mut self) -> Result<serde_json::Value> {
        let text = self.ask(&Request::Agent("status -o json".to_owned()))?;
        let mut status: serde_json::Value = serde_json::from_str(&text).context("read the agent's status")?;
        Ok(status["overlays"][0].take())
    }

    /// A counter of the agent's: packets and bytes, with what was sent to a next hop that the kernel resolves.
    pub(super) fn counter(&mut self, label: &str) -> Result<[u64; 2]> {
        let text = self.ask(&Request::Agent("counters".to_owned()))?;
        let resolved = format!("{label}_neighbour");
        let mut sum = [0; 2];
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if words.next().is_some_and(|word| word == label || word == resolved) {
                for sum in &mut sum {
                    *sum += words.next().context("a counter without a number")?.parse::<u64>()?;
                }
            }
        }
        Ok(sum)
    }

    /// Ends it as if somebody had pulled the plug, and boots it again. Its disk is all that is left.
    pub(super) fn reset(&mut self) -> Result<()> {
        let line = format!("{}\n", serde_json::to_string(&Request::Reset)?);
        self.commands.get_mut().write_all(line.as_bytes())?;
        let start = Instant::now();
        while self.emulator.0.try_wait()?.is_none() {
            anyhow::ensure!(start.elapsed() < LIMIT, "machine {} does not end", self.number);
            std::thread::sleep(Duration::from_millis(10));
        }
        *self = Booting::again(self.parts, self.number, self.consoles.clone())?.ready()?;
        Ok(())
    }

    /// Whether it still runs and answers.
    pub(super) fn is_up(&mut self) -> bool {
        !self.is_late && matches!(self.emulator.0.try_wait(), Ok(None))
    }

    /// What its kernels complained about.
    pub(super) fn complaints(&self) -> Result<Vec<String>> {
        let mut complaints = Vec::new();
        for console in &self.consoles {
            let words = fs::read_to_string(console).with_context(|| format!("read {console:?}"))?;
            complaints.extend(words.lines().filter(|line| is_complaint(line)).map(str::to_owned));
        }
        Ok(complaints)
    }

    /// What the taps between the two count.
    pub(super) fn wire(&self) -> Result<String> {
        self.parts.wire.statistics()
    }

    fn last_words(&self, what: &str) -> String {
        let console = self.consoles.last().map(|console| last_words(console)).unwrap_or_default();
        format!("machine {}: {what}; its kernel's last words:\n{console}", self.number)
    }
}

fn disk(parts: &Parts<'_>, number: u8) -> PathBuf {
    parts.directory.join(format!("disk-{number}"))
}

/// Of a kernel: that a checksum was said to be right and was not, or something that should never be.
fn is_complaint(line: &str) -> bool {
    ["hw csum failure", "WARNING:", "BUG:", "Oops", "bad gso", "skb_warn_bad_offload"]
        .iter()
        .any(|words| line.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_checksum_state_is_a_complaint() {
        assert!(is_complaint("[   12.3] pod1: hw csum failure"));
        assert!(!is_complaint("[   12.3] virtio_net virtio1 eth0: XDP request 3 queues but max is 1"));
    }
}
