//! Whether something sets the clock. Nothing of the overlay goes by it but certificates.

use nix::libc;

use super::Check;
use crate::{cli::Cli, registry::StoreOptions};

pub(super) fn check(cli: &Cli) -> Check {
    let is_judged_by = match cli.store() {
        StoreOptions::Etcd(etcd) => etcd.endpoints.iter().any(|endpoint| endpoint.starts_with("https://")),
        StoreOptions::Kubernetes(_) => true,
    };
    judge(is_synchronised(), is_judged_by)
}

/// Whether the kernel was told of a time within the last hours by a program that keeps it (`ntp_adjtime(2)`); [`None`] where it
/// does not say.
fn is_synchronised() -> Option<bool> {
    // SAFETY: all fields are integers, of which any value is one; with `modes` 0 nothing is set.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of this frame, which the call fills.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    (state >= 0).then_some(state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0)
}

fn judge(is_synchronised: Option<bool>, is_judged_by: bool) -> Check {
    match (is_synchronised, is_judged_by) {
        (Some(true), _) => Check::ok("clock", "synchronised"),
        (None, _) => Check::ok("clock", "the kernel does not say whether it is synchronised"),
        (Some(false), false) => {
            Check::ok("clock", "not synchronised; nothing goes by it, since the store is not asked over TLS")
        }
        (Some(false), true) => Check::warning(
            "clock",
            "not synchronised, and certificates are judged by it",
            "run a time service, such as systemd-timesyncd or chrony",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn a_clock_that_nobody_sets_matters_to_certificates_only() {
        assert_eq!(judge(Some(true), true).verdict, Verdict::Ok);
        assert_eq!(judge(Some(false), false).verdict, Verdict::Ok);
        assert_eq!(judge(Some(false), true).verdict, Verdict::Warning);
        assert_eq!(judge(None, true).verdict, Verdict::Ok);
        // Whatever it says, it can be asked.
        assert!(is_synchronised().is_some());
    }
}
