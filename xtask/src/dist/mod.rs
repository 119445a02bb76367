//! `cargo xtask dist`: what users install. A Debian package, an archive, the checksums of both, and a list of the crates in them,
//! from binaries that hold no paths of the machine that built them. The same commit and compilers give the same bytes.
//!
//! * `binaries` — the release build, and its floors
//! * [`files`] — where each file goes
//! * [`deb`] — the Debian package, by `dpkg-deb`
//! * [`archive`] — the archive, and files in gzip's format
//! * [`sbom`] — the list of crates, in CycloneDX's format

pub mod archive;
mod binaries;
pub mod deb;
pub mod files;
pub mod sbom;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use self::files::Files;
use crate::{
    process::{output, workspace},
    progress::step,
};

/// The version of all parts.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Options of `cargo xtask dist`.
#[derive(clap::Args)]
pub struct Options {
    /// Pack the programs of this folder instead of building them (their sizes are not checked)
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Where the results go
    #[arg(long, value_name = "DIR", default_value = "target/dist")]
    into: PathBuf,
    /// How much work compression is worth
    #[arg(long, value_enum, default_value_t)]
    effort: Effort,
    /// Pack twice, and fail where the two differ in a byte
    #[arg(long)]
    verify: bool,
}

/// How much work compression is worth.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum Effort {
    /// Small files
    #[default]
    Small,
    /// Large ones, soon
    Quick,
}

/// Builds and packs.
///
/// # Errors
/// Where the build fails, a program names a path of this machine, or a result can't be written.
pub fn run(options: &Options) -> Result<()> {
    let folder = match &options.binaries {
        Some(folder) => folder.clone(),
        None => {
            let folder = step("build the release", binaries::build)?;
            binaries::check(&folder)?;
            folder
        }
    };
    let into = workspace().join(&options.into);
    let packages = step("pack", || pack(&folder, &into, options.effort))?;
    if options.verify {
        step("pack again and compare", || {
            let again = TempDir::new()?;
            compare(&into, again.path(), &pack(&folder, again.path(), options.effort)?)
        })?;
    }
    for path in packages {
        println!("  {} {}", size(fs::metadata(&path)?.len()), path.display());
    }
    Ok(())
}

/// Packs the programs of a folder into another, and returns what it wrote: package, archive, list of crates, checksums.
///
/// # Errors
/// Where a program is missing, or a result can't be written.
pub fn pack(binaries: &Path, into: &Path, effort: Effort) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(into).with_context(|| format!("create {into:?}"))?;
    let epoch = epoch()?;
    let scratch = TempDir::new().context("create a scratch folder")?;
    let sbom = scratch.path().join(sbom::NAME);
    fs::write(&sbom, sbom::list()?).with_context(|| format!("write {sbom:?}"))?;
    let files = Files::collect(binaries, &sbom, scratch.path())?;
    let architecture = architecture(&files.agent)?;
    let package = into.join(format!("{}_{VERSION}_{architecture}.deb", deb::NAME));
    deb::write(&files, &scratch.path().join("root"), architecture, epoch, effort, &package)?;
    let name = format!("{}-{VERSION}-linux-{architecture}", deb::NAME);
    let archive = into.join(format!("{name}.tar.gz"));
    archive::write(&files, &scratch.path().join("archive"), &name, epoch, effort, &archive)?;
    let list = into.join(format!("{name}.{}", sbom::NAME));
    fs::copy(&sbom, &list).with_context(|| format!("write {list:?}"))?;
    let mut written = vec![package, archive, list];
    let sums = into.join("SHA256SUMS");
    fs::write(&sums, checksums(&written)?).with_context(|| format!("write {sums:?}"))?;
    written.push(sums);
    Ok(written)
}

/// The lines of `sha256sum` for files of one folder, by name.
fn checksums(paths: &[PathBuf]) -> Result<String> {
    let mut names: Vec<_> = paths.iter().filter_map(|path| path.file_name()).collect();
    names.sort();
    let folder = paths.first().and_then(|path| path.parent()).context("nothing was packed")?;
    output(Command::new("sha256sum").args(names).current_dir(folder))
}

fn compare(first: &Path, second: &Path, packed: &[PathBuf]) -> Result<()> {
    for path in packed {
        let name = path.strip_prefix(second)?;
        let same = fs::read(first.join(name))? == fs::read(path)?;
        ensure!(same, "{}: packed twice from the same files, and not the same bytes", name.display());
    }
    Ok(())
}

/// The time that all files have: `SOURCE_DATE_EPOCH` (reproducible-builds.org), else that of the last commit.
fn epoch() -> Result<SystemTime> {
    let given = std::env::var("SOURCE_DATE_EPOCH").ok();
    let seconds = match given {
        Some(seconds) => seconds,
        None => output(Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(workspace()))?,
    };
    let seconds = seconds.trim().parse().with_context(|| format!("{seconds:?} are no seconds since 1970"))?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

/// Since 1970.
fn seconds(epoch: SystemTime) -> Result<u64> {
    Ok(epoch.duration_since(SystemTime::UNIX_EPOCH)?.as_secs())
}

/// Debian's name for the architecture of a program, by `e_machine` of its ELF header (elf(5)).
fn architecture(program: &Path) -> Result<&'static str> {
    let header = fs::read(program).with_context(|| format!("read {program:?}"))?;
    match header.get(18..20) {
        Some([62, 0]) => Ok("amd64"),
        Some([183, 0]) => Ok("arm64"),
        machine => anyhow::bail!("{program:?} is for a machine that is not known here: {machine:?}"),
    }
}

/// In MiB.
fn size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "for eyes")]
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    format!("{mebibytes:6.2} MiB")
}
