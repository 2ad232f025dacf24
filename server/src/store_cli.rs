//! `ringline store`: check, repair, export and back up a data folder. Runs on the main thread of a command; a progress
//! bar goes to the standard error when that is a terminal.
//!
//! Exit codes: 0 all is well (or was mended), 1 the command could not do its work, 2 damage was found and is still there.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ringline_schema::ids::ConversationId;
use ringline_schema::record::StoredMessage;
use ringline_schema::rows::{Row, RowKey, RowValue};
use ringline_store::embedded::backup::{BackupReport, backup};
use ringline_store::embedded::offline::{self, CheckReport, Exported, IndexState, Progress, RepairReport};
use ringline_store::embedded::{Damage, Torn};
use serde_json::{Value, json};

use crate::cli::ConfigArgs;

/// Damage was found and is still there.
pub const EXIT_DAMAGED: u8 = 2;
/// Bytes of an export that are gathered before they are written.
const EXPORT_BUFFER_BYTES: usize = 1024 * 1024;
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
    /// Write all users, conversations, messages and rows as JSON lines. Password hashes are left out.
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
            let lines = export(data_dir, args.out.as_deref(), watch)?;
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
    Ok(config.load()?.0.data_dir)
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

fn export(data_dir: &Path, out: Option<&Path>, watch: offline::Watch<'_>) -> Result<u64, String> {
    let out: Box<dyn Write> = match out {
        Some(path) => Box::new(File::create_new(path).map_err(|error| format!("{}: {error}", path.display()))?),
        None => Box::new(std::io::stdout().lock()),
    };
    let mut out = BufWriter::with_capacity(EXPORT_BUFFER_BYTES, out);
    let mut lines = 0;
    let mut each = |exported| {
        lines += 1;
        writeln!(out, "{}", line(&exported))
    };
    offline::export(data_dir, &mut each, watch).map_err(|error| error.to_string())?;
    out.flush().map_err(|error| error.to_string())?;
    Ok(lines)
}

fn id(conversation: ConversationId) -> String {
    format!("{conversation:?}")
}

fn line(exported: &Exported) -> Value {
    match exported {
        Exported::User(user) => json!({
            "type": "user",
            "name": user.name.as_str(),
            "created_ms": user.created_ms,
            "password": user.password_hash.is_some(),
        }),
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

fn message_line(message: &StoredMessage) -> Value {
    let mut value = json!({
        "type": "message",
        "conversation": id(message.conversation),
        "seq": message.seq.0,
        "from": message.from.as_str(),
        "to": message.to.as_str(),
        "device": message.device.0,
        "client_seq": message.client_seq,
        "time_ms": message.time_ms,
        "kind": format!("{:?}", message.kind).to_lowercase(),
    });
    let Some(fields) = value.as_object_mut() else { return value };
    match std::str::from_utf8(&message.body) {
        Ok(text) => fields.insert("body".into(), text.into()),
        Err(_) => fields.insert("body_base64".into(), BASE64_STANDARD.encode(&message.body).into()),
    };
    if let Some(extra) = &message.extra {
        let names = |names: &[ringline_schema::ids::UserName]| -> Vec<String> {
            names.iter().map(|name| name.as_str().to_owned()).collect()
        };
        let change = extra.change.as_ref().map(|change| {
            let what = format!("{:?}", change.what).to_lowercase();
            json!({ "what": what, "users": names(&change.users), "text": change.text, "number": change.number })
        });
        fields.insert("mentions".into(), names(&extra.mentions).into());
        fields.insert("mention_all".into(), extra.mention_all.into());
        fields.insert("refers".into(), extra.refers.0.into());
        fields.insert("state".into(), format!("{:?}", extra.state).to_lowercase().into());
        fields.insert("amended_ms".into(), extra.amended_ms.into());
        fields.insert("change".into(), change.unwrap_or(Value::Null));
    }
    value
}

/// A row by the names of its key and its value; names and numbers only, so a table that is added shows up by itself.
fn row_line(row: &Row) -> Value {
    let (table, user, conversation, more) = match &row.key {
        RowKey::Group(conversation) => ("group", None, Some(*conversation), Value::Null),
        RowKey::Member(conversation, user) => ("member", Some(user), Some(*conversation), Value::Null),
        RowKey::Receipt(conversation, user) => ("receipt", Some(user), Some(*conversation), Value::Null),
        RowKey::Device(user, device) => ("device", Some(user), None, json!(device.0)),
        RowKey::Setting(user) => ("setting", Some(user), None, Value::Null),
        RowKey::Block(user, other) => ("block", Some(user), None, json!(other.as_str())),
        RowKey::Wrote(conversation, user) => ("wrote", Some(user), Some(*conversation), Value::Null),
        RowKey::Amended(conversation, seq) => ("amended", None, Some(*conversation), json!(seq.0)),
        RowKey::Mark(user, conversation) => ("mark", Some(user), Some(*conversation), Value::Null),
        RowKey::Hidden(user, conversation, seq) => ("hidden", Some(user), Some(*conversation), json!(seq.0)),
    };
    json!({
        "type": "row",
        "table": table,
        "user": user.map(|user| user.as_str()),
        "conversation": conversation.map(id),
        "key": more,
        "value": row.value.as_ref().map(value_json),
    })
}

fn value_json(value: &RowValue) -> Value {
    let choice = |debug: String| debug.to_lowercase();
    match value {
        RowValue::Group(group) => json!({
            "name": group.name.as_str(),
            "title": group.title,
            "join": choice(format!("{:?}", group.join)),
            "owner": group.owner.as_str(),
            "created_ms": group.created_ms,
            "dissolved": group.dissolved.0,
        }),
        RowValue::Member(member) => {
            let ranges: Vec<_> = member
                .ranges
                .iter()
                .map(|range| json!({ "join": range.join.0, "leave": range.leave.map(|leave| leave.0) }))
                .collect();
            json!({
                "standing": choice(format!("{:?}", member.standing)),
                "role": choice(format!("{:?}", member.role)),
                "since_ms": member.since_ms,
                "muted_until_ms": member.muted_until_ms,
                "ranges": ranges,
            })
        }
        RowValue::Receipt(receipt) => json!({ "delivered": receipt.delivered.0, "read": receipt.read.0 }),
        RowValue::Device(device) => json!({
            "kind": choice(format!("{:?}", device.kind)),
            "agent": device.agent,
            "first_ms": device.first_ms,
            "last_ms": device.last_ms,
        }),
        RowValue::Setting(setting) => json!({
            "messages_from": choice(format!("{:?}", setting.messages_from)),
            "visible": setting.visible,
            "status": setting.status,
            "last_seen_ms": setting.last_seen_ms,
            "deleted_ms": setting.deleted_ms,
        }),
        RowValue::Amended(amended) => json!({
            "state": choice(format!("{:?}", amended.state)),
            "by": amended.by.0,
            "at_ms": amended.at_ms,
        }),
        RowValue::Mark(mark) => json!({ "pinned": mark.pinned, "muted_until_ms": mark.muted_until_ms }),
        RowValue::Block | RowValue::Hidden | RowValue::Wrote => Value::Null,
    }
}
