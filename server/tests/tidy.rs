//! The house rules that a compiler does not know: floors, file sizes, module docs, where `unsafe` may stand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Package folder, its crate name, and the project crates it may import: imports only go down.
const FLOORS: &[(&str, &str, &[&str])] = &[
    ("schema", "ringline_schema", &[]),
    ("cluster", "ringline_cluster", &["ringline_schema"]),
    ("client", "ringline_client", &["ringline_schema"]),
    ("server/store", "ringline_store", &["ringline_schema"]),
    // The store is a development dependency of the core: its memory backend serves the simulation.
    ("server/core", "ringline_core", &["ringline_schema", "ringline_cluster", "ringline_store"]),
    (
        "server",
        "ringline",
        &["ringline_schema", "ringline_cluster", "ringline_client", "ringline_store", "ringline_core"],
    ),
    (
        "bench",
        "ringline_bench",
        &["ringline_schema", "ringline_core", "ringline_cluster", "ringline_store", "ringline_client"],
    ),
];

/// What in `bench` may import more than the schema, and what of: the first that fits decides.
const BENCH_IMPORTS: &[(&str, &[&str])] = &[
    // What judges shares no code with what it judges.
    ("bench/src/checker", &[]),
    ("bench/src/sim", &["ringline_schema", "ringline_core", "ringline_cluster", "ringline_store", "ringline_client"]),
    ("bench/src/torture", &["ringline_client"]),
    ("bench/src/observed.rs", &["ringline_client"]),
    ("bench/src/", &["ringline_schema"]),
    ("bench/", &["ringline_schema", "ringline_core", "ringline_cluster"]),
];

/// The only files that may hold `unsafe`.
const UNSAFE_FILES: &[&str] = &[
    "server/store/src/embedded/ring.rs",
    "server/src/net/ring.rs",
    "server/src/net/buffers.rs",
    "bench/src/floor_ring.rs",
    // A prototype beside the server's own wake, to compare.
    "server/benches/lane_hop.rs",
    // Not the data path: the trait of allocators is unsafe, and counting allocations is a feature for measuring.
    "server/src/allocations.rs",
];

