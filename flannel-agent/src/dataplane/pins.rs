//! What is kept on the BPF file system.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapError, MapType};
use flannel_common::{
    drops::Drops,
    event::Event,
    flow::{Flow, FlowKey, Original},
    maps::{
        ABI_VERSION, ACCEPTED, COUNTERS, Counter, DROPS, EXCLUDED, EXCLUDED_PORTS, EXCLUDED_WORDS, FLOWS, GONE,
        GONE_SLOTS, HEARD, Heard, MAX_ACCEPTED, MAX_COUNTED, MAX_EXCLUDED, MAX_FLOWS, MAX_PODS, MAX_PREFIXES,
        ORIGINALS, PODS, PREFIXES, SUBNETS, TRAFFIC, Traffic, VTEP_ADDRESSES, VTEPS, Vtep,
    },
    packet::Mac,
    vxlan::Vni,
};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use tracing::{info, warn};

use super::{Capacity, DataplaneError};

/// Entries are made as they come (include/uapi/linux/bpf.h).
const BPF_F_NO_PREALLOC: u32 = 1;

/// The directory of one overlay's pins. Maps are in a folder for their layout; links are beside those folders, so that
/// an agent with another layout takes them over instead of attaching a second time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinDirectory {
    vni: Vni,
    root: PathBuf,
    overlay: PathBuf,
    maps: PathBuf,
}

/// How a map must look to be adopted.
#[derive(Debug, PartialEq)]
pub(super) struct Layout {
    pub(super) name: &'static str,
    kind: MapType,
    key_size: u32,
    value_size: u32,
    pub(super) max_entries: u32,
    flags: u32,
}

/// What maps agents before this one left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Predecessor {
    /// There was none.
    None,
    /// Maps that are used as they are.
    Adopted,
    /// None that can be used: what it knew of the peers, besides who they are, is lost.
    Lost,
}

/// The layout of every pinned map.
pub(super) fn layout(capacity: Capacity) -> [Layout; 15] {
    let Capacity { slots, vteps } = capacity;
    let map = |name, kind, key_size, value_size: usize, max_entries| Layout {
        name,
        kind,
        key_size,
        value_size: value_size as u32,
        max_entries,
        // What the kernel requires of a trie.
        flags: if kind == MapType::LpmTrie { BPF_F_NO_PREALLOC } else { 0 },
    };
    [
        map(SUBNETS, MapType::Array, 4, 4, slots.max(1)),
        // The key is the prefix length and the address.
        map(PREFIXES, MapType::LpmTrie, 8, 4, MAX_PREFIXES),
        map(VTEPS, MapType::Array, 4, size_of::<Vtep>(), vteps),
        map(VTEP_ADDRESSES, MapType::Hash, 4, 4, vteps),
        map(ACCEPTED, MapType::LpmTrie, 8, 4, MAX_ACCEPTED),
        map(HEARD, MapType::Array, 4, size_of::<Heard>(), vteps),
        map(TRAFFIC, MapType::PerCpuArray, 4, size_of::<Traffic>(), vteps.min(MAX_COUNTED)),
        map(FLOWS, MapType::LruHash, size_of::<FlowKey>() as u32, size_of::<Flow>(), MAX_FLOWS),
        map(ORIGINALS, MapType::Array, 4, size_of::<Original>(), Original::COUNT),
        map(PODS, MapType::LruHash, 4, size_of::<Mac>(), MAX_PODS),
        map(GONE, MapType::Array, 4, 4, GONE_SLOTS),
        map(EXCLUDED, MapType::LpmTrie, 8, 4, MAX_EXCLUDED),
        map(EXCLUDED_PORTS, MapType::Array, 4, 8, EXCLUDED_WORDS),
        map(COUNTERS, MapType::PerCpuArray, 4, size_of::<Counter>(), Event::COUNT),
        map(DROPS, MapType::PerCpuArray, 4, size_of::<Drops>(), Event::COUNT),
    ]
}

