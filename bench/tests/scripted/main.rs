//! The whole generator over real sockets against a scripted server: clean runs are clean, planted faults are caught.
//!
//! No assertion depends on speed: a slow machine sends less and finds the same.

mod server;

use std::path::PathBuf;
use std::process::Command as Process;

use clap::Parser;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePrivateKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ringline_bench::Failure;
use ringline_bench::cli::{AnyScenario, Cli, Command};
use ringline_bench::crowd::{self, report::CrowdReport};
use ringline_bench::report::Report;
use ringline_bench::{idle, run, search, storm};
use tempfile::TempDir;

use server::{Script, Server};

/// An issuer key in a folder of its own.
struct Key {
    folder: TempDir,
}

impl Key {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pem = SigningKey::from_bytes(&[3; 32]).to_pkcs8_pem(LineEnding::LF).unwrap();
        std::fs::write(folder.path().join("issuer.pem"), pem.as_bytes()).unwrap();
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("issuer.pem")
    }

    /// A command line against this target; `more` is split at spaces.
    fn line(&self, command: &str, target: &str, more: &str) -> Vec<String> {
        let key = self.path();
        let line =
            ["ringline-bench", command, "--no-progress", "--target", target, "--issuer-key", key.to_str().unwrap()];
        line.into_iter().chain(more.split_whitespace()).map(str::to_owned).collect()
    }
}

fn try_run(target: &str, more: &str) -> Result<Report, Failure> {
    let key = Key::new();
    let Command::Run(args) = Cli::try_parse_from(key.line("run", target, more)).unwrap().command else {
        unreachable!()
    };
    run::run(&args)
}

/// Runs against a server with this script.
fn run_with(script: Script, more: &str) -> (Report, Server) {
    let server = Server::start(script);
    let report = try_run(&server.address.to_string(), more).unwrap();
    (report, server)
}

fn line_of(result: Result<Report, Failure>) -> String {
    match result {
        Ok(report) => panic!("this run cannot be: {}", report.table()),
        Err(failure) => failure.to_string(),
    }
}

const SHORT: &str = "--duration 0.3 --warmup 0.1 --drain 10";

#[test]
fn clean_runs_are_clean_in_every_scenario_and_loop() {
    for scenario in ["self", "pair", "random", "mutual"] {
        for class in ["durable", "transient"] {
            for pace in ["--window 3", "--rate 2000", "--interval-ms 5"] {
                let more = format!("--clients 6 --scenario {scenario} --class {class} {pace} --threads 2 {SHORT}");
                let (report, server) = run_with(Script::GOOD, &more);
                let table = report.table();
                assert!(report.clean() && report.errors.keys().all(|&name| name == "UNSENT"), "{more}\n{table}");
                assert_eq!((report.lost, report.duplicated, report.reordered), (0, 0, 0), "{more}\n{table}");
                assert!(report.sent_per_s > 0.0 && report.delivered_per_s > 0.0, "{more}\n{table}");
                assert!(report.ack_us.max > 0 && report.deliver_us.max > 0, "{more}\n{table}");
                assert_eq!(server.seen().logins, 6);
            }
        }
    }
}

#[test]
fn an_open_loop_sends_exactly_what_is_due() {
    let (report, server) =
        run_with(Script::GOOD, "--clients 4 --scenario pair --rate 400 --duration 0.5 --warmup 0.25");
    let unsent = report.errors.get("UNSENT").copied().unwrap_or_default();
    assert_eq!(server.seen().accepted + unsent, 300, "{}", report.table());
    assert!(report.generator_lag_us.is_some() && report.rate == Some(400.0));
}

#[test]
fn a_closed_loop_goes_no_further_than_its_answers() {
    let script = Script { mute: 1, ..Script::GOOD };
    let more = "--clients 4 --scenario self --window 5 --duration 1 --warmup 0 --drain 0.2";
    let (report, server) = run_with(script, more);
    assert_eq!(server.seen().accepted, 4 * 5, "{}", report.table());
    assert_eq!(report.errors["UNANSWERED"], 20);
    assert!(!report.clean() && report.lost == 0);
}

