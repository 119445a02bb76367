//! Text from elsewhere, for logs and terminals: one line each, and nothing in it that a terminal obeys.

use std::borrow::Cow;

use tracing_subscriber::{
    field::MakeExt as _,
    fmt::{
        FormatFields,
        format::{self, Writer},
    },
};

/// Puts control characters, and those that turn the direction of writing or end a line, as Rust writes them: `\n`,
/// `\u{1b}`.
pub fn control_characters(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match is_obeyed(character) {
            true => escaped.extend(character.escape_default()),
            false => escaped.push(character),
        }
    }
    Cow::Owned(escaped)
}

/// The fields of log lines, escaped, whoever wrote them.
pub fn log_fields() -> impl for<'a> FormatFields<'a> + 'static {
    format::debug_fn(|writer: &mut Writer<'_>, field, value| {
        let value = format!("{value:?}");
        let value = control_characters(&value);
        match field.name() {
            "message" => write!(writer, "{value}"),
            // What `log` records bring along has been taken in by then.
            name if name.starts_with("log.") => Ok(()),
            name => write!(writer, "{name}={value}"),
        }
    })
    .delimited(" ")
}

/// Besides control characters: line and paragraph separators, and bidirectional overrides and isolates.
fn is_obeyed(character: char) -> bool {
    character.is_control() || matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_written_out() {
        assert_eq!(control_characters("10.5.1.0-24 ä \"x\""), "10.5.1.0-24 ä \"x\"");
        assert_eq!(control_characters("a\nb\r\t\0"), r"a\nb\r\t\u{0}");
        assert_eq!(control_characters("\u{1b}[2J\u{9b}1m\u{7f}\u{202e}"), r"\u{1b}[2J\u{9b}1m\u{7f}\u{202e}");
    }
}
