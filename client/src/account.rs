//! What the devices of one user share with each other and with whom they write to: how far they have read, marks of
//! conversations, the list of devices.
//!
//! Pure, as `pending`, which carries these calls; the functions of [`Client`] are handles. All of them may be repeated
//! without harm, and are, after a lost connection.

use ringline_schema::errors::ErrorCode;
use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
use ringline_schema::message::chat::{self, AmendAction, ChatReply, ChatRequest};
use ringline_schema::message::{BodyKind, Credential, DeviceKind, Request, Secret};

use crate::client::Client;
use crate::pending::{Answer, CallError, Query};
use crate::streams::Message;

pub use ringline_schema::message::Place;

/// A device of this user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub device: DeviceId,
    pub kind: DeviceKind,
    /// What the application calls itself; cut at 128 bytes.
    pub agent: String,
    /// First and last login, Unix milliseconds; 0: not known.
    pub first_ms: u64,
    pub last_ms: u64,
    pub online: bool,
}

/// How far a user has a conversation. Both places only rise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadUpto {
    pub conversation: ConversationId,
    /// The other user of the conversation, or the group.
    pub with: UserName,
    /// Who has it so far: the other user, or this one on another device. `None`: at least one other member of the group;
    /// [`Client::receipts`] says who.
    pub user: Option<UserName>,
    pub delivered: Seq,
    pub read: Seq,
}

/// Who has a message: counts over all members but its sender, and a page of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptPage {
    pub members: u32,
    pub delivered: u32,
    pub read: u32,
    /// How far each has the conversation, in order of name.
    pub rows: Vec<MemberReceipt>,
    /// Where the next page starts; `None`: this was the last.
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberReceipt {
    pub user: UserName,
    pub delivered: Seq,
    pub read: Seq,
}

/// A page of what a device missed, conversation by conversation, each in rising order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncPage {
    pub messages: Vec<Message>,
    /// Where the next page begins; `None`: nothing more was missed.
    pub next: Option<Place>,
}

/// A piece of what is kept about a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportPage {
    /// Lines of JSON. A long line may go on in the next piece: put them together before they are parsed.
    pub body: Vec<u8>,
    /// Where the next piece starts; `None`: this was the last.
    pub next: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) enum AccountQuery {
    Sync {
        places: Vec<Place>,
        from: Place,
        limit: u16,
    },
    Read {
        conversation: ConversationId,
        seq: Seq,
    },
    Mark(chat::Mark),
    Devices,
    Drop(DeviceId),
    /// A message deleted for this user alone.
    Hide {
        with: UserName,
        seq: Seq,
    },
    Receipts {
        conversation: ConversationId,
        seq: Seq,
        cursor: String,
        limit: u16,
    },
    Export {
        cursor: String,
    },
    Delete {
        user: UserName,
        proof: DeleteProof,
        recall: bool,
    },
}

/// Why a user may be deleted.
#[derive(Clone)]
pub(crate) enum DeleteProof {
    /// An administrator asks.
    Rank,
    Password(String),
    Token(String),
}

/// Never prints a secret.
impl std::fmt::Debug for DeleteProof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Rank => "Rank",
            Self::Password(_) => "Password",
            Self::Token(_) => "Token",
        })
    }
}

#[derive(Debug)]
pub(crate) enum AccountAnswer {
    Done,
    Devices(Vec<Device>),
    Receipts(ReceiptPage),
    Sync(SyncPage),
    Export(ExportPage),
}

