//! The devices of a user: noted at login, DEVICES lists them, DROP_DEVICE logs one out. Runs on the shard of the user, which
//! alone writes their rows.
//!
//! Stores forget the cursors of a device with its row.
//!
//! A device that could not be noted (the queue to the disk was full) is listed for as long as it is online. The time of a
//! last login is that of the last one noted, at most [`NOTED_MS`] earlier. Invariants: at most `DEVICES_PER_USER_MAX` are
//! remembered after each login that is noted; stamps follow the clock, so a device that comes back after it was dropped
//! is newer than its removal.

use std::collections::BTreeMap;

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{DeviceId, UserName};
use ringline_schema::limits;
use ringline_schema::message::chat::Device;
use ringline_schema::message::{ChatReply, DeviceKind, KickReason, Reply};
use ringline_schema::record::{Answer, Change, Query, Record};
use ringline_schema::rows::{DeviceRow, Row, RowKey, RowList, RowValue};

use crate::conversation::{Pending, PendingWork};
use crate::event::{ConnId, Effects};
use crate::peer::Origin;
use crate::planted::Bug;
use crate::shard::{Question, Shard};

/// Rows asked for: more than there should be, so that those too many are found.
const ROWS_MAX: u16 = 2 * limits::DEVICES_PER_USER_MAX as u16;

/// A login so soon after the one that was noted is not: clients that lost their network come back all at once.
const NOTED_MS: u64 = 60_000;

/// What the rows of a user's devices are wanted for.
#[derive(Debug)]
pub(crate) struct DeviceWork {
    user: UserName,
    what: What,
}

impl DeviceWork {
    pub(crate) fn user(&self) -> &UserName {
        &self.user
    }
}

#[derive(Debug)]
enum What {
    Login { device: DeviceId, kind: DeviceKind, agent: String },
    List(Origin),
    Drop(Origin, DeviceId),
}

/// The part of a LOGIN's agent that is kept.
pub(crate) fn kept_agent(agent: &str) -> String {
    let mut end = agent.len().min(limits::AGENT_BYTES_MAX);
    while !agent.is_char_boundary(end) {
        end -= 1;
    }
    agent.get(..end).unwrap_or_default().to_owned()
}

impl Shard {
    /// A device has logged in.
    pub(crate) fn note_device(
        &mut self,
        user: UserName,
        (device, kind): (DeviceId, DeviceKind),
        agent: String,
        fx: &mut Effects,
    ) {
        if self.may_load() {
            self.load_devices(DeviceWork { user, what: What::Login { device, kind, agent } }, fx);
        }
    }

    pub(crate) fn devices(&mut self, origin: Origin, fx: &mut Effects) -> Result<(), ErrorCode> {
        self.may_page(origin.conn)?;
        let user = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?.user.clone();
        self.load_devices(DeviceWork { user, what: What::List(origin) }, fx);
        Ok(())
    }

    pub(crate) fn drop_device(&mut self, origin: Origin, device: DeviceId, fx: &mut Effects) -> Result<(), ErrorCode> {
        self.may_append()?;
        if !self.may_load() {
            return Err(ErrorCode::Busy);
        }
        let user = self.sessions.login_mut(origin.conn).ok_or(ErrorCode::NotLoggedIn)?.user.clone();
        self.load_devices(DeviceWork { user, what: What::Drop(origin, device) }, fx);
        Ok(())
    }

    fn load_devices(&mut self, work: DeviceWork, fx: &mut Effects) {
        let list = RowList::Devices(work.user.clone());
        self.load(Question::Devices(Box::new(work)), Query::Rows { list, after: None, limit: ROWS_MAX }, fx);
    }

    pub(crate) fn devices_loaded(&mut self, work: DeviceWork, answer: Answer, fx: &mut Effects) {
        let DeviceWork { user, what } = work;
        let rows = match answer {
            Answer::Rows(rows) => rows,
            Answer::Failed
            | Answer::User(_)
            | Answer::Head(_)
            | Answer::Messages { .. }
            | Answer::NotReadable
            | Answer::Conversations(_)
            | Answer::Row(_)
            | Answer::Count(_) => match what {
                What::Login { .. } => return,
                What::List(origin) | What::Drop(origin, _) => {
                    return self.tell_done(origin, Err(self.unread()), fx);
                }
            },
        };
        let known: BTreeMap<DeviceId, (u64, DeviceRow)> = rows.into_iter().filter_map(known).collect();
        match what {
            What::Login { device, kind, agent } => self.write_device(&user, (device, kind, agent), known, fx),
            What::List(origin) => self.list_devices(origin, &user, known, fx),
            What::Drop(origin, device) => {
                let stamp = known.get(&device).map(|(stamp, _)| *stamp);
                self.drop_known(origin, (user, device), stamp, fx);
            }
        }
    }

    /// Later than everything that was written of this device.
    fn device_stamp(&self, before: Option<u64>) -> u64 {
        before.map_or(0, |stamp| stamp.saturating_add(1)).max(self.now.unix_ms)
    }

