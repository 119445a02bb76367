//! Where the program that puts a note on a packet, for runs of others (BPF_PROG_TEST_RUN), has what in `cb` of `struct __sk_buff`.

/// The number of the program that is to run.
pub const PROGRAM: usize = 0;
/// Whether it has run.
pub const IS_OVER: usize = 1;
/// The note (`tc_index`) before, and after it has run.
pub const NOTE: usize = 2;
/// Whom the packet is for (`pkt_type`), after it has run.
pub const PACKET_TYPE: usize = 3;
/// Whether the packet gets the hash of its flow first, as one has that comes out of the stack.
pub const HAS_HASH: usize = 4;

/// How many programs there can be.
pub const PROGRAMS: u32 = 6;
