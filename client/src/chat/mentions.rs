//! `@name` and `@all` in a message to a group: whom it is meant for above others. Part of the chat, on its thread.
//!
//! A mention begins where a word begins, so an address of mail is none. A name with spaces is put in double quotes, as
//! everywhere at the prompt: `@"Jürgen 老师"`, and a user whose name is `all`: `@"all"`. Whether there is such a user, and
//! who may mention all, is the server's to say.

use crate::{Message, MessageState, SendOptions, UserName};

/// What may follow a mention without a space and is no part of the name; the second row is of full width.
const PUNCTUATION: [char; 13] = [
    '.', ',', ';', ':', '!', '?', ')', //
    '\u{3002}', '\u{3001}', '\u{ff0c}', '\u{ff01}', '\u{ff1f}', '\u{ff09}',
];

/// How a line to `peer` is sent.
pub(super) fn options(peer: &UserName, text: &str) -> SendOptions {
    if !peer.is_group() {
        return SendOptions::default();
    }
    let (mentions, mention_all) = mentioned(text);
    SendOptions { mentions, mention_all, ..SendOptions::default() }
}

/// Who is mentioned, each once and in order, and whether all are.
fn mentioned(text: &str) -> (Vec<UserName>, bool) {
    let (mut users, mut all) = (Vec::new(), false);
    let (mut rest, mut word_begins) = (text, true);
    while let Some((before, behind)) = rest.split_once('@') {
        let is_mention = before.chars().next_back().map_or(word_begins, |last| last.is_whitespace() || last == '(');
        (rest, word_begins) = (behind, false);
        if !is_mention {
            continue;
        }
        let quoted = behind.strip_prefix('"').and_then(|inside| inside.split_once('"'));
        let name = match quoted {
            Some((name, after)) => {
                rest = after;
                name
            }
            None => {
                let (word, after) = behind.split_once(char::is_whitespace).unwrap_or((behind, ""));
                (rest, word_begins) = (after, true);
                word.trim_end_matches(PUNCTUATION)
            }
        };
        match UserName::of_user(name) {
            Ok(_) if name == "all" && quoted.is_none() => all = true,
            Ok(user) if !users.contains(&user) => users.push(user),
            Ok(_) | Err(_) => {}
        }
    }
    (users, all)
}

/// What stands behind a message that mentions its reader.
pub(super) fn of_reader(message: &Message, reader: &UserName) -> &'static str {
    let is_mentioned = message
        .extra
        .as_ref()
        .is_some_and(|extra| (extra.mention_all || extra.mentions.contains(reader)) && message.from != *reader);
    match message.state() {
        MessageState::AsSent | MessageState::Edited if is_mentioned => " (mentions you)",
        MessageState::AsSent
        | MessageState::Edited
        | MessageState::Recalled
        | MessageState::Deleted
        | MessageState::Hidden => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_begins_with_an_at_sign_mentions_and_an_address_of_mail_does_not() {
        let cases: [(&str, &[&str], bool); 10] = [
            ("hello @bob", &["bob"], false),
            ("@bob, @cid: look (@dan)!", &["bob", "cid", "dan"], false),
            ("@bob and @bob again", &["bob"], false),
            ("@all look", &[], true),
            ("@all! and @bob? @cid\u{ff01}", &["bob", "cid"], true),
            ("@\"Jürgen 老师\" and @\"all\"", &["Jürgen 老师", "all"], false),
            ("write to me@example.org", &[], false),
            ("@bob@example.org wrote", &["bob@example.org"], false),
            ("@ @, @#team @\"\" @\"open", &["\"open"], false),
            ("nobody", &[], false),
        ];
        for (text, users, all) in cases {
            let (mentions, mention_all) = mentioned(text);
            let names: Vec<&str> = mentions.iter().map(UserName::as_str).collect();
            assert_eq!((&names[..], mention_all), (users, all), "{text:?}");
        }
    }

    #[test]
    fn only_messages_to_groups_mention() {
        let options = |peer: &str| options(&UserName::new(peer).unwrap(), "@bob @all");
        assert_eq!((options("#team").mentions.len(), options("#team").mention_all), (1, true));
        assert_eq!((options("bob").mentions.len(), options("bob").mention_all), (0, false));
    }
}
