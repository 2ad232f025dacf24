//! The one table of metrics, and the OpenMetrics text made from snapshots. Runs on the admin thread, at a scrape.
//!
//! Everything has a label `core`, the number of the shard; a sum over it is the node. A core that did not answer has no
//! figures but `ringline_core_up 0`. The counters of a shard and their texts come from its own table.

use std::fmt::Error;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use ringline_core::counters::Counters;
use ringline_store::StoreStats;

use super::snapshot::{Answer, Snapshot};
use crate::allocations::Allocations;
use crate::peers::refused::Reason;
use crate::peers::{PeerCounters, PeerSnapshot};

/// Upper ends of the buckets of commit latency, in microseconds; above the last is `+Inf`.
const COMMIT_BUCKETS_US: [u64; 17] = [
    50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000,
    5_000_000, 10_000_000,
];

/// What a metric of the table is.
#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

/// One line of the table. The name is without prefix, unit and `_total`.
struct Metric {
    kind: Kind,
    name: &'static str,
    unit: Option<Unit>,
    help: &'static str,
    read: fn(&Snapshot) -> u64,
}

macro_rules! metrics {
    ($($kind:ident $name:literal $unit:expr, $help:literal, $read:expr;)*) => {
        const METRICS: &[Metric] =
            &[$(Metric { kind: Kind::$kind, name: $name, unit: $unit, help: $help, read: $read },)*];
    };
}

metrics! {
    Gauge "connections" None, "open connections", |core| core.levels.connections as u64;
    Gauge "sessions" None, "connections that are logged in", |core| core.levels.sessions as u64;
    Gauge "users_online" None, "users with at least one session", |core| core.levels.users_online as u64;
    Gauge "conversations_cached" None, "conversation heads in memory", |core| core.levels.conversations_cached as u64;
    Gauge "users_cached" None, "user records in memory", |core| core.levels.users_cached as u64;
    Gauge "appends_in_flight" None, "records given to the store that are not durable yet",
        |core| core.levels.appends_in_flight;
    Gauge "delivery_waits" None, "delivery acknowledgements that are waited for",
        |core| core.levels.delivery_waits as u64;
    Gauge "timers" None, "deadlines in the table, stale ones among them", |core| core.levels.timers as u64;
    Gauge "fan_outs_open" None, "groups with messages under way to their members",
        |core| core.levels.fan_outs as u64;
    Gauge "fan_outs_waiting" Some(Unit::Bytes), "bytes of these messages", |core| core.levels.fan_out_bytes as u64;
    Gauge "draining" None, "1 while the node stops", |core| u64::from(core.draining);
    Counter "sockets_accepted" None, "sockets accepted", |core| core.net.accepted;
    Counter "sockets_refused" None, "sockets refused because the node holds as many as it may",
        |core| core.net.refused;
    Counter "sockets_handed_in" None, "sockets taken in from other cores", |core| core.shell.handed_in;
    Counter "accept_pauses" None, "times that accepting paused for lack of descriptors or memory",
        |core| core.net.accept_pauses;
    Counter "received" Some(Unit::Bytes), "bytes received from clients", |core| core.net.bytes_received;
    Counter "sent" Some(Unit::Bytes), "bytes sent to clients", |core| core.net.bytes_sent;
    Counter "lane_batches_sent" None, "batches sent to other cores", |core| core.shell.lane_batches_sent;
    Counter "lane_batches_received" None, "batches received from other cores",
        |core| core.shell.lane_batches_received;
    Counter "turns" None, "turns of the core's loop", |core| core.shell.turns;
    Counter "sleeps" None, "times that the core went to sleep", |core| core.shell.sleeps;
    Gauge "tunnels_held" None, "clients held for other nodes: this node is their gateway",
        |core| core.shell.tunnels.held;
    Gauge "tunnels_served" None, "sessions whose clients gateways hold", |core| core.shell.tunnels.served;
    Counter "tunnels_opened" None, "clients that came to be held for other nodes", |core| core.shell.tunnels.opened;
    Counter "tunnels_lost" None, "of them, those that were sent away because their owner was away or did not answer",
        |core| core.shell.tunnels.lost;
    Counter "tunnels_up" Some(Unit::Bytes), "bytes from clients held here to their owners",
        |core| core.shell.tunnels.up_bytes;
    Counter "tunnels_down" Some(Unit::Bytes), "bytes to clients held here", |core| core.shell.tunnels.down_bytes;
    Gauge "store_failed" None, "1 once the store failed: nothing durable is accepted",
        |core| u64::from(core.store_failed);
    Gauge "store_disk_full" None, "1 while the disk has no room: durable messages are refused",
        |core| u64::from(core.disk_full);
    Gauge "store_away" None, "1 while the database cannot be written: durable messages are refused",
        |core| u64::from(core.store_away);
    Counter "store_reconnects" None, "times that the database was lost, and attempts that did not bring it back",
        |core| core.store.reconnects;
    Counter "store_commits" None, "batches made durable", |core| core.store.commits;
    Counter "store_records" None, "records made durable", |core| core.store.records;
    Counter "store_log" Some(Unit::Bytes), "bytes written to the log and synced", |core| core.store.bytes;
    Gauge "store_index_lag" Some(Unit::Bytes), "durable bytes of the log that the index has not taken in",
        |core| core.store.index_lag_bytes;
    Gauge "store_segments" None, "files of the logs of the node", |core| core.store.retention.segments;
    Gauge "store_logs" Some(Unit::Bytes),
        "bytes of these files, with what is reserved; in a database with retention, of all messages in it",
        |core| core.store.retention.log_bytes;
    Counter "store_floors" None, "times that retention advanced the first message of a conversation",
        |core| core.store.retention.floors;
    Counter "store_segments_released" None, "files that retention removed", |core| core.store.retention.segments_released;
    Counter "store_messages_released" None, "messages that retention deleted in a database",
        |core| core.store.retention.messages_released;
    Counter "store_released" Some(Unit::Bytes), "bytes of these files or messages",
        |core| core.store.retention.bytes_released;
    Counter "store_checkpoints" None, "checkpoints written", |core| core.store.retention.checkpoints;
    Gauge "store_checkpoint" Some(Unit::Bytes), "size of the last checkpoint",
        |core| core.store.retention.checkpoint_bytes;
    Gauge "store_checkpoint_ms" None, "milliseconds that the last checkpoint took",
        |core| core.store.retention.checkpoint_ms;
}

