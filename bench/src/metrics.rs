//! What the server counts about itself, read from its metrics page (OpenMetrics or Prometheus text) over HTTP.
//!
//! Main thread only: once before and once after the measured window. Pure but for [`Source::read`]. Invariants: nothing
//! here ends a run, a page that cannot be had or read is a sentence in the report; every figure is the difference of the
//! two pages, so that warm-up and earlier runs do not count.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use ureq::Agent;

/// For connect, answer and body together.
const TIMEOUT: Duration = Duration::from_secs(2);
/// A page larger than this is no metrics page of ours.
const PAGE_BYTES_MAX: u64 = 4 << 20;
/// Every series of the server begins with this.
const PREFIX: &str = "ringline_";
/// The histogram of commits: write and sync of one batch, in seconds.
const COMMIT: &str = "ringline_store_commit_seconds";
/// The counter of the records in them, without `_total`.
const RECORDS: &str = "ringline_store_records";
const US_PER_S: f64 = 1e6;

/// Where the page is.
#[derive(Clone, Debug)]
pub struct Source {
    url: String,
}

impl Source {
    /// From a URL as people write it: without a path it means `/metrics`, without a scheme `http`.
    pub fn new(url: &str) -> Self {
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let has_path = url.split_once("://").is_some_and(|(_, rest)| rest.contains('/'));
        Self { url: if has_path { url } else { url + "/metrics" } }
    }

    pub fn at(address: SocketAddr) -> Self {
        Self::new(&address.to_string())
    }

    /// The page as it is now.
    ///
    /// Errors: one line for people.
    pub fn read(&self) -> Result<Page, String> {
        let agent = Agent::new_with_config(Agent::config_builder().timeout_global(Some(TIMEOUT)).build());
        let failed = |error: ureq::Error| format!("no metrics from {}: {error}", self.url);
        let mut answer = agent.get(&self.url).call().map_err(failed)?;
        let text = answer.body_mut().with_config().limit(PAGE_BYTES_MAX).read_to_string().map_err(failed)?;
        Ok(Page::parse(&text))
    }
}

/// The samples of a page, by name, with those that differ in other labels than `le` summed: a series a core is one here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    values: BTreeMap<String, f64>,
    /// By name and upper bound; the bound as the page writes it, because that is its identity.
    buckets: BTreeMap<String, BTreeMap<String, f64>>,
    /// Names that the page declares as counters, without `_total`.
    counters: Vec<String>,
}

