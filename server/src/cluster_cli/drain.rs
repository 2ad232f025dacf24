//! `ringline cluster drain NODE` and `undrain`: marks a node in etcd, so that all nodes want its partitions elsewhere, and shows
//! how it gives them away. Runs on the main thread of a command, which asks etcd itself and no node.
//!
//! What is relied on: a node tells in one entry whether it drains and how much it owns, both as of one look; see
//! [`crate::etcd::entry::Entry::owned`].

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use ringline_cluster::membership::Standing;
use tokio::runtime::Runtime;
use tokio::time::sleep;

use super::say;
use crate::cli::ConfigArgs;
use crate::config::ClusterMode;
use crate::etcd::drains::Drains;
use crate::etcd::entry::Listing;
use crate::etcd::gateway::EtcdError;
use crate::etcd::{Directory, EtcdOptions};

/// The waiting has ended, and the node still owned something.
const EXIT_NOT_DRAINED: u8 = 3;
/// How long an endpoint may take to answer, at least: unlike a node, a person can wait.
const ANSWER: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(300);
/// The waiting ends when nothing has changed for so long: six leases.
const STALL: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The name of the node, as `ringline cluster status` shows it.
    #[arg(value_name = "NODE")]
    node: String,
    /// Mark it, and do not wait until it owns nothing.
    #[arg(long)]
    no_wait: bool,
    /// Of any node of the cluster: it says where etcd is.
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
pub struct UndrainArgs {
    /// The name of the node.
    #[arg(value_name = "NODE")]
    node: String,
    /// Of any node of the cluster: it says where etcd is.
    #[command(flatten)]
    config: ConfigArgs,
}

/// How far a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It has not said that it drains.
    Unseen,
    /// It gives away; so many are left.
    Owns(u16),
    /// Nobody is there to take what it owns.
    Alone(u16),
    /// It owns nothing, and takes nothing.
    Drained,
    /// It is not there any more.
    Gone,
}

fn stage(listing: &Listing, node: &str) -> Stage {
    let Some(entry) = listing.entries.get(node) else {
        return if listing.unreadable.contains(node) { Stage::Unseen } else { Stage::Gone };
    };
    match (entry.member.standing, entry.owned) {
        (Standing::Draining, Some(0)) => Stage::Drained,
        (Standing::Draining, Some(owned)) if listing.has_others(node) => Stage::Owns(owned),
        (Standing::Draining, Some(owned)) => Stage::Alone(owned),
        (Standing::Draining, None) | (Standing::Up | Standing::Away, _) => Stage::Unseen,
    }
}

/// Runs the command. Errors are one line.
pub fn run(args: &DrainArgs) -> Result<u8, String> {
    let (options, runtime) = begin(&args.config)?;
    let node = &args.node;
    runtime.block_on(async {
        let mut directory = Directory::new(&options);
        let listing = directory.list().await.map_err(away)?;
        may_drain(&listing, node)?;
        Drains::new(&options).mark(node).await.map_err(away)?;
        if args.no_wait {
            say(&format!("node {node} is marked: it gives away what it owns\n"));
            return Ok(0);
        }
        let seen = Progress::new(node, listing.entries.get(node).and_then(|entry| entry.owned));
        Ok(watch(&mut directory, node, seen).await)
    })
}

/// The same for `undrain`.
pub fn undo(args: &UndrainArgs) -> Result<u8, String> {
    let (options, runtime) = begin(&args.config)?;
    let node = &args.node;
    runtime.block_on(async {
        let was_marked = Drains::new(&options).unmark(node).await.map_err(away)?;
        if was_marked {
            say(&format!("node {node} is not drained any more: it is given its part when it is there\n"));
            return Ok(0);
        }
        Err(format!("node {node:?} was not drained"))
    })
}

fn begin(args: &ConfigArgs) -> Result<(EtcdOptions, Runtime), String> {
    let (config, _) = args.load()?;
    if config.cluster_mode != ClusterMode::Etcd {
        return Err(
            "cluster.mode of this configuration is not etcd: what a node owns can be given away there only".to_owned()
        );
    }
    let options = config.etcd().map_err(|error| error.to_string())?;
    let options = EtcdOptions { timeout: options.timeout.max(ANSWER), ..options };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    Ok((options, runtime.map_err(|error| format!("no runtime: {error}"))?))
}

fn away(error: EtcdError) -> String {
    error.to_string()
}

/// Errors: there is no such node, or nobody else could own what it has.
fn may_drain(listing: &Listing, node: &str) -> Result<(), String> {
    let mut known: Vec<&str> = listing.entries.keys().chain(&listing.unreadable).map(String::as_str).collect();
    if !known.contains(&node) {
        known.sort_unstable();
        let known = if known.is_empty() { "nobody".to_owned() } else { known.join(", ") };
        return Err(format!("there is no node {node:?}; registered are: {known}"));
    }
    if !listing.has_others(node) {
        return Err(format!(
            "node {node} is the last one that may own partitions: start or undrain another, or stop it with SIGTERM"
        ));
    }
    Ok(())
}

/// Waits until the node owns nothing. Returns the exit code.
async fn watch(directory: &mut Directory, node: &str, mut seen: Progress) -> u8 {
    loop {
        let stage = match directory.list().await {
            Ok(listing) => stage(&listing, node),
            Err(error) => {
                seen.note(&format!("waiting for etcd: {error}"));
                seen.last
            }
        };
        if let Some(end) = seen.take(stage) {
            return end;
        }
        sleep(LOOK).await;
    }
}

/// What was seen so far, and how it is shown: a bar at a terminal, lines elsewhere.
struct Progress {
    node: String,
    bar: Option<ProgressBar>,
    last: Stage,
    since: Instant,
    /// What was noted last, so that it is noted once.
    noted: String,
}

