//! What a simulated application asks beside its sends, and what it makes of the answers: groups, READ, SYNC, lists, devices,
//! and whole conversations that are read back.
//!
//! Part of a [`Device`]; forgotten with its process. Invariant: what is asked page by page is written to the history when the
//! last page has come, as one thing.

use std::collections::{BTreeMap, VecDeque};

use ringline_client::machine::{Ask, Told};
use ringline_client::{
    CallError, ConversationId, ConversationPage, ErrorCode, ExportPage, HistoryRange, Seq, SyncPage,
};
use ringline_client::{History as Page, Place as WirePlace};

use super::device::Device;
use crate::checker::{Happening, History, Listed, Moment, Notice, Peer, Place, Range, Shown, Source};
use crate::observed::{self, Memory};

/// Rows of a page: few, so that there are several.
const PAGE_ROWS: u16 = 20;

/// What an open question is for.
#[derive(Clone, Debug)]
pub(super) enum Purpose {
    Reading,
    Group,
    Read(Place),
    Sync,
    List,
    Devices,
    Drop(u64),
    Delete(u32),
    Hide(Place),
    Fetch(Moment, (Peer, u128), Range),
    Watch,
    Unwatch(u32),
    Status,
    Receipts(Place),
    Once(Once),
}

/// What is asked without pages, and of which only a success counts.
#[derive(Clone, Debug)]
pub(super) enum Once {
    /// Settles something; what happens when it is kept.
    Settling(Box<Happening>),
    /// Tells everyone this.
    Notice(String),
    Export,
}

/// A SYNC, page by page.
#[derive(Clone, Debug, Default)]
struct Syncing {
    asked: Moment,
    behind: Vec<Place>,
    messages: Vec<Shown>,
    /// Nothing is sent meanwhile.
    at_rest: bool,
}

/// See the module.
#[derive(Default)]
pub struct Asked {
    open: BTreeMap<u64, Purpose>,
    pub memory: Memory,
    reading: VecDeque<Peer>,
    read: Vec<Shown>,
    syncing: Option<Syncing>,
    listing: Option<(Moment, Vec<Listed>, bool)>,
    /// Every conversation of the user, and its head.
    listed: Vec<Place>,
    /// Receipts that are still to be asked for.
    receipts: Vec<Place>,
    /// A status is on its way.
    saying: bool,
    /// So is something else that counts by the last answer.
    pub(super) settling: bool,
    /// Whom it watches, as it asked last.
    watching: Option<u32>,
    /// Whom it has blocked last.
    pub(super) blocked: Option<u32>,
    /// Of an export, page after page.
    exported: Vec<u8>,
    statuses: u32,
    /// What has to be asked when nothing is sent any more.
    last: VecDeque<Last>,
}

#[derive(Clone, Copy, Debug)]
enum Last {
    ReadBack,
    Sync,
    List,
    Devices,
    Receipts,
    Export,
}

impl Asked {
    /// Where the application is in the `number`th of the conversations it knows, counted round and round.
    pub fn place(&self, number: usize) -> Option<Place> {
        let (&conversation, &seq) = self.memory.seen.iter().nth(number.checked_rem(self.memory.seen.len())?)?;
        Some(Place { conversation, seq })
    }

    /// Nothing is being asked that has to come to its end.
    pub fn is_done(&self) -> bool {
        self.last.is_empty() && self.reading.is_empty() && self.syncing.is_none() && self.listing.is_none()
    }
}

fn wire(place: Place) -> WirePlace {
    WirePlace { conversation: ConversationId(place.conversation), seq: Seq(place.seq) }
}

impl Device {
    fn ask(&mut self, now_ms: u64, purpose: Purpose, ask: Ask) {
        self.asks(now_ms, purpose, ask);
    }

    /// False: its queue is full, and the application asks another time.
    pub(super) fn asks(&mut self, now_ms: u64, purpose: Purpose, ask: Ask) -> bool {
        let number = self.machine.ask(now_ms, ask);
        if let Ok(number) = number {
            self.asked.open.insert(number, purpose);
        }
        number.is_ok()
    }

