//! `ringline cluster partitions`: who owns what and who should, as a running node sees it. Runs on the main thread of a command.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use clap::Args;
use serde_json::Value;

use super::{AskArgs, OUT_OF_DATE, columns, say};

/// Something is not where it should be.
const EXIT_MOVING: u8 = 2;
/// Shown for an owner that is not there.
const NOBODY: &str = "nobody";

#[derive(Debug, Args)]
pub struct PartitionsArgs {
    /// Every partition, those beside each other that are alike in one line, instead of how many each node owns.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    ask: AskArgs,
}

/// One partition, as the node tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    partition: u64,
    epoch: u64,
    owner: String,
    wanted: String,
    state: String,
}

/// Runs the command. Exit code 2: something is not where it should be. Errors are one line.
pub fn run(args: &PartitionsArgs) -> Result<u8, String> {
    let (body, answer) = args.ask.ask("/partitions")?;
    let rows = rows(&answer);
    let table = if args.all { whole(&rows) } else { summary(&rows) };
    let old = if answer["current"].as_bool() == Some(true) { "" } else { OUT_OF_DATE };
    let text = if args.ask.json { body } else { format!("{table}{old}") };
    say(&text);
    Ok(if is_settled(&answer, &rows) { 0 } else { EXIT_MOVING })
}

/// Whether the node with this admin address sees everything where it should be.
pub(super) fn are_settled(admin: SocketAddr) -> bool {
    let Ok(body) = super::fetch(admin, "/partitions") else { return false };
    serde_json::from_str(&body).is_ok_and(|answer| is_settled(&answer, &rows(&answer)))
}

fn is_settled(answer: &Value, rows: &[Row]) -> bool {
    answer["current"].as_bool() == Some(true) && !rows.is_empty() && rows.iter().all(|row| row.state == "served")
}

fn rows(answer: &Value) -> Vec<Row> {
    let row = |row: &Value| {
        let number = |key: &str| row[key].as_u64().unwrap_or(0);
        let text = |key: &str| row[key].as_str().unwrap_or(NOBODY).to_owned();
        let (partition, epoch) = (number("partition"), number("epoch"));
        Row { partition, epoch, owner: text("owner"), wanted: text("wanted"), state: text("state") }
    };
    answer["partitions"].as_array().into_iter().flatten().map(row).collect()
}

/// How many partitions each owner has for whom, and with which epochs.
fn summary(rows: &[Row]) -> String {
    let mut groups: BTreeMap<(&str, &str, &str), (u64, u64, u64)> = BTreeMap::new();
    for row in rows {
        let (count, low, high) = groups.entry((&row.owner, &row.wanted, &row.state)).or_insert((0, u64::MAX, 0));
        (*count, *low, *high) = (*count + 1, (*low).min(row.epoch), (*high).max(row.epoch));
    }
    let mut table = vec![["OWNER", "SHOULD OWN", "STATE", "PARTITIONS", "EPOCHS"].map(str::to_owned)];
    for ((owner, wanted, state), (count, low, high)) in groups {
        table.push([owner.to_owned(), wanted.to_owned(), state.to_owned(), count.to_string(), range(low, high)]);
    }
    columns(&table)
}

fn whole(rows: &[Row]) -> String {
    let mut table = vec![["PARTITIONS", "EPOCH", "OWNER", "SHOULD OWN", "STATE"].map(str::to_owned)];
    let alike = |one: &Row, next: &Row| {
        let follows = one.partition + 1 == next.partition;
        follows && Row { partition: next.partition, ..one.clone() } == *next
    };
    for group in rows.chunk_by(alike) {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
        let Row { epoch, owner, wanted, state, .. } = first.clone();
        table.push([range(first.partition, last.partition), epoch.to_string(), owner, wanted, state]);
    }
    columns(&table)
}

fn range(low: u64, high: u64) -> String {
    if low == high { low.to_string() } else { format!("{low}-{high}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_counted_by_owner_and_listed_in_ranges() {
        let partition = |at: u64, epoch: u64, owner: Option<&str>, state: &str| serde_json::json!({ "partition": at, "epoch": epoch, "owner": owner, "wanted": "a", "state": state });
        let told = [
            partition(0, 3, Some("a"), "served"),
            partition(1, 3, Some("a"), "served"),
            partition(2, 5, Some("a"), "served"),
            partition(3, 1, Some("b"), "moving"),
            partition(4, 0, None, "free"),
        ];
        let rows = rows(&serde_json::json!({ "partitions": told }));
        let lines = |text: String| -> Vec<Vec<String>> {
            text.lines().skip(1).map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
        };
        assert_eq!(
            lines(summary(&rows)),
            [["a", "a", "served", "3", "3-5"], ["b", "a", "moving", "1", "1"], ["nobody", "a", "free", "1", "0"]]
        );
        assert_eq!(
            lines(whole(&rows)),
            [
                ["0-1", "3", "a", "a", "served"],
                ["2", "5", "a", "a", "served"],
                ["3", "1", "b", "a", "moving"],
                ["4", "0", "nobody", "a", "free"],
            ]
        );
    }
}
