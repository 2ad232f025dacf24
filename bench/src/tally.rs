//! Counts and latencies of one thread, and of all threads once they are merged.
//!
//! Owned by one generator thread while the run goes. Invariant: rates and histograms hold only what belongs to the
//! measured window; the `ever_*` counts hold everything, because loss is judged over everything.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use ringline_schema::errors::ErrorCode;

use crate::intervals::Intervals;

/// The longest latency a histogram tells apart, in µs: 10 minutes. Longer ones count as this.
const LATENCY_US_MAX: u64 = 600_000_000;
/// Significant decimal digits of a histogram.
const DIGITS: u8 = 3;
const NS_PER_US: u64 = 1_000;

/// Adds the named counts of another thread to these.
macro_rules! add_fields {
    ($mine:expr, $theirs:expr; $($field:ident),+ $(,)?) => {
        $($mine.$field += $theirs.$field;)+
    };
}
pub(crate) use add_fields;

/// How a connection ended that the generator had not closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disconnect {
    /// The server closed it.
    ByServer,
    /// The server or the kernel reset it.
    Reset,
    /// Another error of the socket.
    Socket,
    /// The server sent bytes that are no frames or no tables.
    Unreadable,
}

/// What goes wrong in a run, each with the name it is counted under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incident {
    /// A FAILURE frame; those that are retried count each time.
    Refused(ErrorCode),
    Kicked,
    Lagged,
    /// More gaps at once than one client keeps: their messages count as lost.
    GapForgotten,
    Goaway,
    Disconnected(Disconnect),
    /// The server gave up on a client that read slowly on purpose.
    SlowReaderClosed,
    /// An answer to nothing that was asked, or a second answer.
    UnexpectedAnswer,
    /// A command that this generator does not know, from a newer server: passed over.
    UnknownCommand,
    /// The server took a message for a repeat that was sent once.
    DupWithoutRetry,
}

impl Incident {
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused(code) => code.name(),
            Self::Kicked => "KICKED",
            Self::Lagged => "LAGGED",
            Self::GapForgotten => "GAP_FORGOTTEN",
            Self::Goaway => "GOAWAY",
            Self::Disconnected(Disconnect::ByServer) => "DISCONNECTED_BY_SERVER",
            Self::Disconnected(Disconnect::Reset) => "DISCONNECTED_RESET",
            Self::Disconnected(Disconnect::Socket) => "DISCONNECTED_SOCKET_ERROR",
            Self::Disconnected(Disconnect::Unreadable) => "DISCONNECTED_UNREADABLE",
            Self::SlowReaderClosed => "SLOW_READER_CLOSED",
            Self::UnexpectedAnswer => "UNEXPECTED_ANSWER",
            Self::UnknownCommand => "UNKNOWN_PUSH",
            Self::DupWithoutRetry => "DUP_WITHOUT_RETRY",
        }
    }
}

/// See the file's head.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Messages sent, accepted and first delivered inside the measured window.
    pub sent: u64,
    pub accepted: u64,
    pub delivered: u64,
    /// Intended send time to SEND_ACK, and to the first DELIVER, in µs; of messages intended inside the window.
    pub ack_us: Histogram<u64>,
    pub deliver_us: Histogram<u64>,
    /// The same to receivers that read slowly on purpose; they are not in `deliver_us`.
    pub slow_deliver_us: Histogram<u64>,
    /// Both latencies by interval of the window, if the plan wants them.
    pub intervals: Intervals,
    /// Open loop: how late the generator itself was, in µs.
    pub lag_us: Histogram<u64>,
    pub ever_sent: u64,
    pub ever_accepted: u64,
    pub ever_delivered: u64,
    /// Sends of clients still connected that have no answer yet.
    pub unanswered: u64,
    /// Sends without an answer whose client was disconnected.
    pub abandoned: u64,
    /// Refused to the last (BUSY, RATE_LIMITED): the run ended before the next try.
    pub given_up: u64,
    /// Open loop: due inside the window and never sent, because the client had too many unanswered or was gone.
    pub unsent: u64,
    pub disconnected: u64,
    pub pings: u64,
    /// Messages fetched from the history after LAGGED.
    pub fetched: u64,
    pub incidents: BTreeMap<&'static str, u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            sent: 0,
            accepted: 0,
            delivered: 0,
            ack_us: histogram(),
            deliver_us: histogram(),
            slow_deliver_us: histogram(),
            intervals: Intervals::default(),
            lag_us: histogram(),
            ever_sent: 0,
            ever_accepted: 0,
            ever_delivered: 0,
            unanswered: 0,
            abandoned: 0,
            given_up: 0,
            unsent: 0,
            disconnected: 0,
            pings: 0,
            fetched: 0,
            incidents: BTreeMap::new(),
        }
    }
}

