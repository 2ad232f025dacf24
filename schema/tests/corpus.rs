//! The corpus of the fuzz targets, replayed: each file, each of its beginnings, each of its bytes changed. Where there is no
//! fuzzer this is what runs; where there is one, what it finds is put into the corpus and stays found.

#[path = "../../fuzz/targets/samples.rs"]
mod samples;
#[path = "../../fuzz/targets/wire.rs"]
mod wire;

use std::collections::BTreeSet;
use std::path::PathBuf;

use ringline_schema::commands::{Command, Direction};
use samples::Sample;

/// What a byte is changed by.
const FLIPS: [u8; 4] = [0x01, 0x80, 0xff, 0x10];

fn folder(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

/// Compares the samples with their files, or writes them.
fn keep(target: &str, samples: &[Sample]) {
    let folder = folder(target);
    let write = std::env::var_os("WRITE_CORPUS").is_some();
    if write {
        std::fs::create_dir_all(&folder).unwrap();
    }
    for (name, bytes) in samples {
        let path = folder.join(name);
        if write {
            std::fs::write(&path, bytes).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_default();
        assert!(kept == *bytes, "{}: WRITE_CORPUS=1 cargo test -p ringline-schema --test corpus", path.display());
    }
}

fn replay(target: &str, run: impl Fn(&[u8])) {
    let files: Vec<_> = std::fs::read_dir(folder(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!files.is_empty(), "{target} has a corpus");
    for path in files {
        let bytes = std::fs::read(&path).unwrap();
        run(&bytes);
        (0..bytes.len()).for_each(|end| run(&bytes[..end]));
        let mut changed = bytes.clone();
        for at in 0..bytes.len() {
            for flip in FLIPS {
                changed[at] = bytes[at] ^ flip;
                run(&changed);
            }
            changed[at] = bytes[at];
        }
    }
}

fn names(samples: &[Sample]) -> BTreeSet<String> {
    samples.iter().map(|(name, _)| name.clone()).collect()
}

#[test]
fn the_corpus_has_every_command_and_every_record() {
    let of = |wanted: fn(Direction) -> bool| -> BTreeSet<String> {
        let all = Command::ALL.iter().filter(|command| wanted(command.direction()));
        all.map(|command| command.name().to_lowercase()).collect()
    };
    let (requests, replies) = (samples::requests(), samples::replies());
    assert_eq!(names(&requests), of(|direction| direction == Direction::Request));
    assert_eq!(names(&replies), of(|direction| direction != Direction::Request));
    keep("request", &requests);
    keep("request", &samples::more_requests());
    keep("reply", &replies);
    keep("reply", &samples::more_replies());
    keep("frame", &samples::frames());
    keep("record", &samples::records());
}

#[test]
fn frames_are_cut_the_same_whatever_the_pieces() {
    replay("frame", wire::frame);
}

#[test]
fn every_request_decodes_or_is_refused() {
    replay("request", wire::request);
}

#[test]
fn every_reply_decodes_or_is_refused() {
    replay("reply", wire::reply);
}

#[test]
fn every_record_decodes_or_is_refused() {
    replay("record", wire::record);
}