    pub fn ask_group(&mut self, now_ms: u64, ask: Ask) {
        self.ask(now_ms, Purpose::Group, ask);
    }

    pub fn read(&mut self, now_ms: u64, place: Place, history: &mut History) {
        history.push(self.name, Happening::ReadAsked(place));
        let WirePlace { conversation, seq } = wire(place);
        self.ask(now_ms, Purpose::Read(place), Ask::Read { conversation, seq });
    }

    pub fn drop_device(&mut self, now_ms: u64, number: u64, history: &mut History) {
        history.push(self.name, Happening::DropAsked(number));
        self.ask(now_ms, Purpose::Drop(number), Ask::DropDevice(ringline_client::DeviceId(number)));
    }

    /// Its own account, or, as an administrator, another's.
    pub fn delete_user(&mut self, now_ms: u64, (user, recall): (u32, bool), history: &mut History) {
        history.push(self.name, Happening::DeleteAsked { user, recall });
        let token = (user == self.name.user).then(|| "token".to_owned());
        let ask = Ask::DeleteUser { user: observed::name(Peer::User(user)), token, recall };
        self.ask(now_ms, Purpose::Delete(user), ask);
    }

    /// The user deletes a message for himself.
    pub fn hide(&mut self, now_ms: u64, (with, place): (Peer, Place), history: &mut History) {
        history.push(self.name, Happening::HideAsked(place));
        let (with, seq) = (observed::name(with), Seq(place.seq));
        self.ask(now_ms, Purpose::Hide(place), Ask::DeleteForMe { with, seq });
    }

    /// Asks for a part of the history.
    pub fn fetch(&mut self, now_ms: u64, (with, conversation): (Peer, u128), range: Range, history: &History) {
        let Range { after, before, newest } = range;
        let wanted = HistoryRange { after: Seq(after), before: before.map(Seq), limit: PAGE_ROWS, newest };
        let ask = Ask::History { with: observed::name(with), range: wanted };
        self.ask(now_ms, Purpose::Fetch(history.now(), (with, conversation), range), ask);
    }

    /// Watches these users from now on.
    pub fn watch(&mut self, now_ms: u64, users: &[u32], history: &mut History) {
        let names = users.iter().map(|user| observed::name(Peer::User(*user))).collect();
        history.push(self.name, Happening::WatchAsked(users.to_vec()));
        self.asked.watching = users.last().copied();
        self.ask(now_ms, Purpose::Watch, Ask::Watch(names));
    }

    /// Watches somebody no more, whom it watches if there is one. Not while it asks to watch somebody: which of the two is answered first is open.
    pub fn unwatch(&mut self, now_ms: u64, user: u32, history: &mut History) {
        let watches = |purpose: &Purpose| matches!(purpose, Purpose::Watch | Purpose::Unwatch(_));
        if !self.asked.open.values().any(watches) {
            let user = self.asked.watching.take().unwrap_or(user);
            history.push(self.name, Happening::UnwatchAsked(vec![user]));
            self.ask(now_ms, Purpose::Unwatch(user), Ask::Unwatch(vec![observed::name(Peer::User(user))]));
        }
    }

    /// Whether it may ask to watch somebody: it has not just asked for the contrary.
    pub fn may_watch(&self) -> bool {
        !self.asked.open.values().any(|purpose| matches!(purpose, Purpose::Unwatch(_)))
    }

    /// Says something else of its user, one thing after the other.
    pub fn say(&mut self, now_ms: u64, visible: bool, history: &mut History) {
        if self.asked.saying || !self.machine.is_online() {
            return;
        }
        self.asked.statuses += 1;
        let status = format!("{}.{}.{}", self.name.user, self.process, self.asked.statuses);
        let ask = Ask::SetStatus { status: status.clone(), visible };
        if let Ok(number) = self.machine.ask(now_ms, ask) {
            self.asked.saying = true;
            self.asked.open.insert(number, Purpose::Status);
            history.push(self.name, Happening::StatusAsked { status, visible });
        }
    }

