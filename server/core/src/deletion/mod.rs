//! DELETE_USER: a user goes for ever. Owned by the shard of the user, which alone writes what says so.
//!
//! One record makes it true: settings that say when the user was deleted, and beside them how far the work behind it has
//! come ([`DeletionRow`]). From that moment nobody logs in or registers under the name, and who writes to it is told
//! `USER_DELETED`. When it is on disk the devices are kicked, every shard that can be reached asks anew who writes to the user,
//! and DONE is answered. What follows is [`walk`]: nobody waits for it, and a node that dies goes on with it when it starts.
//!
//! Who deletes its own account proves again who it is, by the password or, without one, by a token; a wrong proof counts as
//! a failed login. Administrators delete others without. Messages stay with those who have got them unless they are to be
//! recalled, and the name stays on them: it is never given to anybody else.
//!
//! Invariants: one proof a user is checked at a time; a user in `users` has the settings of a deleted one in memory or on
//! disk; at most `DELETIONS_MAX` are accepted before earlier ones end.

pub(crate) mod walk;

use std::collections::{BTreeMap, BTreeSet};

use ringline_cluster::ownership::PartitionSet;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::limits;
use ringline_schema::message::{Credential, KickReason, Secret};
use ringline_schema::record::{Answer, Change, Query, Record};
use ringline_schema::rows::{DeletionRow, DeletionStage, Row, RowKey, RowValue, SettingRow};

use crate::config::DELETIONS_MAX;
use crate::conversation::{Pending, PendingWork};
use crate::event::{Effects, Work, WorkOutcome};
use crate::peer::Origin;
use crate::shard::{Question, Shard};
use crate::social::settings::Parked;
use crate::social::{Gathered, SocialMessage};
use crate::timers::{Timer, Timers};
use walk::Deletion;

/// A request that may delete a user; on its way to the shard of the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteAsk {
    pub origin: Origin,
    pub user: UserName,
    pub recall: bool,
}

/// Somebody proves that the account is his own.
pub(crate) struct Proof {
    ask: DeleteAsk,
    secret: OwnSecret,
}

enum OwnSecret {
    Password(String),
    Token(String),
}

impl DeletionQuestion {
    /// Whose deletion it is about; `None`: about any.
    pub(crate) fn user(&self) -> Option<&UserName> {
        match self {
            Self::Account(proof) => Some(&proof.ask.user),
            Self::Proof(ask) | Self::Exists(ask) => Some(&ask.user),
            Self::Page(user) | Self::Rows(user) | Self::Hash(user) => Some(user),
            Self::Recover => None,
        }
    }
}

/// Never prints a secret.
impl std::fmt::Debug for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.ask.fmt(f)
    }
}

