//! Values in the two text formats that Prometheus and what reads like it ask for. No crate encodes both: `prometheus-client` has
//! OpenMetrics only, `prometheus` the older one.
//!
//! * [Prometheus text 0.0.4](https://prometheus.io/docs/instrumenting/exposition_formats/)
//! * [OpenMetrics 1.0.0](https://prometheus.io/docs/specs/om/open_metrics_spec/): a counter's family is called without `_total`, there
//!   is a type for what is only labels, and the text has an end.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use super::catalogue::{Kind, Metric};
use crate::histogram::Histogram;

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus text 0.0.4.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// That which a client prefers which sends such an `Accept` (RFC 9110, section 12.5.1): OpenMetrics only where it names that, and
    /// no less gladly than the other.
    pub fn of_accept(accept: &str) -> Self {
        let (mut open_metrics, mut text) = (0.0_f64, 0.0_f64);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media_type = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut quality, mut version) = (1.0_f64, None);
            for (name, value) in parts.filter_map(|parameter| parameter.split_once('=')) {
                match name.trim().to_ascii_lowercase().as_str() {
                    "q" => quality = value.trim().parse().unwrap_or(0.0),
                    "version" => version = Some(value.trim().trim_matches('"').to_owned()),
                    _ => {}
                }
            }
            match (media_type.as_str(), version.as_deref()) {
                ("application/openmetrics-text", None | Some("1.0.0")) => open_metrics = quality.max(open_metrics),
                ("text/plain", None | Some("0.0.4")) => text = quality.max(text),
                _ => {}
            }
        }
        if open_metrics > 0.0 && open_metrics >= text { Self::OpenMetrics } else { Self::Text }
    }

    /// For HTTP.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The value of one sample.
#[derive(Clone, Debug)]
pub enum Value {
    /// What is counted.
    Count(u64),
    /// Anything else.
    Number(f64),
    /// How often something took how long.
    Histogram(Histogram),
}

macro_rules! into_value {
    ($($from:ty, $name:ident => $value:expr;)+) => {
        $(impl From<$from> for Value {
            fn from($name: $from) -> Self {
                $value
            }
        })+
    };
}

into_value! {
    u64, count => Self::Count(count);
    usize, count => Self::Count(count as u64);
    bool, is_so => Self::Count(is_so.into());
    f64, number => Self::Number(number);
    &Histogram, histogram => Self::Histogram(histogram.clone());
}

/// All that is told at one moment.
#[derive(Clone, Debug, Default)]
pub struct Exposition {
    families: BTreeMap<Metric, Vec<(Vec<String>, Value)>>,
}

impl Exposition {
    /// Adds a sample, with the values of the metric's labels in their order. The same labels must not come twice.
    pub fn add(&mut self, metric: Metric, labels: &[&str], value: impl Into<Value>) {
        debug_assert_eq!(labels.len(), metric.labels().len(), "{metric:?}");
        let labels = labels.iter().map(|&label| label.to_owned()).collect();
        self.families.entry(metric).or_default().push((labels, value.into()));
    }

    /// All of it. What was added in the same order has the same text.
    pub fn encode(&self, format: Format) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _written = self.write(format, &mut text);
        text
    }

    fn write(&self, format: Format, text: &mut String) -> fmt::Result {
        for (metric, samples) in &self.families {
            let (name, kind) = (metric.name(), metric.kind());
            let (family, kind) = match (format, kind) {
                (Format::OpenMetrics, Kind::Counter) => (name.trim_end_matches("_total"), "counter"),
                (Format::OpenMetrics, Kind::Info) => (name.trim_end_matches("_info"), "info"),
                (Format::Text, Kind::Counter) => (name, "counter"),
                (_, Kind::Gauge | Kind::Info) => (name, "gauge"),
                (_, Kind::Histogram) => (name, "histogram"),
            };
            writeln!(text, "# HELP {family} {}", metric.help())?;
            writeln!(text, "# TYPE {family} {kind}")?;
            for (values, value) in samples {
                let labels = || metric.labels().iter().copied().zip(values.iter().map(String::as_str));
                match value {
                    Value::Count(count) => sample(text, name, labels(), count)?,
                    Value::Number(number) => sample(text, name, labels(), number)?,
                    Value::Histogram(histogram) => {
                        let bucket = format!("{name}_bucket");
                        for (bound, count) in histogram.cumulated() {
                            // With a decimal point, which OpenMetrics asks for, and with a sign for the infinite one.
                            let bound = bound.map_or_else(|| "+Inf".to_owned(), |bound| format!("{bound:?}"));
                            sample(text, &bucket, labels().chain([("le", bound.as_str())]), count)?;
                        }
                        sample(text, &format!("{name}_sum"), labels(), histogram.sum())?;
                        sample(text, &format!("{name}_count"), labels(), histogram.count())?;
                    }
                }
            }
        }
        if format == Format::OpenMetrics {
            text.push_str("# EOF\n");
        }
        Ok(())
    }
}

