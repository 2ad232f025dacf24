//! Keyed rows: everything the store keeps that is not a message, a user's credentials or a device's cursor.
//!
//! A row is a key, a stamp and a value; of two rows with one key the higher stamp counts, whatever the order in which
//! they are read, so logs can be replayed in any order. The one owner of a key writes its rows and raises the stamp. A
//! row without a value says that the key is gone. Stores treat all tables alike: a new table is a variant here and
//! nothing there.
//!
//! | table | key | owner | what |
//! |---|---|---|---|
//! | group | conversation | partition of the group | title, policy, owner |
//! | member | conversation, user | partition of the group | standing, role, what may be read |
//! | receipt | conversation, user | partition of the conversation | how far it was delivered and read |
//! | wrote | conversation, user | partition of the conversation | that the user has written in it |
//! | amended | conversation, seq | partition of the conversation | what a message has become, and by which row |
//! | device | user, device | partition of the user | kind, agent, logins |
//! | setting | user | partition of the user | who may write, presence |
//! | block | user, user | partition of the first | that the first blocks the second |
//! | mark | user, conversation | partition of the user | pin, mute |
//! | hidden | user, conversation, seq | partition of the user | a message deleted for this user alone |
//! | deletion | user | partition of the user | how far the deletion of the user has come |

use crate::ids::{ConversationId, DeviceId, Partition, Seq, UserName};
use crate::limits;
use crate::message::chat::MessagesFrom;
use crate::message::group::{JoinPolicy, Role, Standing};
use crate::message::{DeviceKind, MessageState};
use crate::pack::{BadPack, Reader, Writer};

/// What a row is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RowKey {
    Group(ConversationId),
    Member(ConversationId, UserName),
    Receipt(ConversationId, UserName),
    /// In a conversation of two.
    Wrote(ConversationId, UserName),
    Amended(ConversationId, Seq),
    Device(UserName, DeviceId),
    Setting(UserName),
    Block(UserName, UserName),
    Mark(UserName, ConversationId),
    Hidden(UserName, ConversationId, Seq),
    Deletion(UserName),
}

/// A table within one owner, for lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowList {
    Members(ConversationId),
    Receipts(ConversationId),
    Amended(ConversationId),
    Devices(UserName),
    Blocks(UserName),
    Marks(UserName),
    Hidden(UserName, ConversationId),
    /// In all conversations.
    AllHidden(UserName),
    /// Of all users.
    Deletions,
}

impl RowKey {
    /// The partition whose owner writes this row.
    pub fn partition(&self) -> Partition {
        match self {
            Self::Group(conversation)
            | Self::Member(conversation, _)
            | Self::Receipt(conversation, _)
            | Self::Wrote(conversation, _)
            | Self::Amended(conversation, _) => conversation.partition(),
            Self::Device(user, _)
            | Self::Setting(user)
            | Self::Block(user, _)
            | Self::Mark(user, _)
            | Self::Hidden(user, ..)
            | Self::Deletion(user) => user.partition(),
        }
    }

