//! Lines of JSON of what is stored: the same for a user's EXPORT and for `ringline store export`. Pure.
//!
//! Names and numbers only, in the words of the tables, so a table that is added shows up by itself.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ringline_schema::ids::{ConversationId, UserName};
use ringline_schema::record::{ConversationRow, StoredMessage, User};
use ringline_schema::rows::{Row, RowKey, RowValue};
use serde_json::{Value, json};

/// A conversation's id as text.
pub fn id(conversation: ConversationId) -> String {
    format!("{conversation:?}")
}

/// Without the password's hash.
pub fn user_line(user: &User) -> Value {
    json!({
        "type": "user",
        "name": user.name.as_str(),
        "created_ms": user.created_ms,
        "password": user.password_hash.is_some(),
    })
}

/// A row of a user's conversation list.
pub fn listed_line(row: &ConversationRow) -> Value {
    json!({
        "type": "conversation",
        "id": id(row.conversation),
        "with": row.with.as_str(),
        "title": row.title,
        "standing": row.standing.map(|standing| format!("{standing:?}").to_lowercase()),
        "first": row.first.0,
        "head": row.head.0,
        "read": row.read.0,
        "pinned": row.pinned,
        "muted_until_ms": row.muted_until_ms,
    })
}

/// A message, as it is shown to whom it is exported for.
pub fn message_line(message: &StoredMessage) -> Value {
    let mut value = json!({
        "type": "message",
        "conversation": id(message.conversation),
        "seq": message.seq.0,
        "from": message.from.as_str(),
        "to": message.to.as_str(),
        "device": message.device.0,
        "client_seq": message.client_seq,
        "time_ms": message.time_ms,
        "kind": format!("{:?}", message.kind).to_lowercase(),
    });
    let Some(fields) = value.as_object_mut() else { return value };
    match std::str::from_utf8(&message.body) {
        Ok(text) => fields.insert("body".into(), text.into()),
        Err(_) => fields.insert("body_base64".into(), BASE64_STANDARD.encode(&message.body).into()),
    };
    if let Some(extra) = &message.extra {
        let names = |names: &[UserName]| -> Vec<String> { names.iter().map(|name| name.as_str().to_owned()).collect() };
        let change = extra.change.as_ref().map(|change| {
            let what = format!("{:?}", change.what).to_lowercase();
            json!({ "what": what, "users": names(&change.users), "text": change.text, "number": change.number })
        });
        fields.insert("mentions".into(), names(&extra.mentions).into());
        fields.insert("mention_all".into(), extra.mention_all.into());
        fields.insert("refers".into(), extra.refers.0.into());
        fields.insert("state".into(), format!("{:?}", extra.state).to_lowercase().into());
        fields.insert("amended_ms".into(), extra.amended_ms.into());
        fields.insert("change".into(), change.unwrap_or(Value::Null));
    }
    value
}

/// A row by the names of its key and its value.
pub fn row_line(row: &Row) -> Value {
    let (table, user, conversation, more) = match &row.key {
        RowKey::Group(conversation) => ("group", None, Some(*conversation), Value::Null),
        RowKey::Member(conversation, user) => ("member", Some(user), Some(*conversation), Value::Null),
        RowKey::Receipt(conversation, user) => ("receipt", Some(user), Some(*conversation), Value::Null),
        RowKey::Device(user, device) => ("device", Some(user), None, json!(device.0)),
        RowKey::Setting(user) => ("setting", Some(user), None, Value::Null),
        RowKey::Block(user, other) => ("block", Some(user), None, json!(other.as_str())),
        RowKey::Wrote(conversation, user) => ("wrote", Some(user), Some(*conversation), Value::Null),
        RowKey::Amended(conversation, seq) => ("amended", None, Some(*conversation), json!(seq.0)),
        RowKey::Mark(user, conversation) => ("mark", Some(user), Some(*conversation), Value::Null),
        RowKey::Hidden(user, conversation, seq) => ("hidden", Some(user), Some(*conversation), json!(seq.0)),
        RowKey::Deletion(user) => ("deletion", Some(user), None, Value::Null),
    };
    json!({
        "type": "row",
        "table": table,
        "user": user.map(|user| user.as_str()),
        "conversation": conversation.map(id),
        "key": more,
        "value": row.value.as_ref().map(value_json),
    })
}

fn value_json(value: &RowValue) -> Value {
    let choice = |debug: String| debug.to_lowercase();
    match value {
        RowValue::Group(group) => json!({
            "name": group.name.as_str(),
            "title": group.title,
            "join": choice(format!("{:?}", group.join)),
            "owner": group.owner.as_str(),
            "created_ms": group.created_ms,
            "dissolved": group.dissolved.0,
        }),
        RowValue::Member(member) => {
            let ranges: Vec<_> = member
                .ranges
                .iter()
                .map(|range| json!({ "join": range.join.0, "leave": range.leave.map(|leave| leave.0) }))
                .collect();
            json!({
                "standing": choice(format!("{:?}", member.standing)),
                "role": choice(format!("{:?}", member.role)),
                "since_ms": member.since_ms,
                "muted_until_ms": member.muted_until_ms,
                "ranges": ranges,
            })
        }
        RowValue::Receipt(receipt) => json!({ "delivered": receipt.delivered.0, "read": receipt.read.0 }),
        RowValue::Device(device) => json!({
            "kind": choice(format!("{:?}", device.kind)),
            "agent": device.agent,
            "first_ms": device.first_ms,
            "last_ms": device.last_ms,
        }),
        RowValue::Setting(setting) => json!({
            "messages_from": choice(format!("{:?}", setting.messages_from)),
            "visible": setting.visible,
            "status": setting.status,
            "last_seen_ms": setting.last_seen_ms,
            "deleted_ms": setting.deleted_ms,
            "hides": setting.hides,
        }),
        RowValue::Amended(amended) => json!({
            "state": choice(format!("{:?}", amended.state)),
            "by": amended.by.0,
            "at_ms": amended.at_ms,
        }),
        RowValue::Mark(mark) => json!({ "pinned": mark.pinned, "muted_until_ms": mark.muted_until_ms }),
        RowValue::Deletion(deletion) => json!({
            "stage": choice(format!("{:?}", deletion.stage)),
            "recall": deletion.recall,
            "done": id(deletion.done),
        }),
        RowValue::Block | RowValue::Hidden | RowValue::Wrote => Value::Null,
    }
}
