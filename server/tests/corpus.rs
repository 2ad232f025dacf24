//! The corpus of the configuration's fuzz target, replayed: each file, each of its beginnings, each of its bytes changed.

#[path = "../../fuzz/targets/config.rs"]
mod config;

use std::path::PathBuf;

use ringline::config::Config;

/// Bytes that mean something in TOML, and one that is no text.
const OTHERS: &[u8] = b"=\"[]#\n-.9\xff";

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/config")
}

#[test]
fn every_configuration_is_one_or_says_what_is_wrong() {
    let files: Vec<_> = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() > 3);
    for path in files {
        let bytes = std::fs::read(&path).unwrap();
        (0..=bytes.len()).for_each(|end| config::config(&bytes[..end]));
        let mut changed = bytes.clone();
        for at in 0..bytes.len() {
            for other in OTHERS {
                changed[at] = *other;
                config::config(&changed);
            }
            changed[at] = bytes[at];
        }
    }
}

#[test]
fn the_corpus_holds_what_is_right_and_what_is_wrong() {
    let read = |name: &str| std::fs::read_to_string(folder().join(name)).unwrap();
    assert!(Config::parse(&read("right")).is_ok());
    for wrong in ["no_toml", "no_key", "out_of_bounds", "conflict"] {
        assert!(Config::parse(&read(wrong)).is_err(), "{wrong}");
    }
}
