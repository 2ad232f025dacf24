//! What is asked of etcd and what it answers, as JSON. Pure.
//!
//! In the JSON of protocol buffers, numbers of 64 bits are texts, bytes are base64, and what is 0, false or empty is left
//! out.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

/// A lease of etcd; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseId(pub i64);

pub mod path {
    pub const RANGE: &str = "/v3/kv/range";
    pub const TXN: &str = "/v3/kv/txn";
    pub const PUT: &str = "/v3/kv/put";
    pub const DELETE: &str = "/v3/kv/deleterange";
    pub const GRANT: &str = "/v3/lease/grant";
    pub const KEEP: &str = "/v3/lease/keepalive";
    pub const REVOKE: &str = "/v3/lease/revoke";
    pub const WATCH: &str = "/v3/watch";
    pub const AUTHENTICATE: &str = "/v3/auth/authenticate";
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Header {
    /// Rises with every change of anything in etcd.
    #[serde(default, deserialize_with = "number")]
    pub revision: i64,
}

#[derive(Debug, Deserialize)]
pub struct Range {
    #[serde(default)]
    pub header: Header,
    #[serde(default)]
    pub kvs: Vec<KeyValue>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct KeyValue {
    #[serde(deserialize_with = "bytes")]
    pub key: Vec<u8>,
    #[serde(default, deserialize_with = "bytes")]
    pub value: Vec<u8>,
    /// The lease that it goes with; 0: none.
    #[serde(default, deserialize_with = "number")]
    pub lease: i64,
}

#[derive(Debug, Deserialize)]
pub struct Txn {
    #[serde(default)]
    pub succeeded: bool,
}

/// Several ranges of keys, as of one moment.
#[derive(Debug, Deserialize)]
pub struct Ranges {
    #[serde(default)]
    pub header: Header,
    /// In the order in which they were asked for.
    #[serde(default)]
    pub responses: Vec<OneOf>,
}

#[derive(Debug, Deserialize)]
pub struct OneOf {
    pub response_range: Range,
}

#[derive(Debug, Deserialize)]
pub struct Deleted {
    /// How many keys there were.
    #[serde(default, deserialize_with = "number")]
    pub deleted: i64,
}

#[derive(Deserialize)]
pub struct Authenticated {
    #[serde(default)]
    pub token: String,
}

/// Where nothing in the answer matters.
#[derive(Debug, Deserialize)]
pub struct Done {}

#[derive(Debug, Deserialize)]
pub struct Granted {
    #[serde(rename = "ID", deserialize_with = "number")]
    pub id: i64,
    /// Seconds from when etcd got the question; 0: there is no such lease any more.
    #[serde(rename = "TTL", default, deserialize_with = "number")]
    pub ttl_s: i64,
}

/// One value of an answer that is a stream.
#[derive(Debug, Deserialize)]
pub struct Streamed<T> {
    pub result: T,
}

#[derive(Debug, Deserialize)]
pub struct Watched {
    /// The watch stands: what happens from now on is told.
    #[serde(default)]
    pub created: bool,
    /// It does not any more.
    #[serde(default)]
    pub canceled: bool,
    #[serde(default)]
    pub events: Vec<serde::de::IgnoredAny>,
}

/// All keys that begin so, as they are after everything that was written before the question: not from a server that lags.
pub fn range_of(prefix: &str, limit: usize) -> Value {
    json!({ "key": text(prefix), "range_end": base64(&end_of(prefix)), "limit": limit.to_string() })
}

/// The same of several prefixes, all at one moment.
pub fn ranges_of(prefixes: &[&str], limit: usize) -> Value {
    let asked: Vec<_> = prefixes.iter().map(|prefix| json!({ "request_range": range_of(prefix, limit) })).collect();
    json!({ "success": asked })
}

pub fn get(key: &str) -> Value {
    json!({ "key": text(key) })
}

pub fn put(key: &str, value: &[u8]) -> Value {
    json!({ "key": text(key), "value": base64(value) })
}

pub fn delete(key: &str) -> Value {
    json!({ "key": text(key) })
}

/// Writes the key under the lease unless there is one by this name.
pub fn create(key: &str, value: &[u8], lease: LeaseId) -> Value {
    let compare = json!({ "key": text(key), "target": "CREATE", "result": "EQUAL", "create_revision": "0" });
    under(compare, (key, value), lease)
}

/// Writes the key under the lease if it is there under that already.
pub fn replace(key: &str, value: &[u8], lease: LeaseId) -> Value {
    let compare = json!({ "key": text(key), "target": "LEASE", "result": "EQUAL", "lease": lease.0.to_string() });
    under(compare, (key, value), lease)
}

fn under(compare: Value, (key, value): (&str, &[u8]), lease: LeaseId) -> Value {
    let put = json!({ "key": text(key), "value": base64(value), "lease": lease.0.to_string() });
    json!({ "compare": [compare], "success": [{ "request_put": put }] })
}

pub fn authenticate(user: &str, password: &str) -> Value {
    json!({ "name": user, "password": password })
}

pub fn grant(ttl_s: u64) -> Value {
    json!({ "TTL": ttl_s.to_string() })
}

pub fn of_lease(lease: LeaseId) -> Value {
    json!({ "ID": lease.0.to_string() })
}

/// What happens to keys that begin so, from now on.
pub fn watch_of(prefix: &str) -> Value {
    json!({ "create_request": { "key": text(prefix), "range_end": base64(&end_of(prefix)) } })
}

fn text(text: &str) -> String {
    base64(text.as_bytes())
}

fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// The first key behind all that begin so. A prefix is text, so its last byte is never 255.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Text(String),
        Number(i64),
    }
    match Written::deserialize(from)? {
        Written::Number(number) => Ok(number),
        Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(from)?;
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As etcd 3.4 has written them.
    #[test]
    fn answers_are_read_as_they_are_written() {
        let text = r#"{"header":{"cluster_id":"324","revision":"2","raft_term":"2"},"kvs":[{"key":"L2E=","create_revision":"2",
            "mod_revision":"2","version":"1","value":"dg==","lease":"2324035532718788615"}],"count":"1"}"#;
        let range: Range = serde_json::from_str(text).unwrap();
        let [one] = &range.kvs[..] else { panic!("{range:?}") };
        assert_eq!((range.header.revision, &one.key[..], &one.value[..]), (2, &b"/a"[..], &b"v"[..]));
        assert_eq!(one.lease, 2_324_035_532_718_788_615);
        let none: Range = serde_json::from_str(r#"{"header":{"revision":"7"}}"#).unwrap();
        assert!(none.kvs.is_empty());
        let lease: Streamed<Granted> =
            serde_json::from_str(r#"{"result":{"header":{},"ID":"123","TTL":"10"}}"#).unwrap();
        assert_eq!((lease.result.id, lease.result.ttl_s), (123, 10));
        let gone: Streamed<Granted> = serde_json::from_str(r#"{"result":{"header":{},"ID":"123"}}"#).unwrap();
        assert_eq!(gone.result.ttl_s, 0);
        let watched: Streamed<Watched> = serde_json::from_str(
            r#"{"result":{"header":{"revision":"3"},"events":[{"type":"DELETE","kv":{"key":"L2E=","mod_revision":"3"}}]}}"#,
        )
        .unwrap();
        assert!(watched.result.events.len() == 1 && !watched.result.created && !watched.result.canceled);
        let text = r#"{"header":{"revision":"9"},"succeeded":true,"responses":[{"response_range":{"header":{"revision":"9"},
            "kvs":[{"key":"L2E=","value":"dg=="}],"count":"1"}},{"response_range":{"header":{"revision":"9"}}}]}"#;
        let ranges: Ranges = serde_json::from_str(text).unwrap();
        let counts: Vec<_> = ranges.responses.iter().map(|one| one.response_range.kvs.len()).collect();
        assert_eq!((ranges.header.revision, &counts[..]), (9, &[1, 0][..]));
        assert_eq!(serde_json::from_str::<Deleted>(r#"{"header":{},"deleted":"1"}"#).unwrap().deleted, 1);
        assert!(serde_json::from_str::<Txn>(r#"{"header":{}}"#).is_ok_and(|txn| !txn.succeeded));
        for bad in [r#"{"kvs":[{"key":"!"}]}"#, r#"{"kvs":[{"value":"dg=="}]}"#, r#"{"header":{"revision":"x"}}"#] {
            assert!(serde_json::from_str::<Range>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_prefix_ends_before_the_next_name() {
        assert_eq!(range_of("/x/", 3), json!({ "key": "L3gv", "range_end": "L3gw", "limit": "3" }));
        assert_eq!(watch_of("/x/"), json!({ "create_request": { "key": "L3gv", "range_end": "L3gw" } }));
    }
}