#[test]
fn planted_faults_are_caught() {
    let pair = "--clients 4 --scenario pair --window 4 --duration 0.3 --warmup 0.1 --drain 0.3";
    for class in ["durable", "transient"] {
        let more = format!("{pair} --class {class}");
        let caught = |script| run_with(script, &more).0;
        let lossy = caught(Script { lose: 11, ..Script::GOOD });
        assert!(lossy.lost > 0 && lossy.duplicated == 0 && !lossy.clean(), "{}", lossy.table());
        let doubling = caught(Script { duplicate: 11, ..Script::GOOD });
        assert!(doubling.duplicated > 0 && doubling.lost == 0 && !doubling.clean(), "{}", doubling.table());
        let swapping = caught(Script { swap: 11, ..Script::GOOD });
        assert!(swapping.reordered > 0 && swapping.duplicated == 0 && !swapping.clean(), "{}", swapping.table());
        let damaging = caught(Script { corrupt: 11, ..Script::GOOD });
        assert!(damaging.errors["CORRUPT"] > 0 && damaging.lost > 0 && !damaging.clean(), "{}", damaging.table());
    }
    let (wrong, _) = run_with(Script { misdeliver: 7, ..Script::GOOD }, &pair.replace("pair", "random"));
    assert!(wrong.lost > 0 && !wrong.clean(), "{}", wrong.table());
}

#[test]
fn losses_are_counted_to_the_message_and_warm_up_is_checked() {
    let script = Script { lose: 10, ..Script::GOOD };
    let (report, server) =
        run_with(script, "--clients 2 --scenario pair --rate 500 --duration 0.1 --warmup 0.4 --drain 0.3");
    assert_eq!(report.lost, server.seen().accepted / 10, "{}", report.table());
}

#[test]
fn busy_is_retried_until_accepted() {
    let script = Script { busy: 7, ..Script::GOOD };
    let (report, server) = run_with(script, &format!("--clients 4 --scenario self --window 4 {SHORT}"));
    assert!(report.clean(), "{}", report.table());
    assert!(report.errors["BUSY"] > 0);
    assert_eq!(report.errors["BUSY"], server.seen().busy);
}

#[test]
fn large_messages_pass_whole_through_full_sockets() {
    // More than a socket buffer takes at once (4 MiB): the generator has to wait for room.
    let script = Script { sends_in_flight_max: 128, read_pause_ms: 500, ..Script::GOOD };
    let more = "--clients 1 --scenario self --window 100 --payload 60000 --duration 1 --warmup 0 --drain 20";
    let (report, server) = run_with(script, more);
    assert!(report.clean() && server.seen().accepted >= 100, "{}", report.table());
}

#[test]
fn what_lagged_drops_is_fetched_and_not_lost() {
    let script = Script { lag: 9, ..Script::GOOD };
    let (report, server) = run_with(script, &format!("--clients 4 --scenario pair --window 2 {SHORT}"));
    assert!(report.clean() && report.lost == 0, "{}", report.table());
    assert!(report.errors["LAGGED"] > 0 && server.seen().fetches > 0);
}

#[test]
fn a_cut_connection_is_counted_and_ends_nothing_else() {
    let script = Script { hang_up: 40, ..Script::GOOD };
    let (report, _) = run_with(script, "--clients 6 --scenario self --window 2 --duration 0.3 --warmup 0 --drain 0.2");
    let cut: u64 =
        report.errors.iter().filter(|(name, _)| name.starts_with("DISCONNECTED")).map(|(_, count)| count).sum();
    assert!(cut > 0 && !report.clean(), "{}", report.table());
}

#[test]
fn cursors_are_acknowledged_unless_switched_off() {
    let more = "--clients 2 --scenario pair --rate 200 --duration 1.5 --warmup 0";
    let (_, with) = run_with(Script::GOOD, more);
    assert!(with.seen().cursors > 0);
    let (_, without) = run_with(Script::GOOD, &format!("{more} --ack-cursors off"));
    assert_eq!(without.seen().cursors, 0);
}

