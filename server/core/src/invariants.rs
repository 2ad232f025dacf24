//! The sweep: what must hold between any two events. For debug builds, tests and the simulator.

use crate::conversation::{PendingWork, Stage};
use crate::session::State;
use crate::shard::Shard;

impl Shard {
    /// Panics if an invariant of this shard is broken. Walks everything: not for production paths.
    pub fn check_invariants(&self) {
        self.check_sessions();
        self.check_conversations();
        self.check_pending();
        self.receipts.check_invariants();
        self.check_groups();
        self.fan_outs.check_invariants();
        self.check_deletions();
        assert!(self.users.len() <= self.config.users_cached_max.max(1));
        self.delivery_waits.check_invariants();
        for (key, number) in &self.delivery_index {
            let wait = self.delivery_waits.get(*number).expect("an indexed wait exists");
            assert_eq!((wait.conversation, wait.whose.user(), wait.seq), (key.0, key.1.as_ref(), key.2));
        }
    }

    fn check_sessions(&self) {
        let mut logged_in = 0;
        for session in self.sessions.iter() {
            let State::LoggedIn(login) = &session.state else { continue };
            logged_in += 1;
            assert!(self.is_here(self.owner(login.user.partition())), "{} lives elsewhere", login.user);
            let conns = self.online.get(&login.user).expect("a logged-in user is online");
            assert_eq!(conns.iter().filter(|&&conn| conn == session.conn).count(), 1);
            assert!(!login.alone || conns.len() == 1, "who has other devices does not write for itself alone");
            assert!(login.sends_in_flight <= ringline_schema::limits::SENDS_IN_FLIGHT_MAX);
            for known in login.known().values() {
                assert!(known.acked <= known.shown, "acknowledged more than was shown");
            }
        }
        let listed: usize = self.online.iter().map(|(_, devices)| devices.len()).sum();
        assert_eq!(
            (listed, self.online.devices()),
            (logged_in, logged_in),
            "the online list is the logged-in sessions"
        );
        // Those who are not visible are not on the list.
        assert!(self.online.listed_after(None).all(|name| self.online.contains_key(name)));
        let away = |(user, _): (&_, &_)| !self.online.contains_key(user);
        assert!(self.social.settings.iter().all(away), "settings are in one place");
    }

    fn check_conversations(&self) {
        for (id, conversation) in &self.conversations {
            assert!(self.may_hold(id.partition()), "{id} lives elsewhere");
            assert_eq!(conversation.committed.0 + conversation.in_flight, conversation.head.0, "numbers are dense");
            assert!(conversation.exists || conversation.head.0 == 0);
            assert!(conversation.stage != Stage::Ready || conversation.waiting.is_empty(), "nobody waits for nothing");
            assert!(conversation.senders.iter().all(|sender| sender.filter.is_well_formed()));
        }
    }

    fn check_groups(&self) {
        for (id, slot) in &self.groups {
            assert!(self.may_hold(id.partition()), "{id} lives elsewhere");
            assert!(slot.loading || slot.waiting.is_empty(), "nobody waits for nothing");
            if let Some(group) = slot.group.as_ref().filter(|_| !slot.loading) {
                assert!(group.is_well_formed(), "{id}: members in order, one owner");
            }
        }
    }

    fn check_pending(&self) {
        if self.poisoned {
            return;
        }
        assert!(self.stored <= self.appended);
        let lsns: Vec<_> = self.pending.iter().map(|pending| pending.lsn).collect();
        assert!(lsns.is_sorted(), "answers follow the log");
        assert!(lsns.iter().all(|&lsn| lsn > self.stored && lsn <= self.appended));
        let weight: usize = self.pending.iter().map(|pending| pending.weight).sum();
        assert_eq!(weight, self.pending_bytes);
        let mut in_flight = 0;
        for pending in &self.pending {
            in_flight += match &pending.work {
                PendingWork::Message(_) => 1,
                PendingWork::Group(group) => u64::from(group.message.is_some()),
                PendingWork::Repeat { .. }
                | PendingWork::User { .. }
                | PendingWork::Social(_)
                | PendingWork::Receipt(_)
                | PendingWork::Mark(..)
                | PendingWork::Dropped(..)
                | PendingWork::Hidden(_)
                | PendingWork::Done(_)
                | PendingWork::Pass(_)
                | PendingWork::Deleted(_)
                | PendingWork::Deletion(_) => 0,
            };
        }
        let counted: u64 = self.conversations.iter().map(|(_, conversation)| conversation.in_flight).sum();
        assert_eq!(counted, in_flight, "what is in flight is pinned in the cache");
    }
}