    /// Asks for what is behind these places.
    pub fn sync(&mut self, now_ms: u64, behind: Vec<Place>, history: &History) {
        if self.asked.syncing.is_none() {
            self.asked.syncing = Some(Syncing { asked: history.now(), behind, ..Syncing::default() });
            self.sync_on(now_ms, WirePlace::default());
        }
    }

    fn sync_on(&mut self, now_ms: u64, from: WirePlace) {
        let Some(syncing) = &self.asked.syncing else { return };
        let places = syncing.behind.iter().copied().map(wire).collect();
        self.ask(now_ms, Purpose::Sync, Ask::Sync { places, from, limit: PAGE_ROWS });
    }

    pub fn list(&mut self, now_ms: u64, history: &History) {
        if self.asked.listing.is_none() {
            self.asked.listing = Some((history.now(), Vec::new(), false));
            self.list_on(now_ms, ConversationId(0));
        }
    }

    fn list_on(&mut self, now_ms: u64, cursor: ConversationId) {
        self.ask(now_ms, Purpose::List, Ask::Conversations { cursor, limit: PAGE_ROWS });
    }

    /// Nothing is sent any more: everything is asked once, one thing after the other.
    pub fn ask_all(&mut self, now_ms: u64, with: impl Iterator<Item = Peer>, history: &History) {
        self.asked = Asked { memory: std::mem::take(&mut self.asked.memory), ..Asked::default() };
        self.asked.reading = with.collect();
        self.asked.last = VecDeque::from([Last::ReadBack, Last::List, Last::Sync, Last::Devices, Last::Receipts]);
        self.ask_last(now_ms, history);
    }

    /// … and at the end of it for all that is kept about its user.
    pub fn export_too(&mut self) {
        self.asked.last.push_back(Last::Export);
    }

    fn ask_last(&mut self, now_ms: u64, history: &History) {
        match self.asked.last.front() {
            None => {}
            Some(Last::ReadBack) => self.read_next(now_ms, Seq::ZERO, history),
            Some(Last::Sync) => {
                let behind = self.asked.listed.iter().map(|place| Place { seq: 0, ..*place }).collect();
                self.asked.syncing =
                    Some(Syncing { asked: history.now(), behind, messages: Vec::new(), at_rest: true });
                self.sync_on(now_ms, WirePlace::default());
            }
            Some(Last::List) => {
                self.asked.listing = Some((history.now(), Vec::new(), true));
                self.list_on(now_ms, ConversationId(0));
            }
            Some(Last::Devices) => self.ask(now_ms, Purpose::Devices, Ask::Devices),
            Some(Last::Export) => {
                self.asked.exported.clear();
                self.ask(now_ms, Purpose::Once(Once::Export), Ask::Export { cursor: String::new() });
            }
            Some(Last::Receipts) => {
                self.asked.receipts = self.asked.listed.iter().copied().filter(|place| place.seq > 0).collect();
                self.receipts_next(now_ms, history);
            }
        }
    }

    fn last_done(&mut self, now_ms: u64, history: &History) {
        self.asked.last.pop_front();
        self.ask_last(now_ms, history);
    }

    fn receipts_next(&mut self, now_ms: u64, history: &History) {
        match self.asked.receipts.last() {
            Some(&place) => {
                let WirePlace { conversation, seq } = wire(place);
                let ask = Ask::Receipts { conversation, seq, limit: PAGE_ROWS };
                self.ask(now_ms, Purpose::Receipts(place), ask);
            }
            None => self.last_done(now_ms, history),
        }
    }

