//! What a node writes of itself into etcd, under `PREFIX/nodes/NAME`, and who is to give away what he owns: `PREFIX/drains/NAME`.
//! Pure.
//!
//! A mark to be drained is nobody's lease: it stays until it is taken away, over all starts of the node, and counts whatever the
//! node says of itself. What it says of itself follows; see [`Entry::owned`].
//!
//! What another node has written is judged: an entry that can't be read counts as one of a node that is there and of which
//! nothing is known, so that nobody takes from a node whose version is another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ringline_cluster::link::hello::Incarnation;
use ringline_cluster::membership::{Member, Standing};
use ringline_cluster::placement::{NODES_MAX, NodeIndex};
use ringline_cluster::reconcile::Start;
use ringline_cluster::rendezvous::WEIGHT_MAX;
use serde::{Deserialize, Serialize};

use super::wire::Ranges;
use crate::config::is_node_name;

/// The longest entry that is looked at.
const ENTRY_BYTES_MAX: usize = 4_096;
/// The longest address that clients are told.
const CLIENT_ADDRESS_BYTES_MAX: usize = 300;

/// One start of a node, as it is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its incarnation is the number of the start: rising, whatever clocks say.
    pub member: Member,
    /// The number of this start in the table of owners; above 0.
    pub start: Start,
    /// The number of its name in the cluster.
    pub number: NodeIndex,
    /// How many partitions it owns; `None`: its version does not tell. Told together with its standing, so one that says to be
    /// draining and to own nothing takes nothing until it says something else.
    pub owned: Option<u16>,
}

/// The same as JSON. Fields are only ever added.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    start: i64,
    number: u16,
    peer_address: SocketAddr,
    client_address: String,
    weight: u32,
    client_weight: u32,
    connections: u64,
    draining: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owned: Option<u16>,
}

impl Entry {
    pub fn encode(&self) -> Vec<u8> {
        let Self { member, start, number, owned } = self;
        let written = Written {
            start: start.0,
            number: number.0,
            peer_address: member.peer_address,
            client_address: member.client_address.clone(),
            weight: member.weight,
            client_weight: member.client_weight,
            connections: member.connections,
            draining: member.standing == Standing::Draining,
            owned: *owned,
        };
        serde_json::to_vec(&written).unwrap_or_default()
    }

    /// `None`: this build can't make sense of it.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > ENTRY_BYTES_MAX {
            return None;
        }
        let written: Written = serde_json::from_slice(bytes).ok()?;
        let numbers = written.start > 0 && usize::from(written.number) < NODES_MAX;
        let weights = written.weight <= WEIGHT_MAX && written.client_weight <= WEIGHT_MAX;
        if !numbers || !weights || written.client_address.len() > CLIENT_ADDRESS_BYTES_MAX {
            return None;
        }
        let member = Member {
            incarnation: Incarnation(written.start.unsigned_abs()),
            peer_address: written.peer_address,
            client_address: written.client_address,
            weight: written.weight,
            client_weight: written.client_weight,
            connections: written.connections,
            standing: if written.draining { Standing::Draining } else { Standing::Up },
        };
        let (start, number) = (Start(written.start), NodeIndex(written.number));
        Some(Self { member, start, number, owned: written.owned })
    }
}

/// Who is alive, at one revision of etcd.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    pub revision: i64,
    pub entries: BTreeMap<String, Entry>,
    /// Names whose entry can't be read.
    pub unreadable: BTreeSet<String>,
    /// Names that are marked to be drained, whether they are there or not.
    pub drained: BTreeSet<String>,
}

impl Listing {
    /// `nodes`, `drains`: what the keys of each begin with, before the name.
    pub fn read((nodes, drains): (&str, &str), ranges: &Ranges) -> Self {
        let mut listing = Self { revision: ranges.header.revision, ..Self::default() };
        for kv in ranges.responses.iter().flat_map(|one| &one.response_range.kvs) {
            let key = std::str::from_utf8(&kv.key).unwrap_or_default();
            let named = |prefix: &str| key.strip_prefix(prefix).filter(|name| is_node_name(name)).map(str::to_owned);
            if let Some(name) = named(nodes) {
                match Entry::decode(&kv.value) {
                    Some(entry) => _ = listing.entries.insert(name, entry),
                    None => _ = listing.unreadable.insert(name),
                }
            } else if let Some(name) = named(drains) {
                listing.drained.insert(name);
            }
        }
        listing
    }

    /// For [`ringline_cluster::membership::Membership::update`]: who is marked drains, whatever it says itself.
    pub fn members(&self) -> BTreeMap<String, Member> {
        let member = |(name, entry): (&String, &Entry)| {
            let standing = self.standing(name, entry);
            (name.clone(), Member { standing, ..entry.member.clone() })
        };
        self.entries.iter().map(member).collect()
    }

    fn standing(&self, name: &str, entry: &Entry) -> Standing {
        if self.drained.contains(name) { Standing::Draining } else { entry.member.standing }
    }

    /// Whether somebody else than this node is there to own partitions.
    pub fn has_others(&self, than: &str) -> bool {
        let takes = |(name, entry): (&String, &Entry)| {
            name != than && entry.member.weight > 0 && self.standing(name, entry) == Standing::Up
        };
        self.entries.iter().any(takes)
    }