impl Page {
    /// Lines that are not understood are passed over: a page is no promise.
    pub fn parse(text: &str) -> Self {
        let mut page = Self::default();
        for line in text.lines().map(str::trim) {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                if let Some((name, "counter")) = kind.rsplit_once(' ') {
                    page.counters.push(base(name.trim()).to_owned());
                }
            } else if !line.starts_with('#') {
                page.sample(line);
            }
        }
        page
    }

    /// `name{label="value",…} number [time] [# exemplar]`
    fn sample(&mut self, line: &str) -> Option<()> {
        let (name, labels, rest) = match line.split_once('{') {
            Some((name, rest)) => {
                let (labels, rest) = split_labels(rest)?;
                (name.trim(), labels, rest)
            }
            None => {
                let (name, rest) = line.split_once(char::is_whitespace)?;
                (name, Vec::new(), rest)
            }
        };
        let value: f64 = rest.split_whitespace().next()?.parse().ok()?;
        if !value.is_finite() {
            return None;
        }
        match (name.strip_suffix("_bucket"), labels.into_iter().find(|(key, _)| key == "le")) {
            (Some(name), Some((_, bound))) => {
                *self.buckets.entry(name.to_owned()).or_default().entry(bound).or_default() += value;
            }
            _ => *self.values.entry(name.to_owned()).or_default() += value,
        }
        Some(())
    }

    /// What has been counted since `before`.
    pub fn since(&self, before: &Self) -> Counted {
        Counted { commits: self.commits_since(before), counters: self.counters_since(before) }
    }

    fn grown(&self, before: &Self, name: &str) -> Option<f64> {
        let now = self.values.get(name)?;
        // A counter that fell belongs to a server that was started again.
        Some((now - before.values.get(name).unwrap_or(&0.0)).max(0.0))
    }

    fn commits_since(&self, before: &Self) -> Option<Commits> {
        let none = BTreeMap::new();
        let old = before.buckets.get(COMMIT).unwrap_or(&none);
        let of = |(bound, count): (&String, &f64)| {
            Some((bound.parse::<f64>().ok()?, (count - old.get(bound).unwrap_or(&0.0)).max(0.0)))
        };
        let mut buckets: Vec<(f64, f64)> = self.buckets.get(COMMIT)?.iter().filter_map(of).collect();
        buckets.sort_unstable_by(|one, other| one.0.total_cmp(&other.0));
        let count = self.grown(before, &format!("{COMMIT}_count")).or(buckets.last().map(|bucket| bucket.1))?;
        let sum_s = self.grown(before, &format!("{COMMIT}_sum"));
        let records = self.grown(before, &format!("{RECORDS}_total")).or_else(|| self.grown(before, RECORDS));
        Some(Commits {
            commits: count as u64,
            mean_us: sum_s.filter(|_| count > 0.0).map(|sum_s| sum_s * US_PER_S / count),
            p50: bound_at(&buckets, 0.5),
            p99: bound_at(&buckets, 0.99),
            max: bound_at(&buckets, 1.0),
            records: records.map(|records| records as u64),
        })
    }

    fn counters_since(&self, before: &Self) -> BTreeMap<String, u64> {
        let is_counter = |name: &str| name.ends_with("_total") || self.counters.iter().any(|counter| counter == name);
        let names = self.values.keys().filter(|name| name.starts_with(PREFIX) && is_counter(name));
        let grown = names.filter_map(|name| Some((base(name).to_owned(), self.grown(before, name)? as u64)));
        grown.filter(|(_, count)| *count > 0).collect()
    }
}

fn base(name: &str) -> &str {
    name.strip_suffix("_total").unwrap_or(name)
}

/// The labels up to the closing brace, and what follows it. Values may hold escaped quotes.
fn split_labels(text: &str) -> Option<(Vec<(String, String)>, &str)> {
    let (mut labels, mut rest) = (Vec::new(), text.trim_start());
    loop {
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (key, after) = rest.split_once("=\"")?;
        let mut escaped = false;
        let end = after.find(|character| {
            let ends = character == '"' && !escaped;
            escaped = character == '\\' && !escaped;
            ends
        })?;
        let (value, after) = after.split_at_checked(end)?;
        labels.push((key.trim().to_owned(), value.to_owned()));
        rest = after.strip_prefix('"')?.trim_start().trim_start_matches(',').trim_start();
    }
}

/// The first bucket that holds this share of all; `None` without a count. Buckets are cumulative, by rising bound.
fn bound_at(buckets: &[(f64, f64)], share: f64) -> Option<Bound> {
    let all = buckets.last().map(|bucket| bucket.1).filter(|count| *count > 0.0)?;
    let at = buckets.iter().position(|(_, count)| *count >= share * all)?;
    let (bound_s, _) = *buckets.get(at)?;
    if bound_s.is_finite() {
        return Some(Bound::AtMostUs((bound_s * US_PER_S).round() as u64));
    }
    let (last_s, _) = *buckets.get(at.checked_sub(1)?)?;
    Some(Bound::OverUs((last_s * US_PER_S).round() as u64))
}

/// What a histogram by buckets can say of a quantile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtMostUs(u64),
    /// In the last bucket, which has no upper bound.
    OverUs(u64),
}

impl std::fmt::Display for Bound {
    /// In milliseconds.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMostUs(us) => write!(f, "<= {}", crate::report::ms(*us)),
            Self::OverUs(us) => write!(f, "> {}", crate::report::ms(*us)),
        }
    }
}

/// The commits of the store: a batch of records that was written and synced once.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Commits {
    pub commits: u64,
    pub mean_us: Option<f64>,
    /// The buckets that hold these quantiles, and the slowest commit.
    pub p50: Option<Bound>,
    pub p99: Option<Bound>,
    pub max: Option<Bound>,
    /// Records in them; `null`: not told.
    pub records: Option<u64>,
}

