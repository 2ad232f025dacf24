//! The Rust client of Ringline: sends that are kept exactly once, streams without gap or duplicate, over a connection
//! that mends itself.
//!
//! ```
//! use ringline_client::{Client, Event};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let server = ringline_client::testing::FakeServer::start().await?;
//! # let address = server.address();
//! let ann = Client::builder(&address).user("ann").password("ann's secret");
//! ann.register().await?;
//! let (ann, _) = ann.connect().await?;
//!
//! let bob = Client::builder(&address).user("bob").password("bob's secret");
//! bob.register().await?;
//! let (_bob, mut events) = bob.connect().await?;
//!
//! // Accepted means durable: the message is on the server's disk, and has its place in the conversation.
//! let accepted = ann.send("bob", "hello").await?;
//! assert_eq!(accepted.seq.0, 1);
//!
//! while let Some(event) = events.next().await {
//!     if let Event::Message(message) = event {
//!         assert_eq!((message.from.as_str(), &*message.text()), ("ann", "hello"));
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! - A lost connection is tried again with exponential back-off and full jitter, 0.2 s to 30 s. Sends are kept meanwhile
//!   and written again under their old numbers, by which the server knows what it has already: see [`Client::send`].
//! - No outcome is silent: a send ends as [`Accepted`] or as a [`SendError`] that says whether the message may have been
//!   accepted. A lost answer is [`SendError::Unknown`], never a failure.
//! - What was missed while away is handed on first, in order, by SYNC and what it leaves open by FETCH: see [`CatchUp`]
//!   and [`Events::next`].
//!
//! Inside, `pending`, `lanes`, `streams` and `session` are pure and take the time as an argument; `connection` is the one task
//! that owns them and a socket; `client` holds the handles. The terminal chat is the feature `chat`.

mod account;
mod addresses;
mod amend;
mod client;
mod connection;
pub mod group;
mod lanes;
#[cfg(feature = "machine")]
pub mod machine;
mod pending;
mod session;
mod social;
mod streams;

#[cfg(feature = "chat")]
pub mod chat;
#[doc(hidden)]
#[cfg(feature = "testing")]
pub mod testing;

pub use account::{Device, ExportPage, MemberReceipt, Place, ReadUpto, ReceiptPage, SyncPage};
pub use amend::Amendment;
pub use client::{Client, ClientBuilder, ConnectError, Events, Sending};
pub use connection::TokenFuture;
pub use pending::{
    Accepted, CallError, Conversation, ConversationPage, Delivery, History, HistoryRange, OnlinePage, OnlineUser,
    SendError, SendOptions,
};
pub use ringline_schema::errors::ErrorCode;
pub use ringline_schema::ids::{ConversationId, DeviceId, Seq, UserName};
pub use ringline_schema::message::chat::MessagesFrom;
pub use ringline_schema::message::group::{JoinPolicy, Role, What};
pub use ringline_schema::message::{
    BodyKind, Class, DeviceKind, GoawayReason, KickReason, MessageState, Outcome, Receipt, Standing,
};
pub use session::{CloseReason, Event, LinkError};
pub use social::{BlockPage, Notice, Presence, Signal};
pub use streams::{CatchUp, Message};
