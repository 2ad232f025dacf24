//! Bytes of the parts of what shards of different nodes say to each other. Pure; keeps nothing.
//!
//! Each type says its fields once, in [`fields`] or [`variants`], and both directions come from that: a field or a variant
//! that is forgotten does not compile. Numbers of variants are never reused. Invariants: nothing read here panics, nor
//! allocates more than a small multiple of the bytes there are; names keep their rules.

use std::sync::Arc;

use bytes::Bytes;
use ringline_cluster::placement::ShardIndex;
use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Seq, UserName};
use ringline_schema::message::group::{JoinPolicy, Role, What};
use ringline_schema::message::{BodyKind, MessageState, Outcome, Receipt, SendAck, Standing};
use ringline_schema::pack::{BadPack, Reader, Writer};
use ringline_schema::record::{Answer, ConversationRow, Range, StoredChange, StoredExtra, StoredMessage};
use ringline_schema::rows::{GroupRow, MemberRow, Membership, ReceiptRow};

use super::reads::NodeRead;
use crate::amend::Amending;
use crate::deletion::DeleteAsk;
use crate::event::{Act, ConnId, GroupAnswer, GroupPush, InfoAnswer, MemberAnswer, Pass, Passing, Relay};
use crate::group::list::MemberList;
use crate::peer::{Ask, Origin, ShardMessage, SocialMessage, Submit, SubmitMore, TransientSend, Wanted};
use crate::receipt_list::{NoReceipts, ReceiptAsk, ReceiptPage};
use crate::receipts::{ReceiptNews, ReceiptUp};
use crate::social::notice::NoticeOut;
use crate::social::presence::Seen;
use crate::social::signal::SignalSend;

/// Something with bytes of its own.
pub(crate) trait Field: Sized {
    fn put(&self, out: &mut Writer);
    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack>;
    /// A value made of what `dice` throws, for tests.
    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self;
}

macro_rules! fields {
    ($($name:ident { $($field:ident),* $(,)? })*) => {$(
        impl Field for $name {
            fn put(&self, out: &mut Writer) {
                let Self { $($field),* } = self;
                $($field.put(out);)*
            }

            fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
                Ok(Self { $($field: Field::take(from)?),* })
            }

            #[cfg(test)]
            fn throw(dice: &mut super::record::Dice) -> Self {
                Self { $($field: Field::throw(dice)),* }
            }
        }
    )*};
}

macro_rules! variants {
    ($name:ident, $($number:literal $variant:ident $(($($item:ident),*))? $({ $($field:ident),* })?;)*) => {
        impl Field for $name {
            fn put(&self, out: &mut Writer) {
                match self {
                    $(Self::$variant $(($($item),*))? $({ $($field),* })? => {
                        out.number($number);
                        $($($item.put(out);)*)?
                        $($($field.put(out);)*)?
                    })*
                }
            }

            fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
                Ok(match from.number()? {
                    $($number => {
                        $($(let $item = Field::take(from)?;)*)?
                        $($(let $field = Field::take(from)?;)*)?
                        Self::$variant $(($($item),*))? $({ $($field),* })?
                    })*
                    _ => return Err(BadPack(stringify!($name))),
                })
            }

            #[cfg(test)]
            fn throw(dice: &mut super::record::Dice) -> Self {
                const NUMBERS: &[u64] = &[$($number),*];
                match NUMBERS[dice.below(NUMBERS.len())] {
                    $($number => {
                        $($(let $item = Field::throw(dice);)*)?
                        $($(let $field = Field::throw(dice);)*)?
                        Self::$variant $(($($item),*))? $({ $($field),* })?
                    })*
                    _ => unreachable!(),
                }
            }
        }
    };
}

/// What is a number on the wire: how it becomes one, and is made of one.
macro_rules! numbers {
    ($($name:ty: $put:expr, $take:expr, $throw:expr;)*) => {$(
        impl Field for $name {
            fn put(&self, out: &mut Writer) {
                let put: fn(&Self) -> u64 = $put;
                out.number(put(self));
            }

            fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
                let take: fn(u64) -> Option<Self> = $take;
                take(from.number()?).ok_or(BadPack(stringify!($name)))
            }

            #[cfg(test)]
            fn throw(dice: &mut super::record::Dice) -> Self {
                let throw: fn(&mut super::record::Dice) -> Self = $throw;
                throw(dice)
            }
        }
    )*};
}

/// The number of an enum of the wire.
fn small<T>(number: u64, of: fn(u8) -> Option<T>) -> Option<T> {
    u8::try_from(number).ok().and_then(of)
}

