//! `ringline cluster`: what a running node says of the others, asked of its admin endpoint ([`partitions`] of who owns what), a
//! node that gives away what it owns ([`drain`]), and a cluster to try ([`demo`]). Runs on the main thread of a command.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;

use crate::cli::ConfigArgs;

mod demo;
mod drain;
mod partitions;

/// How long the node may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest answer: many more links than a cluster can have.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;

#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// The nodes as a running node sees them. Exit code 2: one of them is away.
    Status(AskArgs),
    /// Who owns which partition, as a running node of a cluster of etcd sees it. Exit code 2: something is not where it
    /// should be.
    Partitions(partitions::PartitionsArgs),
    /// Have a node give away all that it owns, over its starts until `undrain`; waits until it owns nothing. Exit code 3: it
    /// still owned something when the waiting ended; the mark stays.
    Drain(drain::DrainArgs),
    /// Let a node that was drained own its part again.
    Undrain(drain::UndrainArgs),
    /// Start a cluster on this machine to try: makes what it needs, prints how to connect, stops all on Ctrl-C.
    Demo(demo::DemoArgs),
}

/// Which node is asked, and how it is shown.
#[derive(Debug, Args)]
pub struct AskArgs {
    /// The node's admin address, IP:PORT; without it admin.listen of its configuration.
    #[arg(long, value_name = "IP:PORT")]
    admin: Option<SocketAddr>,
    /// The whole answer as JSON instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

/// Said where the node can't read how it is now.
const OUT_OF_DATE: &str = "the node can't read the database or etcd: this is how it was before\n";
/// A node is away.
const EXIT_AWAY: u8 = 2;

/// Links to one node, added up over the cores.
#[derive(Debug, Default, PartialEq, Eq)]
struct Line {
    address: String,
    up: u64,
    links: u64,
    for_ms: u64,
    incarnation: u64,
    cores: u64,
    received: u64,
    sent: u64,
    waiting: u64,
    /// It has left the cluster in order, or its lease has ended: nobody waits for it.
    has_left: bool,
}

impl Line {
    fn is_away(&self) -> bool {
        self.up < self.links && !self.has_left
    }
}

/// Runs the command. The result is the exit code; errors are one line.
pub fn run(command: &ClusterCommand) -> Result<u8, String> {
    match command {
        ClusterCommand::Status(args) => status(args),
        ClusterCommand::Partitions(args) => partitions::run(args),
        ClusterCommand::Drain(args) => drain::run(args),
        ClusterCommand::Undrain(args) => drain::undo(args),
        ClusterCommand::Demo(args) => demo::run(args),
    }
}

impl AskArgs {
    /// The answer of the node's admin endpoint to a GET of that page, as it came and as JSON.
    fn ask(&self, page: &str) -> Result<(String, Value), String> {
        let address = match self.admin {
            Some(address) => address,
            None => {
                let (config, _) = self.config.load()?;
                config.admin_listen.ok_or("admin.listen is empty: give --admin, or the configuration of the node")?
            }
        };
        let body = fetch(address, page).map_err(|error| format!("{address} does not answer: {error}"))?;
        let answer = serde_json::from_str(&body).map_err(|error| format!("{address} answers no JSON: {error}"))?;
        Ok((body, answer))
    }
}

fn status(args: &AskArgs) -> Result<u8, String> {
    let (body, answer) = args.ask("/cluster")?;
    let lines = lines(&answer);
    let text = if args.json { body } else { nodes_table(&answer) + &table(&lines) };
    say(&text);
    let away = lines.values().any(|line| line.is_away());
    Ok(if away { EXIT_AWAY } else { 0 })
}

/// A reader that has gone away has read enough.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// One GET, on a connection of its own.
fn fetch(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        return Err(std::io::Error::other(format!("status {status:?} for {path}: {}", body.trim_end())));
    }
    Ok(body.to_owned())
}

fn lines(answer: &Value) -> BTreeMap<String, Line> {
    let mut lines: BTreeMap<String, Line> = BTreeMap::new();
    let listed = answer["nodes"].as_array();
    let is_listed = |name: &str| listed.is_none_or(|nodes| nodes.iter().any(|node| node["node"] == name));
    for link in answer["links"].as_array().into_iter().flatten() {
        let number = |key: &str| link[key].as_u64().unwrap_or(0);
        let truth = |key: &str| link[key].as_bool().unwrap_or(false);
        let text = |key: &str| link[key].as_str().unwrap_or_default().to_owned();
        let line = lines.entry(text("node")).or_default();
        line.address = text("address");
        line.has_left = !is_listed(&text("node"));
        line.received += number("bytes_received");
        line.sent += number("bytes_sent");
        line.waiting += number("waiting_bytes");
        line.incarnation = line.incarnation.max(number("incarnation"));
        line.cores = line.cores.max(number("cores"));
        if truth("sends") {
            line.links += 1;
            line.up += u64::from(truth("up"));
            line.for_ms = line.for_ms.max(number("for_ms"));
        }
    }
    lines
}

