//! The Debian package. `dpkg-deb` writes it, which every machine that can install it has: it sorts, clamps times and names no
//! owner of the machine. What debhelper would add to scripts is in them (flannel-agent/deploy/debian).

use std::{
    fs::{self, File, FileTimes},
    path::Path,
    process::Command,
    time::SystemTime,
};

use anyhow::{Context as _, Result};

use super::{
    Effort, VERSION,
    files::{Files, put},
    seconds,
};
use crate::process::{output, workspace};

/// The package's name.
pub const NAME: &str = "flannel-agent";
/// Who answers for the package.
const MAINTAINER: &str = "the project's contributors <flannel-agent@localhost.invalid>";
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];
/// Where packages keep files that belong to the administrator once they are installed.
const CONFIGURATION: &str = "etc/";

/// Writes the package, by way of a folder that has its files as they are to be installed.
///
/// # Errors
/// Where a file can't be copied, or `dpkg-deb` fails.
pub fn write(
    files: &Files,
    root: &Path,
    architecture: &str,
    epoch: SystemTime,
    effort: Effort,
    path: &Path,
) -> Result<()> {
    files.place(root, |file| file.installed.as_deref())?;
    let places = || files.files.iter().filter_map(|file| Some((file.installed.as_deref()?, &file.source)));
    let sizes = places().map(|(_, source)| Ok(fs::metadata(source)?.len())).collect::<Result<Vec<_>>>()?;
    let configuration: String = places()
        .filter(|(place, _)| place.starts_with(CONFIGURATION))
        .map(|(place, _)| format!("/{place}\n"))
        .collect();
    let control = root.join("DEBIAN");
    put(control_file(files, architecture, sizes.iter().sum())?.as_bytes(), &control.join("control"), 0o644)?;
    put(configuration.as_bytes(), &control.join("conffiles"), 0o644)?;
    for name in SCRIPTS {
        let script = workspace().join("flannel-agent/deploy/debian").join(name);
        put(&fs::read(&script).with_context(|| format!("read {script:?}"))?, &control.join(name), 0o755)?;
    }
    set_times(root, epoch)?;
    let compression = match effort {
        Effort::Small => "-Zxz",
        Effort::Quick => "-Znone",
    };
    let mut dpkg_deb = Command::new("dpkg-deb");
    dpkg_deb.args(["--root-owner-group", compression, "--build"]).arg(root).arg(path);
    output(dpkg_deb.env("SOURCE_DATE_EPOCH", seconds(epoch)?.to_string())).map(drop)
}

/// `dpkg-deb` clamps times to the epoch and leaves earlier ones; so all have it.
fn set_times(folder: &Path, epoch: SystemTime) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            set_times(&path, epoch)?;
        } else {
            File::open(&path)?.set_times(FileTimes::new().set_modified(epoch))?;
        }
    }
    Ok(File::open(folder)?.set_times(FileTimes::new().set_modified(epoch))?)
}

/// deb-control(5).
fn control_file(files: &Files, architecture: &str, size: u64) -> Result<String> {
    let libc = needed_libc(&[&files.agent, &files.plugin])?;
    Ok(format!(
        "Package: {NAME}
Version: {VERSION}
Architecture: {architecture}
Maintainer: {MAINTAINER}
Installed-Size: {}
Depends: libc6 (>= {libc}), libgcc-s1, init-system-helpers
Recommends: nftables | iptables
Suggests: containernetworking-plugins, docker.io, etcd-client
Section: net
Priority: optional
Description: pod network of flannel's kind over an eBPF dataplane
 An agent that leases a subnet for each host from etcd or Kubernetes, and lets
 the pods of all hosts reach each other over VXLAN or without a tunnel. It
 takes flannel's flags, configuration and leases, and mixes with its hosts.
 The CNI plugin is in /usr/lib/cni.
",
        size.div_ceil(1024)
    ))
}

/// The newest version of the C library that the programs have symbols of.
fn needed_libc(programs: &[&Path]) -> Result<String> {
    let symbols = output(Command::new("objdump").arg("-T").args(programs))?;
    newest_libc(&symbols).context("the programs name no version of the C library")
}

fn newest_libc(symbols: &str) -> Option<String> {
    let versions = symbols.split("GLIBC_").skip(1).filter_map(|rest| {
        let version: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        let (major, minor) = version.split_once('.')?;
        Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
    });
    let (major, minor): (u32, u32) = versions.max()?;
    Some(format!("{major}.{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_symbol_tells_the_library() {
        let symbols = "DF *UND* (GLIBC_2.2.5) free\nDF *UND* (GLIBC_2.34) x\nDF *UND* (GLIBC_2.9) y";
        assert_eq!(newest_libc(symbols).as_deref(), Some("2.34"));
        assert_eq!(newest_libc("nothing"), None);
    }
}