numbers! {
    u64: |value| *value, Some, |dice| dice.number();
    u32: |value| u64::from(*value), |number| number.try_into().ok(), |dice| dice.number() as u32;
    u16: |value| u64::from(*value), |number| number.try_into().ok(), |dice| dice.number() as u16;
    u8: |value| u64::from(*value), |number| number.try_into().ok(), |dice| dice.number() as u8;
    bool: |value| u64::from(*value), |number| (number < 2).then_some(number == 1), |dice| dice.below(2) == 1;
    Seq: |seq| seq.0, |number| Some(Seq(number)), |dice| Seq(dice.number());
    DeviceId: |device| device.0, |number| Some(DeviceId(number)), |dice| DeviceId(dice.number());
    ShardIndex: |shard| u64::from(shard.0), |number| number.try_into().ok().map(ShardIndex),
        |dice| ShardIndex(dice.number() as u16);
    ErrorCode: |code| *code as u64, |number| number.try_into().ok().and_then(ErrorCode::from_number),
        |dice| ErrorCode::ALL[dice.below(ErrorCode::ALL.len())];
    BodyKind: |kind| *kind as u64, |number| small(number, BodyKind::from_number), |dice| dice.of(BodyKind::from_number);
    MessageState: |state| *state as u64, |number| small(number, MessageState::from_number),
        |dice| dice.of(MessageState::from_number);
    Outcome: |outcome| *outcome as u64, |number| small(number, Outcome::from_number),
        |dice| dice.of(Outcome::from_number);
    Standing: |standing| *standing as u64, |number| small(number, Standing::from_number),
        |dice| dice.of(Standing::from_number);
    Role: |role| *role as u64, |number| small(number, Role::from_number), |dice| dice.of(Role::from_number);
    JoinPolicy: |join| *join as u64, |number| small(number, JoinPolicy::from_number),
        |dice| dice.of(JoinPolicy::from_number);
    What: |what| *what as u64, |number| small(number, What::from_number), |dice| dice.of(What::from_number);
}

impl Field for u128 {
    fn put(&self, out: &mut Writer) {
        out.0.extend_from_slice(&self.to_le_bytes());
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        let (bytes, rest) = from.0.split_first_chunk::<16>().ok_or(BadPack("id"))?;
        from.0 = rest;
        Ok(Self::from_le_bytes(*bytes))
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        Self::from(dice.number()) << 64 | Self::from(dice.number())
    }
}

/// What is another field inside.
macro_rules! wrapped {
    ($($name:ty as $inner:ty: $put:expr, $take:expr;)*) => {$(
        impl Field for $name {
            fn put(&self, out: &mut Writer) {
                let put: fn(&Self) -> $inner = $put;
                put(self).put(out);
            }

            fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
                <$inner>::take(from).map($take)
            }

            #[cfg(test)]
            fn throw(dice: &mut super::record::Dice) -> Self {
                let take: fn($inner) -> Self = $take;
                take(<$inner>::throw(dice))
            }
        }
    )*};
}

wrapped! {
    ConversationId as u128: |id| id.0, ConversationId;
    DeviceKey as u128: |key| key.0, DeviceKey;
}

impl Field for UserName {
    fn put(&self, out: &mut Writer) {
        out.text(self.as_str());
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        from.name()
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        Self::new(&format!("user-{}", dice.number())).unwrap()
    }
}

impl Field for String {
    fn put(&self, out: &mut Writer) {
        out.text(self);
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        from.text().map(str::to_owned)
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        "tøxt ".repeat(dice.below(9))
    }
}

impl Field for Arc<str> {
    fn put(&self, out: &mut Writer) {
        out.text(self);
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        from.text().map(Self::from)
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        String::throw(dice).into()
    }
}

impl Field for Bytes {
    fn put(&self, out: &mut Writer) {
        out.bytes(self);
    }

    /// Copied: what was received is a whole batch, which a small body must not keep.
    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        from.bytes().map(Self::copy_from_slice)
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        vec![dice.number() as u8; dice.below(300)].into()
    }
}

impl Field for StoredExtra {
    fn put(&self, out: &mut Writer) {
        out.bytes(&self.encode());
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        Self::decode(from.bytes()?)
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        Self {
            mentions: Field::throw(dice),
            mention_all: Field::throw(dice),
            refers: Field::throw(dice),
            state: Field::throw(dice),
            amended_ms: Field::throw(dice),
            change: Field::throw(dice),
        }
    }
}