impl AccountQuery {
    pub(crate) fn as_wire(&self) -> Request<'_> {
        Request::Chat(match self {
            Self::Sync { places, from, limit } => {
                ChatRequest::Sync(chat::Sync { places: places[..].into(), from: *from, limit: *limit })
            }
            Self::Read { conversation, seq } => ChatRequest::Read { conversation: *conversation, seq: *seq },
            Self::Mark(mark) => ChatRequest::Mark(*mark),
            Self::Devices => ChatRequest::Devices,
            Self::Drop(device) => ChatRequest::DropDevice { device: *device },
            Self::Hide { with, seq } => {
                let (with, action, kind) = (with.as_str(), AmendAction::DeleteForMe, BodyKind::Text);
                ChatRequest::Amend(chat::Amend { with, seq: *seq, action, kind, client_seq: 0, body: &[] })
            }
            Self::Receipts { conversation, seq, cursor, limit } => {
                ChatRequest::Receipts { conversation: *conversation, seq: *seq, cursor, limit: *limit }
            }
            Self::Export { cursor } => ChatRequest::Export { cursor },
            Self::Delete { user, proof, recall } => {
                let proof = match proof {
                    DeleteProof::Rank => None,
                    DeleteProof::Password(password) => Some(Credential::Password(Secret(password))),
                    DeleteProof::Token(token) => Some(Credential::Token(Secret(token))),
                };
                ChatRequest::DeleteUser { user: user.as_str(), proof, recall: *recall }
            }
        })
    }

    pub(crate) fn is_answered_by(&self, answer: &AccountAnswer) -> bool {
        match (self, answer) {
            (
                Self::Read { .. } | Self::Mark(_) | Self::Drop(_) | Self::Hide { .. } | Self::Delete { .. },
                AccountAnswer::Done,
            )
            | (Self::Devices, AccountAnswer::Devices(_))
            | (Self::Sync { .. }, AccountAnswer::Sync(_))
            | (Self::Receipts { .. }, AccountAnswer::Receipts(_))
            | (Self::Export { .. }, AccountAnswer::Export(_)) => true,
            (Self::Read { .. } | Self::Mark(_) | Self::Drop(_) | Self::Hide { .. } | Self::Delete { .. }, _)
            | (Self::Devices | Self::Sync { .. } | Self::Receipts { .. } | Self::Export { .. }, _) => false,
        }
    }
}

/// The answer in a reply. Errors: `BAD_BODY` for one that answers no question of this kind, or names nobody.
pub(crate) fn answer(reply: &ChatReply<'_>) -> Result<AccountAnswer, ErrorCode> {
    let name = |text: &str| UserName::new(text).map_err(|_| ErrorCode::BadBody);
    match reply {
        ChatReply::Done => Ok(AccountAnswer::Done),
        ChatReply::DevicesOk { devices } => {
            let device = |row: &chat::Device<'_>| Device {
                device: row.device,
                kind: row.kind,
                agent: row.agent.to_owned(),
                first_ms: row.first_ms,
                last_ms: row.last_ms,
                online: row.online,
            };
            Ok(AccountAnswer::Devices(devices.iter().map(device).collect()))
        }
        ChatReply::ReceiptsOk { members, delivered, read, rows, next } => {
            let row = |row: &chat::MemberReceipt<'_>| {
                name(row.user).map(|user| MemberReceipt { user, delivered: row.delivered, read: row.read })
            };
            let rows = rows.iter().map(row).collect::<Result<_, _>>()?;
            let next = (!next.is_empty()).then(|| (*next).to_owned());
            let (members, delivered, read) = (*members, *delivered, *read);
            Ok(AccountAnswer::Receipts(ReceiptPage { members, delivered, read, rows, next }))
        }
        ChatReply::SyncOk { messages, next } => {
            let messages = messages.iter().map(Message::from_wire).collect::<Result<_, _>>()?;
            let next = (*next != Place::default()).then_some(*next);
            Ok(AccountAnswer::Sync(SyncPage { messages, next }))
        }
        ChatReply::ExportOk { body, next } => {
            let next = (!next.is_empty()).then(|| (*next).to_owned());
            Ok(AccountAnswer::Export(ExportPage { body: body.to_vec(), next }))
        }
        ChatReply::Truncated { .. }
        | ChatReply::BroadcastOk { .. }
        | ChatReply::PresenceOk { .. }
        | ChatReply::BlocksOk { .. }
        | ChatReply::ReceiptUpto { .. }
        | ChatReply::Signalled { .. }
        | ChatReply::PresenceChanged { .. }
        | ChatReply::Hidden { .. }
        | ChatReply::Notice { .. } => Err(ErrorCode::BadBody),
    }
}

impl Client {
    /// This user has read a conversation up to `seq`, on whatever device; those they write with are told. Never goes back.
    pub async fn read(&self, conversation: ConversationId, seq: Seq) -> Result<(), CallError> {
        self.done(AccountQuery::Read { conversation, seq }).await
    }

    /// Pins a conversation for this user, or unpins it. At most 100 are pinned: `TOO_MANY_PINS`.
    pub async fn pin(&self, conversation: ConversationId, pinned: bool) -> Result<(), CallError> {
        self.done(AccountQuery::Mark(chat::Mark { conversation, pinned: Some(pinned), muted_until_ms: None })).await
    }

    /// Says until when (Unix milliseconds; 0: not) this user wants no notifications of a conversation.
    pub async fn mute(&self, conversation: ConversationId, until_ms: u64) -> Result<(), CallError> {
        self.done(AccountQuery::Mark(chat::Mark { conversation, pinned: None, muted_until_ms: Some(until_ms) })).await
    }