    /// Notes a login, and forgets whom there is no more room for: those that logged in longest ago.
    fn write_device(
        &mut self,
        user: &UserName,
        (device, kind, agent): (DeviceId, DeviceKind, String),
        mut known: BTreeMap<DeviceId, (u64, DeviceRow)>,
        fx: &mut Effects,
    ) {
        if self.may_append().is_err() || self.is_deleted(user) {
            return;
        }
        let now_ms = self.now.unix_ms;
        let before = known.remove(&device);
        let noted = |(_, row): &(u64, DeviceRow)| {
            row.kind == kind && row.agent == agent && now_ms < row.last_ms.saturating_add(NOTED_MS)
        };
        if before.as_ref().is_some_and(noted) {
            return;
        }
        let first_ms = before.as_ref().map_or(now_ms, |(_, row)| row.first_ms);
        let stamp = self.device_stamp(before.map(|(stamp, _)| stamp));
        let row = DeviceRow { kind, agent, first_ms, last_ms: now_ms };
        let key = RowKey::Device(user.clone(), device);
        let mut rows = vec![Row { key, stamp, value: Some(RowValue::Device(row)) }];
        let mut others: Vec<_> = known.into_iter().collect();
        others.sort_by_key(|(device, (_, row))| (row.last_ms, *device));
        let excess = (others.len() + 1).saturating_sub(limits::DEVICES_PER_USER_MAX);
        for (device, (stamp, _)) in others.into_iter().take(excess) {
            let stamp = self.device_stamp(Some(stamp));
            rows.push(Row { key: RowKey::Device(user.clone(), device), stamp, value: None });
        }
        self.append(Record::Change(Box::new(Change { message: None, rows })), fx);
    }

    /// Connections of a user, with the device of each.
    fn online_devices(&self, user: &UserName) -> Vec<(ConnId, DeviceId, DeviceKind)> {
        let conns = self.online.get(user).into_iter().flatten();
        let device = |&conn| {
            let login = self.sessions.get(conn)?.login()?;
            Some((conn, login.device, login.kind))
        };
        conns.filter_map(device).collect()
    }

    fn list_devices(
        &mut self,
        origin: Origin,
        user: &UserName,
        mut known: BTreeMap<DeviceId, (u64, DeviceRow)>,
        fx: &mut Effects,
    ) {
        let online = self.online_devices(user);
        for &(_, device, kind) in &online {
            let unnoted = || (0, DeviceRow { kind, agent: String::new(), first_ms: 0, last_ms: 0 });
            known.entry(device).or_insert_with(unnoted);
        }
        let devices = known
            .iter()
            .map(|(device, (_, row))| Device {
                device: *device,
                kind: row.kind,
                agent: &row.agent,
                first_ms: row.first_ms,
                last_ms: row.last_ms,
                online: online.iter().any(|(_, other, _)| other == device),
            })
            .collect();
        let reply = Reply::Chat(ChatReply::DevicesOk { devices });
        self.sessions.answer(origin.conn, origin.request_id, &reply, fx);
    }

    /// Logs a device out at once; done when it is forgotten on disk. Who drops his own device goes last.
    fn drop_known(
        &mut self,
        origin: Origin,
        (user, device): (UserName, DeviceId),
        stamp: Option<u64>,
        fx: &mut Effects,
    ) {
        let conns: Vec<_> = self.online_devices(&user).into_iter().filter(|(_, other, _)| *other == device).collect();
        if stamp.is_none() && conns.is_empty() {
            return self.tell_done(origin, Err(ErrorCode::NoSuchDevice), fx);
        }
        if let Err(code) = self.may_append() {
            return self.tell_done(origin, Err(code), fx);
        }
        for (conn, _, _) in conns {
            // What it has and has not written yet is forgotten with the rest.
            if let Some(login) = self.sessions.login_mut(conn) {
                login.forget_known();
            }
            if conn != origin.conn && !self.planted.is(Bug::DroppedStay) {
                self.kick(conn, KickReason::LoggedOut, fx);
            }
        }
        // A login of this moment may have been noted with the same stamp.
        let stamp = self.device_stamp(stamp).saturating_add(1);
        let row = Row { key: RowKey::Device(user, device), stamp, value: None };
        let lsn = self.append(Record::Change(Box::new(Change { message: None, rows: vec![row] })), fx);
        self.pending.push_back(Pending { lsn, weight: 0, work: PendingWork::Dropped(origin, device) });
    }

    pub(crate) fn dropped(&mut self, origin: Origin, device: DeviceId, fx: &mut Effects) {
        self.tell_done(origin, Ok(()), fx);
        if let Some(login) = self.sessions.login_mut(origin.conn).filter(|login| login.device == device) {
            login.forget_known();
            self.kick(origin.conn, KickReason::LoggedOut, fx);
        }
    }
}

/// A row's device, stamp and value.
fn known(row: Row) -> Option<(DeviceId, (u64, DeviceRow))> {
    match (row.key, row.value) {
        (RowKey::Device(_, device), Some(RowValue::Device(value))) => Some((device, (row.stamp, value))),
        (_, _) => None,
    }
}
