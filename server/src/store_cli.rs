//! `ringline store`: check, repair, export and back up a data folder. Runs on the main thread of a command; a progress
//! bar goes to the standard error when that is a terminal.
//!
//! Exit codes: 0 all is well (or was mended), 1 the command could not do its work, 2 damage was found and is still there.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ringline_core::export::Exporter;
use ringline_core::export::lines::{id, message_line, row_line, user_line};
use ringline_schema::ids::UserName;
use ringline_store::embedded::backup::{BackupReport, backup};
use ringline_store::embedded::offline::{self, CheckReport, Exported, IndexState, Progress, RepairReport};
use ringline_store::embedded::{Damage, EmbeddedOptions, EmbeddedStore, Torn};
use ringline_store::{LoadToken, Store, StoreEvent};
use serde_json::{Value, json};

use crate::cli::ConfigArgs;
use crate::config::StoreKind;

/// Damage was found and is still there.
pub const EXIT_DAMAGED: u8 = 2;
/// Bytes of an export that are gathered before they are written.
const EXPORT_BUFFER_BYTES: usize = 1024 * 1024;
/// Time between two looks for an answer.
const EXPORT_PAUSE: Duration = Duration::from_micros(50);
/// Redraws of the progress bar.
const DRAWS_PER_S: u8 = 10;

/// What to do with the folder; but for a backup the server must not be running.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Read all logs and the whole index and say what is damaged. Changes no log. Exit code 2: something is.
    Check(ReportArgs),
    /// Rebuild the index from the logs. A damaged log is left alone unless --skip-damaged is given. Exit code 2: it was.
    Repair(RepairArgs),
    /// Copy the folder to another one that a server can start from. The server may be running.
    Backup(BackupArgs),
    /// Write all users, conversations, messages and rows as JSON lines, or all that one user is shown. Password hashes are
    /// left out.
    Export(ExportArgs),
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
pub struct RepairArgs {
    /// Leave out what can't be read. It is lost; the damaged files stay beside the new ones.
    #[arg(long)]
    skip_damaged: bool,
    #[command(flatten)]
    report: ReportArgs,
}

#[derive(Debug, Args)]
pub struct BackupArgs {
    /// An empty or new folder.
    #[arg(value_name = "DIR")]
    to: PathBuf,
    #[command(flatten)]
    report: ReportArgs,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Where to write; the standard output otherwise.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Only what this user is shown: account, settings, devices, blocks, conversations and their messages.
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// Runs one of them. The result is the exit code; an error is one line.
pub fn run(command: StoreCommand) -> Result<u8, String> {
    let data_dir = &data_dir(&command)?;
    let bar = Bar::new();
    let watch = &mut |progress| bar.show(progress);
    match command {
        StoreCommand::Check(args) => {
            let report = offline::check(data_dir, watch).map_err(|error| error.to_string())?;
            bar.end();
            say(args.json, &check_json(&report), &check_text(&report));
            Ok(if report.is_whole() { 0 } else { EXIT_DAMAGED })
        }
        StoreCommand::Repair(args) => {
            let report = offline::repair(data_dir, args.skip_damaged, watch).map_err(|error| error.to_string())?;
            bar.end();
            say(args.report.json, &repair_json(&report), &repair_text(&report));
            Ok(if report.rebuilt.is_some() { 0 } else { EXIT_DAMAGED })
        }
        StoreCommand::Backup(args) => {
            let report = backup(data_dir, &args.to, watch).map_err(|error| error.to_string())?;
            bar.end();
            let BackupReport { logs, segments, bytes, records } = report;
            let text = format!("{records} records, {bytes} bytes in {segments} segments of {logs} logs\n");
            let json = json!({ "records": records, "bytes": bytes, "segments": segments, "logs": logs });
            say(args.report.json, &json, &text);
            Ok(0)
        }
        StoreCommand::Export(args) => {
            let lines = export(data_dir, &args, watch)?;
            bar.end();
            eprintln!("{lines} lines");
            Ok(0)
        }
    }
}

fn data_dir(command: &StoreCommand) -> Result<PathBuf, String> {
    let config = match command {
        StoreCommand::Check(args) => &args.config,
        StoreCommand::Repair(args) => &args.report.config,
        StoreCommand::Backup(args) => &args.report.config,
        StoreCommand::Export(args) => &args.config,
    };
    let config = config.load()?.0;
    if config.store_kind == StoreKind::Postgres {
        return Err("store.kind is postgres: `ringline store` is for the folder of the embedded store; \
             use pg_dump and pg_amcheck on the database"
            .to_owned());
    }
    Ok(config.data_dir)
}

/// A bar for work with a known end, a spinner with a count for other work; nothing when nobody looks.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        // Hidden by the library when the standard error is no terminal.
        Self(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(DRAWS_PER_S)))
    }

    fn show(&self, progress: Progress) {
        let known = "{msg}: {wide_bar} {decimal_bytes}/{decimal_total_bytes}, {eta} left";
        let template = if progress.total > 0 { known } else { "{spinner} {msg}: {human_pos}" };
        if self.0.message() != progress.what {
            // The templates are fixed; were one wrong, the default style would serve.
            self.0.set_style(ProgressStyle::with_template(template).unwrap_or(ProgressStyle::default_bar()));
            self.0.set_message(progress.what);
        }
        if progress.total > 0 {
            self.0.set_length(progress.total);
        }
        self.0.set_position(progress.done);
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.end();
    }
}

