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
    fn carries_are_folded_to_the_end() {
        assert_eq!(sum([0xffff; 10]), 0xffff);
        assert_eq!(sum([0xffff, 0x0001]), 0x0001);
    }
}
