//! `ringline doctor` of the real binary, on whatever machine the tests run.

mod common;

use ringline::config::KEYS;
use ringline::doctor::checks::CHECKS;
use ringline::doctor::selftest::PROBES;
use serde_json::Value;

use common::run;

/// Output and exit code of `doctor` on a folder of its own.
fn doctor(more: &[&str]) -> (String, i32) {
    let folder = tempfile::tempdir().unwrap();
    let data_dir = folder.path().join("not").join("yet");
    let mut arguments = vec!["doctor", "--listen", "127.0.0.1:0", "--data-dir", data_dir.to_str().unwrap()];
    arguments.extend(more);
    let output = run(&arguments);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(!data_dir.exists(), "the doctor made the data directory");
    (String::from_utf8(output.stdout).unwrap(), output.status.code().unwrap())
}

#[test]
fn json_has_every_check_and_measurement() {
    let (text, code) = doctor(&["--json"]);
    let report: Value = serde_json::from_str(&text).unwrap();
    let named = |list: &str, name: &str| {
        let lines = report[list].as_array().unwrap();
        lines.iter().find(|line| line["name"] == name).unwrap_or_else(|| panic!("{name} is missing: {text}")).clone()
    };
    let verdicts = ["ok", "note", "warn", "fail"];
    let mut failed = false;
    for check in CHECKS {
        let line = named("checks", check.name);
        for key in ["reads", "finding", "why"] {
            assert!(!line[key].as_str().unwrap().is_empty(), "{key}: {line}");
        }
        assert!(verdicts.contains(&line["verdict"].as_str().unwrap()), "{line}");
        assert!(line["mend"].is_string(), "{line}");
        failed |= line["verdict"] == "fail";
    }
    for probe in PROBES {
        let line = named("self_test", probe.name);
        assert!(verdicts.contains(&line["verdict"].as_str().unwrap()), "{line}");
        assert!(line["latency"]["p99_us"].is_u64() || line["latency"].is_null(), "{line}");
        failed |= line["verdict"] == "fail";
    }
    assert_eq!(code, i32::from(failed), "{text}");
    assert_eq!(report["verdict"] == "fail", failed);
}

#[test]
fn the_table_has_a_line_for_each_and_a_sum() {
    let (text, _) = doctor(&["--cores", "1"]);
    for name in CHECKS.iter().map(|check| check.name).chain(PROBES.iter().map(|probe| probe.name)) {
        let is_there = text.lines().any(|line| line.split_whitespace().nth(1) == Some(name));
        assert!(is_there, "{name} is missing:\n{text}");
    }
    assert!(text.contains(" failures") && !text.contains('\x1b'), "{text}");
}

#[test]
fn an_address_of_elsewhere_fails() {
    let (text, code) = doctor(&["--listen", "192.0.2.1:9700"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.lines().any(|line| line.starts_with("FAIL") && line.contains("192.0.2.1")), "{text}");
}

#[test]
fn a_core_that_is_not_there_is_refused() {
    let (code, line) = common::complaint(&["doctor", "--cores", "4000-4001"]);
    assert_eq!(code, 1);
    assert!(line.contains("core 4000") && line.contains("--cores"), "{line}");
}

#[test]
fn the_tuning_page_has_every_check_measurement_and_key() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tuning.md");
    let page = std::fs::read_to_string(path).unwrap();
    let checks = CHECKS.iter().map(|check| check.name);
    let names = checks.chain(PROBES.iter().map(|probe| probe.name)).chain(KEYS.iter().map(|key| key.name));
    let missing: Vec<&str> = names.filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "tuning.md does not name {missing:?}");
}

#[test]
fn the_tuning_page_has_every_limit() {
    let read = |path: &str| {
        std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)).unwrap()
    };
    let (page, limits) = (read("tuning.md"), read("schema/src/limits.rs"));
    let names = limits.lines().filter_map(|line| line.strip_prefix("pub const ")?.split(':').next());
    // The one that is no limit.
    let names: Vec<&str> = names.filter(|name| *name != "FRAME_HEADER_BYTES").collect();
    assert!(names.len() > 30, "{names:?}");
    let missing: Vec<_> = names.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "tuning.md does not name {missing:?}");
}