    pub(super) fn answered(
        &mut self,
        now_ms: u64,
        (number, answer): (u64, Result<Told, CallError>),
        history: &mut History,
    ) {
        let Some(purpose) = self.asked.open.remove(&number) else { return };
        match (purpose, answer) {
            (Purpose::Reading, Ok(Told::History(page))) => self.read_page(now_ms, page, history),
            (Purpose::Reading, Err(CallError::Refused { .. })) => {
                // Of no group that this user was ever in.
                self.asked.reading.pop_front();
                self.asked.read.clear();
                self.read_next(now_ms, Seq::ZERO, history);
            }
            (Purpose::Reading, _) => {
                self.asked.read.clear();
                self.read_next(now_ms, Seq::ZERO, history);
            }
            (Purpose::Group, Ok(Told::Group(done))) if done.seq > Seq::ZERO => {
                let place = Place { conversation: done.conversation.0, seq: done.seq.0 };
                history.push(self.name, Happening::Changed(place));
            }
            (Purpose::Read(place), Ok(_)) => history.push(self.name, Happening::ReadKept(place)),
            (Purpose::Sync, Ok(Told::Sync(page))) => self.sync_page(now_ms, page, history),
            (Purpose::Sync, _) => self.sync_ends(now_ms, false, history),
            (Purpose::List, Ok(Told::Conversations(page))) => self.list_page(now_ms, &page, history),
            (Purpose::List, _) => self.listing_ends(now_ms, false, history),
            (Purpose::Devices, Ok(Told::Devices(devices))) => {
                let numbers = devices.iter().map(|device| device.device.0).collect();
                history.push(self.name, Happening::Devices(numbers));
                self.last_done(now_ms, history);
            }
            (Purpose::Devices, _) => self.ask_last(now_ms, history),
            (Purpose::Fetch(asked, (with, conversation), range), answer) => {
                let page = match &answer {
                    Ok(Told::History(page)) => observed::page(Ok(page)),
                    Ok(_) => None,
                    Err(error) => observed::page(Err(error)),
                };
                if let Some(page) = page {
                    history.push(self.name, Happening::Fetched { asked, with, conversation, range, page });
                }
            }
            (Purpose::Watch, Ok(Told::Presence(rows))) => {
                let users = rows.iter().map(|row| observed::user(&row.user)).collect();
                history.push(self.name, Happening::Watches(users));
            }
            (Purpose::Status, answer) => {
                self.asked.saying = false;
                if answer.is_ok() {
                    history.push(self.name, Happening::StatusKept);
                }
            }
            (Purpose::Receipts(place), answer) => {
                if let Ok(Told::Receipts(page)) = &answer {
                    history.push(self.name, Happening::ReceiptsShown(observed::receipts(place, page)));
                }
                // What is refused is none of ours any more, or let go.
                if matches!(answer, Ok(_) | Err(CallError::Refused { .. })) {
                    self.asked.receipts.pop();
                }
                self.receipts_next(now_ms, history);
            }
            (Purpose::Group, Err(CallError::Refused { code: ErrorCode::NotAllowed, .. })) => {
                history.push(self.name, Happening::Outranked);
            }
            (Purpose::Once(once), answer) => self.told_once(now_ms, (once, answer), history),
            (Purpose::Hide(place), Ok(_)) => history.push(self.name, Happening::HideKept(place)),
            (Purpose::Unwatch(user), Ok(_)) => history.push(self.name, Happening::Unwatched(vec![user])),
            (Purpose::Drop(number), Ok(_)) => history.push(self.name, Happening::DropKept(number)),
            (Purpose::Delete(user), Ok(_)) => history.push(self.name, Happening::DeleteKept { user }),
            (Purpose::Group | Purpose::Read(_) | Purpose::Hide(_) | Purpose::Watch, _) => {}
            (Purpose::Drop(_) | Purpose::Delete(_) | Purpose::Unwatch(_), _) => {}
        }
    }

    fn told_once(&mut self, now_ms: u64, (once, answer): (Once, Result<Told, CallError>), history: &mut History) {
        match (once, answer) {
            (Once::Settling(kept), answer) => {
                self.asked.settling = false;
                if answer.is_ok() {
                    history.push(self.name, *kept);
                }
            }
            (Once::Notice(body), Ok(Told::Broadcast(devices))) => {
                history.push(self.name, Happening::Notice(Notice::Given { body, devices }));
            }
            (Once::Notice(_), Err(CallError::Refused { code: ErrorCode::NotAllowed, .. })) => {
                history.push(self.name, Happening::Outranked);
            }
            (Once::Export, Ok(Told::Export(page))) => self.export_page(now_ms, page, history),
            (Once::Export, _) => self.ask_last(now_ms, history),
            (Once::Notice(_), _) => {}
        }
    }