fn table(lines: &BTreeMap<String, Line>) -> String {
    if lines.is_empty() {
        return "the node serves alone: it has no links to others\n".to_owned();
    }
    let mut rows = vec![
        ["NODE", "ADDRESS", "STATE", "FOR", "LINKS", "CORES", "STARTED", "IN", "OUT", "WAITING"].map(str::to_owned),
    ];
    for (name, line) in lines {
        let state = match line.up {
            up if up == line.links => "up",
            _ if line.has_left => "left",
            0 => "away",
            _ => "partly",
        };
        let started = if line.incarnation == 0 { "never seen".to_owned() } else { line.incarnation.to_string() };
        rows.push([
            name.clone(),
            line.address.clone(),
            state.to_owned(),
            format!("{} s", line.for_ms / 1_000),
            format!("{}/{}", line.up, line.links),
            line.cores.to_string(),
            started,
            bytes(line.received),
            bytes(line.sent),
            bytes(line.waiting),
        ]);
    }
    columns(&rows)
}

/// Of a node where nodes come and go: all nodes, itself among them. Else nothing.
fn nodes_table(answer: &Value) -> String {
    let Some(nodes) = answer["nodes"].as_array() else { return String::new() };
    let names = ["NODE", "CLIENTS AT", "STATE", "WEIGHT", "PARTITIONS", "SHOULD OWN", "CLIENTS"];
    let mut rows = vec![names.map(str::to_owned)];
    for node in nodes {
        let text = |key: &str| node[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| node[key].as_u64().unwrap_or(0).to_string();
        let drained = if node["drained"].as_bool() == Some(true) { "drained" } else { "leaving" };
        let state = if text("standing") == "draining" { drained.to_owned() } else { text("standing") };
        let (owned, wanted, clients) = (number("partitions"), number("wanted"), number("clients"));
        rows.push([text("node"), text("clients_at"), state, number("weight"), owned, wanted, clients]);
    }
    let old = if answer["current"].as_bool() == Some(true) { "" } else { OUT_OF_DATE };
    format!("{}{old}\n", columns(&rows))
}

/// Rows below each other, two spaces between columns.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |at: usize| rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|at| width(at).unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn bytes(count: u64) -> String {
    match count {
        0..10_240 => format!("{count} B"),
        10_240..10_485_760 => format!("{} KiB", count / 1_024),
        _ => format!("{} MiB", count / 1_048_576),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::LinkStatus;

    #[test]
    fn links_add_up_to_nodes() {
        let link = |node: &str, up: bool, is_own: bool| LinkStatus {
            node: node.into(),
            address: "127.0.0.1:9801".into(),
            up,
            is_own,
            for_ms: 61_000,
            incarnation: 77,
            shards: 2,
            bytes_sent: 6_000,
            ..LinkStatus::default()
        };
        let links = [link("b", true, true), link("b", true, true), link("c", false, true), link("b", false, false)];
        let links: Vec<Value> = links.iter().map(|link| link.to_json(0)).collect();
        let lines = lines(&serde_json::json!({ "links": links }));
        assert_eq!((lines["b"].up, lines["b"].links, lines["b"].sent), (2, 2, 18_000));
        let text = table(&lines);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1][..6], ["b", "127.0.0.1:9801", "up", "61", "s", "2/2"]);
        assert_eq!(rows[2][..3], ["c", "127.0.0.1:9801", "away"]);
        assert!(text.contains("17 KiB"), "{text}");
        assert!(table(&BTreeMap::new()).contains("alone"));
        assert!(lines["c"].is_away() && !lines["b"].is_away());
    }

    #[test]
    fn where_nodes_come_and_go_all_are_shown_and_who_left_is_not_waited_for() {
        let away = LinkStatus { node: "c".into(), is_own: true, ..LinkStatus::default() };
        let node = |name: &str, standing: &str, drained: bool| {
            serde_json::json!({
                "node": name, "clients_at": "127.0.0.1:1", "standing": standing, "weight": 1, "partitions": 512,
                "wanted": 513, "clients": 7, "drained": drained,
            })
        };
        let nodes = [node("a", "up", false), node("b", "draining", true), node("d", "draining", false)];
        let answer = serde_json::json!({ "links": [away.to_json(0)], "nodes": nodes, "current": false });
        let lines = lines(&answer);
        assert!(lines["c"].has_left && !lines["c"].is_away() && table(&lines).contains("left"));
        let text = nodes_table(&answer);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["a", "127.0.0.1:1", "up", "1", "512", "513", "7"]);
        assert_eq!((rows[2][2], rows[3][2]), ("drained", "leaving"));
        assert!(text.contains("can't read"), "{text}");
        assert_eq!(nodes_table(&serde_json::json!({ "links": [] })), "");
    }
}
