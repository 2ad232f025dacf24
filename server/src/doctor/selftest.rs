//! Four short measurements of what a message meets: a timer, a wake between two cores, an echo over loopback, a synced
//! write. Each runs on threads of its own, pinned to the plan's cores; the caller watches over them.
//!
//! Invariant: the whole takes at most [`SELF_TEST_MS_MAX`], whatever hangs: a measurement that is not finished by then
//! is given up, and its threads end with the process. Nothing is left behind in the data directory, unless the process is
//! killed or its disk hangs for as long.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use crossbeam_channel::bounded;
use rustix::event::{EventfdFlags, eventfd};
use serde::Serialize;

use super::checks::{Judgement, Verdict, bad, ok};

/// All measurements together.
pub const SELF_TEST_MS_MAX: u64 = 6_000;
/// One measurement takes no new sample after this.
const MEASURE_MS_MAX: u64 = 600;
/// One measurement takes so many samples at most.
const SAMPLES_MAX: usize = 400;
const TIMER_MS: u64 = 1;
/// Between two wakes, so that the other core has gone to sleep.
const WAKE_PAUSE_US: u64 = 200;
const ECHO_BYTES: usize = 64;
const ECHO_TIMEOUT_MS: u64 = 1_000;
const WRITE_BYTES: usize = 4_096;

/// What a measurement works on.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Not empty; the second one, if there is one, answers the first.
    pub cores: Vec<usize>,
    /// A folder that is there.
    pub folder: PathBuf,
}

impl Bench {
    fn pin(&self, at: usize) {
        if let Some(&id) = self.cores.get(at).or(self.cores.first()) {
            // Where it is not allowed the figure is that of any core.
            core_affinity::set_for_current(CoreId { id });
        }
    }
}

/// One line of the table of measurements.
pub struct Probe {
    pub name: &'static str,
    pub what: &'static str,
    /// At the 99th percentile: up to this is normal …
    pub normal_us: u64,
    /// … and above this is bad.
    pub bad_us: u64,
    pub mend: &'static str,
    measure: fn(&Bench) -> io::Result<Vec<Duration>>,
}

/// Every measurement, in the order of the report.
pub const PROBES: &[Probe] = &[
    Probe {
        name: "timer",
        what: "how late a sleep of 1 ms ends",
        normal_us: 150,
        bad_us: 2_000,
        mend: "keep neighbours and interrupts off the core: taskset, isolcpus; see governor and c_states",
        measure: timer,
    },
    Probe {
        name: "wake",
        what: "waking a sleeping core by eventfd, there and back",
        normal_us: 100,
        bad_us: 2_000,
        mend: "cpupower idle-set -D 50; keep neighbours off the core",
        measure: wake,
    },
    Probe {
        name: "echo",
        what: "64 bytes over loopback TCP, there and back",
        normal_us: 200,
        bad_us: 4_000,
        mend: "keep neighbours off the cores; look at nft list ruleset for rules on lo",
        measure: echo,
    },
    Probe {
        name: "fsync",
        what: "4 KiB appended and fdatasynced beside the data",
        normal_us: 2_000,
        bad_us: 20_000,
        mend: "--data-dir on a local NVMe disk with power-loss protection",
        measure: sync,
    },
];

/// Percentiles of one measurement in µs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Latency {
    pub samples: usize,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

impl Latency {
    /// `None`: there are no samples.
    fn of(mut samples: Vec<Duration>) -> Option<Self> {
        samples.sort_unstable();
        // The smallest sample that at least `percent` of a hundred do not exceed.
        let at = |percent: usize| {
            let rank = (samples.len() * percent).div_ceil(100).saturating_sub(1);
            samples.get(rank).map(|sample| u64::try_from(sample.as_micros()).unwrap_or(u64::MAX))
        };
        Some(Self { samples: samples.len(), p50_us: at(50)?, p99_us: at(99)?, max_us: at(100)? })
    }
}

/// How a measurement ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Measured(Latency),
    Failed(String),
    /// The watchdog gave it up.
    TimedOut,
}

