//! How far a group has been received and read, as far as those who wrote in it lately are told. Pure; at the owner of the
//! group, in memory only: after a restart it begins anew, and RECEIPTS tells the state at any time.
//!
//! A writer is told the places that at least one other member has reached, as long as there is a message of his own that
//! nobody had read when he was last told. Invariant: what a writer is told only rises.

use std::collections::VecDeque;

use ringline_schema::ids::{Seq, UserName};
use ringline_schema::rows::ReceiptRow;

/// Writers of one group that are told; of one more the one who wrote longest ago is forgotten.
const WRITERS_TOLD_MAX: usize = 32;

/// The highest place of anybody, and the highest of anybody else: enough to leave any one user out.
#[derive(Debug, Default)]
struct Best {
    by: Option<UserName>,
    first: Seq,
    second: Seq,
}

impl Best {
    /// The place of a user has risen to `seq`.
    fn raise(&mut self, user: &UserName, seq: Seq) {
        if self.by.as_ref() == Some(user) {
            self.first = self.first.max(seq);
        } else if seq > self.first {
            self.second = self.first;
            (self.by, self.first) = (Some(user.clone()), seq);
        } else {
            self.second = self.second.max(seq);
        }
    }

    /// The highest place of anybody but this user.
    fn without(&self, user: &UserName) -> Seq {
        if self.by.as_ref() == Some(user) { self.second } else { self.first }
    }
}

#[derive(Debug)]
struct Writer {
    user: UserName,
    /// The last message.
    last: Seq,
    told: ReceiptRow,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Reached {
    pub group: UserName,
    delivered: Best,
    read: Best,
    /// In order of their last messages.
    writers: VecDeque<Writer>,
}

impl Reached {
    pub fn new(group: UserName) -> Self {
        Self { group, delivered: Best::default(), read: Best::default(), writers: VecDeque::new() }
    }

    pub fn wrote(&mut self, user: &UserName, seq: Seq) {
        let known = self.writers.iter().position(|writer| writer.user == *user).and_then(|at| self.writers.remove(at));
        let told = known.map_or_else(ReceiptRow::default, |writer| writer.told);
        if self.writers.len() >= WRITERS_TOLD_MAX {
            self.writers.pop_front();
        }
        self.writers.push_back(Writer { user: user.clone(), last: seq, told });
    }

    pub fn raise(&mut self, user: &UserName, row: ReceiptRow) {
        self.delivered.raise(user, row.delivered);
        self.read.raise(user, row.read);
    }

    /// Who is to be told what.
    pub fn news(&self) -> Vec<(UserName, ReceiptRow)> {
        let news = |writer: &Writer| {
            let row =
                ReceiptRow { delivered: self.delivered.without(&writer.user), read: self.read.without(&writer.user) };
            let risen = row.delivered > writer.told.delivered || row.read > writer.told.read;
            (risen && writer.last > writer.told.read).then(|| (writer.user.clone(), row))
        };
        self.writers.iter().filter_map(news).collect()
    }

    /// This user was told so.
    pub fn told(&mut self, user: &UserName, row: ReceiptRow) {
        if let Some(writer) = self.writers.iter_mut().find(|writer| writer.user == *user) {
            writer.told = row;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    fn row(delivered: u64, read: u64) -> ReceiptRow {
        ReceiptRow { delivered: Seq(delivered), read: Seq(read) }
    }

    fn tell(reached: &mut Reached) -> Vec<(UserName, ReceiptRow)> {
        let news = reached.news();
        news.iter().for_each(|(user, row)| reached.told(user, *row));
        news
    }

    #[test]
    fn writers_hear_of_others_and_only_while_something_of_theirs_is_unread() {
        let mut reached = Reached::new(name("#team"));
        let (ann, bob, cid) = (name("ann"), name("bob"), name("cid"));
        reached.wrote(&ann, Seq(5));
        reached.raise(&ann, row(5, 5));
        assert!(tell(&mut reached).is_empty(), "nobody else has it");
        reached.raise(&bob, row(5, 3));
        assert_eq!(tell(&mut reached), [(ann.clone(), row(5, 3))]);
        assert!(tell(&mut reached).is_empty(), "told once");
        reached.wrote(&bob, Seq(6));
        reached.raise(&cid, row(6, 6));
        assert_eq!(tell(&mut reached), [(ann.clone(), row(6, 6)), (bob.clone(), row(6, 6))]);
        reached.raise(&bob, row(9, 9));
        assert!(tell(&mut reached).is_empty(), "all that ann has written is read");
        reached.wrote(&ann, Seq(10));
        assert_eq!(tell(&mut reached), [(ann, row(9, 9))]);
        for number in 0..3 * WRITERS_TOLD_MAX as u64 {
            reached.wrote(&name(&format!("user-{number}")), Seq(11 + number));
        }
        assert_eq!(reached.writers.len(), WRITERS_TOLD_MAX);
    }
}