    fn export_page(&mut self, now_ms: u64, page: ExportPage, history: &mut History) {
        self.asked.exported.extend(page.body);
        if let Some(cursor) = page.next {
            return self.ask(now_ms, Purpose::Once(Once::Export), Ask::Export { cursor });
        }
        let export = observed::export(&self.asked.exported);
        history.push(self.name, Happening::Exported(export));
        self.last_done(now_ms, history);
    }

    fn read_next(&mut self, now_ms: u64, after: Seq, history: &History) {
        let Some(&with) = self.asked.reading.front() else { return self.last_done(now_ms, history) };
        let range = HistoryRange { after, before: None, limit: PAGE_ROWS, newest: false };
        self.ask(now_ms, Purpose::Reading, Ask::History { with: observed::name(with), range });
    }

    fn read_page(&mut self, now_ms: u64, page: Page, history: &mut History) {
        self.asked.read.extend(page.messages.iter().map(observed::shown));
        if let Some(last) = page.messages.last() {
            return self.read_next(now_ms, last.seq, history);
        }
        let messages = std::mem::take(&mut self.asked.read);
        let (conversation, first, head) = (page.conversation.0, page.first.0, page.head.0);
        if let Some(with) = self.asked.reading.pop_front() {
            history.push(self.name, Happening::ReadBack { conversation, with, first, head, messages });
        }
        self.read_next(now_ms, Seq::ZERO, history);
    }

    fn sync_page(&mut self, now_ms: u64, page: SyncPage, history: &mut History) {
        let Some(syncing) = &mut self.asked.syncing else { return };
        syncing.messages.extend(page.messages.iter().map(observed::shown));
        match page.next {
            Some(next) => self.sync_on(now_ms, next),
            None => self.sync_ends(now_ms, true, history),
        }
    }

    fn sync_ends(&mut self, now_ms: u64, complete: bool, history: &mut History) {
        let Some(Syncing { asked, behind, messages, at_rest }) = self.asked.syncing.take() else { return };
        history.push(self.name, Happening::Synced { asked, behind, messages, whole: complete && at_rest });
        match (at_rest, complete) {
            (true, true) => self.last_done(now_ms, history),
            (true, false) => self.ask_last(now_ms, history),
            (false, _) => {}
        }
    }

    fn list_page(&mut self, now_ms: u64, page: &ConversationPage, history: &mut History) {
        let asked = self.asked.listing.as_ref().map_or_else(|| history.now(), |(asked, ..)| *asked);
        for row in &page.conversations {
            let first = Place { conversation: row.conversation.0, seq: row.first.0 };
            history.push(self.name, Happening::FloorShown { asked, first });
            let place = Place { conversation: row.conversation.0, seq: row.read.0 };
            let (source, user) = (Source::List, self.name.user);
            history.push(self.name, Happening::ReadShown { source, user, place });
        }
        let Some((_, rows, _)) = &mut self.asked.listing else { return };
        rows.extend(page.conversations.iter().map(observed::listed));
        match page.next {
            Some(next) => self.list_on(now_ms, next),
            None => self.listing_ends(now_ms, true, history),
        }
    }

    fn listing_ends(&mut self, now_ms: u64, complete: bool, history: &mut History) {
        let Some((_, rows, at_rest)) = self.asked.listing.take() else { return };
        match (at_rest, complete) {
            (true, true) => {
                self.asked.listed =
                    rows.iter().map(|row| Place { conversation: row.conversation, seq: row.head }).collect();
                history.push(self.name, Happening::Listed(rows));
                self.last_done(now_ms, history);
            }
            (true, false) => self.ask_last(now_ms, history),
            (false, _) => {}
        }
    }
}
