//! The guest's files: the kernel's modules, the programs that the tests call with their libraries, agent and tests; all in
//! memory, from an initramfs.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use super::Kernel;
use crate::{process::output, setup};

/// What a system has anyway, and the guest's `init` and the tests call. iptables does as it is called.
const SYSTEM: [&str; 30] = [
    "sh",
    "mount",
    "umount",
    "mkdir",
    "chown",
    "rm",
    "cat",
    "echo",
    "sleep",
    "stty",
    "xargs",
    "env",
    "true",
    "seq",
    "kill",
    "head",
    "tail",
    "grep",
    "sed",
    "ls",
    "modprobe",
    "nstat",
    "hostname",
    "dmesg",
    "iptables-nft",
    "iptables-nft-save",
    "iptables-nft-restore",
    "iptables-legacy",
    "iptables-legacy-save",
    "iptables-legacy-restore",
];

/// Of the host's, where they are there: names of users, services and protocols, and what programs open by name.
const FILES: [&str; 12] = [
    "/etc/passwd",
    "/etc/group",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/ethertypes",
    "/etc/ssl/openssl.cnf",
    "/usr/lib/ssl",
    "/etc/iproute2",
    "/usr/share/iproute2",
    "/usr/share/wireshark",
];

/// Plugins, which programs open by name, and which want libraries themselves.
const PLUGINS: [&str; 1] = ["/usr/lib/x86_64-linux-gnu/xtables"];

/// Where a guest has agent, tests, and this program, which is the tests' double of an API server, and does what a pair's
/// machine is asked to; beside each other as cargo leaves them.
pub(super) const AGENT: &str = "target/debug/flannel-agent";
pub(super) const XTASK: &str = "target/debug/xtask";
pub(super) const TESTS: &str = "target/debug/deps/dataplane";

/// What the first process does first: mounts what a system has.
const MOUNTS: &str = r#"#!/bin/sh
export PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracing /sys/kernel/tracing
mkdir -p /run/netns /run/lock
ip link set lo up
"#;

/// What is different in each guest.
pub(super) struct Contents<'a> {
    /// Programs that cargo built, and where they are in the guest.
    pub(super) built: &'a [(PathBuf, &'a str)],
    /// Folders that programs want to be there.
    pub(super) folders: &'a [&'a str],
    /// Files with their text.
    pub(super) files: &'a [(&'a str, String)],
    /// What the first process does, once everything is mounted.
    pub(super) init: &'a str,
}

/// Puts the files together, and returns the initramfs.
pub(super) fn build(kernel: &Kernel, contents: &Contents<'_>, directory: &Path) -> Result<PathBuf> {
    let mut tree = Tree::new(directory.join("root"))?;
    for (program, _) in setup::PROGRAMS.iter().filter(|(program, _)| !setup::BUILD_ONLY.contains(program)) {
        tree.program(program)?;
    }
    SYSTEM.iter().try_for_each(|program| tree.program(program))?;
    // Few tests call it.
    if which::which(setup::KUBECTL.0).is_ok() {
        tree.program(setup::KUBECTL.0)?;
    }
    FILES.iter().try_for_each(|file| tree.copy_all(Path::new(file)))?;
    for folder in PLUGINS.map(Path::new).into_iter().filter(|folder| folder.exists()) {
        tree.copy_all(folder)?;
        for plugin in fs::read_dir(folder)?.flatten() {
            tree.libraries(&plugin.path())?;
        }
    }
    for (from, to) in contents.built {
        tree.libraries(from)?;
        let to = tree.root.join(to);
        fs::create_dir_all(to.parent().unwrap_or(&to))?;
        output(Command::new("strip").args(["--strip-debug", "-o"]).arg(&to).arg(from))?;
    }
    tree.modules(kernel)?;
    for folder in contents.folders {
        let folder = tree.root.join(folder.trim_start_matches('/'));
        fs::create_dir_all(&folder).with_context(|| format!("create {folder:?}"))?;
    }
    for (file, text) in contents.files {
        fs::write(tree.root.join(file), text)?;
    }
    let init = tree.root.join("init");
    fs::write(&init, format!("{MOUNTS}{}", contents.init))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let initramfs = tree.pack(&directory.join("initramfs"))?;
    fs::remove_dir_all(&tree.root).with_context(|| format!("remove {:?}", tree.root))?;
    Ok(initramfs)
}

