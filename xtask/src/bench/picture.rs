//! A picture of the medians: one panel for each metric, in it both modes, in each of them a bar for each rival.

use svg::{
    Document,
    node::element::{Group, Line, Rectangle, Text},
};

use super::{
    measure::Metric,
    report::{Conditions, Report, Results, number},
    topology::{Rival, Subject},
};

const COLUMNS: usize = 4;
/// A panel's width and height, with what is around its bars.
const PANEL: (f64, f64) = (290.0, 245.0);
const MARGIN: f64 = 20.0;
/// Above the panels, for the title and the legend.
const HEAD: f64 = 70.0;
/// Within a panel, for its title and the numbers on the bars.
const PANEL_HEAD: f64 = 46.0;
/// Within a panel, for the names of the modes and the distance to the next.
const PANEL_FOOT: f64 = 40.0;
const BAR: f64 = 31.0;
const INK: &str = "#222222";
const FAINT: &str = "#666666";

/// The picture of a report.
pub(super) fn draw(report: &Report) -> Document {
    let metrics: Vec<_> = Metric::ALL.into_iter().filter(|metric| metric.is_result()).collect();
    let rows = metrics.len().div_ceil(COLUMNS);
    let width = 2.0 * MARGIN + COLUMNS as f64 * PANEL.0;
    let height = HEAD + rows as f64 * PANEL.1 + MARGIN;
    // White behind everything: on a dark page too, it is dark ink on it.
    let background = Rectangle::new().set("width", width).set("height", height).set("fill", "#ffffff");
    let document = Document::new()
        .set("viewBox", (0, 0, width, height))
        .set("width", width)
        .set("height", height)
        .set("font-family", "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif")
        .add(background)
        .add(head(report));
    metrics.iter().enumerate().fold(document, |document, (index, metric)| {
        let (column, row) = (index % COLUMNS, index / COLUMNS);
        let (x, y) = (MARGIN + column as f64 * PANEL.0, HEAD + row as f64 * PANEL.1);
        document.add(panel(*metric, &report.results).set("transform", format!("translate({x} {y})")))
    })
}

fn color(rival: Rival) -> &'static str {
    // Okabe and Ito's, told apart by most eyes.
    match rival {
        Rival::Ours => "#0072b2",
        Rival::Vxlan => "#e69f00",
        Rival::HostGw => "#009e73",
        Rival::Direct => "#999999",
    }
}

fn text(words: impl Into<String>, (x, y): (f64, f64), size: f64, fill: &str) -> Text {
    Text::new(words).set("x", x).set("y", y).set("font-size", size).set("fill", fill)
}

fn head(report: &Report) -> Group {
    let Conditions { rounds, seconds, kernel, cpus, .. } = &report.conditions;
    let warning = report.warning().map_or_else(String::new, |warning| format!("; {warning}"));
    let made = format!(
        "cargo xtask bench --rounds {rounds} --seconds {seconds} on Linux {kernel}, {cpus} CPUs, veth of MTU 1500; medians{warning}"
    );
    let group = Group::new().add(text(made, (MARGIN, 26.0), 13.0, FAINT));
    Rival::ALL.into_iter().enumerate().fold(group, |group, (index, rival)| {
        let x = MARGIN + index as f64 * 130.0;
        let square = Rectangle::new().set("x", x).set("y", 40).set("width", 12).set("height", 12);
        group.add(square.set("fill", color(rival))).add(text(rival.name(), (x + 18.0, 51.0), 14.0, INK))
    })
}

/// One metric, drawn from the upper left corner.
fn panel(metric: Metric, results: &[Results]) -> Group {
    let bars: Vec<_> = results
        .iter()
        .enumerate()
        .flat_map(|(mode, results)| {
            let bar = move |(place, rival)| {
                Some((mode, place, rival, results.summary(Subject::by_address(rival), metric)?.median))
            };
            Rival::ALL.into_iter().enumerate().filter_map(bar)
        })
        .collect();
    let greatest = bars.iter().map(|(.., value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let sense = if metric.less_is_better() { "less is better" } else { "more is better" };
    let floor = PANEL.1 - PANEL_FOOT;
    let left = |mode: usize| mode as f64 * (Rival::ALL.len() as f64 * BAR + 12.0);
    let group = Group::new().add(text(metric.name(), (0.0, 14.0), 13.0, INK).set("font-weight", "bold")).add(text(
        sense,
        (0.0, 29.0),
        11.0,
        FAINT,
    ));
    let group = results.iter().enumerate().fold(group, |group, (mode, results)| {
        let end = left(mode) + Rival::ALL.len() as f64 * BAR;
        let line = Line::new().set("x1", left(mode)).set("x2", end).set("y1", floor).set("y2", floor);
        let middle = f64::midpoint(left(mode), end);
        group
            .add(line.set("stroke", FAINT))
            .add(text(results.mode.name(), (middle, floor + 15.0), 11.0, FAINT).set("text-anchor", "middle"))
    });
    bars.into_iter().fold(group, |group, (mode, place, rival, value)| {
        let height = value / greatest * (floor - PANEL_HEAD);
        let (x, y) = (left(mode) + place as f64 * BAR, floor - height);
        let bar = Rectangle::new().set("x", x + 2.0).set("y", y).set("width", BAR - 4.0).set("height", height);
        let label = text(number(value), (x + BAR / 2.0, y - 4.0), 10.0, INK).set("text-anchor", "middle");
        group.add(bar.set("fill", color(rival))).add(label)
    })
}
