//! The Internet checksum (RFC 1071).

/// The folded ones' complement sum of `words`, each in host order; not complemented, so that sums can be added up.
#[inline(always)]
pub fn sum<const N: usize>(words: [u16; N]) -> u16 {
    let mut total = 0u32;
    for word in words {
        total += u32::from(word);
    }
    fold(total)
}

/// The checksum field for a header whose words add up to `sum`, in host order.
#[inline(always)]
pub fn complete(sum: u16) -> u16 {
    !sum
}

/// The IPv4 header checksum (wire order) after the TTL went down by one, which takes 0x0100 off the sum (RFC 1624, as
/// `ip_decrease_ttl`, include/net/ip.h).
#[inline(always)]
pub fn decrement_ttl(check: [u8; 2]) -> [u8; 2] {
    let check = u32::from(u16::from_be_bytes(check)) + 0x0100;
    ((check + u32::from(check >= 0xffff)) as u16).to_be_bytes()
}

/// What a sum changes by when these words become those: 32 bits that are still to be folded, as the kernel's helpers take them
/// (`csum_sub`, include/net/checksum.h). Words are as they are in memory: the sum is the same in either byte order.
#[inline(always)]
pub fn difference<const N: usize>(from: [u32; N], to: [u32; N]) -> u32 {
    let mut total = 0u64;
    for (from, to) in from.into_iter().zip(to) {
        total += u64::from(!from) + u64::from(to);
    }
    let total = (total & 0xffff_ffff) + (total >> 32);
    ((total & 0xffff_ffff) + (total >> 32)) as u32
}

/// A checksum field after the words below it changed by [`difference`] (RFC 1624, equation 3).
#[inline(always)]
pub fn adjust(check: [u8; 2], difference: u32) -> [u8; 2] {
    let check = u32::from(!u16::from_ne_bytes(check));
    (!fold(check + (difference & 0xffff) + (difference >> 16))).to_ne_bytes()
}

#[inline(always)]
fn fold(total: u32) -> u16 {
    // Twice: the first addition can carry once more.
    let total = (total & 0xffff) + (total >> 16);
    ((total & 0xffff) + (total >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1071_section_3_example() {
        assert_eq!(sum([0x0001, 0xf203, 0xf4f5, 0xf6f7]), 0xddf2);
        assert_eq!(complete(0xddf2), 0x220d);
    }

    #[test]
    fn one_hop_less_fits_the_whole_sum() {
        for ttl in 1..=255u16 {
            for rest in [0u16, 1, 0x00ff, 0x1234, 0xf0f0, 0xfeff, 0xff00, 0xfffe] {
                let check = |ttl: u16| complete(sum([0x4500, rest, ttl << 8 | 6])).to_be_bytes();
                assert_eq!(decrement_ttl(check(ttl)), check(ttl - 1), "{ttl} {rest:#x}");
            }
        }
    }

    #[test]
    fn other_addresses_fit_the_whole_sum() {
        let words = |address: [u8; 4]| {
            [u16::from_be_bytes([address[0], address[1]]), u16::from_be_bytes([address[2], address[3]])]
        };
        let check = |address| {
            let [high, low] = words(address);
            complete(sum([0x4500, 0x1234, 0x4006, high, low])).to_be_bytes()
        };
        let addresses = [[10, 96, 0, 10], [10, 5, 2, 2], [255; 4], [0, 0, 0, 1], [0x12, 0x34, 0xed, 0xcb]];
        for from in addresses {
            for to in addresses {
                let difference = difference([u32::from_ne_bytes(from)], [u32::from_ne_bytes(to)]);
                assert_eq!(adjust(check(from), difference), check(to), "{from:?} {to:?}");
            }
        }
    }

    #[test]
    fn carries_are_folded_to_the_end() {
        assert_eq!(sum([0xffff; 10]), 0xffff);
        assert_eq!(sum([0xffff, 0x0001]), 0x0001);
    }
}
