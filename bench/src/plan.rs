//! Who sends what to whom and when: a pure function of the options, read by all threads, changed by none.
//!
//! Invariant: the receiver and the intended time of message `number` of client `sender` follow from the plan alone, so
//! a receiver can tell whether a message was meant for it, and an open loop never waits for an answer.

use clap::ValueEnum;
use ringline_schema::message::Class;

/// Who talks to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Every client sends to itself.
    #[value(name = "self")]
    SelfChat,
    /// Clients 2k and 2k+1 send to each other, both of them.
    Pair,
    /// Every message goes to another client drawn at random.
    Random,
    /// Every client sends to all others in turn (200 clients are usual: each then has 199 conversations).
    Mutual,
    /// As pair, but some of the receivers (--slow-percent) read slowly and send nothing.
    Slow,
}

impl Scenario {
    pub fn name(self) -> &'static str {
        match self {
            Self::SelfChat => "self",
            Self::Pair => "pair",
            Self::Random => "random",
            Self::Mutual => "mutual",
            Self::Slow => "slow",
        }
    }
}

/// What makes a client send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Closed loop: each client keeps this many sends unanswered. A slow server slows the load down.
    Closed { window: u32 },
    /// Open loop: each client sends once in this time, the clients evenly staggered, whatever the server does.
    Open { period_ns: u64 },
}

impl Pace {
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed { .. } => "closed",
            Self::Open { .. } => "open",
        }
    }
}

/// The slow readers of [`Scenario::Slow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow {
    /// Of all clients; 1 to 50, because only one of a pair is slow.
    pub percent: u32,
    /// What such a client reads, until the measured window ends.
    pub bytes_per_s: u32,
}

/// The whole plan of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub scenario: Scenario,
    /// Used by [`Scenario::Slow`] only.
    pub slow: Slow,
    /// Length of one histogram of the interval log; `None`: no log is kept.
    pub interval_ns: Option<u64>,
    pub class: Class,
    /// Sends are answered only when they are refused; transient ones in an open loop.
    pub no_reply: bool,
    pub pace: Pace,
    pub payload_bytes: usize,
    /// Told apart by this: messages of an earlier run that are still under way.
    pub run: u64,
    /// client_seq of message 0. Rises from run to run, because the server's duplicate filter never forgets.
    pub client_seq_base: u64,
    /// Whether deliveries are acknowledged by cumulative cursors.
    pub ack_cursors: bool,
    /// User names, one a client.
    pub names: Vec<String>,
    /// The number of the target that each lives on; empty: there is one.
    pub homes: Vec<u16>,
}

impl Plan {
    pub fn clients(&self) -> u32 {
        u32::try_from(self.names.len()).unwrap_or(u32::MAX)
    }

    /// The client that message `number` of `sender` goes to.
    pub fn target(&self, sender: u32, number: u32) -> u32 {
        match self.scenario {
            Scenario::SelfChat => sender,
            Scenario::Pair | Scenario::Slow => sender ^ 1,
            Scenario::Mutual => {
                let clients = u64::from(self.clients()).max(1);
                // 1 to clients - 1 places further on: every other client once a round, and each sender begins with
                // another one, so that no receiver gets a burst.
                let ahead = 1 + u64::from(number) % clients.saturating_sub(1).max(1);
                u32::try_from((u64::from(sender) + ahead) % clients).unwrap_or(0)
            }
            Scenario::Random => {
                let others = u64::from(self.clients().saturating_sub(1)).max(1);
                let drawn = mix(self.run ^ (u64::from(sender) << 32) ^ u64::from(number)) % others;
                // Skips the sender itself.
                let drawn = u32::try_from(drawn).unwrap_or(0);
                if drawn >= sender { drawn.saturating_add(1) } else { drawn }
            }
        }
    }

    /// Whether a client reads slowly and sends nothing: the odd one of some pairs, evenly spread.
    pub fn reads_slowly(&self, client: u32) -> bool {
        // Of the pairs so far, twice the share is slow, because each has one receiver that may be.
        let slow_pairs = |pairs: u64| pairs * 2 * u64::from(self.slow.percent) / 100;
        let pair = u64::from(client / 2);
        self.scenario == Scenario::Slow && client % 2 == 1 && slow_pairs(pair + 1) > slow_pairs(pair)
    }