/// A file tree for the guest, with `/usr` merged.
struct Tree {
    root: PathBuf,
    copied: BTreeSet<PathBuf>,
}

impl Tree {
    fn new(root: PathBuf) -> Result<Self> {
        let _rest = fs::remove_dir_all(&root);
        for folder in
            ["proc", "sys", "dev", "run", "tmp", "root", "var", "etc", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"]
        {
            fs::create_dir_all(root.join(folder)).with_context(|| format!("create {folder} in {root:?}"))?;
        }
        for folder in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{folder}"), root.join(folder))?;
        }
        symlink("../run", root.join("var/run"))?;
        Ok(Self { root, copied: BTreeSet::new() })
    }

    /// A program of the host's with its libraries, under the name that it is called by: some do as they are called.
    fn program(&mut self, name: &str) -> Result<()> {
        let path = which::which(name).with_context(|| format!("the tests call {name}"))?;
        self.libraries(&path)?;
        let to = self.root.join("usr/bin").join(name);
        fs::copy(&path, &to).with_context(|| format!("copy {path:?}"))?;
        // The kernel looks for it here.
        if name == "modprobe" {
            symlink("../bin/modprobe", self.root.join("usr/sbin/modprobe"))?;
        }
        Ok(())
    }

    /// The shared libraries of a program or library, and its loader.
    fn libraries(&mut self, path: &Path) -> Result<()> {
        // What is no dynamic program has none, and `ldd` fails for it.
        let listed = output(Command::new("ldd").arg(path)).unwrap_or_default();
        for word in listed.split_whitespace().filter(|word| word.starts_with('/')) {
            self.copy(Path::new(word))?;
        }
        Ok(())
    }

    /// A file under its own name; what it links to under that name too.
    fn copy(&mut self, path: &Path) -> Result<()> {
        if !self.copied.insert(path.to_owned()) {
            return Ok(());
        }
        let inside = path.strip_prefix("/").unwrap_or(path);
        // Folders that are links here are links there.
        let inside = match inside.components().next().and_then(|first| first.as_os_str().to_str()) {
            Some("bin" | "sbin" | "lib" | "lib64") => Path::new("usr").join(inside),
            _ => inside.to_owned(),
        };
        let to = self.root.join(inside);
        fs::create_dir_all(to.parent().unwrap_or(&to))?;
        fs::copy(path, &to).map(drop).with_context(|| format!("copy {path:?}"))
    }

    /// A file or a folder, where it is there.
    fn copy_all(&mut self, path: &Path) -> Result<()> {
        if !path.is_dir() {
            return if path.is_file() { self.copy(path) } else { Ok(()) };
        }
        for entry in fs::read_dir(path).with_context(|| format!("list {path:?}"))? {
            self.copy_all(&entry?.path())?;
        }
        Ok(())
    }

    /// All of the kernel's modules: it loads what is asked for by itself, as on any system.
    fn modules(&mut self, kernel: &Kernel) -> Result<()> {
        let to = self.root.join("usr/lib/modules");
        fs::create_dir_all(&to)?;
        output(Command::new("cp").arg("-a").arg(&kernel.modules).arg(&to))?;
        output(Command::new("depmod").arg("-b").arg(&self.root).arg(&kernel.release)).map(drop)
    }

    /// The archive that the kernel unpacks. Not compressed: an emulated processor takes longer for that than for reading.
    fn pack(&self, archive: &Path) -> Result<PathBuf> {
        let mut find = Command::new("find");
        let mut find = find.arg(".").current_dir(&self.root).stdout(Stdio::piped()).spawn().context("start find")?;
        let names = find.stdout.take().context("find has no output")?;
        let mut cpio = Command::new("cpio");
        cpio.args(["--create", "--format=newc", "--owner=0:0", "--quiet"]).current_dir(&self.root);
        let status = cpio.stdin(names).stdout(File::create(archive)?).status().context("start cpio")?;
        let found = find.wait().context("wait for find")?;
        anyhow::ensure!(status.success() && found.success(), "cpio: {status}, find: {found}");
        Ok(archive.to_owned())
    }
}