    /// Bytes that sort as lists are read: by table, then owner, then the rest. A name holds no control characters, so a
    /// zero ends it.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Group(conversation) => [&b"g"[..], &id(*conversation)].concat(),
            Self::Member(conversation, user) => [&b"m"[..], &id(*conversation), user.as_str().as_bytes()].concat(),
            Self::Receipt(conversation, user) => [&b"r"[..], &id(*conversation), user.as_str().as_bytes()].concat(),
            Self::Amended(conversation, seq) => [&b"a"[..], &id(*conversation), &seq.0.to_be_bytes()].concat(),
            Self::Wrote(conversation, user) => [&b"w"[..], &id(*conversation), user.as_str().as_bytes()].concat(),
            Self::Device(user, device) => [&b"d"[..], user.as_str().as_bytes(), &[0], &device.0.to_be_bytes()].concat(),
            Self::Setting(user) => [&b"s"[..], user.as_str().as_bytes()].concat(),
            Self::Block(user, other) => [&b"b"[..], user.as_str().as_bytes(), &[0], other.as_str().as_bytes()].concat(),
            Self::Mark(user, conversation) => [&b"k"[..], user.as_str().as_bytes(), &[0], &id(*conversation)].concat(),
            Self::Hidden(user, conversation, seq) => {
                [&b"h"[..], user.as_str().as_bytes(), &[0], &id(*conversation), &seq.0.to_be_bytes()].concat()
            }
            Self::Deletion(user) => [&b"x"[..], user.as_str().as_bytes()].concat(),
        }
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BadPack> {
        const BAD: BadPack = BadPack("row key");
        let (&table, rest) = bytes.split_first().ok_or(BAD)?;
        let name = |bytes| std::str::from_utf8(bytes).ok().and_then(|text| UserName::new(text).ok()).ok_or(BAD);
        let conversation =
            |bytes: &[u8]| bytes.first_chunk::<16>().map(|id| ConversationId(u128::from_be_bytes(*id))).ok_or(BAD);
        let number = |bytes: &[u8]| bytes.last_chunk::<8>().map(|number| u64::from_be_bytes(*number)).ok_or(BAD);
        let of_user = || {
            let end = rest.iter().position(|&byte| byte == 0).ok_or(BAD)?;
            let (user, rest) = rest.split_at_checked(end).ok_or(BAD)?;
            Ok((name(user)?, rest.get(1..).ok_or(BAD)?))
        };
        let key = match table {
            b'g' => Self::Group(conversation(rest)?),
            b'm' => Self::Member(conversation(rest)?, name(rest.get(16..).ok_or(BAD)?)?),
            b'r' => Self::Receipt(conversation(rest)?, name(rest.get(16..).ok_or(BAD)?)?),
            b'a' => Self::Amended(conversation(rest)?, Seq(number(rest)?)),
            b'w' => Self::Wrote(conversation(rest)?, name(rest.get(16..).ok_or(BAD)?)?),
            b'd' => of_user().and_then(|(user, rest)| Ok(Self::Device(user, DeviceId(number(rest)?))))?,
            b's' => Self::Setting(name(rest)?),
            b'b' => of_user().and_then(|(user, rest)| Ok(Self::Block(user, name(rest)?)))?,
            b'k' => of_user().and_then(|(user, rest)| Ok(Self::Mark(user, conversation(rest)?)))?,
            b'h' => {
                of_user().and_then(|(user, rest)| Ok(Self::Hidden(user, conversation(rest)?, Seq(number(rest)?))))?
            }
            b'x' => Self::Deletion(name(rest)?),
            _ => return Err(BAD),
        };
        // Bytes too many are damage as well.
        if key.encode() == bytes { Ok(key) } else { Err(BAD) }
    }
}

impl RowList {
    /// What the keys of this list begin with.
    pub fn prefix(&self) -> Vec<u8> {
        match self {
            Self::Members(conversation) => [&b"m"[..], &id(*conversation)].concat(),
            Self::Receipts(conversation) => [&b"r"[..], &id(*conversation)].concat(),
            Self::Amended(conversation) => [&b"a"[..], &id(*conversation)].concat(),
            Self::Devices(user) => [&b"d"[..], user.as_str().as_bytes(), &[0]].concat(),
            Self::Blocks(user) => [&b"b"[..], user.as_str().as_bytes(), &[0]].concat(),
            Self::Marks(user) => [&b"k"[..], user.as_str().as_bytes(), &[0]].concat(),
            Self::Hidden(user, conversation) => {
                [&b"h"[..], user.as_str().as_bytes(), &[0], &id(*conversation)].concat()
            }
            Self::AllHidden(user) => [&b"h"[..], user.as_str().as_bytes(), &[0]].concat(),
            Self::Deletions => b"x".to_vec(),
        }
    }
}

