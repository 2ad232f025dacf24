//! A partition that goes, taken out of what a shard has in memory. Owned by the shard.
//!
//! In two steps. At once: questions about it are taken back, who waits is told `UNAVAILABLE` (nothing of theirs was appended),
//! and what has nothing on its way to the disk is forgotten. When the log has what was appended until then, the rest.
//! Invariants: after the first step nothing is appended for it; after the second nothing of it is in memory.

use ringline_cluster::ownership::PartitionSet;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, Partition, UserName};

use crate::conversation::Stage;
use crate::deletion::DeletionQuestion;
use crate::event::{Effects, Token};
use crate::shard::{Question, Shard};
use crate::social::SocialQuestion;

const GONE: ErrorCode = ErrorCode::Unavailable;

impl Shard {
    /// The first step.
    pub(super) fn let_go_of(&mut self, gone: &PartitionSet, fx: &mut Effects) {
        if gone.is_empty() {
            return;
        }
        self.let_deletions_go(gone);
        self.take_questions_back(gone, fx);
        self.let_conversations_go(gone, fx);
        self.let_groups_go(gone, fx);
        self.let_receipts_go(gone, false, fx);
        self.let_settings_go(gone, fx);
        self.forget_watchers_of(gone);
        self.forget_users_of(gone);
        // Answers to requests of deletions may have asked anew.
        self.forget_ended(fx);
    }

    /// The second: nothing of it is on its way to the disk.
    pub(super) fn forget_all_of(&mut self, gone: &PartitionSet) {
        let ids = self.conversations_of(gone);
        for id in ids {
            let conversation = self.conversations.pop(&id);
            debug_assert!(
                conversation.is_none_or(|it| it.in_flight == 0 && it.waiting.is_empty()),
                "{id} is in flight"
            );
        }
        for id in self.groups_of(gone) {
            self.forget_group(id);
        }
        let mut nobody = Effects::default();
        self.let_receipts_go(gone, true, &mut nobody);
        debug_assert!(nobody.list.is_empty(), "nobody waits any more");
        self.forget_settings(gone, true);
        self.forget_watchers_of(gone);
        self.forget_users_of(gone);
    }

    fn forget_users_of(&mut self, gone: &PartitionSet) {
        let users = self.users.iter().filter(|(name, _)| gone.contains(name.partition())).map(|(name, _)| name.clone());
        for user in users.collect::<Vec<_>>() {
            self.users.pop(&user);
        }
    }

    fn take_questions_back(&mut self, gone: &PartitionSet, fx: &mut Effects) {
        let about = |question: &Question| match self.partition_of(question) {
            About::One(partition) => gone.contains(partition),
            About::NobodyHere => true,
            About::Anything => false,
        };
        let mut tokens: Vec<Token> =
            self.questions.iter().filter(|(_, question)| about(question)).map(|(token, _)| *token).collect();
        // The table has no order of its own; replays must agree.
        tokens.sort_unstable();
        for token in tokens {
            if let Some(question) = self.questions.remove(&token) {
                self.take_back(question, fx);
            }
        }
    }

    /// Whose answer it would be.
    fn partition_of(&self, question: &Question) -> About {
        let user = |name: &UserName| About::One(name.partition());
        match question {
            Question::AttemptUser(conn) | Question::AttemptWork(conn) => {
                match self.sessions.get(*conn).filter(|session| !session.is_draining()) {
                    Some(_) => About::Anything,
                    None => About::NobodyHere,
                }
            }
            Question::Head(id, _) | Question::Original(id) => About::One(id.partition()),
            Question::KnowUser(_, ask) => user(&ask.user),
            Question::Social(SocialQuestion::Setting(name) | SocialQuestion::Blocks(name)) => user(name),
            Question::Social(SocialQuestion::Wrote { user: name, .. }) => user(name),
            Question::Group(question) => About::One(question.group().partition()),
            Question::GroupCount(submit) => user(&submit.message.from),
            Question::Visited(submit) => {
                let next = submit.more.as_ref().and_then(|more| more.unvisited.last());
                next.map_or(About::Anything, user)
            }
            Question::Mark(work) => user(work.user()),
            Question::Devices(work) => user(work.user()),
            Question::Hide(hiding) => user(&hiding.user),
            Question::Receipt(reader) => About::One(reader.0.partition()),
            Question::Receipts(list) => About::One(list.conversation().partition()),
            Question::Deletion(question) => question.user().map_or(About::Anything, user),
            // They only read, for sessions that find out themselves whether they are still there.
            Question::Fetch(..)
            | Question::Conversations(_)
            | Question::Last(_)
            | Question::Export(_)
            | Question::Sync(_)
            | Question::Flush(..)
            | Question::Part(_)
            | Question::Read(..)
            | Question::Resync(_)
            | Question::Veil(_)
            | Question::CatchUp(_) => About::Anything,
        }
    }

