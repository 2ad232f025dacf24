//! Who is who: REGISTER, LOGIN, LOGOUT, the device policy, and what is forgotten when a device goes.
//!
//! An attempt belongs to its connection and moves by the answers of the store and the workers. A wrong password, an
//! unknown user and a bad token end in the same answer, after the same work.

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{DeviceId, Partition, UserName};
use ringline_schema::limits;
use ringline_schema::message::{self, Credential, DeviceKind, KickReason, LoginOk, Reply, Secret};
use ringline_schema::record::{Answer, Query, Record, User};

use crate::config::{DevicePolicy, LOGIN_FAILURES_MAX};
use crate::conversation::{Pending, PendingWork};
use crate::devices::kept_agent;
use crate::event::{CloseReason, ConnId, Effects, Verdict, Work, WorkOutcome};
use crate::planted::Bug;
use crate::session::{Login, State};
use crate::shard::{Question, Shard};
use crate::social::settings::Parked;

/// A REGISTER or LOGIN under way. Never printed with its secret.
#[derive(Debug)]
pub struct Attempt {
    request_id: u32,
    user: UserName,
    step: Step,
    /// `None` for REGISTER.
    device: Option<(DeviceId, DeviceKind)>,
    /// Of the device.
    agent: String,
}

/// What an attempt waits for.
enum Step {
    /// REGISTER: whether the name is free. The password waits.
    NameFree(String),
    /// REGISTER: the hash.
    Hash,
    /// REGISTER: whether the name is still free.
    NameStillFree(String),
    /// LOGIN: the user, to compare this password with.
    UserForPassword(String),
    /// LOGIN: the comparison, or the check of the token (then the user is still to be looked up).
    Proof { by_token: bool },
    /// LOGIN by a valid token: whether the user exists.
    UserForToken,
    /// The record of a new user on its way to the disk.
    Created,
}

impl Attempt {
    /// Of its user.
    pub(crate) fn partition(&self) -> Partition {
        self.user.partition()
    }
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NameFree(_) => "NameFree",
            Self::Hash => "Hash",
            Self::NameStillFree(_) => "NameStillFree",
            Self::UserForPassword(_) => "UserForPassword",
            Self::Proof { .. } => "Proof",
            Self::UserForToken => "UserForToken",
            Self::Created => "Created",
        })
    }
}

