//! What a process has used.

use std::{fs, path::Path};

/// A field of `/proc/<pid>/status`, in MiB.
pub(super) fn memory(pid: u32, field: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}

/// CPU seconds that a process has used, to the nanosecond: the ticks of `/proc/<pid>/stat` are ten milliseconds.
pub(super) fn cpu(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    threads.map(|thread| schedstat(&thread.path().join("schedstat"))).sum()
}

pub(super) fn thread_cpu() -> f64 {
    schedstat(Path::new("/proc/thread-self/schedstat"))
}

fn schedstat(path: &Path) -> f64 {
    // A thread may just have ended.
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}