#[test]
fn idle_clients_ping_and_are_weighed() {
    let server = Server::start(Script { ping_interval_ms: 100, ..Script::GOOD });
    let key = Key::new();
    let line = key.line("idle", &server.address.to_string(), "--steps 0,10,20 --hold 0.6");
    let Command::Idle(args) = Cli::try_parse_from(line).unwrap().command else { unreachable!() };
    let report = idle::idle(&args).unwrap();
    let text = report.table();
    let clients: Vec<u32> = report.steps.iter().map(|step| step.clients).collect();
    assert!(report.clean() && clients == [0, 10, 20] && text.contains("a logged-in idle connection costs"), "{text}");
    assert!(report.bytes_per_client.server_rss_anon.is_some() && report.socket_ends == 2, "{text}");
    assert!(report.steps.iter().all(|step| step.server_context_switches.is_some()), "{text}");
    assert!(server.seen().pings > 0 && server.seen().logins == 20);
}

#[test]
fn slow_readers_send_nothing_and_catch_up_after_the_window() {
    let (report, server) = run_with(
        Script::GOOD,
        "--clients 8 --scenario slow --slow-percent 25 --slow-bytes-per-s 200 --rate 600 --payload 500 --duration 0.6 \
         --warmup 0 --drain 20",
    );
    let table = report.table();
    let slow = report.slow_deliver_us.unwrap();
    assert!(report.clean() && slow.max > 0 && report.deliver_us.max > 0, "{table}");
    let unsent = report.errors.get("UNSENT").copied().unwrap_or_default();
    assert_eq!(server.seen().accepted + unsent, 360, "the six others send what was asked\n{table}");
}

#[test]
fn a_storm_logs_everybody_in_and_back_in() {
    let server = Server::start(Script { ping_interval_ms: 100, ..Script::GOOD });
    let key = Key::new();
    let line = key.line("storm", &server.address.to_string(), "--clients 12 --churn 50 --duration 0.5 --in-flight 4");
    let Command::Storm(args) = Cli::try_parse_from(line).unwrap().command else { unreachable!() };
    let report = storm::storm(&args).unwrap();
    let table = report.table();
    assert!(report.clean() && report.dropped > 0 && report.returned == report.dropped, "{table}");
    assert_eq!(server.seen().logins, 12 + report.returned, "{table}");
    assert!(report.login_us.max > 0 && report.return_us.max > 0 && report.errors.is_empty(), "{table}");
}

#[test]
fn a_search_steps_upwards_and_holds() {
    let server = Server::start(Script::GOOD);
    let key = Key::new();
    // No latency is too long here, so that only what is achieved ends it, whatever the machine.
    let more =
        "--clients 4 --scenario self --search --rate 4000000 --p99-ms 600000 --duration 0.1 --warmup 0 --drain 1";
    let line = key.line("run", &server.address.to_string(), more);
    let Command::Run(args) = Cli::try_parse_from(line).unwrap().command else { unreachable!() };
    let mut lines = Vec::new();
    let report = search::search(&args, |line| lines.push(line.to_owned())).unwrap();
    assert_eq!(lines.len(), report.steps.len() + 1, "a head, then a line a step");
    assert_eq!(report.sustained_per_s, None, "{}", report.table());
    assert!(report.limited_by.is_some() && report.steps.len() == 2 && report.held.is_empty(), "{}", report.table());
}

/// Set for the half of the next test that runs inside the namespace.
const INSIDE: &str = "RINGLINE_BENCH_TEST_INSIDE";
/// A network of its own with 1,000 local ports, which changes nothing outside; runs the rest of its line there.
const NAMESPACE: [&str; 5] = [
    "unshare",
    "-rn",
    "sh",
    "-c",
    "ip link set lo up && echo 30000 30999 > /proc/sys/net/ipv4/ip_local_port_range && exec \"$@\"",
];