fn sample<'a>(
    text: &mut String,
    name: &str,
    labels: impl Iterator<Item = (&'a str, &'a str)>,
    value: impl fmt::Display,
) -> fmt::Result {
    text.push_str(name);
    let mut separator = '{';
    for (label, value) in labels {
        write!(text, "{separator}{label}=\"")?;
        for character in value.chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
        separator = ',';
    }
    if separator == ',' {
        text.push('}');
    }
    writeln!(text, " {value}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn example() -> Exposition {
        let mut exposition = Exposition::default();
        let mut histogram = Histogram::default();
        histogram.observe(Duration::from_millis(2));
        // Not in the order of the catalogue.
        exposition.add(Metric::Convergence, &["1"], &histogram);
        exposition.add(Metric::LeaseRenewals, &["1"], 7_u64);
        exposition.add(Metric::BuildInfo, &["0.1.0", "a \"b\" \\ \n c"], true);
        exposition.add(Metric::ProcessCpu, &[], 0.25);
        exposition
    }

    #[test]
    fn the_older_format_names_each_family_as_its_samples() {
        let text = example().encode(Format::Text);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], "# TYPE flannel_build_info gauge");
        assert_eq!(lines[2], r#"flannel_build_info{version="0.1.0",layout="a \"b\" \\ \n c"} 1"#);
        assert_eq!(lines[3], "# HELP flannel_lease_renewals_total Renewals of this host's lease");
        assert_eq!(lines[4], "# TYPE flannel_lease_renewals_total counter");
        assert_eq!(lines[5], r#"flannel_lease_renewals_total{vni="1"} 7"#);
        assert_eq!(lines[7], "# TYPE flannel_convergence_seconds histogram");
        assert_eq!(lines[8], r#"flannel_convergence_seconds_bucket{vni="1",le="0.001"} 0"#);
        assert_eq!(lines[9], r#"flannel_convergence_seconds_bucket{vni="1",le="0.0025"} 1"#);
        assert!(lines.contains(&r#"flannel_convergence_seconds_bucket{vni="1",le="1.0"} 1"#), "{text}");
        assert!(lines.contains(&r#"flannel_convergence_seconds_bucket{vni="1",le="+Inf"} 1"#), "{text}");
        assert!(lines.contains(&r#"flannel_convergence_seconds_sum{vni="1"} 0.002"#), "{text}");
        assert!(lines.contains(&r#"flannel_convergence_seconds_count{vni="1"} 1"#), "{text}");
        assert_eq!(lines.last(), Some(&"process_cpu_seconds_total 0.25"));
    }

    #[test]
    fn open_metrics_names_families_without_what_their_type_says() {
        let text = example().encode(Format::OpenMetrics);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], "# TYPE flannel_build info");
        assert_eq!(lines[4], "# TYPE flannel_lease_renewals counter");
        assert_eq!(lines[5], r#"flannel_lease_renewals_total{vni="1"} 7"#);
        assert_eq!(lines.last(), Some(&"# EOF"));
        assert_eq!(text.lines().filter(|line| line.starts_with("# EOF")).count(), 1);
    }

    #[test]
    fn a_client_gets_open_metrics_where_it_asks_for_that() {
        // Prometheus 2.42 and 3.0, VictoriaMetrics, curl.
        let prometheus_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                            text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let prometheus_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;\
                            escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.3";
        for (accept, format) in [
            (prometheus_2, Format::OpenMetrics),
            (prometheus_3, Format::OpenMetrics),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("application/openmetrics-text; version=\"1.0.0\"", Format::OpenMetrics),
            ("text/plain;version=0.0.4;q=1,*/*;q=0.1", Format::Text),
            ("text/plain;version=0.0.4, application/openmetrics-text;version=1.0.0;q=0.9", Format::Text),
            ("application/openmetrics-text;q=0", Format::Text),
            ("application/openmetrics-text;version=2.0.0", Format::Text),
            ("*/*", Format::Text),
            ("", Format::Text),
        ] {
            assert_eq!(Format::of_accept(accept), format, "{accept}");
        }
    }
}
