//! Reading many entries of an array in one call, or one of a size that only the kernel knows, which aya does not offer.

use std::{
    io,
    iter::Sum,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{
    Pod,
    maps::{MapData, MapType},
    util::nr_cpus,
};
use nix::libc;

/// `BPF_MAP_LOOKUP_BATCH` (include/uapi/linux/bpf.h; kernel 5.6).
const LOOKUP_BATCH: libc::c_long = 24;

/// `BPF_MAP_LOOKUP_ELEM`.
const LOOKUP_ELEM: libc::c_long = 1;

/// The part of `union bpf_attr` that it takes.
#[repr(C)]
struct Attr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The values of an array map from `first` on, as many as `len`, or fewer where the map ends.
///
/// # Errors
/// The kernel's.
pub(super) fn read<V: Pod>(map: &MapData, first: u32, len: u32) -> io::Result<Vec<V>> {
    read_each(map, first, len, 1)
}

/// The same of a per-CPU array: of each entry one after the other the values of all CPUs, added up. Values are multiples of eight
/// bytes.
///
/// # Errors
/// The kernel's.
pub(super) fn read_sums<V: Pod + Sum>(map: &MapData, first: u32, len: u32) -> io::Result<Vec<V>> {
    const { assert!(size_of::<V>().is_multiple_of(8), "the kernel pads the values of each CPU") };
    let cpus = nr_cpus().map_err(|(_, error)| error)?;
    let values = read_each::<V>(map, first, len, cpus)?;
    Ok(values.chunks_exact(cpus).map(|of_cpus| of_cpus.iter().copied().sum()).collect())
}

/// Entries of `each` values.
fn read_each<V: Pod>(map: &MapData, first: u32, len: u32, each: usize) -> io::Result<Vec<V>> {
    let info = map.info().map_err(io::Error::other)?;
    if info.value_size() as usize != size_of::<V>() || info.key_size() != 4 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut values: Vec<V> = Vec::with_capacity(len as usize * each);
    let mut keys: Vec<u32> = Vec::with_capacity(len as usize);
    // The key before the first; an array takes one that is too large for none (`array_map_get_next_key`).
    let before = first.wrapping_sub(1);
    let mut last = 0u32;
    let mut attr = Attr {
        in_batch: (&raw const before) as u64,
        out_batch: (&raw mut last) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: len,
        map_fd: map.fd().as_fd().as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the pointers are to an u32 each, and to room for `len` keys and `each` values for each of them, of the sizes that
    // the map has; the kernel writes no more than `count` of each, and says in `count` how many.
    let result = unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut attr, size_of::<Attr>()) };
    let error = io::Error::last_os_error();
    // The end of the map.
    if result < 0 && error.raw_os_error() != Some(libc::ENOENT) {
        return Err(error);
    }
    // SAFETY: the kernel has written that many, and any bytes are a value.
    unsafe { values.set_len(attr.count.min(len) as usize * each) };
    Ok(values)
}

/// The part of `union bpf_attr` that a lookup of one entry takes.
#[repr(C)]
struct EntryAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// A value of an array map, in bytes as many as it has. Not of one with values for each CPU.
///
/// # Errors
/// The kernel's.
pub(super) fn read_value(map: &MapData, key: u32) -> io::Result<Vec<u8>> {
    let info = map.info().map_err(io::Error::other)?;
    if info.key_size() != 4 || !matches!(info.map_type(), Ok(MapType::Array)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut value = vec![0; info.value_size() as usize];
    let mut attr = EntryAttr {
        map_fd: map.fd().as_fd().as_raw_fd() as u32,
        padding: 0,
        key: (&raw const key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the pointers are to an u32 and to as many bytes as the map's values have, which is all that the kernel writes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_ELEM, &raw mut attr, size_of::<EntryAttr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}
