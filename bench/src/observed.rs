//! What SDK clients saw, said as the checker's histories say it. Shared by the simulator and `torture`.
//!
//! Pure. Names of users and groups are their numbers, so that a name can be told from a number and back.

use ringline_client::{Accepted, Conversation, Message, SendError, UserName, What};

use crate::checker::{Change, Happening, Listed, Peer, Place, Shown};

/// The name of a user or a group.
pub fn name(peer: Peer) -> UserName {
    let text = match peer {
        Peer::User(number) => format!("user-{number}"),
        Peer::Group(number) => format!("#group-{number}"),
    };
    UserName::new(&text).expect("a plain name")
}

/// Whom a name names. A name that is none of ours is nobody's: `u32::MAX`.
pub fn peer(name: &UserName) -> Peer {
    let number = |text: &str| text.parse().unwrap_or(u32::MAX);
    match name.as_str().strip_prefix("#group-") {
        Some(text) => Peer::Group(number(text)),
        None => Peer::User(name.as_str().strip_prefix("user-").map_or(u32::MAX, number)),
    }
}

/// As [`peer`], for what can only be a user.
pub fn user(name: &UserName) -> u32 {
    match peer(name) {
        Peer::User(number) => number,
        Peer::Group(_) => u32::MAX,
    }
}

pub fn shown(message: &Message) -> Shown {
    let change = message.extra.as_ref().and_then(|extra| extra.change.as_ref());
    let change = change.map(|change| {
        let users = || change.users.iter().map(user).collect();
        match change.what {
            What::Created => Change::Created,
            What::Joined => Change::Came(users()),
            What::Left | What::Kicked => Change::Went(users()),
            What::Renamed | What::Policy | What::Muted | What::Role | What::Transferred | What::Dissolved => {
                Change::Other
            }
            // Pushes, never rows.
            What::Invited | What::Asked | What::Refused => Change::Other,
        }
    });
    Shown {
        place: Place { conversation: message.conversation.0, seq: message.seq.0 },
        from: user(&message.from),
        to: peer(&message.to),
        device: message.device.0,
        client_seq: message.client_seq,
        body: message.text().into_owned(),
        change,
    }
}

pub fn end_of_send(number: u64, result: Result<Accepted, SendError>) -> Happening {
    match result {
        Ok(accepted) => {
            let place = Place { conversation: accepted.conversation.0, seq: accepted.seq.0 };
            Happening::Accepted { number, place }
        }
        Err(SendError::Unknown) => Happening::Unknown { number },
        Err(
            SendError::Refused { .. }
            | SendError::NotSent
            | SendError::QueueFull
            | SendError::BadName
            | SendError::BodyTooLarge { .. }
            | SendError::DeliveryNotAsked,
        ) => Happening::Refused { number },
    }
}

pub fn listed(row: &Conversation) -> Listed {
    Listed { conversation: row.conversation.0, head: row.head.0, read: row.read.0 }
}
