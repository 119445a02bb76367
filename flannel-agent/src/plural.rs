//! Numbers with what they are of, in messages.

use std::fmt::Display;

/// `1 peer`, `2 peers`; of nouns that take an s.
pub(crate) fn counted<N: Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    let ending = if count == N::from(1) { "" } else { "s" };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular_and_none_is_plural() {
        assert_eq!(
            [0, 1, 2].map(|count| counted(count, "event")),
            ["0 events", "1 event", "2 events"].map(str::to_owned)
        );
    }
}