impl Tally {
    pub fn count(&mut self, incident: Incident) {
        *self.incidents.entry(incident.name()).or_default() += 1;
    }

    /// Adds the figures of another thread.
    pub fn merge(&mut self, other: &Self) {
        add_fields!(self, other; sent, accepted, delivered, ever_sent, ever_accepted, ever_delivered, unanswered,
            abandoned, given_up, unsent, disconnected, pings, fetched);
        add(&mut self.ack_us, &other.ack_us);
        add(&mut self.deliver_us, &other.deliver_us);
        add(&mut self.slow_deliver_us, &other.slow_deliver_us);
        self.intervals.merge(&other.intervals);
        add(&mut self.lag_us, &other.lag_us);
        add_names(&mut self.incidents, &other.incidents);
    }
}

/// Records the time from `from_ns` to `to_ns` in µs; less than 1 µs counts as 1.
pub fn record(histogram: &mut Histogram<u64>, from_ns: u64, to_ns: u64) {
    histogram.saturating_record((to_ns.saturating_sub(from_ns) / NS_PER_US).max(1));
}

/// An empty histogram of latencies in µs; all have the same bounds.
pub fn histogram() -> Histogram<u64> {
    // The bounds are constants that the library accepts; a test makes one.
    Histogram::new_with_bounds(1, LATENCY_US_MAX, DIGITS).unwrap_or_else(|_| unreachable!("constant bounds"))
}

/// Merging cannot fail: all histograms have the same bounds.
pub fn add(mine: &mut Histogram<u64>, theirs: &Histogram<u64>) {
    if let Err(error) = mine.add(theirs) {
        unreachable!("same bounds: {error}");
    }
}

/// Adds counts by name.
pub fn add_names(mine: &mut BTreeMap<&'static str, u64>, theirs: &BTreeMap<&'static str, u64>) {
    for (name, count) in theirs {
        *mine.entry(name).or_default() += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_microseconds_and_saturate() {
        let mut tally = Tally::default();
        record(&mut tally.ack_us, 1_000, 251_000);
        assert_eq!(tally.ack_us.max(), 250);
        record(&mut tally.ack_us, 5_000, 4_000);
        assert_eq!(tally.ack_us.min(), 1, "time never runs backwards in a figure");
        record(&mut tally.ack_us, 0, u64::MAX);
        assert!(tally.ack_us.max() >= LATENCY_US_MAX);
    }

    #[test]
    fn merging_adds_everything() {
        let (mut one, mut other) = (Tally::default(), Tally { sent: 2, ever_delivered: 3, ..Tally::default() });
        one.count(Incident::Lagged);
        other.count(Incident::Lagged);
        other.count(Incident::Refused(ErrorCode::Busy));
        record(&mut other.deliver_us, 0, 5_000);
        one.merge(&other);
        assert_eq!((one.sent, one.ever_delivered, one.deliver_us.len()), (2, 3, 1));
        assert_eq!(one.incidents, BTreeMap::from([("BUSY", 1), ("LAGGED", 2)]));
    }
}