#[test]
fn clients_beyond_the_local_ports_come_from_further_addresses() {
    if std::env::var_os(INSIDE).is_some() {
        let (report, server) =
            run_with(Script::GOOD, "--clients 2500 --scenario self --rate 500 --duration 0.2 --warmup 0 --drain 20");
        assert!(report.clean() && server.seen().logins == 2_500, "{}", report.table());
        return;
    }
    let inside = |line: &[&str]| {
        let [program, more @ ..] = NAMESPACE;
        Process::new(program).args(more).arg("sh").args(line).env(INSIDE, "1").output()
    };
    match inside(&["true"]) {
        Ok(output) if output.status.success() => {}
        Ok(output) => return println!("skipped, no namespace: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => return println!("skipped, no unshare: {error}"),
    }
    let own = std::env::current_exe().unwrap();
    let name = "clients_beyond_the_local_ports_come_from_further_addresses";
    let output = inside(&[own.to_str().unwrap(), "--exact", name, "--nocapture"]).unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn a_metrics_page_is_added_and_a_missing_one_is_said() {
    let server = Server::start(Script::GOOD);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let more = format!("--clients 4 --scenario self --metrics {nobody} --duration 0.1 --warmup 0");
    let report = try_run(&server.address.to_string(), &more).unwrap();
    assert!(report.clean() && report.table().contains("no metrics from http://127.0.0.1"), "{}", report.table());
}

#[test]
fn what_makes_a_run_impossible_is_one_clear_line() {
    let run = "--clients 4 --scenario self --duration 0.1 --warmup 0";
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = line_of(try_run(&closed.to_string(), run));
    assert!(nobody.starts_with("no server at 127.0.0.1"), "{nobody}");
    let refusing = Server::start(Script { refuse_login: true, ..Script::GOOD });
    let refused = line_of(try_run(&refusing.address.to_string(), run));
    assert!(refused.contains("refused: AUTH_FAILED") && refused.contains("--issuer-key"), "{refused}");
    let narrow = Server::start(Script { sends_in_flight_max: 8, ..Script::GOOD });
    let wide = line_of(try_run(&narrow.address.to_string(), &format!("{run} --window 9")));
    assert!(wide.contains("allows 8 sends in flight"), "{wide}");
    for line in [nobody, refused, wide] {
        assert!(!line.contains('\n'), "{line}");
    }
}

#[test]
fn the_program_answers_by_exit_code_and_json() {
    let key = Key::new();
    let json = key.folder.path().join("out.json");
    let run = format!("--clients 4 --scenario pair --duration 0.2 --warmup 0 --drain 0.3 --json {}", json.display());
    let exit = |line: Vec<String>| {
        let status = Process::new(env!("CARGO_BIN_EXE_ringline-bench")).args(&line[1..]).output().unwrap().status;
        status.code()
    };
    let good = Server::start(Script::GOOD);
    assert_eq!(exit(key.line("run", &good.address.to_string(), &run)), Some(0));
    let read = || serde_json::from_str::<serde_json::Value>(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let value = read();
    assert_eq!((value["lost"].as_u64(), value["loop"].as_str()), (Some(0), Some("closed")));
    assert!(value["server_cpu_s"].is_f64(), "the server is found by its port: {value}");
    let lossy = Server::start(Script { lose: 5, ..Script::GOOD });
    assert_eq!(exit(key.line("run", &lossy.address.to_string(), &run)), Some(1));
    assert!(read()["lost"].as_u64() > Some(0));
    assert_eq!(exit(key.line("run", "127.0.0.1:1", &run)), Some(1));
    assert_eq!(exit(key.line("run", &good.address.to_string(), "--clients 3 --scenario pair")), Some(2));
    assert_eq!(exit(key.line("run", "127.0.0.1:1", "--clients 3")), Some(2));
}

fn try_crowd(target: &str, more: &str) -> Result<CrowdReport, Failure> {
    let key = Key::new();
    let Command::Run(args) = Cli::try_parse_from(key.line("run", target, more)).unwrap().command else {
        unreachable!()
    };
    let AnyScenario::Crowd(kind) = args.scenario else { unreachable!() };
    crowd::run(&args, kind)
}

fn crowd_with(script: Script, more: &str) -> (CrowdReport, Server) {
    let server = Server::start(script);
    let report = try_crowd(&server.address.to_string(), more).unwrap();
    (report, server)
}

const GROUP: &str = "--scenario group --clients 2 --interval-ms 20 --groups 2 --members 5 --online 3 --senders 2 \
                     --group-rate 100 --duration 0.5 --warmup 0.1 --drain 1";
const BACK: &str = "--scenario sync --clients 5 --senders 2 --missed 450 --window 3";
const MIX: &str = "--scenario mix --clients 6 --groups 2 --duration 0.5 --warmup 0.1 --drain 1 \
                   --mix direct=4,group=3,transient=2,read=1,sync=1";

#[test]
fn groups_returns_and_mixed_loads_are_clean() {
    let (report, server) = crowd_with(Script::GOOD, GROUP);
    assert!(report.clean(), "{}", report.table());
    let ops: Vec<_> = report.ops.iter().map(|op| (op.op, op.asked, op.answered, op.delivered)).collect();
    assert_eq!(ops, [("direct", 50, 50, 50), ("group", 50, 50, 100)], "an open loop; each to two others");
    assert_eq!(server.seen().logins, 10 + 2 + 6, "members come and go, then those stay who are online");
    let (report, server) = crowd_with(Script::GOOD, BACK);
    assert!(report.clean(), "{}", report.table());
    let back = report.back.unwrap();
    assert_eq!((back.messages, back.pages, server.seen().syncs), (5 * 450, 5 * 3, 15));
    let (report, server) = crowd_with(Script::GOOD, MIX);
    assert!(report.clean(), "{}", report.table());
    assert!(report.ops.len() == 5 && server.seen().reads > 0 && server.seen().syncs > 0, "{}", report.table());
}

#[test]
fn what_a_crowd_does_not_get_is_seen() {
    let (report, _) = crowd_with(Script { lose: 7, ..Script::GOOD }, GROUP);
    assert!(report.lost > 0 && !report.clean(), "{}", report.table());
    let (report, _) = crowd_with(Script { duplicate: 7, ..Script::GOOD }, GROUP);
    assert!(report.repeated > 0 && report.lost == 0, "{}", report.table());
    let (report, _) = crowd_with(Script { corrupt: 7, ..Script::GOOD }, MIX);
    assert!(report.corrupt > 0 && report.lost > 0, "{}", report.table());
    let (report, _) = crowd_with(Script { mute: 9, ..Script::GOOD }, GROUP);
    assert!(report.unanswered > 0, "{}", report.table());
    let (report, _) = crowd_with(Script { sync_gap: true, ..Script::GOOD }, BACK);
    assert_eq!((report.lost, report.holes), (15, 15), "{}", report.table());
    let Err(Failure::Usage(line)) = try_crowd("127.0.0.1:9", "--scenario mix --clients 3") else { panic!() };
    assert!(line.contains("even"), "{line}");
}

#[test]
fn without_replies_what_is_sent_must_arrive() {
    let line = "--clients 4 --scenario pair --class transient --no-reply --interval-ms 10 --duration 0.3 --warmup 0.1";
    let (report, server) = run_with(Script::GOOD, line);
    assert!(report.clean() && report.sent_per_s > 0.0 && server.seen().accepted > 0, "{}", report.table());
    let (report, _) = run_with(Script { lose: 5, ..Script::GOOD }, line);
    assert!(report.lost > 0, "{}", report.table());
    let closed = "--clients 4 --scenario pair --class transient --no-reply";
    assert!(matches!(try_run("127.0.0.1:9", closed), Err(Failure::Usage(_))));
}