    /// How many clients send.
    pub fn senders(&self) -> u32 {
        match self.scenario {
            Scenario::SelfChat | Scenario::Pair | Scenario::Random | Scenario::Mutual => self.clients(),
            Scenario::Slow => {
                let slow = u64::from(self.clients() / 2) * 2 * u64::from(self.slow.percent) / 100;
                self.clients().saturating_sub(u32::try_from(slow).unwrap_or(u32::MAX))
            }
        }
    }

    /// The number of the target that a client lives on.
    pub fn home(&self, client: u32) -> usize {
        self.homes.get(client as usize).map_or(0, |home| usize::from(*home))
    }

    /// The user name of a client; empty for an index that is no client.
    pub fn name(&self, client: u32) -> &str {
        self.names.get(client as usize).map_or("", String::as_str)
    }

    /// When message `number` of `client` is due in an open loop that began at `start_ns`; `None` in a closed loop.
    pub fn intended_ns(&self, start_ns: u64, client: u32, number: u32) -> Option<u64> {
        match self.pace {
            Pace::Closed { .. } => None,
            Pace::Open { period_ns } => {
                let clients = u128::from(self.clients()).max(1);
                let steps = u128::from(number) * clients + u128::from(client);
                let after = steps * u128::from(period_ns) / clients;
                Some(start_ns.saturating_add(u64::try_from(after).unwrap_or(u64::MAX)))
            }
        }
    }
}

/// User names `PREFIX-000001`, `PREFIX-000002`, …
pub fn names(prefix: &str, clients: u32) -> Vec<String> {
    (1..=clients).map(|number| name(prefix, number)).collect()
}

/// One of them.
pub(crate) fn name(prefix: &str, number: u32) -> String {
    format!("{prefix}-{number:06}")
}

