//! A server with nothing to do sleeps: no thread of it runs more often than the slow tick of a core asks for, whatever
//! the net, the number of cores and of silent clients.
//!
//! Counted in two ways: how often its threads gave up the processor, over a window in which nobody looks, and then its
//! system calls, by strace. Where strace may not attach (a container without ptrace), that is said and the first count
//! stands alone.

mod common;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Server, Wire};
use ringline_schema::message::{Reply, Request};

/// What logins cause is over by then: the store flushes its index 5 s after the last record, and the deadline of each
/// login, which these tests set to [`LOGIN_TIMEOUT`], has passed by without effect.
const SETTLE: Duration = Duration::from_secs(17);
/// As long as a busy machine needs for fifty of them.
const LOGIN_TIMEOUT: &str = "limits.login_timeout_ms=15000";
const WINDOW_S: u64 = 10;
const STRACE_WINDOW_S: u64 = 10;
/// Clients of a server that has some: five devices each of ten users.
const USERS: usize = 10;
const DEVICES: u64 = 5;
/// Pings in each window of a server with clients: each of 50 comes by once in 20 s or so.
const PINGS: u64 = 20;

/// A core looks round once a second ([`SLEEP_US_MAX`] of the server's `park`); room for one more at each end.
///
/// [`SLEEP_US_MAX`]: ../src/park.rs
const fn ticks(seconds: u64) -> u64 {
    seconds + 2
}

/// System calls of one tick: the sleep, and with epoll a look without sleeping.
const CALLS_PER_TICK: u64 = 2;
/// Of one ping: the sleep that it ends, and with epoll receive and send; room for one look more.
const CALLS_PER_PING: u64 = 4;
/// Attaching interrupts what each thread sleeps in, and the thread goes back to sleep.
const CALLS_PER_THREAD: u64 = 1;
/// A ping wakes its core; the completion of the answer may wake it once more.
const SWITCHES_PER_PING: u64 = 2;
/// The kernel's thread that wrote a core's log looks round every 5 s and then ends.
const SWITCHES_PER_WRITER: u64 = WINDOW_S / 5 + 1;
/// Clock ticks of processor time, in all, in the first window.
const CPU_TICKS_MAX: u64 = 2;

#[derive(Clone, Copy, Debug)]
struct Case {
    net: &'static str,
    cores: u64,
    clients: bool,
}

/// What `/proc` says of a process: voluntary context switches by thread, and processor time in clock ticks.
#[derive(Clone, Debug)]
struct Reading {
    switches: BTreeMap<String, u64>,
    cpu_ticks: u64,
}

impl Reading {
    /// The threads that ran since `before`, and how often.
    fn since(&self, before: &Self) -> BTreeMap<String, u64> {
        let ran = |(name, count): (&String, &u64)| (name.clone(), count - before.switches.get(name).unwrap_or(&0));
        self.switches.iter().map(ran).filter(|(_, count)| *count > 0).collect()
    }
}

fn read(pid: u32) -> Reading {
    let mut switches = BTreeMap::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let path = task.unwrap().path();
        // A thread of the kernel's that ends meanwhile does not count.
        let Ok(status) = std::fs::read_to_string(path.join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        let name = format!("{} {}", field("Name:"), path.file_name().unwrap().display());
        switches.insert(name, field("voluntary_ctxt_switches:").parse().unwrap());
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // After the name in parentheses, which may hold anything, comes field 3.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split_whitespace().collect();
    let cpu_ticks = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Reading { switches, cpu_ticks }
}

/// Lets a window pass, with the pings of the clients evenly in it.
fn pass(seconds: u64, clients: &mut [Wire]) {
    if clients.is_empty() {
        return std::thread::sleep(Duration::from_secs(seconds));
    }
    let count = clients.len();
    for at in 0..PINGS {
        std::thread::sleep(Duration::from_millis(seconds * 1_000 / PINGS));
        let pong = clients[at as usize % count].request(&Request::Ping { stamp: at });
        assert!(matches!(pong.reply(), Reply::Pong { .. }), "{:?}", pong.reply());
    }
}

/// System calls of the process while `window` runs, with strace's own table. `None`: strace can't attach here.
fn system_calls(pid: u32, window: impl FnOnce()) -> Option<(u64, String)> {
    let strace = Command::new("strace").args(["-f", "-c", "-p", &pid.to_string()]).stderr(Stdio::piped()).spawn();
    let strace = strace.expect("strace is there (.ci/test installs it)");
    window();
    // It may have gone already, when it could not attach.
    let _ = Command::new("kill").args(["-INT", &strace.id().to_string()]).stderr(Stdio::null()).status().unwrap();
    let output = strace.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if !text.contains("attached") {
        eprintln!("strace can't attach here, system calls are not counted: {text}");
        return None;
    }
    // "100.00    0.000123          12        10         2 total"; without any call there is no table.
    let total = text.lines().find(|line| line.trim_end().ends_with("total"));
    let calls = total.map_or(0, |line| line.split_whitespace().nth(3).unwrap().parse().unwrap());
    Some((calls, text))
}

fn check(case: Case) {
    let (net, cores) = (format!("net.kind={}", case.net), case.cores.to_string());
    let server = Server::start(&["--cores", &cores, "--set", &net, "--set", LOGIN_TIMEOUT]);
    let mut clients = Vec::new();
    for user in (0..USERS).filter(|_| case.clients).map(|at| format!("idler{at}")) {
        let token = server.token(&user);
        for device in 1..=DEVICES {
            let mut wire = server.connect();
            wire.login_by_token(&user, &token, device);
            clients.push(wire);
        }
    }
    std::thread::sleep(SETTLE);
    let pings = if case.clients { PINGS } else { 0 };

    let before = read(server.pid());
    pass(WINDOW_S, &mut clients);
    let after = read(server.pid());
    let (ran, cpu) = (after.since(&before), after.cpu_ticks - before.cpu_ticks);
    let switches: u64 = ran.values().sum();
    let threads = after.switches.len() as u64;
    let switches_max = case.cores * (ticks(WINDOW_S) + SWITCHES_PER_WRITER) + pings * SWITCHES_PER_PING;
    println!("{case:?}: {switches} of {switches_max} switches, {cpu} CPU ticks, {threads} threads: {ran:?}");

    let calls_max =
        case.cores * ticks(STRACE_WINDOW_S) * CALLS_PER_TICK + pings * CALLS_PER_PING + threads * CALLS_PER_THREAD;
    let calls = system_calls(server.pid(), || pass(STRACE_WINDOW_S, &mut clients));
    println!("{case:?}: {calls_max} calls at most; {}", calls.as_ref().map_or("", |(_, text)| text));

    assert!(switches <= switches_max, "{case:?}: {switches} of {switches_max} switches: {ran:?}");
    assert!(cpu <= CPU_TICKS_MAX, "{case:?}: {cpu} clock ticks of processor time");
    if let Some((calls, text)) = calls {
        assert!(calls <= calls_max, "{case:?}: {calls} calls, {calls_max} expected at most\n{text}");
    }
}

#[test]
fn slow_own_net_an_idle_server_sleeps() {
    std::thread::scope(|scope| {
        for net in ["ring", "epoll"] {
            for cores in [1, 2] {
                for clients in [false, true] {
                    scope.spawn(move || check(Case { net, cores, clients }));
                }
            }
        }
    });
}
