//! Latency histograms by interval of the measured window, and the interval log made of them (HdrHistogram's text format).
//!
//! Each generator thread owns one [`Intervals`]; they are merged when all threads have ended. Invariants: only the
//! interval at hand is held as a histogram, those before it as compressed bytes; at most [`INTERVALS_MAX`] of them.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer, V2Serializer};

use crate::tally;

/// Intervals of one run: a longer window has longer intervals.
pub const INTERVALS_MAX: u64 = 3_600;
const NS_PER_S: u64 = 1_000_000_000;
/// The log shows maxima in milliseconds; the histograms hold microseconds.
const US_PER_MS: f64 = 1_000.0;

/// Which latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Intended send time to SEND_ACK.
    Ack,
    /// Intended send time to the first DELIVER.
    Deliver,
}

impl Kind {
    /// The tag of its lines in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ack => "ack",
            Self::Deliver => "deliver",
        }
    }
}

/// Whole seconds, at least one, so that a window of this length has [`INTERVALS_MAX`] intervals at most. In ns.
pub fn length_ns(window_ns: u64) -> u64 {
    window_ns.div_ceil(NS_PER_S).div_ceil(INTERVALS_MAX).max(1) * NS_PER_S
}

/// The histogram at hand of one kind.
#[derive(Clone, Debug)]
struct Current {
    interval: u64,
    histogram: Histogram<u64>,
}

/// See the file's head.
#[derive(Clone, Debug, Default)]
pub struct Intervals {
    /// `None`: nothing is kept.
    length_ns: Option<u64>,
    current: BTreeMap<Kind, Current>,
    /// Complete ones, serialized.
    done: BTreeMap<(u64, Kind), Vec<u8>>,
}

impl Intervals {
    pub fn set_length(&mut self, length_ns: Option<u64>) {
        self.length_ns = length_ns.filter(|&length_ns| length_ns > 0);
    }

    /// Records a latency that ended `at_ns` into the window. Calls of one thread come in the order of time.
    pub fn record(&mut self, (kind, at_ns): (Kind, u64), from_ns: u64, to_ns: u64) {
        let Some(length_ns) = self.length_ns else { return };
        let interval = (at_ns / length_ns).min(INTERVALS_MAX - 1);
        let fresh = || Current { interval, histogram: tally::histogram() };
        let current = self.current.entry(kind).or_insert_with(fresh);
        if current.interval != interval {
            keep(&mut self.done, (current.interval, kind), &current.histogram);
            current.interval = interval;
            current.histogram.reset();
        }
        tally::record(&mut current.histogram, from_ns, to_ns);
    }

    /// Adds the intervals of another thread.
    pub fn merge(&mut self, other: &Self) {
        self.length_ns = self.length_ns.or(other.length_ns);
        for (&key, bytes) in &other.done {
            keep(&mut self.done, key, &read(bytes));
        }
        for (&kind, current) in &other.current {
            keep(&mut self.done, (current.interval, kind), &current.histogram);
        }
    }

    /// Every interval that has a record, in the order of time.
    pub fn histograms(&self) -> BTreeMap<(u64, Kind), Histogram<u64>> {
        let mut all: BTreeMap<_, _> = self.done.iter().map(|(&key, bytes)| (key, read(bytes))).collect();
        for (&kind, current) in &self.current {
            tally::add(all.entry((current.interval, kind)).or_insert_with(tally::histogram), &current.histogram);
        }
        all
    }

    /// The interval log: tagged lines `ack` and `deliver`, values in µs, under these comments. `start` is the beginning
    /// of the measured window. Fails only if the library does.
    pub fn log(&self, start: SystemTime, comments: &[String]) -> Result<Vec<u8>, String> {
        let (mut bytes, mut serializer) = (Vec::new(), V2DeflateSerializer::new());
        let mut head = IntervalLogWriterBuilder::new();
        for comment in comments {
            head.add_comment(comment);
        }
        head.with_start_time(start).with_base_time(start).with_max_value_divisor(US_PER_MS);
        let mut writer = head.begin_log_with(&mut bytes, &mut serializer).map_err(|error| error.to_string())?;
        let length = Duration::from_nanos(self.length_ns.unwrap_or(NS_PER_S));
        for ((interval, kind), histogram) in self.histograms() {
            let begins = length.saturating_mul(u32::try_from(interval).unwrap_or(u32::MAX));
            let written = writer.write_histogram(&histogram, begins, length, Tag::new(kind.name()));
            written.map_err(|error| format!("{error:?}"))?;
        }
        drop(writer);
        Ok(bytes)
    }
}

