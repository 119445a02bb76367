//! `cargo xtask bench services`: from a pod through a service address to a pod on the other host, with kube-proxy's rules on
//! all hosts, beside the same on the kernel's own paths and beside ours by the server's own address, in turns.

use anyhow::Result;

use super::{
    Bench, Turns, floors,
    report::Comparison,
    topology::{Rival, Rules, Subject, Target},
};
use crate::lab::{Backend, services::ServiceRules};

const COMPARISON: Comparison = Comparison {
    ours: by_service(Rival::Ours, "ours by service"),
    others: [POD_TO_POD, VXLAN, HOST_GW],
    floors: &floors::SERVICES,
};
/// On the same two hosts as ours by service.
pub(super) const POD_TO_POD: Subject = Subject { name: "ours pod to pod", ..Subject::by_address(Rival::Ours) };
pub(super) const VXLAN: Subject = by_service(Rival::Vxlan, "kernel vxlan by service");
pub(super) const HOST_GW: Subject = by_service(Rival::HostGw, "host-gw by service");

const fn by_service(rival: Rival, name: &'static str) -> Subject {
    Subject { rival, target: Target::Service, name }
}

/// Options of `cargo xtask bench services`.
#[derive(clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    turns: Turns,
    /// The form of kube-proxy's rules
    #[arg(long, value_enum, default_value_t = ServiceRules::Iptables)]
    proxy: ServiceRules,
}

/// Measures and prints medians and ratios.
///
/// # Errors
/// Where the lab does not come up, a measurement fails, or a host does not translate.
pub(super) fn run(options: &Options) -> Result<()> {
    let bench = Bench {
        backend: Backend::default(),
        comparison: &COMPARISON,
        subjects: COMPARISON.subjects().collect(),
        rules: Rules::Cluster,
        proxy: Some(options.proxy),
        turns: &options.turns,
    };
    bench.run().map(drop)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            measure::Metric,
            report::{Results, Sample},
            topology::Mode,
        },
        *,
    };

    #[test]
    fn ours_by_service_is_compared_with_ours_pod_to_pod_and_with_others_by_service() {
        let values = COMPARISON.subjects().zip([9.0, 10.0, 6.0, 8.0]);
        let samples = values.map(|(subject, value)| Sample { round: 0, subject, metric: Metric::TcpOne, value });
        let text = Results { comparison: &COMPARISON, mode: Mode::Whole, samples: samples.collect() }.to_string();
        for line in [
            "ours by service / ours pod to pod | ours by service / kernel vxlan by service | ours by service / host-gw by service",
            "missed 0.900x, at least 0.95x of ours pod to pod: TCP, 1 flow",
            "met    1.500x, at least 1.40x of kernel vxlan by service: TCP, 1 flow",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
