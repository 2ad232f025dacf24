//! Regenerates `schema/src/generated` from `schema/fbs`, or with `--check` compares and exits 1 when they differ.
//!
//! flatc's Rust output and the `flatbuffers` crate must be of one version. Debian's flatc is years older, so the
//! compiler is built from the source that the `flatc-fork` crate vendors (25.12.19).

use std::path::Path;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let check = std::env::args().any(|argument| argument == "--check");
    match run(check) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("flatgen: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(check: bool) -> Result<(), String> {
    // Asked at run time: a program built in another checkout must not look there.
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    let schema = Path::new(&folder).join("..");
    let source = schema.join("fbs/wire.fbs");
    let kept = schema.join("src/generated/wire_generated.rs");
    let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
    let status = Command::new(flatc_fork::flatc())
        .args(["--rust", "--gen-all", "-o"])
        .arg(folder.path())
        .arg(&source)
        .status()
        .map_err(|error| format!("cannot run flatc: {error}"))?;
    if !status.success() {
        return Err(format!("flatc refused {}", source.display()));
    }
    let fresh = std::fs::read(folder.path().join("wire_generated.rs")).map_err(|error| error.to_string())?;
    if !check {
        std::fs::write(&kept, fresh).map_err(|error| error.to_string())?;
        println!("wrote {}", kept.display());
        return Ok(());
    }
    if std::fs::read(&kept).map_err(|error| format!("{}: {error}", kept.display()))? != fresh {
        return Err(format!(
            "{} is not what {} generates: run flatgen without --check",
            kept.display(),
            source.display()
        ));
    }
    println!("generated code is up to date");
    Ok(())
}