/// What a counter of the links is read from.
type PeerRead = fn(&PeerCounters) -> u64;

/// Only of a node of a cluster.
const PEER_COUNTERS: &[(&str, Option<Unit>, &str, PeerRead)] = &[
    ("peer_dials", None, "connections to other nodes that were begun", |links| links.dials),
    ("peer_accepted", None, "connections accepted at the peer port", |links| links.accepted),
    ("peer_connected", None, "connections that came to carry a link", |links| links.connected),
    ("peer_received", Some(Unit::Bytes), "bytes received from other nodes", |links| links.bytes_received),
    ("peer_sent", Some(Unit::Bytes), "bytes sent to other nodes", |links| links.bytes_sent),
    ("peer_batches_sent", None, "batches sent to other nodes", |links| links.batches_sent),
    ("peer_batches_sent_again", None, "of them, sent again after a break", |links| links.batches_sent_again),
    ("peer_batches_received", None, "batches received from other nodes", |links| links.batches_received),
    ("peer_batches_again", None, "batches that came again after a break, and were dropped", |links| {
        links.batches_again
    }),
    ("peer_messages_sent", None, "messages sent to other nodes", |links| links.messages_sent),
    ("peer_messages_received", None, "messages received from other nodes", |links| links.messages_received),
    ("peer_messages_passed", None, "of them, passed to the core that they are for", |links| links.messages_passed),
    ("peer_full", None, "messages not taken because as many bytes waited for the node as may", |links| links.full),
    ("peer_dropped", None, "messages of a process that is gone, or for no core that there is", |links| links.dropped),
    ("peer_resets", None, "links whose other end became a new process", |links| links.resets),
];

