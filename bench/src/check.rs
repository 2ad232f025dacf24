//! The checker: what was accepted must be delivered, once, to whom it was meant for, in order.
//!
//! Each thread owns one [`Ledger`] and, per receiving client, one [`Inbox`]; nothing is shared while the run goes. The
//! ledgers are merged when all threads have ended. Exact, not sampled: two bits a message.
//!
//! Invariant: a message counts as lost only after the merge, because sender and receiver may live on different threads.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use ringline_schema::ids::{ConversationId, Seq};

use crate::tally::add_fields;

/// Messages one client may send in one run; more are not sent. Bounds the bit sets against any number on the wire.
pub const NUMBERS_MAX: u32 = 1 << 26;
/// Late messages kept for the excuse of a retry; those above it count as reordered at once.
const LATE_MAX: usize = 1 << 20;

/// A set of message numbers of one sender.
#[derive(Clone, Debug, Default)]
struct Numbers {
    words: Vec<u64>,
}

impl Numbers {
    /// Whether the number was new.
    fn insert(&mut self, number: u32) -> bool {
        let (word, bit) = (number as usize / 64, 1 << (number % 64));
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        match self.words.get_mut(word) {
            Some(word) => {
                let new = *word & bit == 0;
                *word |= bit;
                new
            }
            None => false,
        }
    }

    fn contains(&self, number: u32) -> bool {
        self.words.get(number as usize / 64).is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    fn merge(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// How many are here and not in `other`.
    fn count_without(&self, other: &Self) -> u64 {
        let theirs = other.words.iter().copied().chain(std::iter::repeat(0));
        self.words.iter().zip(theirs).map(|(mine, theirs)| u64::from((mine & !theirs).count_ones())).sum()
    }
}

/// What happened to the messages of one sender, as far as one thread saw it.
#[derive(Clone, Debug, Default)]
struct Account {
    accepted: Numbers,
    delivered: Numbers,
    retried: Numbers,
}

/// What one thread has seen of all messages.
#[derive(Clone, Debug)]
pub struct Ledger {
    accounts: Vec<Account>,
    late: Vec<(u32, u32)>,
    /// Senders whose receiver may miss messages.
    excused: Vec<u32>,
    verdict: Verdict,
}

/// What the checker found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Accepted, never delivered.
    pub lost: u64,
    /// Delivered again.
    pub duplicated: u64,
    /// Delivered after a later message of the same sender to the same receiver, or below a seq already seen.
    pub reordered: u64,
    /// Late only because the server refused it first (BUSY, RATE_LIMITED) and it was sent again: no fault.
    pub late_by_retry: u64,
    /// Delivered to a client it was not meant for, or under another sender's name.
    pub misdelivered: u64,
    /// Not the bytes that were sent.
    pub corrupt: u64,
    /// Messages of another run: ignored.
    pub other_runs: u64,
    /// Accepted and not read by a client that reads slowly on purpose, where that is no loss: transient messages, and
    /// stored ones once the server has closed the connection.
    pub unread: u64,
    /// Own messages to others, told to the device that sent them: ignored.
    pub echoed: u64,
}

impl Ledger {
    /// A ledger for `clients` senders.
    pub fn new(clients: u32) -> Self {
        let accounts = vec![Account::default(); clients as usize];
        Self { accounts, late: Vec::new(), excused: Vec::new(), verdict: Verdict::default() }
    }

    fn account(&mut self, sender: u32, number: u32) -> Option<&mut Account> {
        self.accounts.get_mut(sender as usize).filter(|_| number < NUMBERS_MAX)
    }

    /// The server has answered this message with SEND_ACK. False: it had done so before.
    pub fn accepted(&mut self, sender: u32, number: u32) -> bool {
        self.account(sender, number).is_some_and(|account| account.accepted.insert(number))
    }

    /// The server has refused this message and it will be sent again.
    pub fn retried(&mut self, sender: u32, number: u32) {
        if let Some(account) = self.account(sender, number) {
            account.retried.insert(number);
        }
    }

    /// A message came from the history after LAGGED. True: it is the first time that it is seen.
    ///
    /// Neither order nor repetition is judged here: the history overlaps what was pushed.
    pub fn fetched(&mut self, sender: u32, number: u32) -> bool {
        self.account(sender, number).is_some_and(|account| account.delivered.insert(number))
    }

    /// What this sender sent and nobody received is no loss: its receiver reads too slowly.
    pub fn excuse(&mut self, sender: u32) {
        self.excused.push(sender);
    }

    /// A body that is not what its sender wrote.
    pub fn corrupt(&mut self) {
        self.verdict.corrupt += 1;
    }

    /// A message for somebody else, or in somebody else's name.
    pub fn misdelivered(&mut self) {
        self.verdict.misdelivered += 1;
    }