    /// The devices of this user, those that are away as well.
    pub async fn devices(&self) -> Result<Vec<Device>, CallError> {
        let answer = self.call(Query::Account(AccountQuery::Devices)).await?;
        let Answer::Account(AccountAnswer::Devices(devices)) = answer else { return Err(CallError::Closed) };
        Ok(devices)
    }

    /// A piece of everything that is kept about this user: account without password, settings, devices, blocked users, and
    /// conversations with the messages that this user may read. `cursor`: empty for the first piece.
    pub async fn export(&self, cursor: &str) -> Result<ExportPage, CallError> {
        let answer = self.call(Query::Account(AccountQuery::Export { cursor: cursor.to_owned() })).await?;
        let Answer::Account(AccountAnswer::Export(page)) = answer else { return Err(CallError::Closed) };
        Ok(page)
    }

    /// Deletes this user for ever, proved by the password: nobody logs in or registers under the name again, and the
    /// client ends with [`KickReason::UserDeleted`](crate::KickReason::UserDeleted). `recall`: the messages that the user
    /// has sent are taken back as well; without it they stay with those who have them. What is kept about the user can be
    /// had before by [`Client::export`]. `AUTH_FAILED` for a wrong password, or an account without one.
    ///
    /// It is done when this returns; groups are left, and messages taken back, in the moments after. If the connection is
    /// lost before the answer comes, the client may end with the refusal of its next login, `USER_DELETED`.
    pub async fn delete_account(&self, password: &str, recall: bool) -> Result<(), CallError> {
        self.delete_own(DeleteProof::Password(password.to_owned()), recall).await
    }

    /// The same for an account without a password, proved by a token.
    pub async fn delete_account_by_token(&self, token: &str, recall: bool) -> Result<(), CallError> {
        self.delete_own(DeleteProof::Token(token.to_owned()), recall).await
    }

    async fn delete_own(&self, proof: DeleteProof, recall: bool) -> Result<(), CallError> {
        self.done(AccountQuery::Delete { user: self.user().clone(), proof, recall }).await
    }

    /// Deletes another user, like [`Client::delete_account`]; for administrators, others are told `NOT_ALLOWED`.
    /// `NO_SUCH_USER` or `USER_DELETED` if there is nobody to delete.
    pub async fn delete_user(&self, user: &str, recall: bool) -> Result<(), CallError> {
        let user = UserName::new(user).map_err(|_| CallError::BadName)?;
        self.done(AccountQuery::Delete { user, proof: DeleteProof::Rank, recall }).await
    }

    /// Logs a device of this user out and forgets it: `NO_SUCH_DEVICE` if there is none.
    pub async fn drop_device(&self, device: DeviceId) -> Result<(), CallError> {
        self.done(AccountQuery::Drop(device)).await
    }

    /// A page of all that was missed in every conversation: behind `places` (at most 1,000), in the others behind what this
    /// device has acknowledged. From the beginning with `None`, then from the `next` of the page before. Only reads: the
    /// stream of [`Events`](crate::Events) catches up by itself. `limit` 0 stands for 50.
    pub async fn sync(&self, places: &[Place], from: Option<Place>, limit: u16) -> Result<SyncPage, CallError> {
        let (places, from) = (places.to_vec(), from.unwrap_or_default());
        let answer = self.call(Query::Account(AccountQuery::Sync { places, from, limit })).await?;
        let Answer::Account(AccountAnswer::Sync(page)) = answer else { return Err(CallError::Closed) };
        Ok(page)
    }

    /// Who has received and read message `seq` of a conversation: from the first with `None`, then from the `next` of the
    /// page before. `limit` 0 stands for 50.
    pub async fn receipts(
        &self,
        conversation: ConversationId,
        seq: Seq,
        from: Option<&str>,
        limit: u16,
    ) -> Result<ReceiptPage, CallError> {
        let cursor = from.unwrap_or_default().to_owned();
        let answer = self.call(Query::Account(AccountQuery::Receipts { conversation, seq, cursor, limit })).await?;
        let Answer::Account(AccountAnswer::Receipts(page)) = answer else { return Err(CallError::Closed) };
        Ok(page)
    }

    pub(crate) async fn done(&self, query: AccountQuery) -> Result<(), CallError> {
        self.call(Query::Account(query)).await.map(|_| ())
    }
}