fn id(conversation: ConversationId) -> [u8; 16] {
    conversation.0.to_be_bytes()
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub key: RowKey,
    /// Rises with every change of this key.
    pub stamp: u64,
    /// `None`: the key is gone.
    pub value: Option<RowValue>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowValue {
    Group(GroupRow),
    Member(MemberRow),
    Receipt(ReceiptRow),
    Wrote,
    Amended(AmendedRow),
    Device(DeviceRow),
    Setting(SettingRow),
    Block,
    Mark(MarkRow),
    Hidden,
    Deletion(DeletionRow),
}

/// A group. The stamp of the row counts the changes of the group and its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupRow {
    pub name: UserName,
    pub title: String,
    pub join: JoinPolicy,
    pub owner: UserName,
    pub created_ms: u64,
    /// The row of the log that dissolved it; 0: it lives.
    pub dissolved: Seq,
}

/// What one user is to a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberRow {
    pub standing: Standing,
    pub role: Role,
    /// When the standing came to be, Unix milliseconds.
    pub since_ms: u64,
    pub muted_until_ms: u64,
    /// The messages this user may read, in rising order, at most `MEMBERSHIP_RANGES_MAX`.
    pub ranges: Vec<Membership>,
}

/// join ≤ seq < leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Membership {
    pub join: Seq,
    /// `None`: a member now.
    pub leave: Option<Seq>,
}

impl Membership {
    pub fn contains(&self, seq: Seq) -> bool {
        seq >= self.join && self.leave.is_none_or(|leave| seq < leave)
    }
}

impl MemberRow {
    /// Whether this user may read message `seq`.
    pub fn may_read(&self, seq: Seq) -> bool {
        self.ranges.iter().any(|range| range.contains(seq))
    }

    /// Becomes a member with row `join` of the log. The oldest range goes when there are too many.
    pub fn begin(&mut self, join: Seq) {
        if self.ranges.len() >= limits::MEMBERSHIP_RANGES_MAX {
            self.ranges.remove(0);
        }
        self.ranges.push(Membership { join, leave: None });
    }

    /// Is a member no more from row `leave` of the log on.
    pub fn end(&mut self, leave: Seq) {
        if let Some(last) = self.ranges.last_mut() {
            last.leave.get_or_insert(leave);
        }
    }

    /// The part of first..=head that this user may read, range by range.
    pub fn readable(&self, first: Seq, head: Seq) -> impl Iterator<Item = (Seq, Seq)> {
        self.ranges.iter().filter_map(move |range| {
            let end = range.leave.map_or(head, |leave| Seq(leave.0.saturating_sub(1)).min(head));
            let start = range.join.max(first);
            (start <= end && end != Seq::ZERO).then_some((start, end))
        })
    }
}

/// How far a user has a conversation. Both only rise, so the stamp may be their sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceiptRow {
    pub delivered: Seq,
    pub read: Seq,
}