    /// A message of another run.
    pub fn other_run(&mut self) {
        self.verdict.other_runs += 1;
    }

    /// The sender was told its own message to somebody else.
    pub fn echoed(&mut self) {
        self.verdict.echoed += 1;
    }

    /// Adds what another thread has seen.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.accounts.iter_mut().zip(&other.accounts) {
            mine.accepted.merge(&theirs.accepted);
            mine.delivered.merge(&theirs.delivered);
            mine.retried.merge(&theirs.retried);
        }
        self.late.extend_from_slice(&other.late);
        self.excused.extend_from_slice(&other.excused);
        let (mine, theirs) = (&mut self.verdict, &other.verdict);
        add_fields!(mine, theirs; duplicated, reordered, misdelivered, corrupt, other_runs, echoed);
    }

    /// The judgement over all that was merged. Call it once all threads have ended.
    pub fn verdict(&self) -> Verdict {
        let mut verdict = self.verdict;
        for account in &self.accounts {
            verdict.lost += account.accepted.count_without(&account.delivered);
        }
        for account in self.excused.iter().filter_map(|&sender| self.accounts.get(sender as usize)) {
            let unread = account.accepted.count_without(&account.delivered);
            verdict.lost = verdict.lost.saturating_sub(unread);
            verdict.unread += unread;
        }
        for &(sender, number) in &self.late {
            let retried = self.accounts.get(sender as usize).is_some_and(|account| account.retried.contains(number));
            if retried {
                verdict.late_by_retry += 1;
            } else {
                verdict.reordered += 1;
            }
        }
        verdict
    }
}

/// One pushed message, meant for the receiver whose [`Inbox`] it goes to.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub sender: u32,
    pub number: u32,
    pub conversation: ConversationId,
    /// 0 for a transient message.
    pub seq: Seq,
}

/// What a receiver knows of one sender.
#[derive(Clone, Copy, Debug)]
struct Stream {
    conversation: ConversationId,
    highest_number: u32,
    highest_seq: Seq,
    /// In `unacknowledged`.
    dirty: bool,
}

/// What one client has received: the order of each sender's messages, and the cursors to acknowledge.
#[derive(Debug, Default)]
pub struct Inbox {
    streams: HashMap<u32, Stream, RandomState>,
    unacknowledged: Vec<u32>,
}

impl Inbox {
    /// Judges one pushed message. True: it is the first time that it is seen.
    pub fn receive(&mut self, arrival: Arrival, ledger: &mut Ledger) -> bool {
        let Arrival { sender, number, conversation, seq } = arrival;
        let Some(account) = ledger.account(sender, number) else {
            ledger.verdict.corrupt += 1;
            return false;
        };
        if !account.delivered.insert(number) {
            ledger.verdict.duplicated += 1;
            return false;
        }
        let Some(stream) = self.streams.get_mut(&sender) else {
            let dirty = seq != Seq::ZERO;
            self.streams.insert(sender, Stream { conversation, highest_number: number, highest_seq: seq, dirty });
            if dirty {
                self.unacknowledged.push(sender);
            }
            return true;
        };
        let seq_fell = seq != Seq::ZERO && seq <= stream.highest_seq;
        if seq_fell || (number < stream.highest_number && ledger.late.len() >= LATE_MAX) {
            ledger.verdict.reordered += 1;
        } else if number < stream.highest_number {
            ledger.late.push((sender, number));
        }
        stream.highest_number = stream.highest_number.max(number);
        if seq > stream.highest_seq {
            stream.highest_seq = seq;
            if !stream.dirty {
                stream.dirty = true;
                self.unacknowledged.push(sender);
            }
        }
        true
    }

    /// Whether there is a cursor to acknowledge.
    pub fn has_unacknowledged(&self) -> bool {
        !self.unacknowledged.is_empty()
    }