impl PinDirectory {
    /// The directory of an overlay below the agent's `--bpf-pin-dir`.
    pub fn new(root: &Path, vni: Vni) -> Self {
        let overlay = root.join(vni.to_string());
        Self { vni, root: root.to_owned(), maps: overlay.join(format!("v{ABI_VERSION}")), overlay }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) const fn vni(&self) -> Vni {
        self.vni
    }

    /// Where a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps.join(name)
    }

    /// Where a program's link is pinned.
    pub(super) fn link(&self, program: &str, ifindex: u32) -> PathBuf {
        self.overlay.join(format!("{program}-{ifindex}"))
    }

    /// A pinned map.
    ///
    /// # Errors
    /// [`DataplaneError::OtherLayout`] where there are only those of another version of the agent, [`DataplaneError::Map`].
    pub(super) fn open(&self, name: &'static str) -> Result<MapData, DataplaneError> {
        MapData::from_pin(self.map(name)).map_err(|source| match self.other_layout() {
            Some(found) => DataplaneError::OtherLayout { vni: self.vni, found, own: ABI_VERSION },
            None => DataplaneError::map("open", name)(source),
        })
    }

    /// The version of the maps, where they are of another one.
    fn other_layout(&self) -> Option<u32> {
        let versions = layouts(&self.overlay);
        versions
            .iter()
            .all(|(version, _)| *version != ABI_VERSION)
            .then(|| versions.first().map(|(version, _)| *version))?
    }

    /// The pinned links of a program.
    pub(super) fn links(&self, program: &str) -> Result<Vec<PathBuf>, DataplaneError> {
        links(&self.overlay, program)
    }

    /// Whether an earlier agent left something.
    pub fn exists(&self) -> bool {
        self.overlay.exists()
    }

    /// Makes the folders.
    pub(super) fn create(&self) -> Result<(), DataplaneError> {
        require_bpffs(&self.root)?;
        for folder in [&self.overlay, &self.maps] {
            if fs::symlink_metadata(folder).is_ok_and(|found| !found.is_dir()) {
                warn!("{} is no folder, and is removed", folder.display());
                remove_pin(folder)?;
            }
        }
        fs::create_dir_all(&self.maps).map_err(failed("create", &self.maps))
    }

    /// Removes maps of other versions, which no attached program uses any more.
    pub(super) fn discard_other_versions(&self) -> Result<(), DataplaneError> {
        for version in versions(&self.overlay).into_iter().filter(|version| *version != self.maps) {
            info!("{} is of another version and no longer used", version.display());
            remove_pin(&version)?;
        }
        Ok(())
    }

    /// Unpins what can't be adopted: the kernel would hand it to programs that take it for something else. The programs
    /// attached by then go on with their maps until they are swapped.
    pub(super) fn adopt(&self, layout: &[Layout]) -> Result<Predecessor, DataplaneError> {
        let entries = fs::read_dir(&self.overlay).map_err(failed("list", &self.overlay))?;
        // Links, or another version's maps.
        let is_upgrade = entries.flatten().any(|entry| entry.path() != self.maps);
        let mut misfit = None;
        let mut found = 0;
        for wanted in layout {
            match wanted.difference_at(&self.map(wanted.name)) {
                Ok(()) => found += 1,
                Err(Misfit::Missing) => misfit = misfit.or(Some(format!("{} is missing", wanted.name))),
                Err(Misfit::Forbidden(source)) => return Err(failed("open", &self.map(wanted.name))(source)),
                Err(Misfit::Other(difference)) => {
                    found += 1;
                    misfit = misfit.or(Some(format!("{} {difference}", wanted.name)));
                }
            }
        }
        // All or none: the maps refer to each other.
        let Some(misfit) = misfit else { return Ok(Predecessor::Adopted) };
        for map in layout {
            remove_pin(&self.map(map.name))?;
        }
        if found > 0 {
            warn!("the maps in {} are made anew, since {misfit}", self.maps.display());
        }
        Ok(if found > 0 || is_upgrade { Predecessor::Lost } else { Predecessor::None })
    }
}

/// Why a map can't be adopted.
enum Misfit {
    Missing,
    Forbidden(io::Error),
    Other(String),
}

