//! Which programs, maps and links an overlay has, and how much memory they take.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{
    maps::MapData,
    programs::{
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};
use serde::Serialize;

use super::{Capacity, DataplaneError, Hook, PinDirectory, pins, xdp};

/// A program or a map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BpfObject {
    /// As it is pinned, or attached.
    pub name: String,
    /// What the kernel has allocated for it; [`None`] where that can't be told. Of programs, only who has CAP_SYS_ADMIN may ask.
    pub bytes: Option<u64>,
    /// Of a map, how many entries it has room for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_entries: Option<u32>,
}

/// What is pinned for an overlay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BpfObjects {
    /// Those that are attached by a pinned link, each once.
    pub programs: Vec<BpfObject>,
    /// Those of this version's layout.
    pub maps: Vec<BpfObject>,
    /// The names of the pins.
    pub links: Vec<String>,
}

/// What is pinned for an overlay; nothing where there is none.
///
/// # Errors
/// [`DataplaneError::Pin`].
pub fn pinned_objects(directory: &PinDirectory) -> Result<BpfObjects, DataplaneError> {
    let mut objects = BpfObjects::default();
    for layout in pins::layout(Capacity { slots: 0, vteps: 0 }) {
        let Ok(map) = MapData::from_pin(directory.map(layout.name)) else { continue };
        objects.maps.push(BpfObject {
            name: layout.name.to_owned(),
            bytes: memory(map.fd().as_fd().as_raw_fd()),
            max_entries: map.info().ok().map(|info| info.max_entries()),
        });
    }
    let mut programs = BTreeMap::new();
    let mut pinned = directory.links(xdp::PIN)?;
    for hook in Hook::ALL {
        pinned.extend(directory.links(hook.program())?);
    }
    for pin in pinned {
        let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let link = PinnedLink::from_pin(&pin).and_then(|link| FdLink::from(link).info());
        if let (Ok(link), Some((program, _))) = (link, name.rsplit_once('-')) {
            programs.insert(link.program_id(), program.to_owned());
        }
        objects.links.push(name);
    }
    objects.links.sort();
    let known: BTreeMap<u32, _> = loaded_programs()
        .map_while(Result::ok)
        .filter(|info| programs.contains_key(&info.id()))
        .map(|info| (info.id(), info.memory_locked().ok()))
        .collect();
    objects.programs = programs
        .into_iter()
        .map(|(id, name)| BpfObject {
            name,
            bytes: known.get(&id).copied().flatten().map(u64::from),
            max_entries: None,
        })
        .collect();
    objects.programs.sort_by(|one, two| one.name.cmp(&two.name));
    Ok(objects)
}

/// What `bpf_map_show_fdinfo` (kernel/bpf/syscall.c) says.
fn memory(descriptor: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}