impl Progress {
    /// `owned`: at the beginning.
    fn new(node: &str, owned: Option<u16>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(u64::from(owned.unwrap_or(0)));
            // The template is fixed; were it wrong, the default style would serve.
            let style = ProgressStyle::with_template("{msg}: {wide_bar} {pos}/{len} partitions given away");
            bar.set_style(style.unwrap_or(ProgressStyle::default_bar()));
            bar.set_message(format!("node {node}"));
            bar
        });
        Self { node: node.to_owned(), bar, last: Stage::Unseen, since: Instant::now(), noted: String::new() }
    }

    /// A line, once.
    fn note(&mut self, text: &str) {
        if self.noted == text {
            return;
        }
        text.clone_into(&mut self.noted);
        match &self.bar {
            Some(bar) => bar.println(text),
            None => say(&format!("{text}\n")),
        }
    }

    /// What a look has shown. `Some`: the exit code, nothing more is to be waited for.
    fn take(&mut self, stage: Stage) -> Option<u8> {
        if std::mem::replace(&mut self.last, stage) != stage {
            self.since = Instant::now();
        }
        let node = self.node.clone();
        match stage {
            Stage::Drained => {
                self.end(&format!(
                    "node {node} owns nothing and may be stopped; `ringline cluster undrain {node}` gives it its part again"
                ));
                return Some(0);
            }
            Stage::Gone => {
                self.end(&format!("node {node} has ended: what it still had is taken by the others; the mark stays"));
                return Some(EXIT_NOT_DRAINED);
            }
            Stage::Alone(owned) => {
                self.end(&format!(
                    "node {node} still owns {owned} partitions, and nobody else is there to take them; the mark stays"
                ));
                return Some(EXIT_NOT_DRAINED);
            }
            Stage::Owns(owned) => self.show(owned),
            Stage::Unseen => {}
        }
        if self.since.elapsed() >= STALL {
            let still = match stage {
                Stage::Owns(owned) => format!("still owns {owned} partitions"),
                Stage::Unseen | Stage::Alone(_) | Stage::Drained | Stage::Gone => "has not seen it".to_owned(),
            };
            self.end(&format!(
                "node {node} {still}, and nothing has changed for {} s; the mark stays",
                STALL.as_secs()
            ));
            return Some(EXIT_NOT_DRAINED);
        }
        None
    }

    fn show(&mut self, owned: u16) {
        match &self.bar {
            Some(bar) => {
                let total = bar.length().unwrap_or(0).max(u64::from(owned));
                bar.set_length(total);
                bar.set_position(total.saturating_sub(u64::from(owned)));
            }
            None => self.note(&format!("node {} still owns {owned} partitions", self.node)),
        }
    }

    fn end(&mut self, text: &str) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.note(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::entry::Entry;
    use ringline_cluster::link::hello::Incarnation;
    use ringline_cluster::membership::Member;
    use ringline_cluster::placement::NodeIndex;
    use ringline_cluster::reconcile::Start;

    fn entry(standing: Standing, owned: Option<u16>) -> Entry {
        let member = Member {
            incarnation: Incarnation(1),
            peer_address: ([127, 0, 0, 1], 9_800).into(),
            client_address: "a:1".into(),
            weight: 1,
            client_weight: 1,
            connections: 0,
            standing,
        };
        Entry { member, start: Start(1), number: NodeIndex(0), owned }
    }

    fn listing(a: Entry) -> Listing {
        let entries = [("a".to_owned(), a), ("b".to_owned(), entry(Standing::Up, Some(9)))].into();
        Listing { entries, drained: ["a".to_owned()].into(), ..Listing::default() }
    }

    #[test]
    fn a_node_is_drained_when_it_says_both_that_it_drains_and_that_it_owns_nothing() {
        let of = |standing, owned| stage(&listing(entry(standing, owned)), "a");
        assert_eq!(of(Standing::Up, Some(0)), Stage::Unseen, "it may be about to take something");
        assert_eq!(of(Standing::Draining, Some(7)), Stage::Owns(7));
        assert_eq!(of(Standing::Draining, None), Stage::Unseen, "its version does not tell");
        assert_eq!(of(Standing::Draining, Some(0)), Stage::Drained);
        let mut last = listing(entry(Standing::Draining, Some(7)));
        last.entries.remove("b");
        assert_eq!(stage(&last, "a"), Stage::Alone(7));
        assert_eq!(stage(&last, "b"), Stage::Gone);
        last.unreadable.insert("b".into());
        assert_eq!(stage(&last, "b"), Stage::Unseen);
    }

    #[test]
    fn who_is_not_there_and_who_is_the_last_is_not_drained() {
        let mut list = listing(entry(Standing::Up, Some(7)));
        list.drained.clear();
        assert_eq!(may_drain(&list, "a"), Ok(()));
        let told = may_drain(&list, "c").unwrap_err();
        assert!(told.contains("\"c\"") && told.contains("a, b"), "{told}");
        assert!(may_drain(&Listing::default(), "c").unwrap_err().contains("nobody"));
        list.drained.insert("b".into());
        assert!(may_drain(&list, "a").unwrap_err().contains("the last one"));
    }

    #[test]
    fn progress_ends_with_a_code_for_each_end() {
        let end = |stage| Progress { bar: None, ..Progress::new("a", Some(7)) }.take(stage);
        let ends = [Stage::Unseen, Stage::Owns(3), Stage::Drained, Stage::Gone, Stage::Alone(3)].map(end);
        assert_eq!(ends, [None, None, Some(0), Some(EXIT_NOT_DRAINED), Some(EXIT_NOT_DRAINED)]);
    }
}
