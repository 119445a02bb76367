//! The crates that are linked into the programs, in CycloneDX's format (version 1.5), as cargo resolved them: those of the
//! agent and of the eBPF programs, without what only builds or tests them.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{VERSION, deb};
use crate::process::{cargo, output, workspace};

/// The list's name.
pub const NAME: &str = "sbom.cdx.json";
/// Between the parts of a line of `cargo tree`: a license may have blanks.
const FORMAT: &str = "{p}|{l}|{r}";

/// One crate.
#[derive(Debug, PartialEq, Eq)]
struct Crate {
    license: String,
    repository: String,
}

/// The list.
///
/// # Errors
/// Where cargo fails.
pub fn list() -> Result<String> {
    let mut crates = BTreeMap::new();
    for package in ["flannel-agent", "flannel-ebpf"] {
        let mut tree = cargo();
        tree.args(["tree", "--locked", "--package", package, "--edges", "normal", "--prefix", "none"]);
        crates.extend(parse(&output(tree.args(["--format", FORMAT]))?));
    }
    let lock = workspace().join("Cargo.lock");
    let lock = fs::read_to_string(&lock).with_context(|| format!("read {lock:?}"))?;
    let document = document(&crates, &checksums(&lock));
    Ok(format!("{}\n", serde_json::to_string_pretty(&document)?))
}

fn document(crates: &BTreeMap<(String, String), Crate>, checksums: &BTreeMap<(String, String), String>) -> Value {
    let components = crates.iter().map(|((name, version), found)| {
        let purl = format!("pkg:cargo/{name}@{version}");
        let mut component = json!({
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": version,
            "purl": purl,
        });
        if !found.license.is_empty() {
            // The older form of an expression.
            let licenses: Vec<_> = found.license.split('/').map(str::trim).collect();
            component["licenses"] = json!([{"expression": licenses.join(" OR ")}]);
        }
        if !found.repository.is_empty() {
            component["externalReferences"] = json!([{"type": "vcs", "url": found.repository}]);
        }
        if let Some(checksum) = checksums.get(&(name.clone(), version.clone())) {
            component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
        }
        component
    });
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {
            "type": "application",
            "bom-ref": deb::NAME,
            "name": deb::NAME,
            "version": VERSION,
            "licenses": [{"expression": "MIT OR Apache-2.0"}],
        }},
        "components": components.collect::<Vec<_>>(),
    })
}

/// Lines of `cargo tree` in [`FORMAT`]. `(*)` behind a package, or behind the line, says that it was named before.
fn parse(tree: &str) -> BTreeMap<(String, String), Crate> {
    let crates = tree.lines().filter_map(|line| {
        let mut parts = line.trim_end_matches(" (*)").split('|');
        let mut package = parts.next()?.split_whitespace();
        let (name, version) = (package.next()?.to_owned(), package.next()?.strip_prefix('v')?.to_owned());
        let [license, repository] = [parts.next()?, parts.next()?].map(|part| part.trim().to_owned());
        Some(((name, version), Crate { license, repository }))
    });
    crates.collect()
}

/// Of each package of a lock file that has one.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let packages = lock.split("[[package]]").filter_map(|package| {
        let value = |key: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
            line.map(|value| value.trim_matches('"').to_owned())
        };
        Some(((value("name")?, value("version")?), value("checksum")?))
    });
    packages.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_and_a_lock_file_are_read() {
        let tree = "a v1.0.0 (/src/a)|MIT|\nb v2.1.0|MIT OR Apache-2.0|https://example.org/b\nb v2.1.0|MIT OR Apache-2.0|https://example.org/b (*)\n";
        let crates = parse(tree);
        assert_eq!(crates.len(), 2);
        let key = ("b".to_owned(), "2.1.0".to_owned());
        assert_eq!(crates[&key].repository, "https://example.org/b");
        let lock = "[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\n[[package]]\nname = \"b\"\nversion = \"2.1.0\"\nchecksum = \"abc\"\n";
        let document = document(&crates, &checksums(lock));
        assert_eq!(document["components"][1]["hashes"][0]["content"], "abc");
        assert_eq!(document["components"][1]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(document["components"][0]["hashes"], Value::Null);
    }
}