/// What the process takes of the machine, by the names that Prometheus's own libraries use.
#[derive(Clone, Copy, Debug, Default)]
struct Process {
    resident_bytes: u64,
    open_fds: u64,
}

impl Process {
    /// What can't be read is 0.
    fn read() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = resident.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
        // From Linux 6.2 the folder's length is the number of entries; before, it is 0.
        let counted = std::fs::metadata("/proc/self/fd").map_or(0, |folder| folder.len());
        let open_fds = match counted {
            0 => std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
            counted => counted,
        };
        Self { resident_bytes: kib.saturating_mul(1_024), open_fds }
    }
}

/// One look at everything.
#[derive(Debug)]
pub struct Scrape {
    cores: Vec<Answer>,
    process: Process,
}

impl Scrape {
    pub fn new(cores: Vec<Answer>) -> Self {
        Self { cores, process: Process::read() }
    }

    /// The OpenMetrics text. Errors: the encoder's, in practice none.
    pub fn encode(self) -> Result<String, Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut page = String::new();
        text::encode(&mut page, &registry)?;
        Ok(page)
    }

    /// The cores that have answered, with their labels.
    fn answers(&self) -> impl Iterator<Item = ([(&'static str, String); 1], &Snapshot)> {
        self.cores.iter().filter_map(|(shard, snapshot)| Some((core_label(shard.0), snapshot.as_deref()?)))
    }

    fn table(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        for metric in METRICS {
            let kind = match metric.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
            };
            let name = prefixed(metric.name);
            let mut family = encoder.encode_descriptor(&name, metric.help, metric.unit.as_ref(), kind)?;
            for (label, core) in self.answers() {
                let value = (metric.read)(core);
                let mut line = family.encode_family(&label)?;
                match metric.kind {
                    Kind::Counter => count(&mut line, value)?,
                    Kind::Gauge => line.encode_gauge(&value)?,
                }
            }
        }
        Ok(())
    }

    fn shard_counters(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        for (at, (name, help)) in Counters::TEXTS.iter().enumerate() {
            let name = prefixed(name);
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for (label, core) in self.answers() {
                let value = core.counters.values().get(at).copied().unwrap_or(0);
                count(&mut family.encode_family(&label)?, value)?;
            }
        }
        let help = "FAILURE answers by their code; a code that was never given is left out";
        let mut family = encoder.encode_descriptor("ringline_failures", help, None, MetricType::Counter)?;
        for ([core_label], core) in self.answers() {
            for (code, value) in core.counters.failures() {
                let labels = [core_label.clone(), ("code", code.to_owned())];
                count(&mut family.encode_family(&labels)?, value)?;
            }
        }
        Ok(())
    }

    fn commit_latency(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let help = "from the hand-over of a batch to the store until it was seen durable";
        let (name, unit) = ("ringline_store_commit", Some(&Unit::Seconds));
        let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        for (label, core) in self.answers() {
            let (sum_s, buckets) = commit_buckets(&core.store);
            let line = &mut family.encode_family(&label)?;
            line.encode_histogram::<NoLabelSet>(sum_s, core.store.commit_us.len(), &buckets, None)?;
        }
        Ok(())
    }

    /// Only in a build that counts them.
    fn allocations(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        type Read = fn(&Allocations) -> u64;
        let all: [(_, _, _, Read); 3] = [
            ("allocations", None, "allocations by the core's thread", |counts| counts.allocations),
            ("reallocations", None, "blocks grown or shrunk by the core's thread", |counts| counts.reallocations),
            ("allocated", Some(&Unit::Bytes), "bytes asked for by the core's thread", |counts| counts.bytes),
        ];
        let counted: Vec<_> = self.answers().filter_map(|(label, core)| Some((label, core.allocations?))).collect();
        for (name, unit, help, read) in all.into_iter().filter(|_| !counted.is_empty()) {
            let name = prefixed(name);
            let mut family = encoder.encode_descriptor(&name, help, unit, MetricType::Counter)?;
            for (label, counts) in &counted {
                count(&mut family.encode_family(label)?, read(counts))?;
            }
        }
        Ok(())
    }

    /// The links of a node of a cluster.
    fn peers(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let links = |core: &Snapshot| core.peers.as_deref().cloned();
        let all: Vec<(_, PeerSnapshot)> =
            self.answers().filter_map(|(label, core)| Some((label, links(core)?))).collect();
        if all.is_empty() {
            return Ok(());
        }
        for (name, unit, help, read) in PEER_COUNTERS {
            let name = prefixed(name);
            let mut family = encoder.encode_descriptor(&name, help, unit.as_ref(), MetricType::Counter)?;
            for (label, links) in &all {
                count(&mut family.encode_family(label)?, read(&links.counters))?;
            }
        }
        let help = "1 when the core's link to the node is up";
        let mut family = encoder.encode_descriptor("ringline_peer_up", help, None, MetricType::Gauge)?;
        for ([label], links) in &all {
            for link in links.links.iter().filter(|link| link.is_own) {
                let labels = [label.clone(), ("node", link.node.clone())];
                family.encode_family(&labels)?.encode_gauge(&u64::from(link.up))?;
            }
        }
        let help = "connections with other nodes that came to nothing, by reason";
        let mut family = encoder.encode_descriptor("ringline_peer_refused", help, None, MetricType::Counter)?;
        for ([label], links) in &all {
            for (reason, value) in Reason::ALL.iter().zip(links.counters.refused) {
                let labels = [label.clone(), ("reason", reason.name().to_owned())];
                count(&mut family.encode_family(&labels)?, value)?;
            }
        }
        Ok(())
    }

    fn process(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let all = [
            ("process_resident_memory", Some(&Unit::Bytes), "resident memory", self.process.resident_bytes),
            ("process_open_fds", None, "open file descriptors", self.process.open_fds),
        ];
        for (name, unit, help, value) in all {
            encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?.encode_gauge(&value)?;
        }
        let mut build = encoder.encode_descriptor("ringline_build", "the running version", None, MetricType::Info)?;
        build.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), Error> {
        let help = "1 when the core answered within half a second; its figures are missing otherwise";
        let mut family = encoder.encode_descriptor("ringline_core_up", help, None, MetricType::Gauge)?;
        for (shard, snapshot) in &self.cores {
            family.encode_family(&core_label(shard.0))?.encode_gauge(&u64::from(snapshot.is_some()))?;
        }
        self.table(&mut encoder)?;
        self.shard_counters(&mut encoder)?;
        self.commit_latency(&mut encoder)?;
        self.allocations(&mut encoder)?;
        self.peers(&mut encoder)?;
        self.process(&mut encoder)
    }
}

