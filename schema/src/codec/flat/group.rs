//! The tables of groups.

use super::{Fbb, TABLES, TABLES_OF_ANSWER, conversation, id128, root, strings};
use crate::commands::Command;
use crate::errors::ErrorCode;
use crate::generated::wire::ringline::wire as fb;
use crate::ids::Seq;
use crate::message::group::{GroupInfo, JoinPolicy, Member, Role, What};
use crate::message::{GroupAct, GroupChange, GroupReply, Names, Reply, Request, Standing};
use flatbuffers::WIPOffset;

/// `None` when the command is none of a group.
pub(super) fn decode_request(command: Command, body: &[u8]) -> Result<Option<Request<'_>>, ErrorCode> {
    if command == Command::GroupCreate {
        let table = root::<fb::GroupCreate>(body, TABLES)?;
        let join = JoinPolicy::from_number(table.join()).ok_or(ErrorCode::BadRequest)?;
        let (title, users) = (table.title().unwrap_or_default(), Names::flat(table.users()));
        let act = GroupAct::Create { title, join, users };
        return Ok(Some(Request::Group { group: table.group().unwrap_or_default(), act }));
    }
    if !(Command::GroupRename as u16..=Command::GroupInfo as u16).contains(&(command as u16)) {
        return Ok(None);
    }
    let table = root::<fb::GroupAct>(body, TABLES)?;
    let act = act(command, &table)?;
    Ok(act.map(|act| Request::Group { group: table.group().unwrap_or_default(), act }))
}

fn act<'a>(command: Command, table: &fb::GroupAct<'a>) -> Result<Option<GroupAct<'a>>, ErrorCode> {
    let (user, text, number) = (table.user().unwrap_or_default(), table.text().unwrap_or_default(), table.number());
    let small = || u8::try_from(number).map_err(|_| ErrorCode::BadRequest);
    Ok(Some(match command {
        Command::GroupRename => GroupAct::Rename { title: text },
        Command::GroupPolicy => {
            GroupAct::Policy { join: JoinPolicy::from_number(small()?).ok_or(ErrorCode::BadRequest)? }
        }
        Command::GroupJoin => GroupAct::Join { greeting: text },
        Command::GroupInvite => GroupAct::Invite { users: Names::flat(table.users()) },
        Command::GroupAnswer => GroupAct::Answer { user, approve: number != 0 },
        Command::GroupLeave => GroupAct::Leave,
        Command::GroupKick => GroupAct::Kick { user },
        Command::GroupMute => GroupAct::Mute { user, for_ms: number },
        Command::GroupRole => GroupAct::Role { user, role: Role::from_number(small()?).ok_or(ErrorCode::BadRequest)? },
        Command::GroupTransfer => GroupAct::Transfer { user },
        Command::GroupDissolve => GroupAct::Dissolve,
        Command::GroupMembers => {
            let standing = match small()? {
                0 => Standing::Member,
                number => Standing::from_number(number).ok_or(ErrorCode::BadRequest)?,
            };
            GroupAct::Members { cursor: user, limit: table.limit(), standing }
        }
        Command::GroupInfo => GroupAct::Info,
        _ => return Ok(None),
    }))
}

pub(super) fn write_request(fbb: &mut Fbb, group: &str, act: &GroupAct<'_>) {
    if let GroupAct::Create { title, join, users } = act {
        let (group, title) = (Some(fbb.create_string(group)), Some(fbb.create_string(title)));
        let users = strings(fbb, *users);
        let args = fb::GroupCreateArgs { group, title, join: *join as u8, users };
        let table = fb::GroupCreate::create(fbb, &args);
        return fbb.finish_minimal(table);
    }
    let group = Some(fbb.create_string(group));
    let mut args = fb::GroupActArgs { group, ..Default::default() };
    let mut user = |name: &str| Some(fbb.create_string(name));
    match act {
        GroupAct::Create { .. } | GroupAct::Leave | GroupAct::Dissolve | GroupAct::Info => {}
        GroupAct::Rename { title: text } | GroupAct::Join { greeting: text } => {
            args.text = Some(fbb.create_string(text));
        }
        GroupAct::Policy { join } => args.number = *join as u64,
        GroupAct::Invite { users } => args.users = strings(fbb, *users),
        GroupAct::Answer { user: name, approve } => (args.user, args.number) = (user(name), u64::from(*approve)),
        GroupAct::Kick { user: name } | GroupAct::Transfer { user: name } => args.user = user(name),
        GroupAct::Mute { user: name, for_ms } => (args.user, args.number) = (user(name), *for_ms),
        GroupAct::Role { user: name, role } => (args.user, args.number) = (user(name), *role as u64),
        GroupAct::Members { cursor, limit, standing } => {
            args.user = user(cursor);
            (args.limit, args.number) = (*limit, *standing as u64);
        }
    }
    let table = fb::GroupAct::create(fbb, &args);
    fbb.finish_minimal(table);
}