/// What a message has become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmendedRow {
    pub state: MessageState,
    /// The amendment that did it; of an edit it has the body. Also the stamp of the row.
    pub by: Seq,
    /// Unix milliseconds.
    pub at_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRow {
    pub kind: DeviceKind,
    pub agent: String,
    pub first_ms: u64,
    pub last_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingRow {
    pub messages_from: MessagesFrom,
    /// Whether others see this user's presence.
    pub visible: bool,
    pub status: String,
    pub last_seen_ms: u64,
    /// When the user was deleted; 0: not.
    pub deleted_ms: u64,
    /// Whether the user has ever deleted a message for itself alone.
    pub hides: bool,
}

impl Default for SettingRow {
    fn default() -> Self {
        let status = String::new();
        let messages_from = MessagesFrom::default();
        Self { messages_from, visible: true, status, last_seen_ms: 0, deleted_ms: 0, hides: false }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MarkRow {
    pub pinned: bool,
    pub muted_until_ms: u64,
}

/// What a deletion of a user is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeletionStage {
    /// The groups are left.
    Leaving = 1,
    /// What was on its way then is looked for, and messages are taken back.
    Sweeping = 2,
    /// The user's own rows go.
    Erasing = 3,
}

impl DeletionStage {
    fn from_number(number: u8) -> Option<Self> {
        [Self::Leaving, Self::Sweeping, Self::Erasing].into_iter().find(|stage| *stage as u8 == number)
    }
}

/// A deletion that is not at its end. Whatever was done behind this may be done again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeletionRow {
    pub stage: DeletionStage,
    /// Messages of the user are taken back.
    pub recall: bool,
    /// Conversations up to this one are done.
    pub done: ConversationId,
}

impl RowValue {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        match self {
            Self::Group(group) => {
                out.text(group.name.as_str());
                out.text(&group.title);
                out.number(group.join as u64);
                out.text(group.owner.as_str());
                out.number(group.created_ms);
                out.number(group.dissolved.0);
            }
            Self::Member(member) => {
                out.number(member.standing as u64);
                out.number(member.role as u64);
                out.number(member.since_ms);
                out.number(member.muted_until_ms);
                out.number(member.ranges.len() as u64);
                for range in &member.ranges {
                    out.number(range.join.0);
                    out.number(range.leave.map_or(0, |leave| leave.0));
                }
            }
            Self::Receipt(receipt) => {
                out.number(receipt.delivered.0);
                out.number(receipt.read.0);
            }
            Self::Amended(amended) => {
                out.number(amended.state as u64);
                out.number(amended.by.0);
                out.number(amended.at_ms);
            }
            Self::Device(device) => {
                out.number(device.kind as u64);
                out.text(&device.agent);
                out.number(device.first_ms);
                out.number(device.last_ms);
            }
            Self::Setting(setting) => {
                out.number(setting.messages_from as u64);
                out.number(u64::from(setting.visible));
                out.text(&setting.status);
                out.number(setting.last_seen_ms);
                out.number(setting.deleted_ms);
                out.number(u64::from(setting.hides));
            }
            Self::Mark(mark) => {
                out.number(u64::from(mark.pinned));
                out.number(mark.muted_until_ms);
            }
            Self::Deletion(deletion) => {
                out.number(deletion.stage as u64);
                out.number(u64::from(deletion.recall));
                out.number((deletion.done.0 >> 64) as u64);
                out.number(deletion.done.0 as u64);
            }
            Self::Wrote | Self::Block | Self::Hidden => {}
        }
        out.0
    }

    /// The value of a row with this key.
    pub fn decode(key: &RowKey, bytes: &[u8]) -> Result<Self, BadPack> {
        let mut row = Reader(bytes);
        Ok(match key {
            RowKey::Group(_) => Self::Group(GroupRow {
                name: row.name()?,
                title: row.text()?.to_owned(),
                join: JoinPolicy::from_number(row.small()?).ok_or(BadPack("join policy"))?,
                owner: row.name()?,
                created_ms: row.number()?,
                dissolved: Seq(row.number()?),
            }),
            RowKey::Member(..) => Self::Member(member(row)?),
            RowKey::Receipt(..) => {
                Self::Receipt(ReceiptRow { delivered: Seq(row.number()?), read: Seq(row.number()?) })
            }
            RowKey::Device(..) => Self::Device(DeviceRow {
                kind: DeviceKind::from_number(row.small()?).ok_or(BadPack("device kind"))?,
                agent: row.text()?.to_owned(),
                first_ms: row.number()?,
                last_ms: row.number()?,
            }),
            RowKey::Setting(_) => Self::Setting(SettingRow {
                messages_from: MessagesFrom::from_number(row.small()?).ok_or(BadPack("who may write"))?,
                visible: row.number()? != 0,
                status: row.text()?.to_owned(),
                last_seen_ms: row.number()?,
                deleted_ms: row.number()?,
                // Rows of before have no such field.
                hides: !row.0.is_empty() && row.number()? != 0,
            }),
            RowKey::Mark(..) => Self::Mark(MarkRow { pinned: row.number()? != 0, muted_until_ms: row.number()? }),
            RowKey::Wrote(..) => Self::Wrote,
            RowKey::Amended(..) => Self::Amended(AmendedRow {
                state: MessageState::from_number(row.small()?).ok_or(BadPack("message state"))?,
                by: Seq(row.number()?),
                at_ms: row.number()?,
            }),
            RowKey::Block(..) => Self::Block,
            RowKey::Hidden(..) => Self::Hidden,
            RowKey::Deletion(_) => Self::Deletion(DeletionRow {
                stage: DeletionStage::from_number(row.small()?).ok_or(BadPack("stage of a deletion"))?,
                recall: row.number()? != 0,
                done: ConversationId(u128::from(row.number()?) << 64 | u128::from(row.number()?)),
            }),
        })
    }
}