impl Commits {
    pub fn records_per_commit(&self) -> Option<f64> {
        self.records.filter(|_| self.commits > 0).map(|records| records as f64 / self.commits as f64)
    }

    /// For people; latencies in ms.
    pub fn text(&self, seconds: f64) -> String {
        if self.commits == 0 {
            return "none".to_owned();
        }
        let bound = |bound: Option<Bound>| bound.map_or_else(|| "?".to_owned(), |bound| bound.to_string());
        let mean = self.mean_us.map_or_else(|| "?".to_owned(), |us| crate::report::ms(us as u64));
        let records = match self.records_per_commit() {
            Some(records) => format!("{records:.1} records each"),
            None => "records not told".to_owned(),
        };
        format!(
            "{:.0}/s, {records}; ms: mean {mean}  p50 {}  p99 {}  max {}",
            self.commits as f64 / seconds.max(f64::MIN_POSITIVE),
            bound(self.p50),
            bound(self.p99),
            bound(self.max)
        )
    }
}

/// What the server counted between two pages. A key of the JSON object is null if the server does not tell it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Counted {
    pub commits: Option<Commits>,
    /// Counters that have grown, by name without `_total`, summed over their labels.
    pub counters: BTreeMap<String, u64>,
}

/// The outcome of asking: nobody was asked, it could not be had, or it is here.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    #[default]
    NotAsked,
    Missing(String),
    Counted(Counted),
}

impl Told {
    /// From the pages at both ends of the window.
    pub fn between(before: Option<Result<Page, String>>, after: Option<Result<Page, String>>) -> Self {
        match (before, after) {
            (Some(Ok(before)), Some(Ok(after))) => Self::Counted(after.since(&before)),
            (Some(Err(why)), _) | (_, Some(Err(why))) => Self::Missing(why),
            (None, _) | (_, None) => Self::NotAsked,
        }
    }

    /// Name and value for tables: how the store did, or why that is not known. Empty if nobody was asked.
    pub fn rows(&self, seconds: f64) -> Vec<(String, String)> {
        let row = |name: &str, value: String| vec![(name.to_owned(), value)];
        match self {
            Self::NotAsked => Vec::new(),
            Self::Missing(why) => row("server metrics", why.clone()),
            Self::Counted(counted) => {
                let commits = counted.commits.map_or_else(|| format!("{COMMIT} is not told"), |it| it.text(seconds));
                row("store commits", commits)
            }
        }
    }

