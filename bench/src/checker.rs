//! The checker: holds what clients saw against what Ringline promises, from outside.
//!
//! Pure; used by the simulator and by `torture`, after a run. It shares no code with the server, the core or the SDK:
//! users are numbers, conversations are opaque, and a [`History`] is a plain list of what happened to devices, in the
//! order of each device. Invariant of its input: no two sends have the same body, so a body names a send.
//!
//! A history is in the order in which things were noted: what a device notes before it asks was noted before anything that
//! follows from the answer. Of the order between devices no rule uses more than that.
//!
//! - [`Rule`]s and the [`History`] here; `judge`: every device's own stream and the logs; `members`: who may see what of a
//!   group, which is worked out from its log; `account`: reading, SYNC, lists; `amended`: what messages have become;
//!   `kept`: what was let go; `passing`: what is not stored; `presence`: who is there; `ended`: who was deleted, dropped or
//!   is watched no more; `permits`: who may write to whom; `roles`: who may change a group; `told`: notices, marks, exports
//!   and mentions.

use std::fmt;

use judge::Checker;

mod account;
mod amended;
mod ended;
mod judge;
mod kept;
mod members;
mod passing;
mod permits;
mod presence;
mod roles;
#[cfg(test)]
mod tests;
mod told;

pub use permits::{Permit, Refusal, Takes};
pub use told::{Export, Mark, Notice};

/// Violations that are kept of one run; more are only counted.
const VIOLATIONS_KEPT_MAX: usize = 40;

/// One device of one user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    pub user: u32,
    pub number: u64,
}

/// A place in the log of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    pub conversation: u128,
    pub seq: u64,
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    User(u32),
    Group(u32),
}

/// What a row of a group's log says of its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Whoever did it is the first member.
    Created,
    Came(Vec<u32>),
    Went(Vec<u32>),
    /// A member has another rank.
    Ranked(u32, Rank),
    /// The group has another owner.
    Transferred(u32),
    Dissolved,
    Renamed,
    /// Who may join from now on: anybody, or not.
    Policy {
        open: bool,
    },
    /// A member may not write until then, Unix milliseconds.
    Muted(u32, u64),
    /// Pushed, never a row.
    Other,
}

/// What a member of a group may do there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    Member,
    Admin,
    Owner,
}

/// Whom a message is meant for above others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mentions {
    pub users: Vec<u32>,
    pub all: bool,
}

/// What has become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    AsSent,
    /// Its sender has given it another body.
    Edited,
    /// Its sender has taken it back.
    Recalled,
    /// Deleted for all.
    Deleted,
    /// Deleted by the reader for himself.
    Hidden,
}

/// A message as a device was shown it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Seq 0: a transient message.
    pub place: Place,
    pub from: u32,
    pub to: Peer,
    /// The number of the sender's device.
    pub device: u64,
    pub client_seq: u64,
    pub body: String,
    /// Of a row that the server wrote, which has no body and was sent by no device.
    pub change: Option<Change>,
    /// The seq of the message that this row amends.
    pub of: Option<u64>,
    /// What it has become; of an amendment, what it makes of the other: `AsSent` when a later one has taken its place.
    pub state: State,
    pub mentions: Mentions,
    /// When it was written, Unix milliseconds of the server.
    pub time_ms: u64,
}

/// Where a device learned how far somebody has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    Push,
    List,
}

/// A row of a conversation list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    pub conversation: u128,
    /// The first that is kept for this user.
    pub first: u64,
    pub head: u64,
    pub read: u64,
    pub pinned: bool,
    /// Unix milliseconds; 0: not muted.
    pub muted_until_ms: u64,
}

/// What a FETCH asks for: of what is above `after` and below `before` the oldest, or the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub after: u64,
    pub before: Option<u64>,
    pub newest: bool,
}

/// What a FETCH brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    Truncated,
    Messages { first: u64, head: u64, messages: Vec<Shown> },
}

/// How a user is, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    pub user: u32,
    pub online: bool,
    /// Unix milliseconds; 0: not told.
    pub last_seen_ms: u64,
    pub status: String,
}

/// Who has one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipts {
    pub place: Place,
    pub members: u32,
    pub delivered: u32,
    pub read: u32,
    /// Every member, and how far it was delivered to him and read.
    pub rows: Vec<(u32, u64, u64)>,
}