/// `None` when the command is none of a group.
pub(super) fn decode_reply(command: Command, body: &[u8]) -> Result<Option<Reply<'_>>, ErrorCode> {
    let reply = match command {
        Command::GroupOk => {
            let table = root::<fb::GroupOk>(body, TABLES_OF_ANSWER)?;
            GroupReply::Ok {
                conversation: conversation(table.conversation()),
                seq: Seq(table.seq()),
                standing: standing(table.standing())?,
            }
        }
        Command::GroupInfoOk => GroupReply::Info(info(&root::<fb::GroupInfoOk>(body, TABLES_OF_ANSWER)?)?),
        Command::MembersOk => {
            let table = root::<fb::MembersOk>(body, TABLES_OF_ANSWER)?;
            let members = table.members().into_iter().flatten().map(member).collect::<Result<_, _>>()?;
            GroupReply::Members { members, next: table.next().unwrap_or_default() }
        }
        Command::GroupChanged => {
            let table = root::<fb::GroupChanged>(body, TABLES_OF_ANSWER)?;
            GroupReply::Changed {
                conversation: conversation(table.conversation()),
                group: table.group().unwrap_or_default(),
                title: table.title().unwrap_or_default(),
                by: table.by().unwrap_or_default(),
                time_ms: table.time_ms(),
                change: change(table.change().ok_or(ErrorCode::BadBody)?)?,
            }
        }
        _ => return Ok(None),
    };
    Ok(Some(Reply::Group(reply)))
}

fn info<'a>(table: &fb::GroupInfoOk<'a>) -> Result<GroupInfo<'a>, ErrorCode> {
    Ok(GroupInfo {
        conversation: conversation(table.conversation()),
        group: table.group().unwrap_or_default(),
        title: table.title().unwrap_or_default(),
        join: JoinPolicy::from_number(table.join()).ok_or(ErrorCode::BadBody)?,
        owner: table.owner().unwrap_or_default(),
        members: table.members(),
        created_ms: table.created_ms(),
        dissolved: table.dissolved(),
        standing: standing(table.standing())?,
        role: Role::from_number(table.role()).ok_or(ErrorCode::BadBody)?,
        muted_until_ms: table.muted_until_ms(),
    })
}

fn member<'a>(table: fb::Member<'a>) -> Result<Member<'a>, ErrorCode> {
    Ok(Member {
        user: table.user().unwrap_or_default(),
        role: Role::from_number(table.role()).ok_or(ErrorCode::BadBody)?,
        standing: standing(table.standing())?.ok_or(ErrorCode::BadBody)?,
        joined_ms: table.joined_ms(),
        muted_until_ms: table.muted_until_ms(),
    })
}

/// 0 is `None`.
pub(super) fn standing(number: u8) -> Result<Option<Standing>, ErrorCode> {
    match number {
        0 => Ok(None),
        number => Standing::from_number(number).map(Some).ok_or(ErrorCode::BadBody),
    }
}

pub(super) fn change<'a>(table: fb::GroupChange<'a>) -> Result<GroupChange<'a>, ErrorCode> {
    Ok(GroupChange {
        what: What::from_number(table.what()).ok_or(ErrorCode::BadBody)?,
        users: Names::flat(table.users()),
        text: table.text().unwrap_or_default(),
        number: table.number(),
    })
}

pub(super) fn write_change<'b>(
    fbb: &mut flatbuffers::FlatBufferBuilder<'b>,
    change: &GroupChange<'_>,
) -> WIPOffset<fb::GroupChange<'b>> {
    let users = strings(fbb, change.users);
    let text = (!change.text.is_empty()).then(|| fbb.create_string(change.text));
    let args = fb::GroupChangeArgs { what: change.what as u8, users, text, number: change.number };
    fb::GroupChange::create(fbb, &args)
}

pub(super) fn write_reply(fbb: &mut Fbb, reply: &GroupReply<'_>) {
    match reply {
        GroupReply::Ok { conversation, seq, standing } => {
            let (id, standing) = (id128(*conversation), standing.map_or(0, |standing| standing as u8));
            let args = fb::GroupOkArgs { conversation: Some(&id), seq: seq.0, standing };
            let table = fb::GroupOk::create(fbb, &args);
            fbb.finish_minimal(table);
        }
        GroupReply::Info(info) => write_info(fbb, info),
        GroupReply::Members { members, next } => {
            let mut rows = Vec::with_capacity(members.len());
            for row in members {
                let user = Some(fbb.create_string(row.user));
                let (role, standing) = (row.role as u8, row.standing as u8);
                let (joined_ms, muted_until_ms) = (row.joined_ms, row.muted_until_ms);
                let args = fb::MemberArgs { user, role, standing, joined_ms, muted_until_ms };
                rows.push(fb::Member::create(fbb, &args));
            }
            let (members, next) = (Some(fbb.create_vector(&rows)), Some(fbb.create_string(next)));
            let table = fb::MembersOk::create(fbb, &fb::MembersOkArgs { members, next });
            fbb.finish_minimal(table);
        }
        GroupReply::Changed { conversation, group, title, by, time_ms, change } => {
            let id = id128(*conversation);
            let (group, title) = (Some(fbb.create_string(group)), Some(fbb.create_string(title)));
            let (by, change) = (Some(fbb.create_string(by)), Some(write_change(fbb, change)));
            let args = fb::GroupChangedArgs { conversation: Some(&id), group, title, by, time_ms: *time_ms, change };
            let table = fb::GroupChanged::create(fbb, &args);
            fbb.finish_minimal(table);
        }
    }
}

fn write_info(fbb: &mut Fbb, info: &GroupInfo<'_>) {
    let id = id128(info.conversation);
    let (group, title) = (Some(fbb.create_string(info.group)), Some(fbb.create_string(info.title)));
    let owner = Some(fbb.create_string(info.owner));
    let args = fb::GroupInfoOkArgs {
        conversation: Some(&id),
        group,
        title,
        join: info.join as u8,
        owner,
        members: info.members,
        created_ms: info.created_ms,
        dissolved: info.dissolved,
        standing: info.standing.map_or(0, |standing| standing as u8),
        role: info.role as u8,
        muted_until_ms: info.muted_until_ms,
    };
    let table = fb::GroupInfoOk::create(fbb, &args);
    fbb.finish_minimal(table);
}