    /// Every counter that has grown.
    pub fn counter_rows(&self) -> Vec<(String, String)> {
        match self {
            Self::NotAsked | Self::Missing(_) => Vec::new(),
            Self::Counted(counted) => {
                let row = |(name, count): (&String, &u64)| {
                    (name.strip_prefix(PREFIX).unwrap_or(name).to_owned(), count.to_string())
                };
                counted.counters.iter().map(row).collect()
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const BEFORE: &str = "# HELP ringline_store_commit_seconds Write and sync of one batch.\n\
        # TYPE ringline_store_commit_seconds histogram\n\
        ringline_store_commit_seconds_bucket{core=\"0\",le=\"0.001\"} 10\n\
        ringline_store_commit_seconds_bucket{core=\"0\",le=\"0.01\"} 10\n\
        ringline_store_commit_seconds_bucket{core=\"0\",le=\"+Inf\"} 10\n\
        ringline_store_commit_seconds_sum{core=\"0\"} 0.005\n\
        ringline_store_commit_seconds_count{core=\"0\"} 10\n\
        # TYPE ringline_store_records counter\n\
        ringline_store_records_total 100\n";

    const AFTER: &str = "# TYPE ringline_store_commit_seconds histogram\n\
        ringline_store_commit_seconds_bucket{core=\"0\",le=\"0.001\"} 70\n\
        ringline_store_commit_seconds_bucket{le=\"0.01\",core=\"0\"} 108 # {trace=\"x\"} 0.2\n\
        ringline_store_commit_seconds_bucket{core=\"0\",le=\"+Inf\"} 109\n\
        ringline_store_commit_seconds_bucket{core=\"1\",le=\"+Inf\"} 1\n\
        ringline_store_commit_seconds_sum{core=\"0\"} 0.205\n\
        ringline_store_commit_seconds_count{core=\"0\"} 109\n\
        ringline_store_commit_seconds_count{core=\"1\"} 1\n\
        ringline_store_records_total 2100\n\
        # TYPE ringline_refused counter\n\
        ringline_refused_total{code=\"BUSY\",what=\"a \\\" } b\"} 3 1700000000\n\
        ringline_refused_total{code=\"LAGGED\"} 4\n\
        ringline_connections 77\n\
        go_goroutines_total 5\n\
        nonsense\n\
        ringline_odd{broken 3\n\
        ringline_nan_total NaN\n\
        # EOF\n";

    pub(crate) fn told() -> Told {
        Told::between(Some(Ok(Page::parse(BEFORE))), Some(Ok(Page::parse(AFTER))))
    }

    #[test]
    fn the_window_is_the_difference_of_two_pages() {
        let Told::Counted(counted) = told() else { panic!("both pages are there") };
        let commits = counted.commits.unwrap();
        assert_eq!((commits.commits, commits.records, commits.records_per_commit()), (100, Some(2_000), Some(20.0)));
        assert_eq!((commits.p50, commits.p99), (Some(Bound::AtMostUs(1_000)), Some(Bound::OverUs(10_000))));
        assert_eq!(commits.max, Some(Bound::OverUs(10_000)));
        assert!(commits.mean_us.is_some_and(|mean_us| (1_999.0..2_001.0).contains(&mean_us)), "{commits:?}");
        let expected = [("ringline_refused", 7), ("ringline_store_records", 2_000)];
        assert_eq!(counted.counters, expected.map(|(name, count)| (name.to_owned(), count)).into());
        let text = commits.text(2.0);
        assert!(text.starts_with("50/s, 20.0 records each") && text.contains("p50 <= 1.000"), "{text}");
    }

    #[test]
    fn nothing_told_is_said_and_not_fatal() {
        let none = Told::between(Some(Ok(Page::parse(""))), Some(Ok(Page::parse("x 1\n"))));
        assert!(none.rows(1.0)[0].1.contains("not told") && none.counter_rows().is_empty());
        assert_eq!(Told::between(None, None).rows(1.0), []);
        let missing = Told::between(Some(Err("no metrics from here".to_owned())), Some(Ok(Page::default())));
        assert_eq!(missing.rows(1.0), [("server metrics".to_owned(), "no metrics from here".to_owned())]);
        let same = Page::parse(AFTER).since(&Page::parse(AFTER));
        assert_eq!((same.commits.map(|commits| commits.text(1.0)), same.counters.len()), (Some("none".to_owned()), 0));
    }

    #[test]
    fn a_url_may_be_short() {
        for (short, whole) in [
            ("127.0.0.1:9701", "http://127.0.0.1:9701/metrics"),
            ("http://h:1", "http://h:1/metrics"),
            ("http://h:1/own", "http://h:1/own"),
        ] {
            assert_eq!(Source::new(short).url, whole);
        }
    }

    #[test]
    fn a_page_is_read_over_http_and_nobody_there_is_a_sentence() {
        use std::io::{Read as _, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut asked, mut buffer) = (Vec::new(), [0; 1_024]);
            while !asked.ends_with(b"\r\n\r\n") {
                let bytes = stream.read(&mut buffer).unwrap();
                asked.extend_from_slice(&buffer[..bytes]);
            }
            let (head, type_) = ("HTTP/1.1 200 OK", "application/openmetrics-text; version=1.0.0");
            let half = BEFORE.len() / 2;
            let (one, two) = BEFORE.split_at(half);
            let chunks = format!("{:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n", one.len(), two.len());
            write!(stream, "{head}\r\nContent-Type: {type_}\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}").unwrap();
            String::from_utf8(asked).unwrap()
        });
        assert_eq!(Source::at(address).read(), Ok(Page::parse(BEFORE)));
        assert!(server.join().unwrap().starts_with("GET /metrics HTTP/1.1\r\n"));
        let why = Source::at(address).read().unwrap_err();
        assert!(why.starts_with("no metrics from http://127.0.0.1") && !why.contains('\n'), "{why}");
    }
}