fn prefixed(name: &str) -> String {
    format!("ringline_{name}")
}

fn core_label(shard: u16) -> [(&'static str, String); 1] {
    [("core", shard.to_string())]
}

fn count(line: &mut MetricEncoder<'_>, value: u64) -> Result<(), Error> {
    line.encode_counter::<NoLabelSet, u64, u64>(&value, None)
}

/// The sum in seconds, and the count of each bucket by its upper end in seconds.
fn commit_buckets(store: &StoreStats) -> (f64, Vec<(f64, u64)>) {
    let seconds = |us: u64| us as f64 / 1e6;
    let mut buckets: Vec<(f64, u64)> = COMMIT_BUCKETS_US.iter().map(|&us| (seconds(us), 0)).collect();
    buckets.push((f64::INFINITY, 0));
    for value in store.commit_us.iter_recorded() {
        // The lowest value that reads the same: a value at a bucket's end would otherwise count as above it.
        let us = store.commit_us.lowest_equivalent(value.value_iterated_to());
        let at = COMMIT_BUCKETS_US.partition_point(|&end| end < us);
        if let Some((_, count)) = buckets.get_mut(at) {
            *count += value.count_at_value();
        }
    }
    (seconds(store.commit_sum_us), buckets)
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::tests::snapshot;
    use super::*;
    use ringline_cluster::placement::ShardIndex;
    use ringline_schema::errors::ErrorCode;

    use crate::peers::LinkStatus;

    fn page(cores: Vec<Answer>) -> String {
        Scrape::new(cores).encode().unwrap()
    }

    #[test]
    fn every_line_has_its_help_and_its_type_and_no_name_comes_twice() {
        let text = page(vec![(ShardIndex(0), Some(Box::new(snapshot(0))))]);
        let of = |word: &str| -> Vec<String> {
            let lines = text.lines().filter_map(|line| line.strip_prefix(word));
            lines.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
        };
        let (helps, types) = (of("# HELP "), of("# TYPE "));
        assert_eq!(helps, types);
        let mut once = helps.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), helps.len(), "{helps:?}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let known = helps.iter().any(|name| line.starts_with(name.as_str()));
            assert!(known, "{line} has no help");
        }
        assert!(text.ends_with("# EOF\n"));
        assert!(METRICS.iter().all(|metric| Counters::TEXTS.iter().all(|(name, _)| *name != metric.name)));
    }

    #[test]
    fn a_node_of_a_cluster_shows_its_links() {
        let alone = page(vec![(ShardIndex(0), Some(Box::new(snapshot(0))))]);
        assert!(!alone.contains("ringline_peer"));
        let mut own = snapshot(0);
        let mut links = PeerSnapshot::default();
        links.counters.batches_sent = 12;
        links.counters.refused[Reason::WrongCa as usize] = 3;
        links.links.push(LinkStatus { node: "b".into(), is_own: true, up: true, ..LinkStatus::default() });
        own.peers = Some(Box::new(links));
        let text = page(vec![(ShardIndex(0), Some(Box::new(own)))]);
        for line in [
            "ringline_peer_batches_sent_total{core=\"0\"} 12",
            "ringline_peer_up{core=\"0\",node=\"b\"} 1",
            "ringline_peer_refused_total{core=\"0\",reason=\"wrong_ca\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_core_without_an_answer_is_down_and_has_no_figures() {
        let mut up = snapshot(0);
        up.levels.connections = 7;
        up.counters.accepted = 41;
        up.counters.failure(ErrorCode::Busy);
        up.net.bytes_sent = 9;
        let text = page(vec![(ShardIndex(0), Some(Box::new(up))), (ShardIndex(1), None)]);
        for line in [
            "ringline_core_up{core=\"0\"} 1",
            "ringline_core_up{core=\"1\"} 0",
            "ringline_connections{core=\"0\"} 7",
            "ringline_accepted_total{core=\"0\"} 41",
            "ringline_failures_total{core=\"0\",code=\"BUSY\"} 1",
            "ringline_sent_bytes_total{core=\"0\"} 9",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("core=\"1\"").count(), 1);
    }

    #[test]
    fn commit_latencies_fall_into_their_buckets() {
        let mut core = snapshot(0);
        for us in [1, 50, 51, 1_000, 30_000_000] {
            core.store.commit_us.record(us).unwrap();
            core.store.commit_sum_us += us;
        }
        let (sum_s, buckets) = commit_buckets(&core.store);
        assert!((sum_s - 30.001_102).abs() < 1e-9, "{sum_s}");
        let full: Vec<_> = buckets.iter().filter(|(_, count)| *count > 0).copied().collect();
        assert_eq!(full, [(50e-6, 2), (100e-6, 1), (1e-3, 1), (f64::INFINITY, 1)]);
        let text = page(vec![(ShardIndex(0), Some(Box::new(core)))]);
        assert!(
            text.contains("ringline_store_commit_seconds_bucket{core=\"0\",le=\"+Inf\"} 5")
                || text.contains("ringline_store_commit_seconds_bucket{le=\"+Inf\",core=\"0\"} 5"),
            "{text}"
        );
        assert!(text.contains("ringline_store_commit_seconds_count{core=\"0\"} 5"), "{text}");
    }
}
