//! Groups at the terminal: `/group …`, and how what happens to them is shown.

use crate::group::{Change, GroupChanged, GroupDone};
use crate::{CallError, JoinPolicy, Role, Standing, UserName, What};

use super::{Chat, clean, onward, split_name};

const MS_PER_SECOND: u64 = 1_000;

pub(super) const HELP: &str = "\
/group create #NAME [TITLE]      make a group that takes who is invited; create-open: everyone; create-approval: who asks
/group policy #NAME HOW          who may join: open, approval, invite
/group invite #NAME USER         invite somebody (who has asked to join becomes a member)
/group join #NAME [WORDS]        join, or ask to; decline #NAME: say no to an invitation, or do not ask any more
/group leave|info|members|dissolve #NAME
/group pending #NAME             who is invited, and who asks to join
/group approve|reject #NAME USER answer who asks; reject also takes an invitation back
/group kick|admin|member|transfer #NAME USER
/group mute #NAME USER SECONDS   forbid somebody to write for a while; 0 ends it
/group rename #NAME TITLE
messages go to a group as to a user: /to #NAME; @USER in one is told to USER, @all of an administrator to all";

impl Chat {
    pub(super) async fn group(&mut self, rest: &str) {
        let (verb, rest) = split_name(rest);
        let (group, rest) = split_name(rest);
        if group.is_empty() {
            return self.screen.line(HELP);
        }
        match verb {
            "members" => _ = self.members(group, Standing::Member).await,
            "pending" => self.pending(group).await,
            "info" => self.group_info(group).await,
            _ => match self.change_group(verb, group, rest).await {
                Ok(done) => self.group_done(group, done),
                Err(usage) => self.screen.line(&usage),
            },
        }
    }

    /// Errors: how the command is written.
    async fn change_group(
        &mut self,
        verb: &str,
        group: &str,
        rest: &str,
    ) -> Result<Result<GroupDone, CallError>, String> {
        let (user, more) = split_name(rest);
        let client = &self.client;
        Ok(match verb {
            "create" | "create-open" | "create-approval" => {
                let join = match verb {
                    "create-open" => JoinPolicy::Open,
                    "create-approval" => JoinPolicy::Approval,
                    _ => JoinPolicy::Invite,
                };
                let title = if rest.is_empty() { group } else { rest };
                client.create_group(group, (title, join), &[]).await
            }
            "policy" => match rest {
                "open" => client.set_join_policy(group, JoinPolicy::Open).await,
                "approval" => client.set_join_policy(group, JoinPolicy::Approval).await,
                "invite" => client.set_join_policy(group, JoinPolicy::Invite).await,
                _ => return Err("/group policy #NAME open, approval or invite".to_owned()),
            },
            "rename" if rest.is_empty() => return Err("/group rename #NAME TITLE".to_owned()),
            "rename" => client.rename_group(group, rest).await,
            "join" => client.join_group(group, rest).await,
            "decline" => client.answer_request(group, client.user().as_str(), false).await,
            "leave" => client.leave_group(group).await,
            "dissolve" => client.dissolve_group(group).await,
            "mute" => match more.parse::<u64>() {
                Ok(seconds) => client.mute_member(group, user, seconds.saturating_mul(MS_PER_SECOND)).await,
                Err(_) => return Err("/group mute #NAME USER SECONDS".to_owned()),
            },
            "invite" | "approve" | "reject" | "kick" | "admin" | "member" | "transfer" if user.is_empty() => {
                return Err(format!("/group {verb} #NAME USER"));
            }
            "invite" => client.invite(group, &[user]).await,
            "approve" => client.answer_request(group, user, true).await,
            "reject" => client.answer_request(group, user, false).await,
            "kick" => client.kick(group, user).await,
            "admin" => client.set_role(group, user, Role::Admin).await,
            "member" => client.set_role(group, user, Role::Member).await,
            "transfer" => client.transfer_group(group, user).await,
            _ => return Err(HELP.to_owned()),
        })
    }

    fn group_done(&mut self, group: &str, done: Result<GroupDone, CallError>) {
        let line = match done {
            Ok(GroupDone { standing: Some(Standing::Asked), .. }) => {
                format!("✓ {}: asked to join; wait for an answer", clean(group))
            }
            Ok(_) => format!("✓ {}", clean(group)),
            Err(CallError::Refused { code, .. }) => format!("✗ {}: {}", clean(group), code.text()),
            Err(error) => format!("✗ {}: {error}", clean(group)),
        };
        self.screen.line(&line);
    }

    /// Who is invited, and who asks to join.
    async fn pending(&mut self, group: &str) {
        let mut shown = 0;
        for standing in [Standing::Invited, Standing::Asked] {
            let Some(users) = self.members(group, standing).await else { return };
            shown += users;
        }
        if shown == 0 {
            self.screen.line("nobody is invited, and nobody asks to join");
        }
    }

