//! Debian's kernel images. Those for clouds are small, and have everything that the dataplane needs; the general ones have the
//! drivers of NICs that are not found in clouds.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{package, process::output};

/// An unpacked kernel image.
pub(super) struct Kernel {
    /// As `uname -r` says it.
    pub(super) release: String,
    /// What is booted.
    pub(super) image: PathBuf,
    /// `lib/modules/<release>`.
    pub(super) modules: PathBuf,
}

/// For what a kernel image is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavour {
    /// Virtual machines of clouds.
    Cloud,
    /// Any machine.
    General,
}

impl Flavour {
    /// What the names of its packages end with.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Cloud => "-cloud-amd64",
            Self::General => "-amd64",
        }
    }

    /// Whether a package is of this flavour. The suffix of the general one is that of all others too, behind a word.
    fn has(self, package: &str) -> bool {
        let release = package.strip_prefix(PREFIX).and_then(|release| release.strip_suffix(self.suffix()));
        let last = release.and_then(|release| release.rsplit('-').next());
        last.is_some_and(|last| last.starts_with(|c: char| c.is_ascii_digit()))
    }
}

impl Kernel {
    /// The newest image of a kernel, as `6.1`. It is downloaded once.
    ///
    /// # Errors
    /// Where the package lists have none, or it can't be had.
    pub(super) fn get(name: &str, flavour: Flavour, directory: &Path) -> Result<Self> {
        let package = newest(&packages(flavour)?, name).with_context(|| {
            let suffix = flavour.suffix();
            format!(
                "the package lists have no linux-image-{name}.*{suffix} (`cargo xtask vm --list` says which they \
                 have). 6.1 is in Debian's bookworm, 6.12 in bookworm-security, bookworm-backports and trixie: name one \
                 of them in /etc/apt/sources.list and run apt-get update"
            )
        })?;
        let unpacked = package::unpacked(&package, directory)?;
        let release = package.trim_start_matches(PREFIX).to_owned();
        let kernel = Self {
            image: unpacked.join("boot").join(format!("vmlinuz-{release}")),
            // With /usr merged or not.
            modules: ["lib", "usr/lib"]
                .map(|lib| unpacked.join(lib).join("modules").join(&release))
                .into_iter()
                .find(|modules| modules.exists())
                .with_context(|| format!("{unpacked:?} has no modules"))?,
            release,
        };
        anyhow::ensure!(kernel.image.exists(), "{:?} does not exist", kernel.image);
        Ok(kernel)
    }

    /// The first two numbers of its release.
    pub(super) fn version(&self) -> Result<[u32; 2]> {
        let numbers = numbers(&self.release);
        numbers.first_chunk().copied().with_context(|| format!("the release {} has no version", self.release))
    }
}

const PREFIX: &str = "linux-image-";

/// Prints the newest image of each kernel that the package lists have.
pub(super) fn list() -> Result<()> {
    let packages = packages(Flavour::Cloud)?;
    let mut names: Vec<_> = packages.iter().map(|package| numbers(package)[..2].to_vec()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names.iter().map(|name| format!("{}.{}", name[0], name[1])) {
        println!("{name:<6} {}", newest(&packages, &name).unwrap_or_default());
    }
    Ok(())
}

/// All signed images of a flavour in the package lists.
fn packages(flavour: Flavour) -> Result<Vec<String>> {
    let pattern = format!("^{PREFIX}[0-9]+[.][0-9]+[.].*{}$", flavour.suffix());
    let found = output(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    let names = found.lines().filter_map(|line| line.split_whitespace().next());
    Ok(names.filter(|name| flavour.has(name)).map(str::to_owned).collect())
}

fn newest(packages: &[String], name: &str) -> Option<String> {
    let prefix = format!("{PREFIX}{name}.");
    packages.iter().filter(|package| package.starts_with(&prefix)).max_by_key(|package| numbers(package)).cloned()
}

/// The numbers in a package's name, for which a longer one is the greater.
fn numbers(package: &str) -> Vec<u32> {
    package.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_by_number() {
        let packages = ["6.1.0-9", "6.1.0-56", "6.12.101+deb12", "6.12.9+deb12", "6.12.101+deb13"]
            .map(|release| format!("{PREFIX}{release}-cloud-amd64"));
        assert_eq!(newest(&packages, "6.1").unwrap(), packages[1]);
        assert_eq!(newest(&packages, "6.12").unwrap(), packages[4]);
        assert_eq!(newest(&packages, "6.2"), None);
    }

    #[test]
    fn each_package_is_of_one_flavour() {
        for (release, flavour) in [
            ("6.12.117+deb12-cloud-amd64", Some(Flavour::Cloud)),
            ("6.1.0-56-cloud-amd64", Some(Flavour::Cloud)),
            ("6.12.117+deb12-amd64", Some(Flavour::General)),
            ("6.1.0-56-amd64", Some(Flavour::General)),
            ("6.12.117+deb12-rt-amd64", None),
            ("6.1.0-56-amd64-unsigned", None),
        ] {
            let package = format!("{PREFIX}{release}");
            let found = [Flavour::Cloud, Flavour::General].into_iter().find(|flavour| flavour.has(&package));
            assert_eq!(found, flavour, "{package}");
        }
    }
}
