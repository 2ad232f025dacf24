//! The one table of counters of a shard. All only rise; the shell adds them up and shows them.

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
            /// Name and value of every counter, and of every failure that happened.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                let mut list = vec![$((stringify!($field), self.$field),)*];
                let failures = ErrorCode::ALL.iter().zip(&self.failures);
                list.extend(failures.filter(|(_, count)| **count > 0).map(|(code, count)| (code.name(), *count)));
                list
            }

            /// Name and meaning of every counter.
            pub const TEXTS: &'static [(&'static str, &'static str)] = &[$((stringify!($field), $text),)*];
        }
    };
}

counters! {
    connections_opened   "connections accepted or handed over to this shard";
    connections_closed   "connections that ended";
    connections_handed   "connections given to the shard of their user";
    requests             "requests decoded";
    registered           "users created";
    logins               "logins that succeeded";
    login_failures       "logins refused";
    kicked               "devices told to go";
    sends_durable        "durable sends taken from clients";
    sends_transient      "transient sends taken from clients";
    accepted             "durable messages committed";
    duplicates           "durable sends recognised as repeats";
    delivered            "DELIVER frames queued to devices";
    dropped_transient    "transient deliveries dropped because the device reads too slowly";
    dropped_durable      "durable deliveries replaced by LAGGED because the device reads too slowly";
    lagged               "LAGGED frames queued";
    receipts             "delivery acknowledgements told to senders";
    cursors_written      "cursor records appended";
    loads                "questions to the store";
    conversations_evicted "conversations dropped from the cache";
    orphaned_answers     "answers whose connection was gone";
}

impl Counters {
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