/// One thing that happened to a device. `number` is the device's own number of a send, rising.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// A process of the device began, with nothing in its memory. Sends of an earlier one that had not ended are unknown.
    Started,
    Sent {
        number: u64,
        to: Peer,
        body: String,
        durable: bool,
    },
    /// The send of that number mentions somebody.
    Mentioned {
        number: u64,
        mentions: Mentions,
    },
    /// As `Sent`, to make something of the message at `of`. An edit has a body that nothing else has, others have none.
    Amended {
        number: u64,
        to: Peer,
        of: Place,
        what: State,
        body: String,
    },
    Accepted {
        number: u64,
        place: Place,
    },
    /// Refused for a while and tried again, or its answer was lost and may have been that: others may have passed it.
    Passed {
        number: u64,
    },
    /// Ended, and was never accepted.
    Refused {
        number: u64,
        why: Refusal,
    },
    /// Ended, and may have been accepted.
    Unknown {
        number: u64,
    },
    /// A device of the receiver has it, the sender was told.
    Delivered {
        number: u64,
    },
    /// The application was handed a message.
    Saw(Shown),
    /// A transient message is in the device; its application may not have been handed it yet, or never.
    Arrived {
        body: String,
    },
    /// The application was told that it cannot have these.
    Skipped {
        conversation: u128,
        from: u64,
        to: u64,
    },
    /// A durable message was pushed on a connection, before any filter of the client.
    Pushed {
        connection: u64,
        place: Place,
    },
    /// The conversation as it was read back, after everything: all from `first` to `head`; of a group, all that this
    /// device's user may read.
    ReadBack {
        conversation: u128,
        with: Peer,
        first: u64,
        head: u64,
        messages: Vec<Shown>,
    },
    /// What this device's user settles about who writes to him.
    Permit(Permit),
    /// This device's user marks a conversation, as pinned and silent until then; `kept`: was told that this is kept.
    Marks {
        place: u128,
        mark: Mark,
        kept: bool,
    },
    Notice(Notice),
    /// All that is kept about this device's user, asked for after it has read everything back.
    Exported(Export),
    /// This device's user asks that others are invited to a group; or to make it, which anybody may join or not.
    Invites {
        group: u32,
        open: Option<bool>,
        users: Vec<u32>,
    },
    /// It was refused what its user's rank does not allow.
    Outranked,
    /// This user's change of a group was answered: it is this row of its log.
    Changed(Place),
    /// The application says that its user has read so far …
    ReadAsked(Place),
    /// … and was told that this is kept.
    ReadKept(Place),
    /// Somebody has read so far.
    ReadShown {
        source: Source,
        user: u32,
        place: Place,
    },
    /// This device's user deletes that message for himself …
    HideAsked(Place),
    /// … and was told that this is kept; …
    HideKept(Place),
    /// … or another device of his was told of it.
    HideTold(Place),
    /// The answer to a FETCH in this conversation.
    Fetched {
        asked: Moment,
        with: Peer,
        conversation: u128,
        range: Range,
        page: Page,
    },
    /// The conversation list said that this is the first that is kept for this user.
    FloorShown {
        asked: Moment,
        first: Place,
    },
    /// Signals somebody; `number` as of a send, and nothing else has this body.
    Signalled {
        number: u64,
        to: Peer,
        body: String,
    },
    /// A signal has arrived.
    SawSignal {
        from: u32,
        to: Peer,
        body: String,
    },
    /// Somebody has so much of a conversation; `None`: at least one other member of the group.
    HasShown {
        user: Option<u32>,
        conversation: u128,
        delivered: u64,
        read: u64,
    },
    /// Who has a message, while nothing is sent.
    ReceiptsShown(Receipts),
    /// This device asks to watch these users …
    WatchAsked(Vec<u32>),
    /// … and watches them, and goes on doing so on its next connections.
    Watches(Vec<u32>),
    /// It asks to watch these no more …
    UnwatchAsked(Vec<u32>),
    /// … and was told that it does not.
    Unwatched(Vec<u32>),
    /// How somebody is, as it came on a connection: pushed, or as an answer.
    PresenceShown {
        connection: u64,
        presence: Presence,
        pushed: bool,
    },
    /// This device begins a connection …
    Connects {
        connection: u64,
    },
    /// … and is logged in on it.
    LoggedIn {
        connection: u64,
    },
    /// It was told that its user is deleted.
    TurnedAway,
    /// That user is to be deleted, and with it what it wrote if `recall` …
    DeleteAsked {
        user: u32,
        recall: bool,
    },
    /// … and was.
    DeleteKept {
        user: u32,
    },
    /// This device's user says something of himself, or that he is not to be seen …
    StatusAsked {
        status: String,
        visible: bool,
    },
    /// … and was told that the last of these is kept.
    StatusKept,
    /// For so long that everybody has to know, this device has been online, or gone since `left_ms` (Unix milliseconds).
    /// Noted for one device after the other, and nothing in between.
    Rested {
        left_ms: Option<u64>,
    },
    /// A SYNC, all its pages one after the other. `behind`: what it asked for in each conversation that it named.
    Synced {
        /// When it was asked for.
        asked: Moment,
        behind: Vec<Place>,
        messages: Vec<Shown>,
        /// It came to its end, nothing was sent meanwhile, and it named every conversation.
        whole: bool,
    },
    /// The conversation list of this device's user, while nothing is sent.
    Listed(Vec<Listed>),
    /// The devices of this device's user, while all are online.
    Devices(Vec<u64>),
    /// This device's user has asked to forget the device of that number, and with it how far it was.
    DropAsked(u64),
    /// … and was told that this is done.
    DropKept(u64),
    /// Everything this device saw is acknowledged, and the server had the time to write that down.
    Settled,
}

