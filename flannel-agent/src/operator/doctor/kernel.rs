//! Kernel, capabilities, bpf file system, and locked memory where it is still counted.

use std::{collections::HashSet, fs};

use caps::{CapSet, Capability};
use nix::sys::resource::{Resource, getrlimit};

use super::{Check, facts::Host};
use crate::{
    backend::has_datapath,
    cli::Cli,
    dataplane::{DataplaneError, Features, require_bpffs},
    preflight::{self, PreflightError},
    privileges::{NEEDED, USEFUL},
};

/// From here on maps count as the memory of a cgroup, before as locked memory of the user (kernel commit 97306be45fbe).
const WITHOUT_MEMLOCK: (u32, u32) = (5, 11);
/// What the maps of an overlay take, rounded up, in bytes.
const NEEDED_MEMORY: u64 = 512 << 20;

pub(super) fn checks(cli: &Cli, host: &Host<'_>) -> Vec<Check> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    if !host.overlays.iter().any(|overlay| has_datapath(overlay.backend)) {
        return vec![Check::ok("kernel", format!("Linux {release}; this backend needs no programs"))];
    }
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    let mut checks = vec![kernel(release, &preflight::check()), capabilities(&held)];
    checks.push(bpf_file_system(cli, &require_bpffs(&cli.bpf_pin_dir)));
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map(|(soft, _)| soft).unwrap_or(u64::MAX);
    checks.extend(locked_memory(release, limit));
    checks
}

fn kernel(release: &str, features: &Result<Features, PreflightError>) -> Check {
    match features {
        Ok(features) => Check::ok("kernel", format!("Linux {release} {features}")),
        Err(PreflightError::Capability(_) | PreflightError::Capabilities(_)) => Check::warning(
            "kernel",
            format!("Linux {release}: without these capabilities it can't be tried what it has"),
            "run doctor as root",
        ),
        Err(PreflightError::Kernel { lacking, features }) => Check::problem(
            "kernel",
            format!("Linux {release} lacks {lacking} ({features})"),
            "use Linux 6.1 or later, or the backend udp",
        ),
        Err(error) => Check::problem("kernel", format!("Linux {release}: {error}"), "allow bpf() to this process"),
    }
}

fn capabilities(held: &HashSet<Capability>) -> Check {
    let lacking = |wanted: &[Capability]| {
        let lacking = wanted.iter().filter(|capability| !held.contains(capability)).map(ToString::to_string);
        lacking.collect::<Vec<_>>().join(" and ")
    };
    let (needed, useful) = (lacking(&NEEDED), lacking(&USEFUL));
    if !needed.is_empty() {
        let advice = "run as root, or give the agent's user CAP_BPF and CAP_NET_ADMIN (systemd: AmbientCapabilities=)";
        return Check::problem("capabilities", format!("this process lacks {needed}"), advice);
    }
    if !useful.is_empty() {
        let found = format!("this process lacks {useful}");
        let advice =
            "without CAP_PERFMON each packet costs more, and without CAP_NET_RAW iptables-legacy can't be used";
        return Check::warning("capabilities", found, advice);
    }
    Check::ok("capabilities", "this process has CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_NET_RAW")
}

fn bpf_file_system(cli: &Cli, found: &Result<(), DataplaneError>) -> Check {
    const NAME: &str = "bpf file system";
    match found {
        Ok(()) => Check::ok(NAME, format!("{} is on one", cli.bpf_pin_dir.display())),
        Err(DataplaneError::NotBpffs { path, mount }) => Check::problem(
            NAME,
            format!("{} is not on one", path.display()),
            format!("mount one with `mount -t bpf bpf {}`, or name one with --bpf-pin-dir", mount.display()),
        ),
        Err(error) => Check::warning(NAME, error.to_string(), "run doctor as the agent's user"),
    }
}

/// [`None`] where nothing is counted.
fn locked_memory(release: &str, limit: u64) -> Option<Check> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next()?, numbers.next()?);
    if version >= WITHOUT_MEMLOCK {
        return None;
    }
    let advice = "set LimitMEMLOCK=infinity in the agent's unit";
    Some(match limit >= NEEDED_MEMORY {
        true => Check::ok("locked memory", "enough for the maps"),
        false => Check::problem("locked memory", format!("{limit} bytes, and the maps count as such"), advice),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn missing_capabilities_are_named() {
        let all: HashSet<_> = NEEDED.into_iter().chain(USEFUL).collect();
        assert_eq!(capabilities(&all).verdict, Verdict::Ok);
        let only = capabilities(&NEEDED.into_iter().collect());
        assert_eq!(only.verdict, Verdict::Warning);
        assert_eq!(only.found, "this process lacks CAP_PERFMON and CAP_NET_RAW");
        let none = capabilities(&HashSet::new());
        assert_eq!(none.verdict, Verdict::Problem);
        assert_eq!(none.found, "this process lacks CAP_BPF and CAP_NET_ADMIN");
    }

    #[test]
    fn a_kernel_that_lacks_something_is_a_problem_and_one_that_was_not_tried_is_none() {
        let features = Features { encap_ethernet: true, redirect_neighbour: true, ..Features::default() };
        let lacks = kernel("5.10.0", &Err(PreflightError::Kernel { lacking: "redirect_peer", features }));
        assert_eq!(lacks.verdict, Verdict::Problem);
        assert!(lacks.found.starts_with("Linux 5.10.0 lacks redirect_peer (has encap_ethernet, "), "{lacks:?}");
        let untried = kernel("6.1.0", &Err(PreflightError::Capability(Capability::CAP_BPF)));
        assert_eq!(untried.verdict, Verdict::Warning);
        assert_eq!(kernel("6.1.0", &Ok(features)).verdict, Verdict::Ok);
    }

    #[test]
    fn locked_memory_counts_on_old_kernels_only() {
        let verdict = |release, limit| locked_memory(release, limit).map(|check| check.verdict);
        assert_eq!(verdict("6.1.0-13-amd64", 65_536), None);
        assert_eq!(verdict("5.10.0-26-amd64", 65_536), Some(Verdict::Problem));
        assert_eq!(verdict("5.10.0-26-amd64", u64::MAX), Some(Verdict::Ok));
    }
}
