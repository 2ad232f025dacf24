//! The ring passes what every net has to pass, and makes a store's writes.

use std::time::Instant;

use ringline_schema::ids::UserName;
use ringline_schema::record::{Record, User};
use ringline_store::embedded::{EmbeddedOptions, EmbeddedShard, EmbeddedStore};
use ringline_store::{Lsn, Store, StoreEvent};

use super::*;
use crate::net::conformance::{Bench, listener, run_all};

#[test]
fn conforms() {
    run_all(|connections_max, refusal| {
        let (listener, address) = listener();
        let admission = Arc::new(Admission::new(connections_max));
        let options = NetOptions { listener, admission: admission.clone(), refusal: refusal.to_vec() };
        Bench { net: Box::new(RingNet::new(options).unwrap()), address, admission }
    });
}

fn net() -> RingNet {
    let (listener, _) = listener();
    RingNet::new(NetOptions { listener, admission: Arc::new(Admission::new(8)), refusal: Vec::new() }).unwrap()
}

fn store(folder: &std::path::Path) -> EmbeddedShard {
    let (mut shards, _) = EmbeddedStore::open(folder, 1, EmbeddedOptions::default()).unwrap();
    shards.pop().unwrap()
}

fn user(number: u64) -> Record {
    let name = UserName::new(&format!("user{number}")).unwrap();
    Record::User(User { name, password_hash: None, created_ms: number })
}

/// Gives the net what the store wants written.
fn hand_over(net: &mut RingNet, store: &mut EmbeddedShard) {
    store.submit();
    if let Some(write) = store.take_write() {
        net.write_file(write).unwrap();
        assert!(net.is_writing_file() && store.take_write().is_none());
    }
}

/// Polls the net until its file write is back with the store.
fn bring_back(net: &mut RingNet, store: &mut EmbeddedShard) {
    let started = Instant::now();
    while net.is_writing_file() {
        net.wait(Duration::from_millis(5));
        net.poll(0, &mut |event| {
            if let NetEvent::FileWritten { write, result } = event {
                store.written(write, result);
            }
            Flow::Continue
        });
        assert!(started.elapsed() < Duration::from_secs(30), "the write does not come back");
    }
}

#[test]
fn a_store_writes_its_log_on_the_ring() {
    let folder = tempfile::tempdir().unwrap();
    let (mut net, mut store) = (net(), store(folder.path()));
    store.lend_writes();
    let mut events = Vec::new();
    for number in 1..=100 {
        assert_eq!(store.append(&user(number)).unwrap(), Lsn(number));
        hand_over(&mut net, &mut store);
        store.poll(&mut events);
        assert!(!events.contains(&StoreEvent::Committed(Lsn(number))), "nothing is durable before its completion");
        bring_back(&mut net, &mut store);
        store.poll(&mut events);
        assert_eq!(events.last(), Some(&StoreEvent::Committed(Lsn(number))));
    }
    // What is queued, but in nobody's hands yet, is made durable by the end.
    store.append(&user(101)).unwrap();
    store.submit();
    store.close().unwrap();
    store.poll(&mut events);
    assert_eq!(events.last(), Some(&StoreEvent::Committed(Lsn(101))));
}

#[test]
fn a_ring_that_goes_waits_for_its_file_write() {
    let folder = tempfile::tempdir().unwrap();
    let (mut net, mut store) = (net(), store(folder.path()));
    store.lend_writes();
    store.append(&user(1)).unwrap();
    hand_over(&mut net, &mut store);
    drop(net);
    // The write is lost to the store, which must not say that it is durable.
    assert!(store.close().is_err());
    let mut events = Vec::new();
    store.poll(&mut events);
    assert_eq!(events, [StoreEvent::Failed]);
}
