//! What ours is to reach at least, as ratios of medians within one run.
//!
//! Of round trips, where idle cores are kept from halting. Where they halt, some 50 of 60 µs on a virtual machine go by before a
//! core of its runs again, on every path: no overlay at all has more than 0.85x of kernel vxlan's. There ours is to be ahead.

use std::fmt;

use super::{
    measure::Metric,
    services,
    topology::{Mode, Rival, Subject},
};

/// One of them.
#[derive(Debug)]
pub(super) struct Floor {
    pub(super) mode: Mode,
    pub(super) metric: Metric,
    pub(super) against: Subject,
    /// The least ratio; the greatest, where less is better.
    limit: f64,
}

/// Those of `cargo xtask bench`.
pub(super) const TRAFFIC: [Floor; 19] = {
    use Metric::{CpuPerGb, RoundTripHalting, RoundTripMedian, TcpOne, Udp};
    use Mode::{Segmented, Whole};
    const VXLAN: Subject = Subject::by_address(Rival::Vxlan);
    const HOST_GW: Subject = Subject::by_address(Rival::HostGw);
    [
        floor(Whole, TcpOne, VXLAN, 1.35),
        floor(Whole, CpuPerGb, VXLAN, 0.70),
        floor(Whole, Udp, VXLAN, 1.80),
        floor(Whole, RoundTripMedian, VXLAN, 0.88),
        floor(Whole, TcpOne, HOST_GW, 1.0),
        floor(Whole, CpuPerGb, HOST_GW, 1.0),
        floor(Whole, Udp, HOST_GW, 1.0),
        floor(Whole, RoundTripMedian, HOST_GW, 1.0),
        floor(Whole, RoundTripHalting, VXLAN, 1.0),
        floor(Whole, RoundTripHalting, HOST_GW, 1.0),
        floor(Segmented, TcpOne, VXLAN, 1.20),
        floor(Segmented, CpuPerGb, VXLAN, 0.88),
        floor(Segmented, Udp, VXLAN, 1.75),
        floor(Segmented, RoundTripMedian, VXLAN, 0.95),
        floor(Segmented, TcpOne, HOST_GW, 0.90),
        floor(Segmented, Udp, HOST_GW, 1.0),
        floor(Segmented, RoundTripMedian, HOST_GW, 1.0),
        floor(Segmented, RoundTripHalting, VXLAN, 1.0),
        floor(Segmented, RoundTripHalting, HOST_GW, 1.0),
    ]
};

/// Those of `cargo xtask bench --backend` without a tunnel.
pub(super) const ON_LINK: [Floor; 12] = {
    use Metric::{Connections, RoundTripMedian, TcpOne, Udp};
    use Mode::{Segmented, Whole};
    const HOST_GW: Subject = Subject::by_address(Rival::HostGw);
    const DIRECT: Subject = Subject::by_address(Rival::Direct);
    [
        floor(Whole, TcpOne, HOST_GW, 1.10),
        floor(Whole, Udp, HOST_GW, 1.50),
        floor(Whole, RoundTripMedian, HOST_GW, 0.80),
        floor(Whole, Connections, HOST_GW, 1.0),
        floor(Whole, TcpOne, DIRECT, 0.85),
        floor(Whole, RoundTripMedian, DIRECT, 1.15),
        floor(Segmented, TcpOne, HOST_GW, 1.0),
        floor(Segmented, Udp, HOST_GW, 1.50),
        floor(Segmented, RoundTripMedian, HOST_GW, 0.80),
        floor(Segmented, Connections, HOST_GW, 1.0),
        floor(Segmented, TcpOne, DIRECT, 0.85),
        floor(Segmented, RoundTripMedian, DIRECT, 1.15),
    ]
};

/// Those of `cargo xtask bench services`.
pub(super) const SERVICES: [Floor; 16] = {
    use Metric::{RoundTripHalting, RoundTripMedian, TcpOne, Udp};
    use Mode::{Segmented, Whole};
    use services::{HOST_GW, POD_TO_POD, VXLAN};
    [
        floor(Whole, TcpOne, POD_TO_POD, 0.95),
        floor(Whole, Udp, POD_TO_POD, 0.95),
        floor(Whole, RoundTripMedian, POD_TO_POD, 1.05),
        floor(Whole, TcpOne, VXLAN, 1.40),
        floor(Whole, Udp, VXLAN, 1.80),
        floor(Whole, RoundTripMedian, VXLAN, 0.85),
        floor(Whole, RoundTripHalting, VXLAN, 1.0),
        floor(Whole, RoundTripHalting, HOST_GW, 1.0),
        floor(Segmented, TcpOne, POD_TO_POD, 0.95),
        floor(Segmented, Udp, POD_TO_POD, 0.95),
        floor(Segmented, RoundTripMedian, POD_TO_POD, 1.05),
        floor(Segmented, TcpOne, VXLAN, 1.25),
        floor(Segmented, Udp, VXLAN, 1.80),
        floor(Segmented, RoundTripMedian, VXLAN, 0.85),
        floor(Segmented, RoundTripHalting, VXLAN, 1.0),
        floor(Segmented, RoundTripHalting, HOST_GW, 1.0),
    ]
};

const fn floor(mode: Mode, metric: Metric, against: Subject, limit: f64) -> Floor {
    Floor { mode, metric, against, limit }
}

impl Floor {
    pub(super) fn is_met(&self, ratio: f64) -> bool {
        if self.metric.less_is_better() { ratio <= self.limit } else { ratio >= self.limit }
    }
}

impl fmt::Display for Floor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, metric, against, limit } = self;
        let bound = if metric.less_is_better() { "at most" } else { "at least" };
        write!(f, "{bound} {limit:.2}x of {}: {}, {}", against.name, metric.name(), mode.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_or_less_is_better() {
        let rate = floor(Mode::Whole, Metric::TcpOne, Subject::by_address(Rival::Vxlan), 1.35);
        assert!(rate.is_met(1.35) && !rate.is_met(1.34) && !rate.is_met(f64::NAN));
        let cost = floor(Mode::Whole, Metric::CpuPerGb, Subject::by_address(Rival::Vxlan), 0.7);
        assert!(cost.is_met(0.7) && !cost.is_met(0.71) && !cost.is_met(f64::NAN));
        assert_eq!(rate.to_string(), "at least 1.35x of kernel vxlan: TCP, 1 flow, Gb/s, GSO passes");
    }
}
