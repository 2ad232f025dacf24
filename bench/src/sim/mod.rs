//! The simulator: real shards, the SDK's real client machine, and between them everything that can go wrong, under one
//! seed.
//!
//! One thread, virtual time, no clock, socket or randomness but the seed's: an equal seed gives an equal run, which its
//! trace hash shows. Simulated are the disk (delays, torn writes, lost unsynced data, failing writes, retention), the lanes between
//! shards (any delay, in order; what they may lose and double, and in which lives of the node, says `node`), connections (bytes
//! in pieces of any size, cut at any byte, slow readers), clocks of deadlines, crashes and orderly stops of the node at any step with another number of
//! shards afterwards, and processes of clients that hang or die. What clients saw goes to the [`checker`](crate::checker).
//!
//! - [`world`]: the queue of what happens when. `node`: the server's shell, played. `faults`: what breaks.
//! - [`cluster`]: several nodes.
//! - [`device`]: a client; `acts`: what it does; `chat`: what it settles, and what groups become; `asked`: what it asks
//!   beside its sends. [`disk`]: what is durable.

mod acts;
mod asked;
mod chat;
pub mod cluster;
pub mod device;
pub mod disk;
mod faults;
mod node;
pub mod world;

use crate::checker::Verdict;
use world::World;

/// A fault that is put in to prove that the checker sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A write is reported as durable before it is synced.
    SkippedSync,
    /// A crash keeps records behind one that it lost.
    TornMiddle,
    /// A lane gives two deliveries in the wrong order.
    SwappedDeliveries,
    /// A crash keeps a change of a group and loses the rows that say who its members are.
    TornChange,
    /// What retention let go is there again after a restart.
    FloorForgotten,
    /// A lane gives two transient messages of a group in the wrong order.
    SwappedPasses,
    /// One of the shard's own; without the feature `planted-bugs` it does nothing.
    Shard(ringline_core::planted::Bug),
}

impl Bug {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let outside = [Self::SkippedSync, Self::TornMiddle, Self::SwappedDeliveries, Self::TornChange];
        let outside = outside.into_iter().chain([Self::FloorForgotten, Self::SwappedPasses]);
        outside.chain(ringline_core::planted::Bug::ALL.iter().copied().map(Self::Shard))
    }
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Run {
    pub verdict: Verdict,
    /// Equal for equal seeds.
    pub trace: u64,
    /// Things that happened, faults among them.
    pub steps: u64,
    pub faults: u64,
    /// Virtual milliseconds.
    pub millis: u64,
}

/// Plays one seed to its end.
pub fn run(seed: u64, bug: Option<Bug>) -> Run {
    let mut world = World::new(seed, bug);
    world.play();
    world.finish();
    Run {
        verdict: world.history.check(),
        trace: world.trace,
        steps: world.steps,
        faults: world.faults,
        millis: world.now_us / 1_000,
    }
}

/// What clients did and saw in one seed's run.
pub fn history(seed: u64) -> crate::checker::History {
    let mut world = World::new(seed, None);
    world.play();
    world.finish();
    world.history
}