/// The finalizer of splitmix64: a well-mixed number for every number.
pub(crate) fn mix(number: u64) -> u64 {
    let z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The phases of a run, in nanoseconds since its epoch. Warm-up is from `start_ns` to `measure_from_ns`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeline {
    pub start_ns: u64,
    pub measure_from_ns: u64,
    pub measure_to_ns: u64,
}

/// An open loop may be this late with its last sends, which were due before the end.
const LAST_SENDS_NS: u64 = 100_000_000;

impl Timeline {
    /// Before the start is known: nothing is sent, nothing is measured.
    pub const NEVER: Self = Self { start_ns: u64::MAX, measure_from_ns: u64::MAX, measure_to_ns: u64::MAX };

    pub fn begun(&self) -> bool {
        self.start_ns != u64::MAX
    }

    /// Whether something that happened then belongs into the figures.
    pub fn measured(&self, time_ns: u64) -> bool {
        (self.measure_from_ns..self.measure_to_ns).contains(&time_ns)
    }

    /// How far into the measured window a time is that is not before it; what comes after the window counts as its end.
    pub fn since_measure_from(&self, now_ns: u64) -> u64 {
        now_ns.min(self.measure_to_ns.saturating_sub(1)).saturating_sub(self.measure_from_ns)
    }

    /// Whether a closed loop sends at this time.
    pub fn sends_at(&self, now_ns: u64) -> bool {
        (self.start_ns..self.measure_to_ns).contains(&now_ns)
    }

    /// Whether an open loop sends now what was due then.
    pub fn sends_due(&self, intended_ns: u64, now_ns: u64) -> bool {
        self.begun()
            && intended_ns <= now_ns
            && intended_ns < self.measure_to_ns
            && now_ns < self.measure_to_ns.saturating_add(LAST_SENDS_NS)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn plan(scenario: Scenario, pace: Pace, clients: u32) -> Plan {
        Plan {
            scenario,
            slow: Slow { percent: 10, bytes_per_s: 1_000 },
            interval_ns: None,
            class: Class::Durable,
            no_reply: false,
            pace,
            payload_bytes: 64,
            run: 42,
            client_seq_base: 1_000,
            ack_cursors: true,
            names: names("bench", clients),
            homes: Vec::new(),
        }
    }

    #[test]
    fn each_scenario_has_its_receivers() {
        let closed = Pace::Closed { window: 1 };
        assert_eq!(plan(Scenario::SelfChat, closed, 4).target(3, 9), 3);
        let pair = plan(Scenario::Pair, closed, 4);
        assert_eq!([0, 1, 2, 3].map(|sender| pair.target(sender, 5)), [1, 0, 3, 2]);
        let random = plan(Scenario::Random, closed, 5);
        let mut hits = [0; 5];
        for number in 0..4_000 {
            let target = random.target(2, number);
            assert_eq!(target, random.target(2, number), "the draw is repeatable");
            hits[target as usize] += 1;
        }
        assert_eq!(hits[2], 0, "never to itself");
        assert!([0, 1, 3, 4].iter().all(|&at| (800..1_200).contains(&hits[at])), "{hits:?}");
        assert_eq!(plan(Scenario::Random, closed, 2).target(0, 1), 1);
        assert_eq!(plan(Scenario::Random, closed, 2).target(1, 1), 0);
    }

    #[test]
    fn mutual_covers_every_ordered_pair_evenly() {
        let clients = 7;
        let plan = plan(Scenario::Mutual, Pace::Closed { window: 1 }, clients);
        let mut hits = vec![vec![0; clients as usize]; clients as usize];
        for sender in 0..clients {
            for number in 0..(clients - 1) * 5 {
                hits[sender as usize][plan.target(sender, number) as usize] += 1;
            }
        }
        for (sender, row) in hits.iter().enumerate() {
            for (target, &count) in row.iter().enumerate() {
                assert_eq!(count, if sender == target { 0 } else { 5 }, "{sender} to {target}");
            }
        }
        // Within one round no two senders aim at the same receiver.
        let mut targets: Vec<u32> = (0..clients).map(|sender| plan.target(sender, 3)).collect();
        targets.sort_unstable();
        assert_eq!(targets, (0..clients).collect::<Vec<_>>());
    }

    #[test]
    fn the_asked_share_of_receivers_is_slow_and_silent() {
        for (percent, clients) in [(10, 100), (1, 1_000), (50, 8), (33, 200)] {
            let mut plan = plan(Scenario::Slow, Pace::Closed { window: 1 }, clients);
            plan.slow.percent = percent;
            let slow: Vec<u32> = (0..clients).filter(|&client| plan.reads_slowly(client)).collect();
            assert_eq!(slow.len() as u32, clients * percent / 100);
            assert!(slow.iter().all(|client| client % 2 == 1), "its partner is quick");
            assert_eq!(plan.senders(), clients - slow.len() as u32);
        }
        assert!(!(0..100).any(|client| plan(Scenario::Pair, OPEN, 100).reads_slowly(client)));
    }

    const OPEN: Pace = Pace::Open { period_ns: 1_000 };

    #[test]
    fn an_open_loop_is_evenly_staggered_over_the_clients() {
        let open = plan(Scenario::SelfChat, Pace::Open { period_ns: 1_000 }, 4);
        let mut due: Vec<u64> = (0..3)
            .flat_map(|number| (0..4).map(move |client| (client, number)))
            .filter_map(|(client, number)| open.intended_ns(50, client, number))
            .collect();
        due.sort_unstable();
        assert_eq!(due, (0..12).map(|step| 50 + step * 250).collect::<Vec<_>>());
        assert_eq!(plan(Scenario::Pair, Pace::Closed { window: 1 }, 2).intended_ns(0, 0, 0), None);
    }

    #[test]
    fn names_are_counted_from_one() {
        assert_eq!(names("bench", 2), ["bench-000001", "bench-000002"]);
        let plan = plan(Scenario::Pair, Pace::Closed { window: 1 }, 2);
        assert_eq!((plan.name(1), plan.name(2)), ("bench-000002", ""));
    }

    #[test]
    fn the_phases_exclude_warm_up_and_drain() {
        let timeline = Timeline { start_ns: 10, measure_from_ns: 20, measure_to_ns: 30 };
        assert_eq!([9, 10, 29, 30].map(|now| timeline.sends_at(now)), [false, true, true, false]);
        assert_eq!([19, 20, 29, 30].map(|now| timeline.measured(now)), [false, true, true, false]);
        assert!(timeline.sends_due(29, 35) && !timeline.sends_due(30, 35) && !timeline.sends_due(29, 28));
        assert!(!timeline.sends_due(29, 30 + LAST_SENDS_NS));
        assert!(!Timeline::NEVER.sends_at(u64::MAX) && !Timeline::NEVER.sends_due(0, 5));
    }
}
