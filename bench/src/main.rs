//! `ringline-bench`: the command line of the load generator. Turns results into text, files and exit codes.
//!
//! Main thread only. Exit codes: 0 all well, 1 a broken promise or a run that could not be done, 2 wrong usage.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use ringline_bench::Failure;
use ringline_bench::cli::{AnyScenario, Cli, Command, RunArgs};
use ringline_bench::compare::{self, cli::Contest};
use ringline_bench::{crowd, floor, html, idle, run, search, storm, torture};
use serde::Serialize;

const EXIT_BROKEN: u8 = 1;
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) if args.search.search => args.fleet.check_single().and_then(|()| search_and_report(&args)),
        Command::Run(args) => match args.scenario {
            AnyScenario::Plain(_) => run_and_report(&args),
            AnyScenario::Crowd(kind) => {
                args.fleet.check_single().and_then(|()| crowd::run(&args, kind)).and_then(|report| {
                    print!("{}", report.table());
                    write_json(args.json.as_deref(), &report)?;
                    Ok(report.clean())
                })
            }
        },
        Command::Idle(args) => idle::idle(&args).and_then(|report| {
            print!("{}", report.table());
            write_json(args.json.as_deref(), &report)?;
            Ok(report.clean())
        }),
        Command::Storm(args) => args.fleet.check_single().and_then(|()| storm::storm(&args)).and_then(|report| {
            print!("{}", report.table());
            write_json(args.json.as_deref(), &report)?;
            Ok(report.clean())
        }),
        Command::Torture(args) => torture::torture(&args),
        Command::Contest(Contest::Floor(args)) => floor::floor(&args),
        Command::Contest(Contest::Compare(args)) => compare::compare(&args),
        Command::Contest(Contest::FloorServer(args)) => floor::serve(&args).map(|never| match never {}),
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
    write_json(args.json.as_deref(), &report)?;
    if let Some(path) = &args.html {
        write(path, html::page(&report).map_err(Failure::Failed)?.as_bytes())?;
    }
    if let Some(path) = &args.hdr {
        let facts = report.machine.rows().into_iter().map(|(name, value)| format!("{name}: {value}"));
        let comments: Vec<String> =
            [report.title(), format!("commit: {}", report.commit)].into_iter().chain(facts).collect();
        let log = report.detail.intervals.log(report.detail.since, &comments);
        write(path, &log.map_err(|error| Failure::Failed(format!("interval log: {error}")))?)?;
    }
    Ok(report.clean())
}

/// Whether no step broke a promise.
fn search_and_report(args: &RunArgs) -> Result<bool, Failure> {
    let report = search::search(args, |line| println!("{line}"))?;
    println!("{}", report.summary());
    if !report.valid {
        println!("INVALID: {}", report.why_invalid());
    }
    write_json(args.json.as_deref(), &report)?;
    if let Some(path) = &args.html {
        write(path, html::search_page(&report).map_err(Failure::Failed)?.as_bytes())?;
    }
    Ok(!report.broken)
}

fn write_json(path: Option<&Path>, report: &impl Serialize) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string(report).map_err(|error| Failure::Failed(format!("JSON: {error}")))?;
    write(path, (text + "\n").as_bytes())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let written = std::fs::write(path, bytes);
    written.map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))
}