/// Takes all measurements, one after the other. Errors become outcomes.
pub fn run(bench: &Bench) -> Vec<Outcome> {
    let deadline = Instant::now() + Duration::from_millis(SELF_TEST_MS_MAX);
    PROBES.iter().map(|probe| watched(probe.measure, bench, deadline)).collect()
}

fn watched(measure: fn(&Bench) -> io::Result<Vec<Duration>>, bench: &Bench, deadline: Instant) -> Outcome {
    let (done, done_in) = bounded(1);
    let bench = bench.clone();
    let work = move || {
        // Who gave up waiting has dropped the other end.
        let _ = done.send(measure(&bench));
    };
    if let Err(error) = std::thread::Builder::new().name("self-test".into()).spawn(work) {
        return Outcome::Failed(error.to_string());
    }
    match done_in.recv_deadline(deadline) {
        Ok(Ok(samples)) => Latency::of(samples).map_or(Outcome::Failed("no samples".into()), Outcome::Measured),
        Ok(Err(error)) => Outcome::Failed(error.to_string()),
        Err(_) => Outcome::TimedOut,
    }
}

/// What an outcome means. A failed write is a `Fail`: the node could store nothing there.
pub fn judge(probe: &Probe, outcome: &Outcome) -> Judgement {
    match outcome {
        Outcome::Failed(reason) => {
            let verdict = if probe.name == "fsync" { Verdict::Fail } else { Verdict::Warn };
            bad(verdict, format!("failed: {reason}"), probe.mend)
        }
        Outcome::TimedOut => {
            bad(Verdict::Warn, format!("not finished after {SELF_TEST_MS_MAX} ms: given up"), probe.mend)
        }
        Outcome::Measured(latency) => {
            let Latency { p50_us, p99_us, max_us, .. } = latency;
            let found = format!("p50 {p50_us} µs, p99 {p99_us} µs, max {max_us} µs");
            let found =
                format!("{found} (p99 up to {} µs is normal, over {} µs is bad)", probe.normal_us, probe.bad_us);
            match *p99_us {
                p99 if p99 > probe.bad_us => bad(Verdict::Warn, found, probe.mend),
                p99 if p99 > probe.normal_us => bad(Verdict::Note, found, probe.mend),
                _ => ok(found),
            }
        }
    }
}

/// Calls `sample` until there are enough, or the time is over.
fn collect(mut sample: impl FnMut() -> io::Result<Duration>) -> io::Result<Vec<Duration>> {
    let end = Instant::now() + Duration::from_millis(MEASURE_MS_MAX);
    let mut samples = Vec::with_capacity(SAMPLES_MAX);
    while samples.len() < SAMPLES_MAX && (samples.is_empty() || Instant::now() < end) {
        samples.push(sample()?);
    }
    Ok(samples)
}

fn timer(bench: &Bench) -> io::Result<Vec<Duration>> {
    bench.pin(0);
    let wanted = Duration::from_millis(TIMER_MS);
    collect(|| {
        let begun = Instant::now();
        std::thread::sleep(wanted);
        Ok(begun.elapsed().saturating_sub(wanted))
    })
}

fn wake(bench: &Bench) -> io::Result<Vec<Duration>> {
    /// Told to the other side instead of a ring: stop.
    const STOP: u64 = u64::MAX - 1;
    let ring = |bell: &OwnedFd, value: u64| rustix::io::write(bell, &value.to_ne_bytes()).map(|_| ());
    let heard = |bell: &OwnedFd| {
        let mut value = [0; 8];
        rustix::io::read(bell, &mut value).map(|_| u64::from_ne_bytes(value))
    };
    let there = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let back = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let (other, there_in, back_out) = (bench.clone(), there.clone(), back.clone());
    let answer = move || {
        other.pin(1);
        while heard(&there_in).is_ok_and(|value| value != STOP) && ring(&back_out, 1).is_ok() {}
    };
    let answering = std::thread::Builder::new().name("self-test".into()).spawn(answer)?;
    bench.pin(0);
    let samples = collect(|| {
        std::thread::sleep(Duration::from_micros(WAKE_PAUSE_US));
        let begun = Instant::now();
        ring(&there, 1)?;
        heard(&back)?;
        Ok(begun.elapsed())
    });
    ring(&there, STOP)?;
    let _ = answering.join();
    samples
}

