//! Samples of dropped packets, as the map [`DROPS`](crate::maps::DROPS) holds them.
//!
//! Each reason has its own few places on each CPU, and the newest sample takes the place of the oldest. So a flood of one
//! reason hides no other, and who comes after the fact finds the latest of each, with no agent needed to take them out. (A
//! BPF ring buffer would refuse new records once it is full, and be full when nobody reads: it would show how the trouble
//! of last week began.)
//!
//! A sample costs more than a count. Each reason may have [`PLACES`] at once on a CPU, and then one each [`INTERVAL`]:
//! single drops are all seen, and of a flood there are samples of its last second.

/// Samples of one reason on one CPU. A power of two.
pub const PLACES: usize = 8;
/// The time that earns one sample, in nanoseconds.
pub const INTERVAL: u64 = 125_000_000;
/// As many bytes of a packet are kept at most.
pub const FRAME_LEN: usize = 128;

/// The samples of one reason on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drops {
    /// Until when samples were taken in advance, in nanoseconds of CLOCK_MONOTONIC.
    pub spent_until: u64,
    /// How many were taken ever.
    pub taken: u64,
    /// The last ones.
    pub samples: [Sample; PLACES],
}

/// One dropped packet, as it was when it was dropped.
///
/// A program may write it while the agent reads. The kernel copies a value from its beginning to its end; `tail` is written
/// first and `head` last, so that a copy in which they differ is of two samples.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The number of the sample among those of its reason and CPU, from 1 on; 0 for none.
    pub head: u32,
    /// The interface that the packet was at.
    pub ifindex: u32,
    /// When, in nanoseconds of CLOCK_MONOTONIC, as exact as the kernel's tick.
    pub time: u64,
    /// Bytes of the packet, from the link-layer header on.
    pub len: u32,
    /// Bytes of the link-layer header: 14 for Ethernet, 0 where there is none.
    pub link_header_len: u16,
    /// Bytes of it in `frame`; what is behind them is an older sample's.
    pub kept: u16,
    /// Its first bytes.
    pub frame: [u8; FRAME_LEN],
    /// As `head`.
    pub tail: u32,
    /// Zero.
    pub reserved: u32,
}

impl Drops {
    /// No sample yet.
    pub const NONE: Self = Self { spent_until: 0, taken: 0, samples: [Sample::NONE; PLACES] };

    /// The place for a sample at a time, and its number; [`None`] where there were too many lately.
    #[inline(always)]
    pub fn next(&mut self, now: u64) -> Option<(usize, u32)> {
        const IN_ADVANCE: u64 = (PLACES as u64 - 1) * INTERVAL;
        // The generic cell rate algorithm (ITU-T I.371).
        let spent_until = self.spent_until.max(now);
        if spent_until - now > IN_ADVANCE {
            return None;
        }
        self.spent_until = spent_until + INTERVAL;
        let place = self.taken as usize & (PLACES - 1);
        self.taken += 1;
        Some((place, self.taken as u32))
    }
}

impl Sample {
    /// None yet.
    pub const NONE: Self = Self {
        head: 0,
        ifindex: 0,
        time: 0,
        len: 0,
        link_header_len: 0,
        kept: 0,
        frame: [0; FRAME_LEN],
        tail: 0,
        reserved: 0,
    };

    /// The bytes that were kept; [`None`] where there is no whole sample.
    pub fn frame(&self) -> Option<&[u8]> {
        let is_whole = self.head != 0 && self.head == self.tail;
        self.frame.get(..usize::from(self.kept)).filter(|_| is_whole)
    }
}

const _: () =
    assert!(size_of::<Sample>() == 160 && size_of::<Drops>() == 16 + PLACES * 160 && PLACES.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn single_drops_are_all_seen_in_turns() {
        let mut drops = Drops::NONE;
        for number in 1..=20u32 {
            let place = (number as usize - 1) % PLACES;
            assert_eq!(drops.next(u64::from(number) * INTERVAL), Some((place, number)));
        }
    }

    #[test]
    fn of_a_flood_a_few_each_second() {
        let mut drops = Drops::NONE;
        let start = 77 * SECOND;
        let taken = |drops: &mut Drops, from: u64| {
            (from..from + SECOND).step_by(10_000).filter(|now| drops.next(*now).is_some()).count()
        };
        assert_eq!(taken(&mut drops, start), 2 * PLACES - 1);
        assert_eq!(taken(&mut drops, start + SECOND), PLACES);
        assert_eq!(taken(&mut drops, start + 10 * SECOND), 2 * PLACES - 1, "after a rest");
    }

    #[test]
    fn a_clock_that_stands_still_is_none_that_fails() {
        let mut drops = Drops::NONE;
        assert_eq!((0..100).filter(|_| drops.next(SECOND).is_some()).count(), PLACES);
    }

    #[test]
    fn what_is_half_written_is_no_sample() {
        let whole = Sample { head: 9, tail: 9, kept: 60, ..Sample::NONE };
        assert_eq!(whole.frame().map(<[u8]>::len), Some(60));
        assert_eq!(Sample { tail: 17, ..whole }.frame(), None);
        assert_eq!(Sample::NONE.frame(), None);
        assert_eq!(Sample { kept: 129, ..whole }.frame(), None);
    }
}
