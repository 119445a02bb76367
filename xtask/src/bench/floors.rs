//! What ours is to reach at least, as ratios of medians within one run.

use std::fmt;

use super::{
    measure::Metric,
    topology::{Mode, Rival},
};

/// One of them.
#[derive(Debug)]
pub(super) struct Floor {
    pub(super) mode: Mode,
    pub(super) metric: Metric,
    pub(super) against: Rival,
    /// The least ratio; the greatest, where less is better.
    limit: f64,
}

/// All of them.
pub(super) const FLOORS: [Floor; 15] = {
    use Metric::{CpuPerGb, RoundTripMedian, TcpOne, Udp};
    use Mode::{Segmented, Whole};
    use Rival::{HostGw, Vxlan};
    [
        floor(Whole, TcpOne, Vxlan, 1.35),
        floor(Whole, CpuPerGb, Vxlan, 0.70),
        floor(Whole, Udp, Vxlan, 1.80),
        floor(Whole, RoundTripMedian, Vxlan, 0.88),
        floor(Whole, TcpOne, HostGw, 1.0),
        floor(Whole, CpuPerGb, HostGw, 1.0),
        floor(Whole, Udp, HostGw, 1.0),
        floor(Whole, RoundTripMedian, HostGw, 1.0),
        floor(Segmented, TcpOne, Vxlan, 1.20),
        floor(Segmented, CpuPerGb, Vxlan, 0.88),
        floor(Segmented, Udp, Vxlan, 1.75),
        floor(Segmented, RoundTripMedian, Vxlan, 0.95),
        floor(Segmented, TcpOne, HostGw, 0.90),
        floor(Segmented, Udp, HostGw, 1.0),
        floor(Segmented, RoundTripMedian, HostGw, 1.0),
    ]
};

const fn floor(mode: Mode, metric: Metric, against: Rival, limit: f64) -> Floor {
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
        write!(f, "{bound} {limit:.2}x of {}: {}, {}", against.name(), metric.name(), mode.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_or_less_is_better() {
        let rate = floor(Mode::Whole, Metric::TcpOne, Rival::Vxlan, 1.35);
        assert!(rate.is_met(1.35) && !rate.is_met(1.34) && !rate.is_met(f64::NAN));
        let cost = floor(Mode::Whole, Metric::CpuPerGb, Rival::Vxlan, 0.7);
        assert!(cost.is_met(0.7) && !cost.is_met(0.71) && !cost.is_met(f64::NAN));
        assert_eq!(rate.to_string(), "at least 1.35x of kernel vxlan: TCP, 1 flow, Gb/s, GSO passes");
    }
}
