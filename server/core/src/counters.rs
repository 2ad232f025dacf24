//! The one table of counters of a shard, which only rise, and its levels. The shell adds them up and shows them.

use ringline_schema::errors::ErrorCode;

macro_rules! counters {
    ($($field:ident $text:literal;)*) => {
        /// Counts of one shard since its start.
        #[derive(Clone, Debug, Default)]
        pub struct Counters {
            $(#[doc = $text] pub $field: u64,)*
            /// FAILURE frames by their code, in the order of `ErrorCode::ALL`.
            failures: Vec<u64>,
        }

        impl Counters {
            /// Name and meaning of every counter, in the order of [`Counters::values`].
            pub const TEXTS: &'static [(&'static str, &'static str)] = &[$((stringify!($field), $text),)*];

            /// The value of every counter but the failures.
            pub fn values(&self) -> Vec<u64> {
                vec![$(self.$field,)*]
            }
        }
    };
}

counters! {
    connections_opened   "connections accepted or handed over to this shard";
    connections_closed   "connections that ended";
    connections_handed   "connections given to the shard of their user";
    requests             "requests decoded";
    registered           "users created";
    users_deleted        "users deleted";
    logins               "logins that succeeded";
    login_failures       "logins refused";
    kicked               "devices told to go";
    sends_durable        "durable sends taken from clients";
    sends_transient      "transient sends taken from clients";
    sends_straight       "of these, those that went straight into the output of their receiver";
    accepted             "durable messages committed";
    duplicates           "durable sends recognised as repeats";
    delivered            "DELIVER frames queued to devices";
    dropped_transient    "transient deliveries dropped because the device reads too slowly";
    dropped_durable      "durable deliveries replaced by LAGGED because the device reads too slowly";
    lagged               "LAGGED frames queued";
    receipts             "delivery acknowledgements told to senders";
    cursors_written      "cursor records appended";
    receipts_untold      "news of receipts dropped: the device reads too slowly, or too many were told at once";
    loads                "questions to the store";
    conversations_evicted "conversations dropped from the cache";
    signals              "signals taken from clients";
    signals_coalesced    "signals dropped because they repeat one of the same second";
    group_changes        "changes of groups appended";
    fan_outs             "shards that messages of groups were given to";
    fan_out_visits       "members visited by fan-outs in slices";
    fan_outs_missed      "messages of large groups replaced by LAGGED because too much was under way";
    fan_outs_dropped     "transient messages to large groups dropped because too much was under way";
    groups_evicted       "groups dropped from the cache";
    orphaned_answers     "answers whose connection was gone";
}

/// What comes and goes in one shard, as it is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    pub connections: usize,
    /// Connections that are logged in.
    pub sessions: usize,
    /// Users with at least one of them.
    pub users_online: usize,
    pub conversations_cached: usize,
    pub users_cached: usize,
    /// Records given to the store that are not durable yet; stays as it was when the store failed.
    pub appends_in_flight: u64,
    /// Delivery acknowledgements that are waited for.
    pub delivery_waits: usize,
    /// Deadlines, the stale ones among them.
    pub timers: usize,
    /// Groups with messages under way to their members.
    pub fan_outs: usize,
    /// Bytes of these messages.
    pub fan_out_bytes: usize,
}

impl Counters {
    /// Failures that happened, by the name of their code.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = ErrorCode::ALL.iter().zip(&self.failures);
        all.filter(|(_, count)| **count > 0).map(|(code, count)| (code.name(), *count))
    }

    pub fn failure(&mut self, code: ErrorCode) {
        if self.failures.is_empty() {
            self.failures = vec![0; ErrorCode::ALL.len()];
        }
        let at = ErrorCode::ALL.iter().position(|&known| known == code);
        if let Some(count) = at.and_then(|at| self.failures.get_mut(at)) {
            *count += 1;
        }
    }
}