/// What is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// An accepted message is in the log, once, at the place that its sender was told.
    AcceptedIsKept,
    /// What was refused is not in the log; nothing is there twice.
    KeptOnce,
    /// One (device, client_seq) has one place.
    OnePlacePerSend,
    /// The log has no hole.
    Dense,
    /// One body per place, whoever looks, whenever.
    OneBodyPerPlace,
    /// What a device's application is handed has no gap.
    NoGap,
    /// … and no repetition.
    NoRepetition,
    /// After the faults every device has reached the head of every conversation of its user.
    ReachesTheHead,
    /// Messages of one device are in the order in which it sent them.
    SenderOrder,
    /// Nothing is shown that was not sent.
    OnlyWhatWasSent,
    /// Nothing is shown to others: in a group, to those who were no members when it got its number.
    OnlyToItsMembers,
    /// Nobody else writes to a group.
    OnlyMembersWrite,
    /// A member can read all of a group that was said while he was one.
    MembersReadAll,
    /// What somebody saw stays in the log.
    NothingVanishes,
    /// Pushes of a conversation rise on a connection.
    PushesRise,
    /// A delivery that is reported has happened.
    TrueReceipts,
    /// What was acknowledged before a restart is not handed out again.
    CursorIsKept,
    /// Every send has an end.
    EverySendEnds,
    /// How far somebody has read never goes back.
    ReadRises,
    /// A READ that was answered is kept.
    ReadIsKept,
    /// Nobody is said to have read more than he said.
    ReadWasAsked,
    /// The pages of a SYNC follow each other without a gap.
    SyncHasNoGap,
    /// A SYNC gives everything.
    SyncIsWhole,
    /// The conversation list names every conversation and its head.
    ListIsTrue,
    /// Every device of a user is in the list of devices.
    DevicesAreListed,
    /// A message is shown as its last amendment has made it, with the body that this has given it.
    AmendmentsShow,
    /// Only its sender edits a message or takes it back; in a group who made the group deletes too.
    OnlyWhoMayAmends,
    /// What was taken back or deleted is shown to nobody who asks after that was answered, and not amended again.
    GoneStaysGone,
    /// What a user deleted for himself he is not shown again.
    HiddenStaysHidden,
    /// Others are shown it, and what he did not delete so is shown to him.
    OnlyAskedIsHidden,
    /// The first that is kept of a conversation never goes back.
    FloorRises,
    /// Nothing below it is shown.
    NothingBelowTheFloor,
    /// Who asks for what is not kept any more is told so, and given no page with a hole.
    TruncatedIsSaid,
    /// Nobody is told so of what is kept.
    TruncatedIsTrue,
    /// Transient messages and signals from one device to one device are in the order in which they were sent.
    PassingOrder,
    /// A signal that is shown was signalled, to whom it is shown, once.
    OnlyWhatWasSignalled,
    /// Nobody is said to have what was not given to him.
    HasIsTrue,
    /// A list of receipts names every member but the sender, and counts right.
    ReceiptsAreTrue,
    /// Who watches somebody knows how he is, a while after the last change.
    PresenceConverges,
    /// Who does not watch somebody any more is not told how he is.
    UnwatchedIsSilent,
    /// A device that was dropped is given nothing on the connections that it had.
    DroppedIsOut,
    /// Who is deleted does not log in any more, and nobody else is told that he is.
    DeletedForEver,
    /// Nobody writes to him, he says nothing, he is in no group, and what was to be taken back with him is.
    DeletedIsGone,
    /// Nothing is taken of who is blocked, or may not write to that user, and nothing of it is given to him.
    OnlyWhoMayWrites,
    /// Nothing is refused for a block, a setting or a deletion that was not there.
    RefusedForAReason,
    /// Only who ranks high enough changes a group, or mentions all of it.
    OnlyWhoRanksActs,
    /// Who may not join a group without an invitation has one.
    OnlyTheInvitedJoin,
    /// Who is muted writes nothing.
    MutedIsSilent,
    /// A group that was dissolved gets nothing more.
    DissolvedIsSilent,
    /// A message mentions whom its sender has mentioned.
    MentionsAsSent,
    /// A notice to everyone is of an administrator, who has asked for it.
    OnlyAdministratorsTell,
    /// No device gets it more often than it was asked for.
    ToldOnce,
    /// While everybody is there, everybody gets it.
    ToldToAll,
    /// An export holds what its user is shown, and nothing else.
    ExportIsTrue,
    /// A mark that was answered is in the list.
    MarksAreKept,
}