fn member(mut row: Reader<'_>) -> Result<MemberRow, BadPack> {
    let standing = Standing::from_number(row.small()?).ok_or(BadPack("standing"))?;
    let role = Role::from_number(row.small()?).ok_or(BadPack("role"))?;
    let (since_ms, muted_until_ms, count) = (row.number()?, row.number()?, row.number()?);
    if count > limits::MEMBERSHIP_RANGES_MAX as u64 {
        return Err(BadPack("membership ranges"));
    }
    let mut ranges = Vec::new();
    for _ in 0..count {
        let (join, leave) = (Seq(row.number()?), row.number()?);
        ranges.push(Membership { join, leave: (leave != 0).then_some(Seq(leave)) });
    }
    Ok(MemberRow { standing, role, since_ms, muted_until_ms, ranges })
}

/// Several rows, one after the other.
pub fn encode_rows(rows: &[Row]) -> Vec<u8> {
    let mut out = Writer::default();
    for row in rows {
        out.bytes(&row.key.encode());
        out.number(row.stamp);
        out.number(u64::from(row.value.is_some()));
        if let Some(value) = &row.value {
            out.bytes(&value.encode());
        }
    }
    out.0
}

pub fn decode_rows(bytes: &[u8]) -> Result<Vec<Row>, BadPack> {
    let mut reader = Reader(bytes);
    let mut rows = Vec::new();
    while !reader.0.is_empty() {
        let key = RowKey::decode(reader.bytes()?)?;
        let stamp = reader.number()?;
        let value = if reader.number()? == 0 { None } else { Some(RowValue::decode(&key, reader.bytes()?)?) };
        rows.push(Row { key, stamp, value });
    }
    Ok(rows)
}