const FILE_CODE_LINES_MAX: usize = 700;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every hand-written Rust file, by its path from the root.
fn sources() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders: Vec<_> = FLOORS.iter().map(|(folder, ..)| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !name.starts_with('.') && name != "target" {
                folders.push(path);
            } else if name.ends_with(".rs") && !name.ends_with("_generated.rs") {
                let key = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.insert(key, std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(found.len() > 30, "the walk found the tree");
    found
}

/// Lines that are neither blank nor only a comment.
fn code_lines(text: &str) -> usize {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")).count()
}

fn package_of(path: &str) -> &'static (&'static str, &'static str, &'static [&'static str]) {
    let inside = FLOORS.iter().filter(|(folder, ..)| path.starts_with(&format!("{folder}/")));
    inside.max_by_key(|(folder, ..)| folder.len()).unwrap()
}

fn report(rule: &str, broken: Vec<String>) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

#[test]
fn every_file_begins_with_what_it_is_for() {
    let without = sources().into_iter().filter(|(_, text)| !text.starts_with("//! ")).map(|(path, _)| path).collect();
    report("a file begins with a `//!` comment", without);
}

#[test]
fn no_file_is_longer_than_it_may_be() {
    let long = |(path, text): (String, String)| {
        let lines = code_lines(&text);
        (lines > FILE_CODE_LINES_MAX).then(|| format!("{path}: {lines} code lines"))
    };
    report("a file has at most 700 code lines", sources().into_iter().filter_map(long).collect());
}

#[test]
fn imports_only_go_down_the_floors() {
    let mut broken = Vec::new();
    for (path, text) in sources() {
        let (_, own, allowed) = package_of(&path);
        for (_, crate_name, _) in FLOORS {
            // `ringline` alone is also the namespace of the generated tables.
            let imported = text.lines().any(|line| {
                let line = line.trim_start();
                let path = line.strip_prefix("pub ").unwrap_or(line).strip_prefix("use ").unwrap_or_default();
                path.starts_with(&format!("{crate_name}::"))
                    || (*crate_name != "ringline" && line.contains(&format!("{crate_name}::")))
            });
            if imported && crate_name != own && !allowed.contains(crate_name) && !path.ends_with("tidy.rs") {
                broken.push(format!("{path} imports {crate_name}"));
            }
        }
        if path.starts_with("server/core/src") && text.contains("ringline_store::") {
            broken.push(format!("{path} imports the store: only tests of the core may"));
        }
    }
    report("imports only go down", broken);
}

#[test]
fn what_measures_shares_no_code_with_what_is_measured() {
    let mut broken = Vec::new();
    for (path, text) in sources() {
        let Some((_, allowed)) = BENCH_IMPORTS.iter().find(|(prefix, _)| path.starts_with(prefix)) else { continue };
        for (_, crate_name, _) in FLOORS {
            let imported = *crate_name != "ringline" && text.contains(&format!("{crate_name}::"));
            if imported && *crate_name != "ringline_bench" && !allowed.contains(crate_name) {
                broken.push(format!("{path} imports {crate_name}"));
            }
        }
    }
    report("only the simulator drives shards, the checker imports nothing", broken);
}

#[test]
fn manifests_name_no_higher_floor() {
    let mut broken = Vec::new();
    for (folder, own, allowed) in FLOORS {
        let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        for (_, crate_name, _) in FLOORS {
            let dependency = format!("\n{}.workspace", crate_name.replace('_', "-"));
            let dotted = format!("\n{} = ", crate_name.replace('_', "-"));
            let named = manifest.contains(&dependency) || manifest.contains(&dotted);
            if named && crate_name != own && !allowed.contains(crate_name) {
                broken.push(format!("{folder}/Cargo.toml names {crate_name}"));
            }
        }
    }
    report("manifests only name lower floors", broken);
}

#[test]
fn unsafe_stands_only_where_it_is_proven() {
    let mut broken = Vec::new();
    for (path, text) in sources() {
        let used = text.lines().map(str::trim).any(|line| {
            let code = line.split("//").next().unwrap_or_default();
            ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|word| code.contains(word))
        });
        if used && !UNSAFE_FILES.contains(&path.as_str()) && !path.ends_with("tidy.rs") {
            broken.push(path.clone());
        }
        if used && !text.contains("SAFETY:") && !path.ends_with("tidy.rs") {
            broken.push(format!("{path} has no SAFETY comment"));
        }
    }
    report("`unsafe` stands only in the ring and buffer files, with its proof", broken);
}

#[test]
fn every_file_is_in_a_module() {
    let sources = sources();
    let mut lost = Vec::new();
    for path in sources.keys() {
        let (folder, file) = path.rsplit_once('/').unwrap();
        let (above, last) = folder.rsplit_once('/').unwrap_or(("", folder));
        // Crate roots: the compiler finds them by itself.
        let is_root = ["tests", "benches", "examples", "bin", "bins"].contains(&last)
            || (last == "src" && ["lib.rs", "main.rs"].contains(&file))
            || (["tests", "benches", "examples"].iter().any(|kind| above.ends_with(kind)) && file == "main.rs")
            || file == "build.rs";
        if is_root {
            continue;
        }
        let (folder, name) = match file {
            "mod.rs" => (above, last),
            _ => (folder, file.trim_end_matches(".rs")),
        };
        let wanted = format!("mod {name};");
        let said = |(other, text): (&String, &String)| {
            let beside = other.strip_prefix(&format!("{folder}/")).is_some_and(|rest| !rest.contains('/'));
            (beside || *other == format!("{folder}.rs")) && text.lines().any(|line| line.trim_end().ends_with(&wanted))
        };
        let by_path = |text: &String| text.contains(&format!("{file}\"]"));
        if !sources.iter().any(said) && !sources.values().any(by_path) {
            lost.push(path.clone());
        }
    }
    report("a file that no module names is not compiled", lost);
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["todo!(", "unimplemented!(", "dbg!(", "#[ignore"];
    let mut broken = Vec::new();
    for (path, text) in sources() {
        let found = words.iter().filter(|word| text.contains(**word) && !path.ends_with("tidy.rs"));
        broken.extend(found.map(|word| format!("{path}: {word}")));
    }
    report("no stub is left", broken);
}