/// One broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub rule: Rule,
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.text)
    }
}

/// How much was judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub sends: u64,
    pub accepted: u64,
    pub unknown: u64,
    /// Messages in the logs.
    pub kept: u64,
    /// Messages handed to applications.
    pub seen: u64,
    pub receipts: u64,
    /// Changes of groups that were answered.
    pub changes: u64,
    /// READs that were answered.
    pub reads: u64,
    /// Messages in pages of SYNCs.
    pub synced: u64,
    /// Amendments that were accepted.
    pub amended: u64,
    /// Messages that users have deleted for themselves.
    pub hidden: u64,
    /// Pages of FETCHes, and how many were TRUNCATED.
    pub pages: u64,
    pub truncated: u64,
    /// Transient messages and signals that arrived.
    pub passed: u64,
    /// Rows of presence that arrived.
    pub presence: u64,
    /// Groups of which too much was let go to know their members.
    pub unjudged: u64,
    /// Processes of devices.
    pub processes: u64,
    /// Users that were deleted, and how often one was told so at the door.
    pub deleted: u64,
    pub turned_away: u64,
    /// Blocks and settings of who may write that were answered, and sends that were refused for one that certainly stood.
    pub permits: u64,
    pub barred: u64,
    /// Rows of groups that only some may write, and changes that were refused for the rank of who asked.
    pub ranked: u64,
    pub outranked: u64,
    /// Groups that were dissolved.
    pub dissolved: u64,
    /// Sends that mention somebody.
    pub mentions: u64,
    /// Notices to everyone that were answered, those of them at rest, and how often one arrived.
    pub notices: u64,
    pub notices_at_rest: u64,
    pub told: u64,
    /// Marks that were answered.
    pub marks: u64,
    /// Messages in exports.
    pub exported: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.sends += other.sends;
        self.accepted += other.accepted;
        self.unknown += other.unknown;
        self.kept += other.kept;
        self.seen += other.seen;
        self.receipts += other.receipts;
        self.changes += other.changes;
        self.reads += other.reads;
        self.synced += other.synced;
        self.amended += other.amended;
        self.hidden += other.hidden;
        self.pages += other.pages;
        self.truncated += other.truncated;
        self.passed += other.passed;
        self.presence += other.presence;
        self.unjudged += other.unjudged;
        self.processes += other.processes;
        self.deleted += other.deleted;
        self.turned_away += other.turned_away;
        self.permits += other.permits;
        self.barred += other.barred;
        self.ranked += other.ranked;
        self.outranked += other.outranked;
        self.dissolved += other.dissolved;
        self.mentions += other.mentions;
        self.notices += other.notices;
        self.notices_at_rest += other.notices_at_rest;
        self.told += other.told;
        self.marks += other.marks;
        self.exported += other.exported;
    }
}

/// What the checker says.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    pub counts: Counts,
    /// The first of them.
    pub violations: Vec<Violation>,
    pub violations_in_all: u64,
}

impl Verdict {
    pub fn is_clean(&self) -> bool {
        self.violations_in_all == 0
    }

    fn broken(&mut self, rule: Rule, text: String) {
        self.violations_in_all += 1;
        if self.violations.len() < VIOLATIONS_KEPT_MAX {
            self.violations.push(Violation { rule, text });
        }
    }
}

/// A place in a history: what was noted before it had happened then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(usize);

/// What happened, in the order in which it was noted.
#[derive(Clone, Debug, Default)]
pub struct History {
    happenings: Vec<(Device, Happening)>,
}

impl History {
    pub fn push(&mut self, device: Device, happening: Happening) {
        self.happenings.push((device, happening));
    }

    pub fn now(&self) -> Moment {
        Moment(self.happenings.len())
    }

    pub fn len(&self) -> usize {
        self.happenings.len()
    }

    pub fn is_empty(&self) -> bool {
        self.happenings.is_empty()
    }

    /// All of it.
    pub fn iter(&self) -> impl Iterator<Item = &(Device, Happening)> {
        self.happenings.iter()
    }

    /// Judges a run that has ended: faults are over, clients had the time to finish, logs were read back.
    pub fn check(&self) -> Verdict {
        let mut checker = Checker::default();
        for (at, (device, happening)) in self.happenings.iter().enumerate() {
            checker.now = Moment(at);
            // A round of rest is noted for one device after the other, and judged when all are.
            if !matches!(happening, Happening::Rested { .. }) {
                checker.check_presence();
            }
            checker.take(*device, happening);
        }
        checker.finish()
    }
}