    /// Tells who waits for the answer; who waits in a conversation, a group or for settings is told with those.
    fn take_back(&mut self, question: Question, fx: &mut Effects) {
        match question {
            Question::KnowUser(asker, ask) => self.tell_user_known(asker, &ask, Err(GONE), fx),
            Question::Social(SocialQuestion::Wrote { user, from, parked }) => {
                self.wrote_answered((&user, from), *parked, Err(GONE), fx);
            }
            Question::GroupCount(submit) | Question::Visited(submit) => self.refuse_submit(&submit, GONE, fx),
            Question::Mark(work) => self.mark_unavailable(&work, fx),
            Question::Receipts(list) => self.receipts_unavailable(&list, fx),
            Question::Deletion(DeletionQuestion::Exists(ask)) => self.tell_done(ask.origin, Err(GONE), fx),
            // Of sessions that have ended, or with what waits.
            Question::AttemptUser(_)
            | Question::AttemptWork(_)
            | Question::Head(..)
            | Question::Original(_)
            | Question::Social(_)
            | Question::Group(_)
            | Question::Devices(_)
            | Question::Hide(_)
            | Question::Receipt(_)
            | Question::Deletion(_) => {}
            Question::Fetch(..)
            | Question::Conversations(_)
            | Question::Last(_)
            | Question::Export(_)
            | Question::Sync(_)
            | Question::Flush(..)
            | Question::Part(_)
            | Question::Read(..)
            | Question::Resync(_)
            | Question::Veil(_)
            | Question::CatchUp(_) => debug_assert!(false, "not about a partition"),
        }
    }

    fn conversations_of(&self, gone: &PartitionSet) -> Vec<ConversationId> {
        let ids = self.conversations.iter().map(|(id, _)| *id).filter(|id| gone.contains(id.partition()));
        let mut ids: Vec<_> = ids.collect();
        ids.sort_unstable();
        ids
    }

    fn groups_of(&self, gone: &PartitionSet) -> Vec<ConversationId> {
        let ids = self.groups.iter().map(|(id, _)| *id).filter(|id| gone.contains(id.partition()));
        let mut ids: Vec<_> = ids.collect();
        ids.sort_unstable();
        ids
    }

    fn let_conversations_go(&mut self, gone: &PartitionSet, fx: &mut Effects) {
        for id in self.conversations_of(gone) {
            let Some(conversation) = self.conversations.peek_mut(&id) else { continue };
            conversation.stage = Stage::Ready;
            let waiting = std::mem::take(&mut conversation.waiting);
            if conversation.in_flight == 0 {
                self.conversations.pop(&id);
            }
            for submit in waiting {
                self.refuse_submit(&submit, GONE, fx);
            }
        }
    }

    fn let_groups_go(&mut self, gone: &PartitionSet, fx: &mut Effects) {
        for id in self.groups_of(gone) {
            let Some(slot) = self.groups.peek_mut(&id) else { continue };
            slot.loading = false;
            let waiting = std::mem::take(&mut slot.waiting);
            if slot.in_flight == 0 {
                self.forget_group(id);
            }
            for submit in waiting {
                self.refuse_submit(&submit, GONE, fx);
            }
        }
    }

    fn forget_group(&mut self, id: ConversationId) {
        let Some(slot) = self.groups.pop(&id) else { return };
        debug_assert!(slot.in_flight == 0 && slot.waiting.is_empty(), "{id} is in flight");
        // Members of a group that was still being loaded are not counted yet.
        let members = slot.group.filter(|_| slot.loaded).map_or(0, |group| group.members().len());
        self.groups_members = self.groups_members.saturating_sub(members);
    }
}

/// What the answer to a question is about.
enum About {
    One(Partition),
    /// A connection that is gone.
    NobodyHere,
    /// What any shard may read, whoever owns what.
    Anything,
}