    /// Shows those who stand so to a group. How many they are; `None`: it could not be had, and that was said.
    async fn members(&mut self, group: &str, standing: Standing) -> Option<usize> {
        let (mut from, mut shown): (Option<String>, usize) = (None, 0);
        loop {
            let page = match self.client.group_members(group, standing, from.as_deref()).await {
                Ok(page) => page,
                Err(error) => {
                    self.group_done(group, Err(error));
                    return None;
                }
            };
            shown += page.members.len();
            for member in page.members {
                let what = match (member.standing, member.role) {
                    (Standing::Invited, _) => " is invited",
                    (Standing::Asked, _) => " asks to join",
                    (Standing::Member, Role::Owner) => " (owner)",
                    (Standing::Member, Role::Admin) => " (administrator)",
                    (Standing::Member, Role::Member) | (Standing::Left | Standing::Kicked, _) => "",
                };
                self.screen.line(&format!("  {}{what}", clean(member.user.as_str())));
            }
            from = onward(from, page.next);
            if from.is_none() {
                return Some(shown);
            }
        }
    }

    async fn group_info(&mut self, group: &str) {
        match self.client.group_info(group).await {
            Ok(info) => {
                let join = match info.join {
                    JoinPolicy::Invite => "by invitation",
                    JoinPolicy::Approval => "by approval",
                    JoinPolicy::Open => "open",
                };
                let state = if info.dissolved { ", dissolved" } else { "" };
                let (title, owner) = (clean(&info.title), clean(info.owner.as_str()));
                let text = format!("  {title}: {} members, owner {owner}, {join}{state}", info.members);
                self.screen.line(&text);
            }
            Err(error) => self.group_done(group, Err(error)),
        }
    }

    pub(super) fn group_changed(&mut self, changed: &GroupChanged) {
        let (group, by) = (clean(changed.group.as_str()), clean(changed.by.as_str()));
        let line = match changed.change.what {
            What::Invited => format!("{by} invites you to {group} ({}): /group join {group}", clean(&changed.title)),
            What::Asked => {
                let words = clean(&changed.change.text);
                let words = if words.is_empty() { words } else { format!(" says {words:?} and") };
                format!("{by}{words} asks to join {group}: /group approve {group} {by}")
            }
            What::Refused => format!("{group}: {by} said no"),
            What::Kicked => format!("{by} took you out of {group}"),
            What::Created
            | What::Renamed
            | What::Policy
            | What::Joined
            | What::Left
            | What::Muted
            | What::Role
            | What::Transferred
            | What::Dissolved => format!("{group}: {by} {}", what_happened(&changed.change, &changed.by)),
        };
        self.screen.line(&line);
    }
}

/// What `by` did to a group, as the end of a sentence that begins with that name.
pub(super) fn what_happened(change: &Change, by: &UserName) -> String {
    let users: Vec<_> = change.users.iter().map(|user| clean(user.as_str())).collect();
    let (users, text) = (users.join(", "), clean(&change.text));
    match change.what {
        What::Created => format!("created the group {text:?}"),
        What::Renamed => format!("named the group {text:?}"),
        What::Policy => "changed who may join".to_owned(),
        What::Joined if change.users == std::slice::from_ref(by) => "joined".to_owned(),
        What::Joined => format!("let in {users}"),
        What::Left => "left".to_owned(),
        What::Kicked => format!("took out {users}"),
        What::Muted if change.number == 0 => format!("let {users} write again"),
        What::Muted => format!("muted {users}"),
        What::Role if change.number == Role::Admin as u64 => format!("made {users} an administrator"),
        What::Role => format!("made {users} a plain member"),
        What::Transferred => format!("gave the group to {users}"),
        What::Dissolved => "dissolved the group".to_owned(),
        What::Invited => format!("invited {users}"),
        What::Asked => "asks to join".to_owned(),
        What::Refused => "said no".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_says_who_did_what_to_whom_and_shows_no_control_characters() {
        let user = |text: &str| UserName::new(text).unwrap();
        let change = |what, users: &[&str], text: &str, number| {
            let users = users.iter().map(|name| user(name)).collect();
            Change { what, users, text: text.to_owned(), number }
        };
        let ann = user("ann");
        let cases = [
            (change(What::Joined, &["ann"], "", 0), "joined"),
            (change(What::Joined, &["bob", "cid"], "", 0), "let in bob, cid"),
            (change(What::Muted, &["bob"], "", 5), "muted bob"),
            (change(What::Muted, &["bob"], "", 0), "let bob write again"),
            (change(What::Role, &["bob"], "", Role::Admin as u64), "made bob an administrator"),
            (change(What::Renamed, &[], "a\u{1b}[2Jb", 0), "named the group \"a\u{fffd}[2Jb\""),
        ];
        for (change, wanted) in cases {
            assert_eq!(what_happened(&change, &ann), wanted);
        }
    }
}