    /// Whether that start of that node may still be alive: its name is there, and not with another start.
    pub fn may_live(&self, name: &str, start: Start) -> bool {
        self.unreadable.contains(name) || self.entries.get(name).is_some_and(|entry| entry.start == start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::wire::{Header, KeyValue, OneOf, Range};

    fn entry(start: i64) -> Entry {
        let member = Member {
            incarnation: Incarnation(start.unsigned_abs()),
            peer_address: SocketAddr::from(([10, 0, 0, 1], 9800)),
            client_address: "chat-a.example:9700".into(),
            weight: 3,
            client_weight: 1,
            connections: 17,
            standing: Standing::Draining,
        };
        Entry { member, start: Start(start), number: NodeIndex(63), owned: Some(17) }
    }

    fn read(ranges: Vec<Vec<KeyValue>>) -> Listing {
        let one = |kvs| OneOf { response_range: Range { header: Header::default(), kvs } };
        let ranges = Ranges { header: Header { revision: 5 }, responses: ranges.into_iter().map(one).collect() };
        Listing::read(("/r/nodes/", "/r/drains/"), &ranges)
    }

    fn kv(key: &str, value: &[u8]) -> KeyValue {
        KeyValue { key: key.into(), value: value.to_vec(), lease: 1 }
    }

    #[test]
    fn an_entry_reads_back_and_one_that_cannot_be_is_no_entry() {
        let written = entry(7);
        assert_eq!(Entry::decode(&written.encode()), Some(written.clone()));
        let with = |change: fn(&mut Entry)| {
            let mut odd = entry(7);
            change(&mut odd);
            Entry::decode(&odd.encode())
        };
        assert_eq!(with(|odd| odd.start = Start(0)), None);
        assert_eq!(with(|odd| odd.start = Start(-1)), None);
        assert_eq!(with(|odd| odd.number = NodeIndex(64)), None);
        assert_eq!(with(|odd| odd.member.weight = WEIGHT_MAX + 1), None);
        assert!(with(|odd| odd.member.weight = WEIGHT_MAX).is_some());
        assert_eq!(with(|odd| odd.member.client_address = "x".repeat(CLIENT_ADDRESS_BYTES_MAX + 1)), None);
        for bad in [&b""[..], b"{}", b"rubbish", &[b' '; ENTRY_BYTES_MAX + 1]] {
            assert_eq!(Entry::decode(bad), None);
        }
        let mut older: serde_json::Value = serde_json::from_slice(&written.encode()).unwrap();
        older.as_object_mut().unwrap().remove("owned");
        let read = Entry::decode(older.to_string().as_bytes());
        assert_eq!(read, Some(Entry { owned: None, ..written.clone() }), "the version before does not tell");
        let mut newer: serde_json::Value = serde_json::from_slice(&written.encode()).unwrap();
        newer["colour"] = "red".into();
        assert_eq!(Entry::decode(newer.to_string().as_bytes()), Some(written), "a newer version may say more");
    }

    #[test]
    fn who_cannot_be_read_may_live() {
        let kvs = vec![
            kv("/r/nodes/a", &entry(7).encode()),
            kv("/r/nodes/b", b"{\"version\":9}"),
            kv("/r/nodes/NOT A NAME", &entry(8).encode()),
            kv("/r/nodes/a/deeper", &entry(9).encode()),
        ];
        let marks = vec![kv("/r/drains/c", b"{}"), kv("/r/drains/a", b""), kv("/r/drains/NOT A NAME", b"{}")];
        let listing = read(vec![kvs, marks]);
        assert_eq!((listing.revision, listing.entries.len(), listing.unreadable.len()), (5, 1, 1));
        let asked = [("a", 7), ("a", 6), ("b", 1), ("c", 1)].map(|(name, start)| listing.may_live(name, Start(start)));
        assert_eq!(asked, [true, false, true, false]);
        assert_eq!(listing.members()["a"].connections, 17);
        assert!(listing.drained.iter().eq(["a", "c"]), "{:?}", listing.drained);
    }

    #[test]
    fn who_is_marked_drains_whatever_it_says_and_does_not_count_as_another() {
        let up = |start, weight| {
            let mut entry = entry(start);
            (entry.member.standing, entry.member.weight) = (Standing::Up, weight);
            entry.encode()
        };
        let nodes = vec![kv("/r/nodes/a", &up(1, 1)), kv("/r/nodes/b", &up(2, 1)), kv("/r/nodes/g", &up(3, 0))];
        let plain = read(vec![nodes.clone(), Vec::new()]);
        assert_eq!(plain.members()["b"].standing, Standing::Up);
        assert!(plain.has_others("a") && plain.has_others("b") && plain.has_others("g"));
        let marked = read(vec![nodes, vec![kv("/r/drains/b", b"{}")]]);
        assert_eq!(marked.members()["b"].standing, Standing::Draining);
        assert_eq!(marked.entries["b"].member.standing, Standing::Up, "it has not said so itself yet");
        assert!(!marked.has_others("a") && marked.has_others("b"), "a gateway takes nothing");
    }
}