/// Rows of every table, for tests of what keeps them.
#[cfg(test)]
pub(crate) fn samples() -> Vec<Row> {
    let (ann, bob) = (UserName::new("ann").unwrap(), UserName::new("Bøb with a rather long name").unwrap());
    let team = UserName::new("#team").unwrap();
    let id = ConversationId::group(&team);
    let ranges =
        vec![Membership { join: Seq(3), leave: Some(Seq(9)) }, Membership { join: Seq(u64::MAX), leave: None }];
    let group = GroupRow {
        name: team,
        title: "The team".into(),
        join: JoinPolicy::Approval,
        owner: ann.clone(),
        created_ms: 7,
        dissolved: Seq(12),
    };
    let (standing, role) = (Standing::Kicked, Role::Admin);
    let member = MemberRow { standing, role, since_ms: 1 << 41, muted_until_ms: 300, ranges };
    let device = DeviceRow { kind: DeviceKind::Tablet, agent: "x/1".into(), first_ms: 1, last_ms: u64::MAX };
    let row = |key, value| Row { key, stamp: 300, value };
    vec![
        row(RowKey::Group(id), Some(RowValue::Group(group))),
        row(RowKey::Member(id, bob.clone()), Some(RowValue::Member(member))),
        row(RowKey::Member(id, ann.clone()), None),
        row(RowKey::Receipt(id, ann.clone()), Some(RowValue::Receipt(ReceiptRow { delivered: Seq(9), read: Seq(4) }))),
        row(RowKey::Wrote(id, ann.clone()), Some(RowValue::Wrote)),
        row(
            RowKey::Amended(id, Seq(3)),
            Some(RowValue::Amended(AmendedRow { state: MessageState::Recalled, by: Seq(300), at_ms: 1 << 41 })),
        ),
        row(RowKey::Device(ann.clone(), DeviceId(u64::MAX)), Some(RowValue::Device(device))),
        row(RowKey::Setting(bob.clone()), Some(RowValue::Setting(SettingRow::default()))),
        row(RowKey::Block(ann.clone(), bob.clone()), Some(RowValue::Block)),
        row(RowKey::Mark(ann.clone(), id), Some(RowValue::Mark(MarkRow { pinned: true, muted_until_ms: 9 }))),
        row(RowKey::Hidden(bob.clone(), id, Seq(5)), Some(RowValue::Hidden)),
        row(
            RowKey::Deletion(bob),
            Some(RowValue::Deletion(DeletionRow { stage: DeletionStage::Sweeping, recall: true, done: id })),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_read_back_and_lists_are_what_their_keys_begin_with() {
        let rows = samples();
        assert_eq!(decode_rows(&encode_rows(&rows)), Ok(rows.clone()));
        for row in &rows {
            let key = row.key.encode();
            assert_eq!(RowKey::decode(&key), Ok(row.key.clone()));
            let list = match row.key.clone() {
                RowKey::Group(_) | RowKey::Setting(_) | RowKey::Wrote(..) => continue,
                RowKey::Member(conversation, _) => RowList::Members(conversation),
                RowKey::Receipt(conversation, _) => RowList::Receipts(conversation),
                RowKey::Amended(conversation, _) => RowList::Amended(conversation),
                RowKey::Device(user, _) => RowList::Devices(user),
                RowKey::Block(user, _) => RowList::Blocks(user),
                RowKey::Mark(user, _) => RowList::Marks(user),
                RowKey::Hidden(user, conversation, _) => {
                    assert!(key.starts_with(&RowList::AllHidden(user.clone()).prefix()));
                    RowList::Hidden(user, conversation)
                }
                RowKey::Deletion(_) => RowList::Deletions,
            };
            assert!(key.starts_with(&list.prefix()));
        }
    }

    #[test]
    fn a_member_reads_between_joining_and_leaving_and_the_oldest_times_are_forgotten() {
        let mut member = MemberRow {
            standing: Standing::Member,
            role: Role::Member,
            since_ms: 0,
            muted_until_ms: 0,
            ranges: Vec::new(),
        };
        member.begin(Seq(3));
        member.end(Seq(6));
        member.begin(Seq(8));
        let readable: Vec<u64> = (0..12).filter(|&seq| member.may_read(Seq(seq))).collect();
        assert_eq!(readable, [3, 4, 5, 8, 9, 10, 11]);
        let parts = |first, head| member.readable(Seq(first), Seq(head)).collect::<Vec<_>>();
        assert_eq!(parts(1, 10), [(Seq(3), Seq(5)), (Seq(8), Seq(10))]);
        assert_eq!(parts(5, 7), [(Seq(5), Seq(5))]);
        assert_eq!(parts(6, 7), []);
        for round in 2..=limits::MEMBERSHIP_RANGES_MAX as u64 {
            member.end(Seq(round * 10));
            member.begin(Seq(round * 10 + 5));
        }
        assert_eq!(member.ranges.len(), limits::MEMBERSHIP_RANGES_MAX);
        assert!(!member.may_read(Seq(3)) && member.may_read(Seq(8)));
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_never_a_panic(
            garbage in prop::collection::vec(any::<u8>(), 0..100),
            flip in any::<prop::sample::Index>(),
            value in any::<u8>(),
        ) {
            let _ = decode_rows(&garbage);
            let _ = RowKey::decode(&garbage);
            let mut bytes = encode_rows(&samples());
            let place = flip.index(bytes.len());
            bytes[place] = value;
            let _ = decode_rows(&bytes);
        }
    }
}
