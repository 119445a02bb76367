//! The Internet checksum (RFC 1071) of many bytes.
//!
//! Sums are of words as they lie in memory: a ones' complement sum is the same in either byte order, swapped.

/// How many 32-bit words are added side by side, so that the compiler uses vector instructions.
const LANES: usize = 4;

/// The sum of these bytes, still to be folded. An odd last one counts as the first of a word.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    // Each lane has room for 2^32 words.
    let mut lanes = [0u64; LANES];
    let (blocks, rest) = bytes.as_chunks::<{ 4 * LANES }>();
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let (words, rest) = rest.as_chunks::<2>();
    let words: u64 = words.iter().map(|word| u64::from(u16::from_ne_bytes(*word))).sum();
    let last = rest.first().map_or(0, |byte| u64::from(u16::from_ne_bytes([*byte, 0])));
    lanes.iter().sum::<u64>() + words + last
}

/// The sum of the pseudo-header of a TCP segment or UDP datagram (RFC 9293, section 3.1; RFC 768).
pub(super) fn pseudo_header(addresses: &[u8; 8], protocol: u8, len: u16) -> u64 {
    sum(addresses) + u64::from(u16::from_ne_bytes([0, protocol])) + u64::from(u16::from_ne_bytes(len.to_be_bytes()))
}

/// A sum in 16 bits, to be stored as it is.
pub(super) fn fold(sum: u64) -> [u8; 2] {
    let mut sum = (sum >> 32) + (sum & 0xffff_ffff);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (sum as u16).to_ne_bytes()
}

/// The checksum field for a sum, to be stored as it is.
pub(super) fn complete(sum: u64) -> [u8; 2] {
    fold(sum).map(|octet| !octet)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rfc_1071_section_3_example() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)), [0xdd, 0xf2]);
        assert_eq!(complete(sum(&bytes)), [0x22, 0x0d]);
    }

    fn plain(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    proptest! {
        #[test]
        fn any_bytes_have_the_sum_that_one_word_after_the_other_gives(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
        ) {
            prop_assert_eq!(u16::from_be_bytes(fold(sum(&bytes))), plain(&bytes));
        }
    }

    #[test]
    fn nothing_overflows_in_the_largest_packet() {
        assert_eq!(fold(sum(&[0xff; 65_536])), [0xff, 0xff]);
    }
}