fn echo(bench: &Bench) -> io::Result<Vec<Duration>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    for socket in [&near, &far] {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_millis(ECHO_TIMEOUT_MS)))?;
    }
    let other = bench.clone();
    let answer = move || {
        other.pin(1);
        let mut bytes = [0; ECHO_BYTES];
        // Ends when the near side is dropped.
        while far.read_exact(&mut bytes).and_then(|()| far.write_all(&bytes)).is_ok() {}
    };
    std::thread::Builder::new().name("self-test".into()).spawn(answer)?;
    bench.pin(0);
    let mut bytes = [7; ECHO_BYTES];
    collect(|| {
        let begun = Instant::now();
        near.write_all(&bytes)?;
        near.read_exact(&mut bytes)?;
        Ok(begun.elapsed())
    })
}

/// Removes its file when dropped.
struct Scratch {
    path: PathBuf,
    file: File,
}

impl Scratch {
    fn new(folder: &std::path::Path) -> io::Result<Self> {
        let path = folder.join(format!(".ringline-doctor-{}", std::process::id()));
        let file = File::options().write(true).create_new(true).open(&path)?;
        Ok(Self { path, file })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn sync(bench: &Bench) -> io::Result<Vec<Duration>> {
    bench.pin(0);
    let mut scratch = Scratch::new(&bench.folder)?;
    let bytes = [7; WRITE_BYTES];
    collect(|| {
        let begun = Instant::now();
        scratch.file.write_all(&bytes)?;
        scratch.file.sync_data()?;
        Ok(begun.elapsed())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_hundred_and_of_none() {
        let samples = (1..=100).rev().map(Duration::from_micros).collect();
        assert_eq!(Latency::of(samples), Some(Latency { samples: 100, p50_us: 50, p99_us: 99, max_us: 100 }));
        assert_eq!(Latency::of(Vec::new()), None);
    }

    #[test]
    fn every_measurement_is_taken_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let bench = Bench { cores: vec![0], folder: folder.path().to_owned() };
        // Called directly: a busy machine may take as long as it wants.
        for probe in PROBES {
            let latency = Latency::of((probe.measure)(&bench).unwrap()).unwrap();
            assert!((1..=SAMPLES_MAX).contains(&latency.samples), "{}: {latency:?}", probe.name);
            assert!(latency.p50_us <= latency.p99_us && latency.p99_us <= latency.max_us, "{latency:?}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_hangs_is_given_up() {
        let hang = |_: &Bench| loop {
            std::thread::park();
        };
        let bench = Bench { cores: vec![0], folder: PathBuf::from("/") };
        assert_eq!(watched(hang, &bench, Instant::now() + Duration::from_millis(10)), Outcome::TimedOut);
    }

    #[test]
    fn a_folder_that_is_gone_is_a_failure_and_slow_ones_are_told() {
        let bench = Bench { cores: vec![0], folder: PathBuf::from("/no/such/folder") };
        let probe = PROBES.iter().find(|probe| probe.name == "fsync").unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        assert_eq!(judge(probe, &watched(probe.measure, &bench, deadline)).verdict, Verdict::Fail);
        let of = |p99_us| Outcome::Measured(Latency { samples: 1, p50_us: 1, p99_us, max_us: p99_us });
        for probe in PROBES {
            assert_eq!(judge(probe, &of(probe.normal_us)).verdict, Verdict::Ok);
            assert_eq!(judge(probe, &of(probe.bad_us)).verdict, Verdict::Note);
            assert_eq!(judge(probe, &of(probe.bad_us + 1)).verdict, Verdict::Warn);
            assert_eq!(judge(probe, &Outcome::TimedOut).verdict, Verdict::Warn);
        }
        assert_eq!(judge(&PROBES[0], &Outcome::Failed("no".into())).verdict, Verdict::Warn);
    }
}
