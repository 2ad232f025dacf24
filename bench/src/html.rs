//! The result as one HTML page: tables of figures, facts and flags, and curves as inline SVG. No external resource.
//!
//! Pure, main thread only. Invariants: every text that comes from outside (command lines, names, the machine) is
//! escaped; a page without its facts is never written; a run that is not valid says so above everything else.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use plotters::prelude::*;

use crate::report::Report;
use crate::run::Point;
use crate::search::SearchReport;

const CHART_PIXELS: (u32, u32) = (920, 330);
const FONT_PIXELS: u32 = 13;
const WIDE: u32 = 4;
const NARROW: u32 = 2;
/// Room above the highest point, for the legend.
const HEADROOM: f64 = 1.35;
const US_PER_MS: f64 = 1_000.0;
/// Places of the percentile axis for each power of ten.
const STEPS_PER_DECADE: u32 = 40;
const INK: RGBColor = RGBColor(0x33, 0x41, 0x55);
const GRID: RGBColor = RGBColor(0xe2, 0xe8, 0xf0);
const BLUE: RGBColor = RGBColor(0x25, 0x63, 0xeb);
const ORANGE: RGBColor = RGBColor(0xea, 0x58, 0x0c);
const GREEN: RGBColor = RGBColor(0x15, 0x80, 0x3d);

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;color:#1e293b;max-width:960px;margin:2em auto;\
    padding:0 1em}h1{font-size:1.5em;margin:0 0 .2em}h2{font-size:1.15em;margin:2em 0 .4em}h3{font-size:1em;\
    margin:1.4em 0 .2em}table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;\
    padding:.25em .8em .25em 0;border-bottom:1px solid #e2e8f0}th{font-weight:500;color:#64748b;width:13em}\
    thead th{width:auto}td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}svg{max-width:100%;height:auto}\
    .num td,.num th{text-align:right;padding-right:.5em}.num td:last-child,.num th:last-child{text-align:left}\
    .bad{background:#fee2e2;color:#991b1b;padding:.6em .9em;border-radius:6px}\
    .good{background:#dcfce7;color:#166534;padding:.6em .9em;border-radius:6px}p{margin:.5em 0}";

/// The page of one run. Fails only if a curve cannot be drawn.
pub fn page(report: &Report) -> Result<String, String> {
    let mut body = heading(&report.title());
    state(&mut body, report);
    run_section(&mut body, report)?;
    facts(&mut body, report);
    Ok(document(&report.title(), &body))
}

/// The page of a search: its steps, then each held run.
pub fn search_page(search: &SearchReport) -> Result<String, String> {
    let mut body = heading(&search.summary());
    if !search.valid {
        let _ = write!(body, "<p class=bad>INVALID: {}</p>", escape(&search.why_invalid()));
    }
    body.push_str("<h2>Steps</h2><table class=num><thead><tr>");
    for name in ["rate/s", "accepted/s", "delivered/s", "ack p99, ms", "delivery p99, ms", "CPU, cores", "result"] {
        let _ = write!(body, "<th>{name}</th>");
    }
    body.push_str("</tr></thead>");
    for row in &search.steps {
        let cpu = row.server_cpu.map_or_else(|| "?".to_owned(), |cpu| format!("{cpu:.2}"));
        let held = if row.held { "held: " } else { "" };
        let _ = write!(
            body,
            "<tr><td>{}</td><td>{:.0}</td><td>{:.0}</td><td>{:.3}</td><td>{:.3}</td><td>{cpu}</td><td>{held}{}</td></tr>",
            row.rate,
            row.accepted_per_s,
            row.delivered_per_s,
            row.ack_p99_us as f64 / US_PER_MS,
            row.deliver_p99_us as f64 / US_PER_MS,
            escape(row.judgement.text())
        );
    }
    body.push_str("</table>");
    for report in &search.held {
        let _ = write!(body, "<h2>Held: {:.0} msg/s</h2>", report.rate.unwrap_or_default());
        state(&mut body, report);
        run_section(&mut body, report)?;
    }
    match search.held.first() {
        Some(report) => facts(&mut body, report),
        None => table(&mut body, "Facts", owned(search.machine.rows())),
    }
    Ok(document(&search.summary(), &body))
}

/// Text that HTML shows as it is.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

fn document(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>ringline-bench: {title}</title>\
         <style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
}

fn heading(title: &str) -> String {
    format!("<h1>ringline-bench</h1><p>{}</p>", escape(title))
}

fn state(body: &mut String, report: &Report) {
    for why in &report.invalid_because {
        let _ = write!(body, "<p class=bad>INVALID: {}</p>", escape(why));
    }
    if !report.clean() {
        body.push_str("<p class=bad>A promise was broken or a client was cut off: see the figures.</p>");
    } else if report.valid {
        body.push_str("<p class=good>Valid; nothing lost, doubled or reordered, nobody cut off.</p>");
    }
}

fn run_section(body: &mut String, report: &Report) -> Result<(), String> {
    let detail = &report.detail;
    body.push_str("<h3>Latency by percentile, ms (from the intended send time)</h3>");
    let curves = [
        ("send to ack", BLUE, &detail.ack_us),
        ("send to delivery", ORANGE, &detail.deliver_us),
        ("to slow readers", GREEN, &detail.slow_deliver_us),
    ];
    body.push_str(&percentiles(&curves)?);
    body.push_str("<h3>Messages a second (time 0: warm-up ends)</h3>");
    body.push_str(&throughput(&detail.points)?);
    body.push_str("<h3>CPU, cores</h3>");
    body.push_str(&cpu(&detail.points)?);
    table(body, "Figures", report.rows());
    let counters = report.server_metrics.counter_rows();
    if !counters.is_empty() {
        table(body, "What the server counted in the window", counters);
    }
    Ok(())
}

fn facts(body: &mut String, report: &Report) {
    let mut rows = report.machine.rows();
    rows.push(("durability", report.durability.to_owned()));
    rows.push(("version, commit", format!("{}, {}", report.version, report.commit)));
    rows.push(("loop", report.loop_kind.to_owned()));
    table(body, "Facts", owned(rows));
}

fn owned(rows: Vec<(&'static str, String)>) -> Vec<(String, String)> {
    rows.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn table(body: &mut String, title: &str, rows: Vec<(String, String)>) {
    let _ = write!(body, "<h2>{}</h2><table>", escape(title));
    for (name, value) in rows {
        let _ = write!(body, "<tr><th>{}</th><td>{}</td></tr>", escape(&name), escape(&value));
    }
    body.push_str("</table>");
}

// --- curves -----------------------------------------------------------------------------------------------------------

struct Line {
    name: &'static str,
    color: RGBColor,
    /// In pixels. Of lines that may lie upon each other the later is the narrower, so that both are seen.
    width: u32,
    points: Vec<(f64, f64)>,
}

struct Chart {
    x: (f64, f64),
    y: (f64, f64),
    /// How many labels the axes have, about.
    labels: (usize, usize),
    x_text: fn(&f64) -> String,
    y_text: fn(&f64) -> String,
    legend: SeriesLabelPosition,
    lines: Vec<Line>,
}

/// Latencies over percentiles; both axes are logarithmic: x is log10 of 1 / (1 - quantile), y is log10 of ms.
fn percentiles(curves: &[(&'static str, RGBColor, &Histogram<u64>)]) -> Result<String, String> {
    let mut lines = Vec::new();
    let mut decades: f64 = 1.0;
    for &(name, color, histogram) in curves.iter().filter(|(_, _, histogram)| !histogram.is_empty()) {
        // Beyond one record in all there is nothing to tell.
        let end = (histogram.len() as f64).log10().clamp(1.0, 7.0);
        decades = decades.max(end);
        let steps = (end * f64::from(STEPS_PER_DECADE)) as u32;
        let point = |step: u32| {
            let x = f64::from(step) / f64::from(STEPS_PER_DECADE);
            let us = histogram.value_at_quantile(1.0 - 10f64.powf(-x)).max(1);
            (x, (us as f64 / US_PER_MS).log10())
        };
        let width = if lines.is_empty() { WIDE } else { NARROW };
        lines.push(Line { name, color, width, points: (0..=steps).map(point).collect() });
    }
    let ys = || lines.iter().flat_map(|line| line.points.iter().map(|point| point.1));
    let (low, high) = (ys().fold(f64::INFINITY, f64::min), ys().fold(f64::NEG_INFINITY, f64::max));
    let y = if low.is_finite() { (low.floor(), high.ceil().max(low.floor() + 1.0)) } else { (-2.0, 1.0) };
    let x = (0.0, decades.ceil());
    let labels = (decades.ceil() as usize + 1, (y.1 - y.0) as usize + 1);
    draw(&Chart {
        x,
        y,
        labels,
        x_text: percentile_text,
        y_text: power_text,
        legend: SeriesLabelPosition::LowerRight,
        lines,
    })
}

/// 0 is "0 %", 1 "90 %", 2 "99 %", 3 "99.9 %"; empty between them.
fn percentile_text(x: &f64) -> String {
    if (x - x.round()).abs() > 1e-6 {
        return String::new();
    }
    let decimals = (x.round() as usize).saturating_sub(2);
    format!("{:.decimals$} %", 100.0 * (1.0 - 10f64.powf(-x.round())))
}

/// The number whose decimal logarithm this is; empty for what is no power of ten.
fn power_text(y: &f64) -> String {
    if (y - y.round()).abs() > 1e-6 {
        return String::new();
    }
    let decimals = (-y.round()).max(0.0) as usize;
    format!("{:.decimals$}", 10f64.powf(y.round()))
}

fn count_text(y: &f64) -> String {
    match *y {
        y if y >= 1e6 => format!("{:.2} M", y / 1e6),
        y if y >= 1e4 => format!("{:.0} k", y / 1e3),
        y if y >= 1e3 => format!("{:.1} k", y / 1e3),
        y => format!("{y:.0}"),
    }
}

fn cores_text(y: &f64) -> String {
    format!("{y:.1}")
}

fn seconds_text(x: &f64) -> String {
    format!("{} s", (x * 100.0).round() / 100.0)
}

/// The slope of a rising figure between neighbouring points, at the later of them.
fn slopes(points: &[Point], figure: impl Fn(&Point) -> Option<f64>) -> Vec<(f64, f64)> {
    let slope = |(from, to): (&Point, &Point)| {
        let seconds = to.at_s - from.at_s;
        let grown = figure(to)? - figure(from)?;
        (seconds > 0.0).then(|| (to.at_s, grown.max(0.0) / seconds))
    };
    points.iter().zip(points.iter().skip(1)).filter_map(slope).collect()
}

fn throughput(points: &[Point]) -> Result<String, String> {
    let lines = vec![
        Line { name: "sent", color: GREEN, width: NARROW, points: slopes(points, |point| Some(point.sent as f64)) },
        Line {
            name: "accepted",
            color: BLUE,
            width: WIDE,
            points: slopes(points, |point| Some(point.accepted as f64)),
        },
        Line {
            name: "delivered",
            color: ORANGE,
            width: NARROW,
            points: slopes(points, |point| Some(point.delivered as f64)),
        },
    ];
    over_time(lines, count_text)
}

fn cpu(points: &[Point]) -> Result<String, String> {
    let lines = vec![
        Line { name: "server", color: BLUE, width: WIDE, points: slopes(points, |point| point.server_cpu_s) },
        Line { name: "generator", color: ORANGE, width: NARROW, points: slopes(points, |point| point.generator_cpu_s) },
    ];
    over_time(lines, cores_text)
}

fn over_time(lines: Vec<Line>, y_text: fn(&f64) -> String) -> Result<String, String> {
    let all = || lines.iter().flat_map(|line| &line.points);
    let from = all().map(|point| point.0).fold(0.0, f64::min);
    let to = all().map(|point| point.0).fold(from + 1.0, f64::max);
    let top = all().map(|point| point.1).fold(0.0, f64::max);
    let y = (0.0, if top > 0.0 { top * HEADROOM } else { 1.0 });
    draw(&Chart {
        x: (from, to),
        y,
        labels: (10, 6),
        x_text: seconds_text,
        y_text,
        legend: SeriesLabelPosition::UpperRight,
        lines,
    })
}

fn draw(chart: &Chart) -> Result<String, String> {
    let mut svg = String::new();
    draw_into(chart, &mut svg).map_err(|error| format!("cannot draw a curve: {error}"))?;
    Ok(svg)
}

fn draw_into(chart: &Chart, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let text = |size: u32| ("system-ui, sans-serif", size).into_font().color(&INK);
    let area = SVGBackend::with_string(svg, CHART_PIXELS).into_drawing_area();
    let mut context = ChartBuilder::on(&area)
        .margin(8)
        .margin_right(24)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d(chart.x.0..chart.x.1, chart.y.0..chart.y.1)?;
    context
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .x_labels(chart.labels.0)
        .y_labels(chart.labels.1)
        .x_label_formatter(&chart.x_text)
        .y_label_formatter(&chart.y_text)
        .label_style(text(FONT_PIXELS))
        .draw()?;
    let lines: Vec<&Line> = chart.lines.iter().filter(|line| !line.points.is_empty()).collect();
    for line in &lines {
        let (color, width) = (line.color, line.width);
        context
            .draw_series(LineSeries::new(line.points.iter().copied(), color.stroke_width(line.width)))?
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(width)));
    }
    if !lines.is_empty() {
        context
            .configure_series_labels()
            .position(chart.legend.clone())
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .label_font(text(FONT_PIXELS))
            .draw()?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;
    use crate::plan::Pace;
    use crate::report::tests::{machine, report, sent};
    use crate::tally::{Incident, record};

    const OPEN: Pace = Pace::Open { period_ns: 4_000_000 };

    fn full() -> Report {
        let mut tally = sent(10);
        for us in [100, 200, 400, 9_000] {
            record(&mut tally.ack_us, 0, us * 1_000);
            record(&mut tally.deliver_us, 0, us * 2_000);
        }
        tally.count(Incident::Lagged);
        report(OPEN, tally, Verdict::default())
    }

    #[test]
    fn the_page_holds_every_fact_and_figure() {
        let report = full();
        let page = page(&report).unwrap();
        let told = report.rows().into_iter().chain(report.server_metrics.counter_rows());
        let facts = owned(report.machine.rows()).into_iter().chain(told);
        for (name, value) in facts {
            assert!(page.contains(&escape(&name)) && page.contains(&escape(&value)), "{name} = {value} is missing");
        }
        for part in [report.commit, report.durability, report.loop_kind, "class=good"] {
            assert!(page.contains(&escape(part)), "{part} is missing");
        }
        assert_eq!(page.matches("<svg").count(), 3);
        assert_eq!(page.matches("</svg>").count(), 3);
    }

    #[test]
    fn text_is_escaped_and_nothing_is_loaded() {
        assert_eq!(escape("<a href=\"x\">&'"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
        let mut report = full();
        report.machine.command_line = "<script>alert(1)</script>".to_owned();
        let page = page(&report).unwrap();
        assert!(page.contains("&lt;script&gt;") && !page.contains("<script"));
        assert!(page.contains(&escape(&machine().cpu_model)) && !page.contains(&machine().cpu_model));
        let outside = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!outside.contains("http") && !outside.contains("src=") && !outside.contains("url("));
    }

    #[test]
    fn an_invalid_run_says_so_first() {
        let mut late = sent(10);
        (0..10).for_each(|_| record(&mut late.lag_us, 0, 11_000_000));
        let page = page(&report(OPEN, late, Verdict::default())).unwrap();
        assert!(page.find("INVALID").unwrap() < page.find("<svg").unwrap() && !page.contains("class=good"));
        let broken = report(OPEN, sent(10), Verdict { lost: 1, ..Verdict::default() });
        assert!(super::page(&broken).unwrap().contains("A promise was broken"));
    }

    #[test]
    fn curves_without_points_are_drawn_too() {
        assert!(percentiles(&[]).unwrap().contains("</svg>"));
        assert!(throughput(&[]).unwrap().contains("</svg>") && cpu(&[]).unwrap().contains("</svg>"));
        let point = |at_s, sent, cpu| Point { at_s, sent, server_cpu_s: cpu, ..Point::default() };
        let points = [point(-1.0, 0, Some(1.0)), point(0.0, 100, None), point(2.0, 300, Some(2.0))];
        assert_eq!(slopes(&points, |point| Some(point.sent as f64)), [(0.0, 100.0), (2.0, 100.0)]);
        assert_eq!(slopes(&points, |point| point.server_cpu_s), [], "a gap is no slope");
    }

    #[test]
    fn axes_name_percentiles_and_powers() {
        assert_eq!(
            [0.0, 1.0, 2.0, 3.0, 4.0].map(|x| percentile_text(&x)),
            ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]
        );
        assert_eq!([-2.0, 0.0, 3.0].map(|y| power_text(&y)), ["0.01", "1", "1000"]);
        assert_eq!((percentile_text(&0.5), power_text(&0.5)), (String::new(), String::new()));
        assert_eq!([5.0, 1_500.0, 25_000.0, 2e6].map(|y| count_text(&y)), ["5", "1.5 k", "25 k", "2.00 M"]);
    }
}