impl Shard {
    pub(crate) fn register(
        &mut self,
        conn: ConnId,
        request_id: u32,
        (user, Secret(password)): (&str, Secret<'_>),
        fx: &mut Effects,
    ) -> Verdict {
        let user = match self.may_attempt(conn, user) {
            Ok(user) => user,
            Err(code) => return self.attempt_refused(conn, request_id, code, fx),
        };
        if let Some(verdict) = self.redirect((conn, request_id), user.partition(), fx) {
            return verdict;
        }
        if !self.is_here(self.owner(user.partition())) {
            self.sessions.hand_over(conn);
            return Verdict::HandOver(self.owner(user.partition()));
        }
        if !(limits::PASSWORD_BYTES_MIN..=limits::PASSWORD_BYTES_MAX).contains(&password.len()) {
            return self.attempt_refused(conn, request_id, ErrorCode::BadPassword, fx);
        }
        let step = Step::NameFree(password.to_owned());
        self.begin(conn, Attempt { request_id, user, step, device: None, agent: String::new() }, fx);
        Verdict::Continue
    }

    pub(crate) fn login(
        &mut self,
        conn: ConnId,
        request_id: u32,
        login: &message::Login<'_>,
        fx: &mut Effects,
    ) -> Verdict {
        let user = match self.may_attempt(conn, login.user) {
            Ok(_) if login.device.0 == 0 => Err(ErrorCode::BadDevice),
            other => other,
        };
        let user = match user {
            Ok(user) => user,
            Err(code) => return self.attempt_refused(conn, request_id, code, fx),
        };
        if let Some(verdict) = self.redirect((conn, request_id), user.partition(), fx) {
            return verdict;
        }
        if !self.is_here(self.owner(user.partition())) {
            self.sessions.hand_over(conn);
            return Verdict::HandOver(self.owner(user.partition()));
        }
        let device = Some((login.device, login.device_kind));
        let agent = kept_agent(login.agent);
        match login.credential {
            Credential::Password(Secret(password)) if password.len() <= limits::PASSWORD_BYTES_MAX => {
                let step = Step::UserForPassword(password.to_owned());
                self.begin(conn, Attempt { request_id, user, step, device, agent }, fx);
            }
            Credential::Token(Secret(token)) if token.len() <= limits::TOKEN_BYTES_MAX => {
                let work = Work::VerifyToken { token: token.to_owned(), user: user.clone() };
                let step = Step::Proof { by_token: true };
                if self.put_attempt(conn, Attempt { request_id, user, step, device, agent }) {
                    self.work(Question::AttemptWork(conn), work, fx);
                }
            }
            Credential::Password(_) | Credential::Token(_) => {
                return self.attempt_refused(conn, request_id, ErrorCode::AuthFailed, fx);
            }
        }
        Verdict::Continue
    }

    /// The checks that every attempt begins with.
    fn may_attempt(&self, conn: ConnId, user: &str) -> Result<UserName, ErrorCode> {
        match self.sessions.get(conn).map(|session| &session.state) {
            Some(State::LoggedIn(_)) => return Err(ErrorCode::AlreadyLoggedIn),
            Some(State::Greeted(Some(_))) => return Err(ErrorCode::LoginInProgress),
            Some(State::Greeted(None) | State::Fresh | State::Draining) | None => {}
        }
        if self.draining {
            return Err(ErrorCode::ShuttingDown);
        }
        if !self.may_load() {
            return Err(ErrorCode::Busy);
        }
        UserName::of_user(user)
    }

    fn attempt_refused(&mut self, conn: ConnId, request_id: u32, code: ErrorCode, fx: &mut Effects) -> Verdict {
        self.sessions.fail(conn, request_id, code, fx);
        if code.closes() { Verdict::Stop } else { Verdict::Continue }
    }

    fn put_attempt(&mut self, conn: ConnId, attempt: Attempt) -> bool {
        match self.sessions.get_mut(conn).map(|session| &mut session.state) {
            Some(State::Greeted(place)) => {
                *place = Some(Box::new(attempt));
                true
            }
            Some(State::Fresh | State::LoggedIn(_) | State::Draining) | None => false,
        }
    }

    fn take_attempt(&mut self, conn: ConnId) -> Option<Attempt> {
        match self.sessions.get_mut(conn).map(|session| &mut session.state) {
            Some(State::Greeted(attempt)) => attempt.take().map(|attempt| *attempt),
            Some(State::Fresh | State::LoggedIn(_) | State::Draining) | None => None,
        }
    }

    /// Parks an attempt until its user is known: at once when it is cached, else after a question to the store.
    fn begin(&mut self, conn: ConnId, attempt: Attempt, fx: &mut Effects) {
        let name = attempt.user.clone();
        if !self.put_attempt(conn, attempt) {
            return;
        }
        match self.users.get(&name).cloned() {
            Some(user) => self.attempt_user(conn, Answer::User(Some(user)), fx),
            None => self.load(Question::AttemptUser(conn), Query::User { name }, fx),
        }
    }

    /// The user of an attempt is known, or known not to exist.
    pub(crate) fn attempt_user(&mut self, conn: ConnId, answer: Answer, fx: &mut Effects) {
        let Answer::User(user) = answer else { return self.attempt_failed(conn, self.unread(), fx) };
        let Some(user) = user else { return self.attempt_known(conn, None, fx) };
        self.remember_user(user.clone());
        // They say whether the user was deleted, and a login needs them anyway.
        let name = user.name.clone();
        self.with_settings(&name, Parked::Attempt(conn, Box::new(user)), fx);
    }

    /// The settings of an attempt's user are in memory, or could not be had.
    pub(crate) fn attempt_settings(
        &mut self,
        conn: ConnId,
        user: User,
        result: Result<(), ErrorCode>,
        fx: &mut Effects,
    ) {
        let there = if self.planted.is(Bug::DeletedLogIn) { Ok(()) } else { self.is_there(&user.name) };
        match there.and(result) {
            Ok(()) => self.attempt_known(conn, Some(user), fx),
            Err(code) => self.attempt_failed(conn, code, fx),
        }
    }

    pub(crate) fn attempt_failed(&mut self, conn: ConnId, code: ErrorCode, fx: &mut Effects) {
        if let Some(attempt) = self.take_attempt(conn) {
            self.sessions.fail(conn, attempt.request_id, code, fx);
        }
    }

    fn attempt_known(&mut self, conn: ConnId, user: Option<User>, fx: &mut Effects) {
        let Some(mut attempt) = self.take_attempt(conn) else { return };
        match (std::mem::replace(&mut attempt.step, Step::Created), user) {
            (Step::NameFree(_) | Step::NameStillFree(_), Some(_)) => {
                self.sessions.fail(conn, attempt.request_id, ErrorCode::NameTaken, fx);
            }
            (Step::NameFree(password), None) => {
                attempt.step = Step::Hash;
                self.put_attempt(conn, attempt);
                self.work(Question::AttemptWork(conn), Work::HashPassword { password }, fx);
            }
            (Step::NameStillFree(hash), None) => {
                attempt.step = Step::Created;
                self.create_user(conn, attempt, Some(hash), fx);
            }
            (Step::UserForPassword(password), user) => {
                let hash = user.and_then(|user| user.password_hash);
                attempt.step = Step::Proof { by_token: false };
                self.put_attempt(conn, attempt);
                self.work(Question::AttemptWork(conn), Work::VerifyPassword { password, hash }, fx);
            }
            (Step::UserForToken, Some(_)) => self.logged_in(conn, attempt, fx),
            (Step::UserForToken, None) if self.config.token_creates_user => {
                attempt.step = Step::Created;
                self.create_user(conn, attempt, None, fx);
            }
            (Step::UserForToken, None) => self.login_failed(conn, attempt.request_id, fx),
            (step @ (Step::Hash | Step::Proof { .. } | Step::Created), _) => {
                debug_assert!(false, "no user was asked for at {step:?}");
            }
        }
    }

    /// A worker has answered.
    pub(crate) fn attempt_worked(&mut self, conn: ConnId, outcome: WorkOutcome, fx: &mut Effects) {
        let Some(mut attempt) = self.take_attempt(conn) else { return };
        match (outcome, &attempt.step) {
            (WorkOutcome::Hashed(hash), Step::Hash) => {
                // Hashing took a while: somebody else may have taken the name.
                attempt.step = Step::NameStillFree(hash);
                self.begin(conn, attempt, fx);
            }
            (WorkOutcome::Verified(true), Step::Proof { by_token: true }) => {
                attempt.step = Step::UserForToken;
                self.begin(conn, attempt, fx);
            }
            (WorkOutcome::Verified(true), Step::Proof { by_token: false }) => self.logged_in(conn, attempt, fx),
            (WorkOutcome::Verified(false), _) => self.login_failed(conn, attempt.request_id, fx),
            (WorkOutcome::Busy, _) => self.sessions.fail(conn, attempt.request_id, ErrorCode::Busy, fx),
            (WorkOutcome::Hashed(_) | WorkOutcome::Verified(true) | WorkOutcome::Failed, _) => {
                self.sessions.fail(conn, attempt.request_id, ErrorCode::Internal, fx);
            }
        }
    }

    fn create_user(&mut self, conn: ConnId, attempt: Attempt, password_hash: Option<String>, fx: &mut Effects) {
        let taken = if attempt.device.is_some() { ErrorCode::Busy } else { ErrorCode::NameTaken };
        let code = if self.creating.contains(&attempt.user) { Err(taken) } else { self.may_append() };
        if let Err(code) = code {
            return self.sessions.fail(conn, attempt.request_id, code, fx);
        }
        let user = User { name: attempt.user.clone(), password_hash, created_ms: self.now.unix_ms };
        self.creating.insert(user.name.clone());
        self.put_attempt(conn, attempt);
        let lsn = self.append(Record::User(user.clone()), fx);
        self.pending.push_back(Pending { lsn, weight: 0, work: PendingWork::User { conn, user } });
    }

    /// The record of a new user is on disk.
    pub(crate) fn user_created(&mut self, conn: ConnId, user: User, fx: &mut Effects) {
        self.creating.remove(&user.name);
        let name = user.name.clone();
        self.remember_user(user);
        self.sessions.counters.registered += 1;
        let Some(attempt) = self.take_attempt(conn) else { return };
        if attempt.device.is_some() {
            self.logged_in(conn, attempt, fx);
        } else {
            self.sessions.answer(conn, attempt.request_id, &Reply::RegisterOk { user: name.as_str() }, fx);
        }
    }

    /// The store failed under a new user.
    pub(crate) fn user_not_created(&mut self, conn: ConnId, user: &User, fx: &mut Effects) {
        self.creating.remove(&user.name);
        if let Some(attempt) = self.take_attempt(conn) {
            self.sessions.fail(conn, attempt.request_id, ErrorCode::StoreFailed, fx);
        }
    }

    pub(crate) fn remember_user(&mut self, user: User) {
        self.users.put(user.name.clone(), user);
        while self.users.len() > self.config.users_cached_max.max(1) {
            self.users.pop_lru();
        }
    }

    pub(crate) fn login_failed(&mut self, conn: ConnId, request_id: u32, fx: &mut Effects) {
        self.sessions.counters.login_failures += 1;
        let mut too_many = false;
        if let Some(session) = self.sessions.get_mut(conn) {
            session.failures = session.failures.saturating_add(1);
            too_many = session.failures >= LOGIN_FAILURES_MAX;
        }
        let code = if too_many { ErrorCode::TooManyLogins } else { ErrorCode::AuthFailed };
        self.sessions.fail(conn, request_id, code, fx);
    }

    fn logged_in(&mut self, conn: ConnId, attempt: Attempt, fx: &mut Effects) {
        let Some((device, kind)) = attempt.device else { return };
        let user = attempt.user;
        // It may have been while the proof was checked.
        if let Err(code) = self.is_there(&user)
            && !self.planted.is(Bug::DeletedLogIn)
        {
            return self.sessions.fail(conn, attempt.request_id, code, fx);
        }
        self.apply_device_policy(&user, (device, kind), fx);
        self.logins += 1;
        let mut login = Login::new(user.clone(), device, kind);
        login.hides = self.settings(&user).is_none_or(|settings| settings.row.hides);
        let Some(session) = self.sessions.get_mut(conn) else { return };
        self.users.pop(&user);
        session.state = State::LoggedIn(Box::new(login));
        // Until now the connection was looked at for its login alone. If that look is soon enough, it serves.
        let look_us = self.now.mono_us + self.config.write_stall_ms * 1_000;
        if session.look_us > look_us {
            self.look_at(conn, look_us);
        }
        let first = self.online.add(&user, conn);
        for &other in self.online.get(&user).into_iter().flatten() {
            if let Some(login) = self.sessions.login_mut(other) {
                login.alone = first;
            }
        }
        self.sessions.counters.logins += 1;
        let ok = LoginOk {
            user: user.as_str(),
            session: (u64::from(self.config.shard.0) << 48) | self.logins,
            server_time_ms: self.now.unix_ms,
            ping_interval_ms: millis(self.config.ping_interval_ms),
            idle_timeout_ms: millis(self.config.idle_timeout_ms),
            frame_bytes_max: self.config.frame_bytes_max,
            sends_in_flight_max: limits::SENDS_IN_FLIGHT_MAX,
        };
        self.sessions.answer(conn, attempt.request_id, &Reply::LoginOk(ok), fx);
        if first {
            self.arrived(&user, fx);
        }
        self.note_device(user, (device, kind), attempt.agent, fx);
    }

    /// Makes room for a device: the same device goes, and what the policy does not allow beside the new one.
    fn apply_device_policy(&mut self, user: &UserName, (device, kind): (DeviceId, DeviceKind), fx: &mut Effects) {
        let present = self.online.get(user).cloned().unwrap_or_default();
        let mut staying = Vec::with_capacity(present.len());
        for conn in present {
            let Some(login) = self.sessions.get(conn).and_then(|session| session.login()) else { continue };
            let clashes = match self.config.device_policy {
                DevicePolicy::Many => false,
                DevicePolicy::OnePerKind => login.kind == kind,
                DevicePolicy::One => true,
            };
            if login.device == device {
                self.kick(conn, KickReason::Replaced, fx);
            } else if clashes {
                self.kick(conn, KickReason::DevicePolicy, fx);
            } else {
                staying.push(conn);
            }
        }
        let excess = (staying.len() + 1).saturating_sub(usize::from(self.config.devices_max.max(1)));
        for conn in staying.into_iter().take(excess) {
            self.kick(conn, KickReason::DevicePolicy, fx);
        }
    }

    pub(crate) fn kick(&mut self, conn: ConnId, reason: KickReason, fx: &mut Effects) {
        let detail = match reason {
            KickReason::Replaced => "this device logged in again",
            KickReason::DevicePolicy => "another device of this user logged in",
            KickReason::LoggedOut => "another device of this user logged this one out",
            KickReason::UserDeleted => "this user was deleted",
        };
        self.sessions.counters.kicked += 1;
        self.sessions.push(conn, &Reply::Kicked { reason, detail }, fx);
        self.sessions.close(conn, CloseReason::Kicked, fx);
    }

    pub(crate) fn logout(&mut self, conn: ConnId, request_id: u32, fx: &mut Effects) {
        self.sessions.answer(conn, request_id, &Reply::LogoutOk, fx);
        self.sessions.close(conn, CloseReason::Logout, fx);
    }

    /// A device is gone: off the online list, its cursors written.
    pub(crate) fn forget_login(&mut self, conn: ConnId, login: &Login, fx: &mut Effects) {
        if let Some(settings) = self.online.remove(&login.user, conn) {
            self.settings_left(&login.user, settings);
            self.left(&login.user, fx);
        }
        for user in login.social().iter().flat_map(|social| &social.watching) {
            self.forget_watch(conn, user);
        }
        self.syncs.remove(&conn);
        for (conversation, known) in login.known().iter().filter(|(_, known)| known.dirty) {
            self.write_cursor(login, *conversation, known.acked, fx);
        }
    }
}

fn millis(ms: u64) -> u32 {
    u32::try_from(ms).unwrap_or(u32::MAX)
}
