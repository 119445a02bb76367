//! What is packed, and where it goes.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::archive::compressed;
use crate::process::{output, workspace};

/// Shells, with where Debian has their completions.
const COMPLETIONS: [(&str, &str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/flannel-agent", "completions/flannel-agent.bash"),
    ("zsh", "usr/share/zsh/vendor-completions/_flannel-agent", "completions/_flannel-agent"),
    ("fish", "usr/share/fish/vendor_completions.d/flannel-agent.fish", "completions/flannel-agent.fish"),
];
/// Where a package's documentation is.
const DOC: &str = "usr/share/doc/flannel-agent";

/// One file.
#[derive(Debug)]
pub struct Packed {
    /// Its content.
    pub source: PathBuf,
    /// Its place below `/`, for the package.
    pub installed: Option<String>,
    /// Its place in the archive.
    pub archived: Option<String>,
    /// Its permissions.
    pub mode: u32,
}

/// All of them.
#[derive(Debug)]
pub struct Files {
    /// The agent.
    pub agent: PathBuf,
    /// The CNI plugin.
    pub plugin: PathBuf,
    /// Sorted by their places in the archive and the package.
    pub files: Vec<Packed>,
}

impl Files {
    /// The programs of a folder, without their symbols; what the agent prints about itself; and what goes with them.
    ///
    /// # Errors
    /// Where one is missing, or can't be made.
    pub fn collect(binaries: &Path, sbom: &Path, scratch: &Path) -> Result<Self> {
        let stripped = |name: &str| -> Result<PathBuf> {
            let program = scratch.join(name);
            output(Command::new("strip").arg("-o").arg(&program).arg(binaries.join(name)))?;
            Ok(program)
        };
        let (agent, plugin) = (stripped("flannel-agent")?, stripped("flannel")?);
        let mut files = Self { agent: agent.clone(), plugin: plugin.clone(), files: Vec::new() };
        files.add_program(agent, "usr/bin/flannel-agent", "bin/flannel-agent");
        files.add_program(plugin, "usr/lib/cni/flannel", "cni/flannel");
        files.add_manuals(scratch)?;
        for (shell, installed, archived) in COMPLETIONS {
            let path = scratch.join(shell);
            let text = output(Command::new(&files.agent).args(["completions", shell]))?;
            fs::write(&path, text).with_context(|| format!("write {path:?}"))?;
            files.add(path, Some(installed), Some(archived));
        }
        files.add_services();
        files.add_documents(sbom, scratch)?;
        files.files.sort_by(|a, b| (&a.archived, &a.installed).cmp(&(&b.archived, &b.installed)));
        Ok(files)
    }

    /// Copies them below a folder, each to the place that `place` finds for it, if any.
    ///
    /// # Errors
    /// Where one can't be copied.
    pub fn place(&self, root: &Path, place: impl Fn(&Packed) -> Option<&str>) -> Result<()> {
        for file in &self.files {
            if let Some(place) = place(file) {
                let content = fs::read(&file.source).with_context(|| format!("read {:?}", file.source))?;
                put(&content, &root.join(place), file.mode)?;
            }
        }
        set_permissions(root)
    }

    fn add(&mut self, source: PathBuf, installed: Option<&str>, archived: Option<&str>) {
        let [installed, archived] = [installed, archived].map(|place| place.map(str::to_owned));
        self.files.push(Packed { source, installed, archived, mode: 0o644 });
    }

    fn add_program(&mut self, source: PathBuf, installed: &str, archived: &str) {
        self.add(source, Some(installed), Some(archived));
        if let Some(program) = self.files.last_mut() {
            program.mode = 0o755;
        }
    }

    fn add_manuals(&mut self, scratch: &Path) -> Result<()> {
        let folder = scratch.join("man");
        output(Command::new(&self.agent).arg("man").arg(&folder))?;
        let pages: Vec<_> = fs::read_dir(&folder).with_context(|| format!("read {folder:?}"))?.flatten().collect();
        for page in pages {
            let name = page.file_name().to_string_lossy().into_owned();
            // The archive has it as it is, the package compressed, as Debian's policy asks (12.1).
            self.add(compressed(&page.path())?, Some(&format!("usr/share/man/man1/{name}.gz")), None);
            self.add(page.path(), None, Some(&format!("man/man1/{name}")));
        }
        Ok(())
    }

    fn add_services(&mut self) {
        let folder = workspace().join("flannel-agent/deploy/systemd");
        let places = [
            ("flannel-agent.service", "usr/lib/systemd/system/flannel-agent.service"),
            ("flannel-agent.tmpfiles", "usr/lib/tmpfiles.d/flannel-agent.conf"),
            ("flannel-agent.default", "etc/default/flannel-agent"),
            ("docker-flannel.conf", "usr/share/doc/flannel-agent/examples/docker-flannel.conf"),
        ];
        for (name, installed) in places {
            self.add(folder.join(name), Some(installed), Some(&format!("systemd/{name}")));
        }
    }

    fn add_documents(&mut self, sbom: &Path, scratch: &Path) -> Result<()> {
        let agent = workspace().join("flannel-agent");
        for name in ["alerts.yaml", "grafana-dashboard.json"] {
            let place = format!("{DOC}/examples/{name}");
            self.add(agent.join("deploy").join(name), Some(&place), Some(&format!("examples/{name}")));
        }
        let docs = agent.join("docs");
        for entry in fs::read_dir(&docs).with_context(|| format!("read {docs:?}"))? {
            let path = entry?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name != "CHANGELOG.md" {
                self.add(path, Some(&format!("{DOC}/{name}")), Some(&format!("doc/{name}")));
            }
        }
        let changes = docs.join("CHANGELOG.md");
        let copy = scratch.join("changelog");
        fs::copy(&changes, &copy).with_context(|| format!("copy {changes:?}"))?;
        self.add(compressed(&copy)?, Some(&format!("{DOC}/changelog.gz")), None);
        self.add(changes, None, Some("doc/CHANGELOG.md"));
        self.add(agent.join("deploy/debian/copyright"), Some(&format!("{DOC}/copyright")), None);
        for name in ["LICENSE-APACHE", "LICENSE-MIT", "README.md"] {
            self.add(workspace().join(name), None, Some(name));
        }
        self.add(sbom.to_owned(), Some(&format!("{DOC}/sbom.cdx.json")), Some("sbom.cdx.json"));
        Ok(())
    }
}

/// Writes a file with its permissions, whatever the umask, and the folders above it.
///
/// # Errors
/// Where it can't be written.
pub fn put(content: &[u8], path: &Path, mode: u32) -> Result<()> {
    let folder = path.parent().context("a file in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("create {folder:?}"))?;
    fs::write(path, content).with_context(|| format!("write {path:?}"))?;
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

/// Gives folders the permissions that installed ones have, whatever the umask.
fn set_permissions(folder: &Path) -> Result<()> {
    fs::set_permissions(folder, Permissions::from_mode(0o755))?;
    let paths = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    paths.into_iter().filter(|path| path.is_dir()).try_for_each(|path| set_permissions(&path))
}