fn say(as_json: bool, json: &Value, text: &str) {
    let text = if as_json { format!("{json}\n") } else { text.to_owned() };
    // A reader that has gone away has read enough.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

fn check_text(report: &CheckReport) -> String {
    let CheckReport { logs, segments, bytes, records, messages, .. } = report;
    let mut text = format!("{logs} logs, {segments} segments, {bytes} bytes, {records} records, {messages} messages\n");
    text.push_str(&damage_text(&report.damage, &report.torn));
    if let Some(rows) = report.checkpoint_rows {
        text.push_str(&format!(
            "checkpoint: {rows} rows; {} conversations do not begin at 1 any more\n",
            report.floors
        ));
    }
    match &report.index {
        IndexState::Missing => text.push_str("index: none; the next start makes it from the logs\n"),
        IndexState::Whole { rows, messages, behind } => {
            let more = if *behind { "; the next start reads the rest from the logs" } else { "" };
            text.push_str(&format!("index: {rows} rows, {messages} messages{more}\n"));
        }
        IndexState::Damaged { defects, more } => {
            defects.iter().for_each(|defect| text.push_str(&format!("index: {defect}\n")));
            if *more > 0 {
                text.push_str(&format!("index: and {more} more\n"));
            }
            text.push_str("`ringline store repair` makes the index anew from the logs\n");
        }
    }
    if report.foreign {
        text.push_str("a newer version wrote in these logs: use that one\n");
    } else if !report.damage.is_empty() {
        text.push_str(
            "restore the folder from a backup, or let `ringline store repair --skip-damaged` leave out what is damaged\n",
        );
    } else if report.is_whole() {
        text.push_str("nothing is damaged\n");
    }
    text
}

fn damage_text(damage: &[Damage], torn: &[Torn]) -> String {
    let mut text = String::new();
    for Damage { file, offset, bytes, what } in damage {
        let size = if *bytes == 0 { "an unknown number of".to_owned() } else { bytes.to_string() };
        text.push_str(&format!("damaged: {} at byte {offset}, {size} bytes: {what}\n", file.display()));
    }
    for Torn { file, offset, bytes } in torn {
        let file = file.display();
        text.push_str(&format!(
            "{file} at byte {offset}: {bytes} bytes of a commit that nobody was told of; no damage\n"
        ));
    }
    text
}

fn damage_json(damage: &[Damage]) -> Value {
    let one = |Damage { file, offset, bytes, what }: &Damage| json!({ "file": file.display().to_string(), "offset": offset, "bytes": bytes, "what": what });
    damage.iter().map(one).collect()
}

fn torn_json(torn: &[Torn]) -> Value {
    let one = |Torn { file, offset, bytes }: &Torn| json!({ "file": file.display().to_string(), "offset": offset, "bytes": bytes });
    torn.iter().map(one).collect()
}

fn check_json(report: &CheckReport) -> Value {
    let index = match &report.index {
        IndexState::Missing => json!({ "state": "missing" }),
        IndexState::Whole { rows, messages, behind } => {
            json!({ "state": "whole", "rows": rows, "messages": messages, "behind": behind })
        }
        IndexState::Damaged { defects, more } => {
            json!({ "state": "damaged", "defects": defects, "more_defects": more })
        }
    };
    json!({
        "whole": report.is_whole(),
        "logs": report.logs,
        "segments": report.segments,
        "bytes": report.bytes,
        "records": report.records,
        "messages": report.messages,
        "damage": damage_json(&report.damage),
        "torn": torn_json(&report.torn),
        "newer_version": report.foreign,
        "checkpoint_rows": report.checkpoint_rows,
        "conversations_cut": report.floors,
        "index": index,
    })
}

fn repair_text(report: &RepairReport) -> String {
    let mut text = damage_text(&report.damage, &report.torn);
    let Some(rebuilt) = &report.rebuilt else {
        text.push_str("nothing was changed: --skip-damaged leaves out what is damaged; it is lost then\n");
        return text;
    };
    if !report.damage.is_empty() {
        text.push_str("what is damaged was left out: it is lost\n");
    }
    for file in &report.kept {
        text.push_str(&format!("the damaged file is kept as {}\n", file.display()));
    }
    for hole in &report.holes {
        let offline::Hole { conversation, first, last } = hole;
        text.push_str(&format!("lost: messages {first} to {last} of conversation {conversation}, shown as deleted\n"));
    }
    if !report.damage.is_empty() {
        text.push_str("messages at the end of a conversation, users, groups and settings may be among what is lost\n");
    }
    text.push_str(&format!("the index was made anew from {} records\n", rebuilt.replayed_records));
    text
}

fn repair_json(report: &RepairReport) -> Value {
    let hole = |hole: &offline::Hole| json!({ "conversation": id(hole.conversation), "first": hole.first.0, "last": hole.last.0 });
    json!({
        "repaired": report.rebuilt.is_some(),
        "damage": damage_json(&report.damage),
        "torn": torn_json(&report.torn),
        "skipped": report.skipped,
        "kept": report.kept.iter().map(|file| file.display().to_string()).collect::<Vec<_>>(),
        "lost_messages": report.holes.iter().map(hole).collect::<Vec<_>>(),
        "records": report.rebuilt.as_ref().map(|rebuilt| rebuilt.replayed_records),
    })
}

fn export(data_dir: &Path, args: &ExportArgs, watch: offline::Watch<'_>) -> Result<u64, String> {
    let out: Box<dyn Write> = match &args.out {
        Some(path) => Box::new(File::create_new(path).map_err(|error| format!("{}: {error}", path.display()))?),
        None => Box::new(std::io::stdout().lock()),
    };
    let mut out = BufWriter::with_capacity(EXPORT_BUFFER_BYTES, out);
    let mut lines = 0;
    match &args.user {
        Some(user) => lines = export_user(data_dir, user, &mut out, watch)?,
        None => {
            let mut each = |exported| {
                lines += 1;
                writeln!(out, "{}", line(&exported))
            };
            offline::export(data_dir, &mut each, watch).map_err(|error| error.to_string())?;
        }
    }
    out.flush().map_err(|error| error.to_string())?;
    Ok(lines)
}

/// The pages of an EXPORT, asked of the store itself.
fn export_user(data_dir: &Path, user: &str, out: &mut dyn Write, watch: offline::Watch<'_>) -> Result<u64, String> {
    let user = UserName::new(user).map_err(|error| error.to_string())?;
    offline::is_data_folder(data_dir).map_err(|error| error.to_string())?;
    let opened = EmbeddedStore::open(data_dir, 1, EmbeddedOptions::default()).map_err(|error| error.to_string())?;
    let mut store = opened.0.into_iter().next().ok_or("no store")?;
    let (mut cursor, mut lines) = (String::new(), 0);
    loop {
        let mut exporter = Exporter::new(user.clone(), &cursor, EXPORT_BUFFER_BYTES).ok_or("a bad cursor")?;
        while let Some(query) = exporter.question() {
            store.load(LoadToken(0), query).map_err(|error| error.to_string())?;
            let mut events = Vec::new();
            while events.is_empty() {
                std::thread::sleep(EXPORT_PAUSE);
                store.poll(&mut events);
            }
            for event in events {
                if let StoreEvent::Loaded(_, answer) = event {
                    exporter.take(answer).map_err(|code| format!("{user}: {code}"))?;
                }
            }
        }
        let (page, next) = exporter.finish();
        lines += page.iter().filter(|byte| **byte == b'\n').count() as u64;
        watch(Progress { what: "exporting", done: lines, total: 0 });
        out.write_all(&page).map_err(|error| error.to_string())?;
        if next.is_empty() {
            break;
        }
        cursor = next;
    }
    store.close().map_err(|error| error.to_string())?;
    Ok(lines)
}

fn line(exported: &Exported) -> Value {
    match exported {
        Exported::User(user) => user_line(user),
        Exported::Conversation { id: conversation, members, created_ms, first, head } => json!({
            "type": "conversation",
            "id": id(*conversation),
            "members": members.as_ref().map(|members| members.each_ref().map(|name| name.as_str())),
            "created_ms": created_ms,
            "first": first.0,
            "head": head.0,
        }),
        Exported::Message(message) => message_line(message),
        Exported::Row(row) => row_line(row),
    }
}
