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
    fn carries_are_folded_to_the_end() {
        assert_eq!(sum([0xffff; 10]), 0xffff);
        assert_eq!(sum([0xffff, 0x0001]), 0x0001);
    }
}
