//! The log, on stderr: as text, as the journal takes it, or as JSON.
//!
//! Who retries says so each time. Warnings and errors are not said again and again: after three times the same line is counted, and told
//! with that number every ten minutes.

use std::{
    collections::HashMap,
    env, fmt,
    fs::File,
    hash::BuildHasher as _,
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde_json::{Map, Value, json};
use tokio::time::Instant;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    filter::LevelFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Writer},
        time::{FormatTime as _, SystemTime},
    },
    registry::LookupSpan,
};

use crate::escape;

/// The same line is printed so often within [`PERIOD`] before it is counted only.
const FREELY: u32 = 3;
/// How often a line that is repeated all the time is printed.
const PERIOD: Duration = Duration::from_secs(600);
/// Of so many lines it is known when they were printed; beyond, all are forgotten.
const MOST_KNOWN: usize = 4096;

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people; with the priorities of sd-daemon(3) where stderr goes to the journal
    #[default]
    Text,
    /// An object a line: timestamp, level, message, and the fields of the event
    Json,
}

/// Begins to log what is as important as `level`; of other crates, warnings.
pub fn start(format: LogFormat, level: LevelFilter, is_terminal: bool) {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .parse_lossy(format!("flannel_agent={level},flannel_ebpf={level},flannel={level}"));
    let form = match format {
        LogFormat::Json => Form::Json,
        LogFormat::Text if is_journal() => Form::Journal,
        LogFormat::Text => Form::Text(Format::default().with_target(false).with_ansi(is_terminal)),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .fmt_fields(escape::log_fields())
        .event_format(Lines { form, repeated: Mutex::default() })
        .with_writer(io::stderr)
        .init();
}

/// Whether stderr is what the service manager connected to the journal (systemd.exec(5), `JOURNAL_STREAM`).
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = io::stderr().as_fd().try_clone_to_owned().map(File::from) else { return false };
    stderr.metadata().is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

enum Form {
    Text(Format<Full>),
    /// Without time and level, which the journal has.
    Journal,
    Json,
}

/// Writes events as lines.
struct Lines {
    form: Form,
    repeated: Mutex<Repeated>,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = event.metadata().level();
        let mut text = String::new();
        // Who debugs wants each, as of packets.
        let is_counted = *level <= Level::WARN;
        if is_counted || matches!(self.form, Form::Journal) {
            context.format_fields(Writer::new(&mut text), event)?;
        }
        let left_out = match is_counted {
            true => self.repeated.lock().unwrap_or_else(PoisonError::into_inner).printed(&text, Instant::now()),
            false => Some(0),
        };
        let Some(left_out) = left_out else { return Ok(()) };
        let note = match left_out {
            0 => String::new(),
            1 => " (and once more since it was logged last)".to_owned(),
            times => format!(" (and {times} more times since it was logged last)"),
        };
        match &self.form {
            Form::Text(format) => {
                let mut line = String::new();
                format.format_event(context, Writer::new(&mut line), event)?;
                writeln!(writer, "{}{note}", line.trim_end_matches('\n'))
            }
            Form::Journal => writeln!(writer, "<{}>{text}{note}", priority(*level)),
            Form::Json => writeln!(writer, "{}", object(event, left_out)),
        }
    }
}

/// Of syslog (RFC 5424, section 6.2.1).
const fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

fn object(event: &Event<'_>, left_out: u32) -> Value {
    let mut time = String::new();
    let _never_fails = SystemTime.format_time(&mut Writer::new(&mut time));
    let mut fields = Fields(Map::new());
    fields.0.insert("timestamp".to_owned(), time.into());
    fields.0.insert("level".to_owned(), event.metadata().level().as_str().into());
    event.record(&mut fields);
    if left_out > 0 {
        fields.0.insert("repeated".to_owned(), json!(left_out));
    }
    Value::Object(fields.0)
}

struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        // What `log` records bring along has been taken in by then.
        if !field.name().starts_with("log.") {
            self.0.insert(field.name().to_owned(), value);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
}

/// Which lines were printed, by their digests.
#[derive(Default)]
struct Repeated {
    digests: std::hash::RandomState,
    lines: HashMap<u64, Printed>,
}

struct Printed {
    /// When it was printed last after it had been silent, or had been counted.
    since: Instant,
    /// How often since then.
    times: u32,
    /// How often it was not since it was last.
    left_out: u32,
}

impl Repeated {
    /// [`None`] where a line is not to be printed, else how often it was not since it was last.
    fn printed(&mut self, line: &str, now: Instant) -> Option<u32> {
        if self.lines.len() >= MOST_KNOWN {
            self.lines.clear();
        }
        let digest = self.digests.hash_one(line);
        let line = self.lines.entry(digest).or_insert(Printed { since: now, times: 0, left_out: 0 });
        if now - line.since >= PERIOD {
            // One that goes on all the time is printed once a period.
            let goes_on = line.left_out > 0;
            let left_out = std::mem::take(&mut line.left_out);
            *line = Printed { since: now, times: if goes_on { FREELY } else { 1 }, left_out: 0 };
            return Some(left_out);
        }
        if line.times < FREELY {
            line.times += 1;
            return Some(0);
        }
        line.left_out += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_on_is_printed_every_ten_minutes_with_its_number() {
        let mut repeated = Repeated::default();
        let begin = Instant::now();
        // A try every 10 s for an hour, beside another line now and then.
        let mut printed = Vec::new();
        for second in (0..3600).step_by(10) {
            let now = begin + Duration::from_secs(second);
            printed.extend(repeated.printed("away", now).map(|left_out| (second, left_out)));
            if second % 900 == 0 {
                assert_eq!(repeated.printed("beside", now), Some(0), "{second}");
            }
        }
        assert_eq!(printed, [(0, 0), (10, 0), (20, 0), (600, 57), (1200, 59), (1800, 59), (2400, 59), (3000, 59)]);
        // It is over, and begins again.
        let later = begin + Duration::from_secs(3 * 3600);
        assert_eq!(repeated.printed("away", later), Some(59));
    }

    #[test]
    fn so_many_lines_that_differ_are_all_printed() {
        let mut repeated = Repeated::default();
        let now = Instant::now();
        assert!((0..2 * MOST_KNOWN).all(|number| repeated.printed(&number.to_string(), now) == Some(0)));
        assert!(repeated.lines.len() <= MOST_KNOWN);
    }
}
