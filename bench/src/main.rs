//! `ringline-bench`: the command line of the load generator. Turns results into text, files and exit codes.
//!
//! Main thread only. Exit codes: 0 all well, 1 a broken promise or a run that could not be done, 2 wrong usage.

use std::process::ExitCode;

use clap::Parser;
use ringline_bench::Failure;
use ringline_bench::cli::{Cli, Command, RunArgs};
use ringline_bench::run;

const EXIT_BROKEN: u8 = 1;
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run_and_report(&args),
        Command::Idle(args) => run::idle(&args).map(|(text, clean)| {
            print!("{text}");
            clean
        }),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_BROKEN),
        Err(failure) => {
            eprintln!("ringline-bench: {failure}");
            ExitCode::from(match failure {
                Failure::Usage(_) => EXIT_USAGE,
                Failure::Failed(_) => EXIT_BROKEN,
            })
        }
    }
}

/// Whether the run was clean.
fn run_and_report(args: &RunArgs) -> Result<bool, Failure> {
    let report = run::run(args)?;
    print!("{}", report.table());
    if let Some(path) = &args.json {
        let text = report.json().map_err(|error| Failure::Failed(format!("JSON: {error}")))?;
        let written = std::fs::write(path, text + "\n");
        written.map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))?;
    }
    Ok(report.clean())
}