impl<T: Field> Field for Option<T> {
    fn put(&self, out: &mut Writer) {
        self.is_some().put(out);
        self.iter().for_each(|value| value.put(out));
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        if bool::take(from)? { T::take(from).map(Some) } else { Ok(None) }
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        (dice.below(2) == 1).then(|| T::throw(dice))
    }
}

impl<T: Field> Field for Vec<T> {
    fn put(&self, out: &mut Writer) {
        out.number(self.len() as u64);
        self.iter().for_each(|value| value.put(out));
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        let count = from.number()?;
        // Nothing takes less than a byte, so a count of more is damage and no reason to reserve room.
        if count > from.0.len() as u64 {
            return Err(BadPack("count"));
        }
        let mut values = Self::new();
        for _ in 0..count {
            values.push(T::take(from)?);
        }
        Ok(values)
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        (0..dice.below(4)).map(|_| T::throw(dice)).collect()
    }
}

impl<T: Field + Clone> Field for Arc<[T]> {
    fn put(&self, out: &mut Writer) {
        out.number(self.len() as u64);
        self.iter().for_each(|value| value.put(out));
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        Vec::take(from).map(Self::from)
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        Vec::throw(dice).into()
    }
}

/// As a list of names; one whose names do not rise is refused.
impl Field for MemberList {
    fn put(&self, out: &mut Writer) {
        out.number(self.len() as u64);
        self.iter().for_each(|name| name.put(out));
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        Self::new(&Vec::take(from)?).ok_or(BadPack("members"))
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        let mut names: Vec<UserName> = Vec::throw(dice);
        names.sort_unstable();
        names.dedup();
        Self::new(&names).unwrap_or_default()
    }
}

impl<T: Field> Field for Box<T> {
    fn put(&self, out: &mut Writer) {
        (**self).put(out);
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        T::take(from).map(Self::new)
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        Self::new(T::throw(dice))
    }
}

impl<T: Field> Field for Arc<T> {
    fn put(&self, out: &mut Writer) {
        (**self).put(out);
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        T::take(from).map(Self::new)
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        Self::new(T::throw(dice))
    }
}

impl Field for () {
    fn put(&self, _: &mut Writer) {}

    fn take(_: &mut Reader<'_>) -> Result<Self, BadPack> {
        Ok(())
    }

    #[cfg(test)]
    fn throw(_: &mut super::record::Dice) -> Self {}
}

/// A name and what belongs to it.
impl<T: Field> Field for (UserName, T) {
    fn put(&self, out: &mut Writer) {
        self.0.put(out);
        self.1.put(out);
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        Ok((UserName::take(from)?, T::take(from)?))
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        (UserName::throw(dice), T::throw(dice))
    }
}

macro_rules! results {
    ($($error:ty),*) => {$(
        impl<T: Field> Field for Result<T, $error> {
            fn put(&self, out: &mut Writer) {
                self.is_ok().put(out);
                match self {
                    Ok(value) => value.put(out),
                    Err(error) => error.put(out),
                }
            }

            fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
                Ok(if bool::take(from)? { Ok(T::take(from)?) } else { Err(<$error>::take(from)?) })
            }

            #[cfg(test)]
            fn throw(dice: &mut super::record::Dice) -> Self {
                if dice.below(2) == 1 { Ok(T::throw(dice)) } else { Err(<$error>::throw(dice)) }
            }
        }
    )*};
}
results!(ErrorCode, NoReceipts);

/// What is of no use at another node, above all the hash of a password, goes as `Failed`.
impl Field for Answer {
    fn put(&self, out: &mut Writer) {
        match self {
            Self::Messages { first, head, messages } => {
                out.number(1);
                first.put(out);
                head.put(out);
                messages.put(out);
            }
            Self::Conversations(rows) => {
                out.number(2);
                rows.put(out);
            }
            Self::NotReadable => out.number(3),
            Self::Count(count) => {
                out.number(4);
                count.put(out);
            }
            Self::Failed | Self::User(_) | Self::Head(_) | Self::Row(_) | Self::Rows(_) => out.number(5),
        }
    }

    fn take(from: &mut Reader<'_>) -> Result<Self, BadPack> {
        Ok(match from.number()? {
            1 => Self::Messages { first: Seq::take(from)?, head: Seq::take(from)?, messages: Vec::take(from)? },
            2 => Self::Conversations(Vec::take(from)?),
            3 => Self::NotReadable,
            4 => Self::Count(u32::take(from)?),
            5 => Self::Failed,
            _ => return Err(BadPack("answer")),
        })
    }