/// Adds a histogram to the serialized one of this key. Bytes in memory that were just made cannot fail either way.
fn keep(done: &mut BTreeMap<(u64, Kind), Vec<u8>>, key: (u64, Kind), histogram: &Histogram<u64>) {
    let mut sum = done.get(&key).map_or_else(tally::histogram, |bytes| read(bytes));
    tally::add(&mut sum, histogram);
    let mut bytes = Vec::new();
    if let Err(error) = V2Serializer::new().serialize(&sum, &mut bytes) {
        unreachable!("into memory: {error:?}");
    }
    done.insert(key, bytes);
}

fn read(bytes: &[u8]) -> Histogram<u64> {
    match Deserializer::new().deserialize(&mut &*bytes) {
        Ok(histogram) => histogram,
        Err(error) => unreachable!("written by this process: {error:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    fn counts(intervals: &Intervals) -> Vec<(u64, Kind, u64)> {
        intervals.histograms().into_iter().map(|((at, kind), histogram)| (at, kind, histogram.len())).collect()
    }

    #[test]
    fn threads_merge_interval_by_interval() {
        let mut threads = [Intervals::default(), Intervals::default()];
        for (thread, intervals) in threads.iter_mut().enumerate() {
            intervals.set_length(Some(NS_PER_S));
            for at_ns in [0, NS_PER_S / 2, NS_PER_S, 5 * NS_PER_S] {
                intervals.record((Kind::Ack, at_ns), 0, 1_000_000 * (thread as u64 + 1));
            }
        }
        threads[1].record((Kind::Deliver, NS_PER_S), 0, 3_000_000);
        let [mut sum, other] = threads;
        sum.merge(&other);
        let expected = [(0, Kind::Ack, 4), (1, Kind::Ack, 2), (1, Kind::Deliver, 1), (5, Kind::Ack, 2)];
        assert_eq!(counts(&sum), expected);
        assert_eq!(sum.histograms()[&(0, Kind::Ack)].max(), 2_000);
    }

    #[test]
    fn nothing_is_kept_unless_asked_for_and_never_more_than_the_bound() {
        let mut off = Intervals::default();
        off.record((Kind::Ack, 0), 0, 1_000);
        assert!(counts(&off).is_empty());
        let mut on = Intervals::default();
        on.set_length(Some(1));
        on.record((Kind::Ack, u64::MAX), 0, 1_000);
        assert_eq!(counts(&on), [(INTERVALS_MAX - 1, Kind::Ack, 1)]);
        assert_eq!([0, 10 * NS_PER_S, 7_201 * NS_PER_S].map(length_ns), [NS_PER_S, NS_PER_S, 3 * NS_PER_S]);
    }

    #[test]
    fn the_log_can_be_read_back() {
        let mut intervals = Intervals::default();
        intervals.set_length(Some(NS_PER_S));
        intervals.record((Kind::Ack, 0), 0, 250_000);
        intervals.record((Kind::Ack, 2 * NS_PER_S), 0, 500_000);
        let log = intervals.log(SystemTime::UNIX_EPOCH, &["commit abc".to_owned()]).unwrap();
        assert!(String::from_utf8(log.clone()).unwrap().starts_with("#commit abc\n"));
        let lines: Vec<_> = IntervalLogIterator::new(&log)
            .filter_map(|entry| match entry.unwrap() {
                LogEntry::Interval(line) => {
                    Some((line.tag().unwrap().as_str().to_owned(), line.start_timestamp().as_secs()))
                }
                _ => None,
            })
            .collect();
        assert_eq!(lines, [("ack".to_owned(), 0), ("ack".to_owned(), 2)]);
    }
}