    /// Takes the conversations with something new since the last call, each with its highest seq.
    pub fn take_unacknowledged(&mut self, mut acknowledge: impl FnMut(ConversationId, Seq)) {
        for sender in self.unacknowledged.drain(..) {
            if let Some(stream) = self.streams.get_mut(&sender) {
                stream.dirty = false;
                acknowledge(stream.conversation, stream.highest_seq);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONVERSATION: ConversationId = ConversationId(5);

    fn arrival(number: u32, seq: u64) -> Arrival {
        Arrival { sender: 0, number, conversation: CONVERSATION, seq: Seq(seq) }
    }

    /// A ledger in which sender 0 had `accepted` messages accepted, and these (number, seq) arrived.
    fn judged(accepted: u32, arrived: &[(u32, u64)]) -> Verdict {
        let (mut ledger, mut inbox) = (Ledger::new(1), Inbox::default());
        for number in 0..accepted {
            assert!(ledger.accepted(0, number));
        }
        for &(number, seq) in arrived {
            inbox.receive(arrival(number, seq), &mut ledger);
        }
        ledger.verdict()
    }

    #[test]
    fn a_clean_stream_is_clean() {
        assert_eq!(judged(3, &[(0, 1), (1, 2), (2, 3)]), Verdict::default());
        assert_eq!(judged(2, &[(0, 0), (1, 0)]), Verdict::default(), "transient");
        assert_eq!(judged(0, &[(0, 1)]), Verdict::default(), "delivered before its acknowledgement is no fault");
    }

    #[test]
    fn loss_duplicates_and_reorderings_are_counted_apart() {
        assert_eq!(judged(3, &[(0, 1), (2, 3)]), Verdict { lost: 1, ..Verdict::default() });
        assert_eq!(judged(130, &[]), Verdict { lost: 130, ..Verdict::default() });
        assert_eq!(judged(2, &[(0, 1), (1, 2), (0, 1)]), Verdict { duplicated: 1, ..Verdict::default() });
        assert_eq!(judged(2, &[(1, 2), (0, 1)]), Verdict { reordered: 1, ..Verdict::default() });
        assert_eq!(judged(2, &[(1, 0), (0, 0)]), Verdict { reordered: 1, ..Verdict::default() }, "transient");
        assert_eq!(judged(2, &[(0, 2), (1, 1)]), Verdict { reordered: 1, ..Verdict::default() }, "seq fell");
        assert_eq!(judged(2, &[(0, 2), (1, 2)]), Verdict { reordered: 1, ..Verdict::default() }, "seq given twice");
    }

    #[test]
    fn a_retry_excuses_a_late_number_but_not_a_fallen_seq() {
        let (mut ledger, mut inbox) = (Ledger::new(1), Inbox::default());
        ledger.retried(0, 0);
        ledger.retried(0, 1);
        for (number, seq) in [(2, 1), (0, 2), (3, 4), (1, 3)] {
            inbox.receive(arrival(number, seq), &mut ledger);
        }
        assert_eq!(ledger.verdict(), Verdict { late_by_retry: 1, reordered: 1, ..Verdict::default() });
    }

    #[test]
    fn sender_and_receiver_may_live_on_different_threads() {
        let (mut of_sender, mut of_receiver, mut inbox) = (Ledger::new(1), Ledger::new(1), Inbox::default());
        of_sender.accepted(0, 0);
        of_sender.accepted(0, 1);
        of_sender.retried(0, 0);
        inbox.receive(arrival(1, 1), &mut of_receiver);
        inbox.receive(arrival(0, 2), &mut of_receiver);
        of_sender.merge(&of_receiver);
        assert_eq!(of_sender.verdict(), Verdict { late_by_retry: 1, ..Verdict::default() });
    }

    #[test]
    fn what_was_fetched_is_not_lost_and_not_doubled() {
        let (mut ledger, mut inbox) = (Ledger::new(1), Inbox::default());
        (0..3).for_each(|number| assert!(ledger.accepted(0, number)));
        assert!(inbox.receive(arrival(2, 3), &mut ledger));
        assert!(ledger.fetched(0, 0) && ledger.fetched(0, 1) && !ledger.fetched(0, 2));
        assert_eq!(ledger.verdict(), Verdict::default());
    }

    #[test]
    fn numbers_off_the_wire_are_bounded() {
        let (mut ledger, mut inbox) = (Ledger::new(1), Inbox::default());
        inbox.receive(arrival(NUMBERS_MAX, 1), &mut ledger);
        inbox.receive(Arrival { sender: 1, ..arrival(0, 1) }, &mut ledger);
        assert_eq!(ledger.verdict(), Verdict { corrupt: 2, ..Verdict::default() });
    }

    #[test]
    fn cursors_are_taken_once_and_only_when_they_moved() {
        let (mut ledger, mut inbox) = (Ledger::new(2), Inbox::default());
        let take = |inbox: &mut Inbox| {
            let mut taken = Vec::new();
            inbox.take_unacknowledged(|conversation, seq| taken.push((conversation, seq.0)));
            taken
        };
        inbox.receive(arrival(0, 1), &mut ledger);
        inbox.receive(arrival(1, 2), &mut ledger);
        inbox.receive(Arrival { sender: 1, ..arrival(0, 0) }, &mut ledger);
        assert!(inbox.has_unacknowledged());
        assert_eq!(take(&mut inbox), [(CONVERSATION, 2)], "a transient message has no cursor");
        assert!(!inbox.has_unacknowledged());
        inbox.receive(arrival(2, 3), &mut ledger);
        assert_eq!(take(&mut inbox), [(CONVERSATION, 3)]);
        assert_eq!(take(&mut inbox), []);
    }
}