    #[cfg(test)]
    fn throw(dice: &mut super::record::Dice) -> Self {
        match dice.below(5) {
            0 => Self::Messages { first: Seq::throw(dice), head: Seq::throw(dice), messages: Vec::throw(dice) },
            1 => Self::Conversations(Vec::throw(dice)),
            2 => Self::NotReadable,
            3 => Self::Count(u32::throw(dice)),
            _ => Self::Failed,
        }
    }
}

fields! {
    ConnId { slot, generation }
    Origin { shard, conn, request_id }
    Wanted { origin, timeout_ms }
    Ask { conversation, user, from, exists, answered }
    Submit { origin, device_key, message, ack_timeout_ms, more }
    SubmitMore { amend, act, passing, unvisited }
    Amending { refers, state, kind, soon, of_deleted }
    TransientSend { origin, from, to, device, client_seq, kind, body, ack_timeout_ms, no_reply }
    SendAck { conversation, seq, time_ms, dup }
    Receipt { conversation, seq, client_seq, outcome, device }
    StoredMessage { conversation, seq, from, to, device, client_seq, time_ms, kind, body, extra }
    StoredChange { what, users, text, number }
    Range { after, before, limit, bytes_max, newest }
    ConversationRow {
        conversation, with, first, head, last_time_ms, acked, read, pinned, muted_until_ms, standing, title,
    }
    ReceiptUp { origin, conversation, user, delivered, read, shown, others }
    ReceiptNews { to, conversation, with, user, row }
    ReceiptRow { delivered, read }
    ReceiptAsk { origin, user, conversation, seq, after, limit }
    ReceiptPage { members, delivered, read, rows, more }
    GroupRow { name, title, join, owner, created_ms, dissolved }
    MemberRow { standing, role, since_ms, muted_until_ms, ranges }
    Membership { join, leave }
    InfoAnswer { conversation, row, members, known }
    MemberAnswer { user, row }
    GroupPush { conversation, group, title, by, time_ms, change }
    Relay { owner, wait, timeout_ms }
    Pass { submit, passing, time_ms, gather, relay }
    DeleteAsk { origin, user, recall }
    NoticeOut { from, time_ms, kind, device_kinds, body, gather }
    Seen { user, online, last_seen_ms, status, hidden_from }
    SignalSend { origin, from, to, kind, body }
}

variants! { NoReceipts, 1 Refused(code); 2 Truncated { conversation, first }; }
variants! { Passing, 1 Message { no_reply }; 2 Signal { kind }; }
variants! { GroupAnswer, 1 Ok { conversation, seq, standing }; 2 Info(info); 3 Members { members, next }; }
variants! {
    Act,
    1 Create { title, join, users };
    2 Rename { title };
    3 Policy { join };
    4 Join { greeting };
    5 Invite { users };
    6 Answer { user, approve };
    7 Leave;
    8 Kick { user };
    9 Mute { user, for_ms };
    10 Role { user, role };
    11 Transfer { user };
    12 Dissolve;
    13 Members { cursor, limit, standing };
    14 Info;
    15 Depart;
}
variants! {
    SocialMessage,
    1 Signal(signal);
    2 Refused { origin, code };
    3 AskAgain { conversation, user, gather };
    4 PrivacyChanged { user, gather };
    5 Watch { users, gather };
    6 Seen { rows, gather };
    7 Notice(notice);
    8 Noticed { gather, devices };
    9 Passed { gather, devices };
    10 Part { gather };
    11 Delete(ask);
    12 NotWatched { gather };
}
variants! {
    NodeRead,
    1 Conversations { user, device, cursor, limit };
    2 Messages { conversation, range, reader };
    3 GroupCount { user };
}
variants! {
    ShardMessage,
    1 Submit(submit);
    2 Transient(send);
    3 SendResult { origin, durable, result, copy };
    4 Deliver { message, wanted };
    5 Receipt { origin, receipt };
    6 AskUser(ask);
    7 UserKnown { conversation, user, known };
    8 Social(message);
    9 Fetch { origin, conversation, range, reader };
    10 Fetched { origin, conversation, truncated, answer };
    11 ReceiptUp(up);
    12 ReceiptNews(news);
    13 ReceiptAsk(ask);
    14 ReceiptPage { origin, page };
    15 Done { origin, result };
    16 Flush { conn, number };
    17 Flushed { conn, number, done };
    18 Online { origin, after, limit };
    19 Visit(submit);
    20 GroupAnswered { origin, answer };
    21 DeliverGroup { message, members, skip, relay };
    22 PassGroup { pass, members };
    23 GroupReached { wait, device };
    24 PushGroup { users, push };
    25 OnlinePage { origin, users, more };
    26 Read { number, read };
    27 ReadDone { number, answer };
    28 Missed;
    29 Moved { partitions };
}