/// What was asked of the store or the workers for a deletion.
#[derive(Debug)]
pub(crate) enum DeletionQuestion {
    /// How the account is proved.
    Account(Box<Proof>),
    /// Whether the proof is good.
    Proof(DeleteAsk),
    /// Whether there is such a user.
    Exists(DeleteAsk),
    /// What an earlier run has left to do, behind this user.
    Recover,
    /// A page of conversations of the user.
    Page(UserName),
    /// Rows of the user that go.
    Rows(UserName),
    /// The password's hash.
    Hash(UserName),
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Deletions {
    /// Not at their end.
    pub users: BTreeMap<UserName, Deletion>,
    /// Whose question to an owner has which number.
    pub asks: BTreeMap<u32, UserName>,
    pub next_ask: u32,
    pub armed: bool,
    pub recovery: walk::Recovery,
    /// What is left of earlier runs is asked for once more, because partitions have come.
    pub again: bool,
    /// Users with a proof under way.
    proving: BTreeSet<UserName>,
    /// Users whose deletion is on its way to the disk: a crash may still undo it.
    unwritten: BTreeSet<UserName>,
}

impl Shard {
    /// Errors: `NOT_ALLOWED`, `AUTH_FAILED`, `BUSY`, those of a user name and of a full disk; later `NO_SUCH_USER`,
    /// `USER_DELETED`.
    pub(crate) fn delete_user(
        &mut self,
        origin: Origin,
        (user, proof, recall): (&str, Option<Credential<'_>>, bool),
        fx: &mut Effects,
    ) -> Result<(), ErrorCode> {
        let user = UserName::of_user(user)?;
        self.may_append()?;
        let login = self.sessions.get(origin.conn).and_then(|session| session.login());
        let own = login.ok_or(ErrorCode::NotLoggedIn)?.user.clone();
        let ask = DeleteAsk { origin, user, recall };
        if ask.user != own {
            if !self.config.admins.contains(&own) {
                return Err(ErrorCode::NotAllowed);
            }
            return self.send_deletion(ask, fx);
        }
        let secret = match proof {
            Some(Credential::Password(Secret(password))) if password.len() <= limits::PASSWORD_BYTES_MAX => {
                OwnSecret::Password(password.to_owned())
            }
            Some(Credential::Token(Secret(token))) if token.len() <= limits::TOKEN_BYTES_MAX => {
                OwnSecret::Token(token.to_owned())
            }
            Some(Credential::Password(_) | Credential::Token(_)) | None => return Err(ErrorCode::AuthFailed),
        };
        if !self.may_load() || !self.deletions.proving.insert(own.clone()) {
            return Err(ErrorCode::Busy);
        }
        let question = DeletionQuestion::Account(Box::new(Proof { ask, secret }));
        self.load(Question::Deletion(question), Query::User { name: own }, fx);
        Ok(())
    }

    /// Users of these partitions are another's, which goes on with their deletions by what the store says of them.
    pub(crate) fn let_deletions_go(&mut self, gone: &PartitionSet) {
        let Deletions { users, asks, proving, .. } = &mut self.deletions;
        users.retain(|user, _| !gone.contains(user.partition()));
        asks.retain(|_, user| !gone.contains(user.partition()));
        proving.retain(|user| !gone.contains(user.partition()));
    }

    fn send_deletion(&mut self, ask: DeleteAsk, fx: &mut Effects) -> Result<(), ErrorCode> {
        let owner = self.owner(ask.user.partition());
        if self.is_here(owner) {
            self.delete_asked(ask, fx);
        } else if self.is_blocked(owner) {
            return Err(ErrorCode::Busy);
        } else {
            self.tell_social(owner, SocialMessage::Delete(Box::new(ask)), fx);
        }
        Ok(())
    }

    /// The store has answered.
    pub(crate) fn deletion_loaded(&mut self, question: DeletionQuestion, answer: Answer, fx: &mut Effects) {
        match question {
            DeletionQuestion::Account(proof) => self.account_loaded(*proof, answer, fx),
            DeletionQuestion::Exists(ask) => self.target_loaded(ask, answer, fx),
            DeletionQuestion::Recover => self.recovered(answer, fx),
            DeletionQuestion::Page(user) => self.page_loaded(&user, answer, fx),
            DeletionQuestion::Rows(user) => self.rows_to_erase(&user, answer, fx),
            DeletionQuestion::Hash(user) => self.hash_to_erase(&user, answer, fx),
            DeletionQuestion::Proof(_) => debug_assert!(false, "a proof is checked by a worker"),
        }
    }

    /// By what the account is proved.
    fn account_loaded(&mut self, proof: Proof, answer: Answer, fx: &mut Effects) {
        let Proof { ask, secret } = proof;
        let Answer::User(Some(account)) = answer else {
            return self.proof_ended(&ask, Err(ErrorCode::Internal), fx);
        };
        let work = match (account.password_hash, secret) {
            (Some(hash), OwnSecret::Password(password)) => Work::VerifyPassword { password, hash: Some(hash) },
            (None, OwnSecret::Token(token)) => Work::VerifyToken { token, user: ask.user.clone() },
            (Some(_), OwnSecret::Token(_)) | (None, OwnSecret::Password(_)) => {
                return self.proof_ended(&ask, Err(ErrorCode::AuthFailed), fx);
            }
        };
        self.work(Question::Deletion(DeletionQuestion::Proof(ask)), work, fx);
    }

    /// A worker has looked at the proof.
    pub(crate) fn proof_worked(&mut self, ask: &DeleteAsk, outcome: &WorkOutcome, fx: &mut Effects) {
        let result = match outcome {
            WorkOutcome::Verified(true) => Ok(()),
            WorkOutcome::Verified(false) => Err(ErrorCode::AuthFailed),
            WorkOutcome::Busy => Err(ErrorCode::Busy),
            WorkOutcome::Hashed(_) | WorkOutcome::Failed => Err(ErrorCode::Internal),
        };
        self.proof_ended(ask, result, fx);
    }

    fn proof_ended(&mut self, ask: &DeleteAsk, result: Result<(), ErrorCode>, fx: &mut Effects) {
        self.deletions.proving.remove(&ask.user);
        let Origin { conn, request_id, .. } = ask.origin;
        // Who has gone in the meantime is not deleted.
        let login = self.sessions.get(conn).and_then(|session| session.login());
        if login.is_none_or(|login| login.user != ask.user) {
            return;
        }
        match result {
            Ok(()) => self.delete_asked(ask.clone(), fx),
            Err(ErrorCode::AuthFailed) => self.login_failed(conn, request_id, fx),
            Err(code) => self.sessions.fail(conn, request_id, code, fx),
        }
    }

    /// At the shard of the user.
    pub(crate) fn delete_asked(&mut self, ask: DeleteAsk, fx: &mut Effects) {
        if self.online.contains_key(&ask.user) || self.users.get(&ask.user).is_some() {
            return self.delete_known(ask, fx);
        }
        if !self.may_load() {
            return self.tell_done(ask.origin, Err(ErrorCode::Busy), fx);
        }
        let query = Query::User { name: ask.user.clone() };
        self.load(Question::Deletion(DeletionQuestion::Exists(ask)), query, fx);
    }

    fn target_loaded(&mut self, ask: DeleteAsk, answer: Answer, fx: &mut Effects) {
        let Answer::User(user) = answer else { return self.tell_done(ask.origin, Err(self.unread()), fx) };
        let Some(user) = user else { return self.tell_done(ask.origin, Err(ErrorCode::NoSuchUser), fx) };
        self.remember_user(user);
        self.delete_known(ask, fx);
    }

    fn delete_known(&mut self, ask: DeleteAsk, fx: &mut Effects) {
        let user = ask.user.clone();
        self.with_settings(&user, Parked::Delete(Box::new(ask)), fx);
    }

    /// The user's settings are in memory, or could not be had.
    pub(crate) fn delete_or_refuse(&mut self, ask: Box<DeleteAsk>, result: Result<(), ErrorCode>, fx: &mut Effects) {
        if let Err(code) = result.and_then(|()| self.may_delete(&ask.user)) {
            return self.tell_done(ask.origin, Err(code), fx);
        }
        let now_ms = self.now.unix_ms.max(1);
        let Some(settings) = self.settings_mut(&ask.user) else {
            return self.tell_done(ask.origin, Err(self.unread()), fx);
        };
        let (stamp, blocked) = settings.delete(now_ms);
        self.social.blocked_names = self.social.blocked_names.saturating_sub(blocked);
        let setting = RowValue::Setting(deleted_row(now_ms));
        let row = DeletionRow { stage: DeletionStage::Leaving, recall: ask.recall, done: ConversationId::default() };
        let deletion = Deletion::new(row, 1, self.now.mono_us);
        let rows =
            vec![Row { key: RowKey::Setting(ask.user.clone()), stamp, value: Some(setting) }, deletion.row(&ask.user)];
        self.deletions.users.insert(ask.user.clone(), deletion);
        self.deletions.unwritten.insert(ask.user.clone());
        let lsn = self.append(Record::Change(Box::new(Change { message: None, rows })), fx);
        self.pending.push_back(Pending { lsn, weight: 0, work: PendingWork::Deleted(ask) });
    }

    fn may_delete(&self, user: &UserName) -> Result<(), ErrorCode> {
        self.is_there(user)?;
        if self.deletions.users.len() >= DELETIONS_MAX {
            return Err(ErrorCode::Busy);
        }
        self.may_append()
    }

    /// Whether a user of this shard is known to be deleted; who was deleted and is not in memory is not.
    pub(crate) fn is_deleted(&self, user: &UserName) -> bool {
        self.deletions.users.contains_key(user)
            || self.settings(user).is_some_and(|settings| settings.row.deleted_ms != 0)
    }

    /// Errors: `USER_DELETED`, which is so for ever, and `BUSY` as long as a crash may undo it.
    pub(crate) fn is_there(&self, user: &UserName) -> Result<(), ErrorCode> {
        match self.is_deleted(user) {
            true if self.deletions.unwritten.contains(user) => Err(ErrorCode::Busy),
            true => Err(ErrorCode::UserDeleted),
            false => Ok(()),
        }
    }

    /// The user is deleted, on disk.
    pub(crate) fn deleted(&mut self, ask: DeleteAsk, fx: &mut Effects) {
        let DeleteAsk { origin, user, .. } = ask;
        self.sessions.counters.users_deleted += 1;
        self.deletions.unwritten.remove(&user);
        self.settings_written(&user);
        // With it goes the password's hash.
        self.users.pop(&user);
        self.list_if_visible(&user);
        self.kick_deleted(&user, Some(origin), fx);
        self.presence_moved(&user);
        self.social.privacy.note(user.clone(), self.now.mono_us);
        self.deletion_written(&user, fx);
        // A node that is away is not waited for: the permits that it has run out by themselves.
        let others = self.reachable_shards();
        let mut gather = 0;
        // Should too many requests wait already, the permits that other shards have run out by themselves.
        if !others.is_empty() && !self.gathers_are_full() {
            let gathered = Gathered::Deleted { origin, user: user.clone() };
            gather = self.gather((origin.conn, origin.request_id), (others.len(), gathered), fx).unwrap_or(0);
        }
        for shard in others {
            self.tell_social(shard, SocialMessage::PrivacyChanged { user: user.clone(), gather }, fx);
        }
        if gather == 0 {
            self.deletion_told(origin, &user, fx);
        }
    }

    /// Every shard knows, or had the time to.
    pub(crate) fn deletion_told(&mut self, origin: Origin, user: &UserName, fx: &mut Effects) {
        self.tell_done(origin, Ok(()), fx);
        self.kick_deleted(user, None, fx);
    }

    /// What the devices have and has not been written yet is forgotten with the rest.
    fn kick_deleted(&mut self, user: &UserName, but: Option<Origin>, fx: &mut Effects) {
        let but = but.filter(|origin| self.is_here(origin.shard)).map(|origin| origin.conn);
        for conn in self.online.get(user).cloned().unwrap_or_default() {
            if let Some(login) = self.sessions.login_mut(conn) {
                login.forget_known();
            }
            if Some(conn) != but {
                self.kick(conn, KickReason::UserDeleted, fx);
            }
        }
    }
}

/// What is left of the settings of somebody who was deleted.
pub(crate) fn deleted_row(now_ms: u64) -> SettingRow {
    SettingRow { visible: false, deleted_ms: now_ms, ..SettingRow::default() }
}

impl Deletions {
    /// Looks at the first moment for what an earlier run has left.
    pub fn new(timers: &mut Timers) -> Self {
        timers.arm(0, Timer::Deletions);
        Self { armed: true, ..Self::default() }
    }
}