impl Layout {
    /// Looks whether what is pinned there is this map.
    fn difference_at(&self, path: &Path) -> Result<(), Misfit> {
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Misfit::Missing),
            Err(error) => return Err(Misfit::Forbidden(error)),
            // A link to it would be followed, to whatever map is at its end.
            Ok(found) if !found.is_file() => return Err(Misfit::Other("is no map".to_owned())),
            Ok(_) => {}
        }
        let info = match MapData::from_pin(path).and_then(|map| Ok((is_map(&map), map.info()?))) {
            Ok((true, info)) => info,
            Ok((false, _)) => return Err(Misfit::Other("is no map".to_owned())),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(Misfit::Forbidden(error.io_error));
            }
            Err(error) => return Err(Misfit::Other(format!("is no map ({error})"))),
        };
        let name = info.name_as_str().unwrap_or_default();
        // Kernels without names for maps have none to compare.
        if !name.is_empty() && name != self.name {
            return Err(Misfit::Other(format!("is the map {name:?}")));
        }
        let found = Self {
            name: self.name,
            kind: info.map_type().unwrap_or(MapType::Unspecified),
            key_size: info.key_size(),
            value_size: info.value_size(),
            max_entries: info.max_entries(),
            flags: info.map_flags(),
        };
        if found == *self { Ok(()) } else { Err(Misfit::Other(format!("is {found}, not {self}"))) }
    }
}

/// Programs and links are opened by the same call, and have information of another form.
fn is_map(map: &MapData) -> bool {
    let descriptor = format!("/proc/self/fd/{}", map.fd().as_fd().as_raw_fd());
    fs::read_link(descriptor).is_ok_and(|target| target == Path::new("anon_inode:bpf-map"))
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name: _, kind, key_size, value_size, max_entries, flags } = self;
        write!(f, "{kind:?} of {max_entries} entries of {key_size} and {value_size} bytes with flags {flags:#x}")
    }
}

/// Removes whatever is there, if anything.
pub(super) fn remove_pin(path: &Path) -> Result<(), DataplaneError> {
    let is_folder = fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    match if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}
/// The overlays that have pins below `root`.
pub fn pinned_vnis(root: &Path) -> Vec<Vni> {
    let overlays = directories(root, |name| name.parse().ok().and_then(|number| Vni::new_checked(number).ok()));
    let has_version = |overlay: &Path| !versions(overlay).is_empty();
    overlays.into_iter().filter(|(_, overlay)| has_version(overlay)).map(|(vni, _)| vni).collect()
}

pub(super) fn links(overlay: &Path, program: &str) -> Result<Vec<PathBuf>, DataplaneError> {
    let prefix = format!("{program}-");
    let entries = match fs::read_dir(overlay) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("list", overlay)(error)),
    };
    let names = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    Ok(names.map(|entry| entry.path()).collect())
}

pub(super) fn versions(overlay: &Path) -> Vec<PathBuf> {
    layouts(overlay).into_iter().map(|(_, path)| path).collect()
}

/// The folders of maps, by the version of their layout.
fn layouts(overlay: &Path) -> Vec<(u32, PathBuf)> {
    directories(overlay, |name| name.strip_prefix('v')?.parse().ok())
}

/// The directories in `parent` whose names mean something.
fn directories<T>(parent: &Path, meaning: impl Fn(&str) -> Option<T>) -> Vec<(T, PathBuf)> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((meaning(entry.file_name().to_str()?)?, entry.path()))).collect()
}

/// Makes sure that things can be pinned there.
///
/// # Errors
/// [`DataplaneError::NotBpffs`].
pub fn require_bpffs(root: &Path) -> Result<(), DataplaneError> {
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match statfs(existing) {
        Ok(info) if info.filesystem_type() == BPF_FS_MAGIC => Ok(()),
        Ok(_) => Err(DataplaneError::NotBpffs { path: root.to_owned(), mount: existing.to_owned() }),
        Err(errno) => Err(failed("look at", existing)(errno.into())),
    }
}

pub(super) fn failed(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataplaneError {
    let path = path.to_owned();
    move |source| DataplaneError::Pin { call, path, source }
}
