//! Cases about keyed rows: groups, memberships, and what else is not a message.

use ringline_schema::ids::{ConversationId, DeviceId, Partition, Seq, UserName};
use ringline_schema::message::group::{JoinPolicy, Role, What};
use ringline_schema::message::{BodyKind, DeviceKind, MessageState, Standing};
use ringline_schema::record::{Answer, Change, Query, Range, Record, StoredChange, StoredExtra, StoredMessage};
use ringline_schema::rows::{
    AmendedRow, DeletionRow, DeletionStage, DeviceRow, GroupRow, MarkRow, MemberRow, ReceiptRow, Row, RowKey, RowList,
    RowValue,
};

use super::{ALL, Node, Opener, name, wait};

/// Rows that were appended together.
fn change(rows: Vec<Row>) -> Record {
    Record::Change(Box::new(Change { message: None, rows }))
}

fn mark(conversation: u128, stamp: u64, muted_until_ms: Option<u64>) -> Row {
    let value = muted_until_ms.map(|muted_until_ms| RowValue::Mark(MarkRow { pinned: true, muted_until_ms }));
    Row { key: RowKey::Mark(name("ann"), ConversationId(conversation)), stamp, value }
}

impl Node {
    pub(crate) fn row(&mut self, key: RowKey) -> Option<Row> {
        match self.ask(key.partition(), Query::Row { key }) {
            Answer::Row(row) => row,
            other => panic!("{other:?}"),
        }
    }

    /// A whole list, read in pages.
    pub(crate) fn rows(&mut self, list: RowList, page: u16) -> Vec<Row> {
        let partition = match &list {
            RowList::Members(id) | RowList::Receipts(id) | RowList::Amended(id) => id.partition(),
            RowList::Devices(user)
            | RowList::Blocks(user)
            | RowList::Marks(user)
            | RowList::Hidden(user, _)
            | RowList::AllHidden(user) => user.partition(),
            // Any shard lists all of them.
            RowList::Deletions => Partition::default(),
        };
        let mut rows: Vec<Row> = Vec::new();
        loop {
            let after = rows.last().map(|row| row.key.clone());
            match self.ask(partition, Query::Rows { list: list.clone(), after, limit: page }) {
                Answer::Rows(more) if more.is_empty() => return rows,
                Answer::Rows(more) => {
                    assert!(more.len() <= usize::from(page));
                    rows.extend(more);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

pub fn stamps(open: Opener<'_>) {
    let mut node = Node::new(open(2));
    let marks = || RowList::Marks(name("ann"));
    assert_eq!((node.row(mark(1, 0, None).key), node.rows(marks(), 3)), (None, Vec::new()));
    node.commit(&[change(vec![mark(1, 5, Some(50)), mark(2, 1, Some(1))]), change(vec![mark(3, 1, Some(2))])]);
    // An older stamp changes nothing, an equal one is the newer of two.
    node.commit(&[change(vec![mark(1, 4, None)]), change(vec![mark(2, 1, Some(7))])]);
    assert_eq!(node.row(mark(1, 0, None).key), Some(mark(1, 5, Some(50))));
    assert_eq!(node.rows(marks(), 2), [mark(1, 5, Some(50)), mark(2, 1, Some(7)), mark(3, 1, Some(2))]);
    node.commit(&[change(vec![mark(2, 9, None)])]);
    assert_eq!(node.row(mark(2, 0, None).key), None);
    node.close();
    let mut node = Node::new(open(3));
    assert_eq!(node.rows(marks(), 1), [mark(1, 5, Some(50)), mark(3, 1, Some(2))]);
    node.commit(&[change(vec![mark(2, 8, Some(1))]), change(vec![mark(1, 6, None)])]);
    assert_eq!(node.rows(marks(), 5), [mark(3, 1, Some(2))]);
    node.commit(&[change(vec![mark(2, 10, Some(4))])]);
    node.close();
    assert_eq!(Node::new(open(1)).rows(marks(), 5), [mark(2, 10, Some(4)), mark(3, 1, Some(2))]);
}

pub fn pages(open: Opener<'_>) {
    let mut alive = std::collections::BTreeMap::new();
    for round in 0..3u64 {
        // What the rounds before wrote lies in the index now, what this one writes does not yet.
        let mut node = Node::new(open(1 + round as u16));
        for step in 0..60u64 {
            let conversation = u128::from((step * 7 + round * 13) % 90);
            let gone = (step + round) % 3 == 0;
            let row = mark(conversation, round * 100 + step, (!gone).then_some(step));
            node.commit(&[change(vec![row.clone()])]);
            if gone {
                alive.remove(&conversation)
            } else {
                alive.insert(conversation, row)
            };
        }
        let wanted: Vec<_> = alive.values().cloned().collect();
        for page in [1, 2, 7, 200] {
            assert_eq!(node.rows(RowList::Marks(name("ann")), page), wanted, "round {round}, pages of {page}");
        }
        assert_eq!(node.rows(RowList::Marks(name("anna")), 5), []);
        node.close();
    }
}

/// A group, played from outside.
struct Team {
    name: UserName,
    id: ConversationId,
}

impl Team {
    fn new(text: &str) -> Self {
        let name = UserName::of_group(text).unwrap();
        Self { id: ConversationId::group(&name), name }
    }

    fn group(&self, stamp: u64, dissolved: u64) -> Row {
        let value = GroupRow {
            name: self.name.clone(),
            title: format!("title {stamp}"),
            join: JoinPolicy::Open,
            owner: name("ann"),
            created_ms: 9,
            dissolved: Seq(dissolved),
        };
        Row { key: RowKey::Group(self.id), stamp, value: Some(RowValue::Group(value)) }
    }

    fn message(&self, seq: u64) -> StoredMessage {
        StoredMessage {
            conversation: self.id,
            seq: Seq(seq),
            from: name("ann"),
            to: self.name.clone(),
            device: DeviceId(1),
            client_seq: seq,
            time_ms: 1_000 + seq,
            kind: BodyKind::Text,
            body: format!("message {seq}").into_bytes().into(),
            extra: None,
        }
    }

    /// `memberships`: joined with this row, left before that one (0: still there).
    fn member(&self, user: &str, stamp: u64, memberships: &[(u64, u64)]) -> Row {
        let present = memberships.last().is_some_and(|(_, leave)| *leave == 0);
        let standing = if present { Standing::Member } else { Standing::Left };
        let (role, since_ms) = (Role::Member, 500);
        let mut member = MemberRow { standing, role, since_ms, muted_until_ms: 0, ranges: Vec::new() };
        for &(join, leave) in memberships {
            member.begin(Seq(join));
            if leave != 0 {
                member.end(Seq(leave));
            }
        }
        Row { key: RowKey::Member(self.id, name(user)), stamp, value: Some(RowValue::Member(member)) }
    }

    fn read(&self, node: &mut Node, user: &str, range: Range) -> Option<(u64, u64, Vec<u64>)> {
        let (conversation, reader) = (self.id, Some(name(user)));
        match node.ask(conversation.partition(), Query::Messages { conversation, range, reader }) {
            Answer::Messages { first, head, messages } => {
                Some((first.0, head.0, messages.iter().map(|message| message.seq.0).collect()))
            }
            Answer::NotReadable => None,
            other => panic!("{other:?}"),
        }
    }
}

pub fn memberships(open: Opener<'_>) {
    let mut node = Node::new(open(2));
    let team = Team::new("#team");
    let (seqs, rows) = (1..=20, vec![team.group(1, 0), team.member("ann", 1, &[(1, 0)])]);
    node.commit(&[Record::Change(Box::new(Change { message: Some(team.message(1).into()), rows }))]);
    node.commit(&seqs.clone().skip(1).map(|seq| Record::Message(team.message(seq).into())).collect::<Vec<_>>());
    node.commit(&[change(vec![team.member("bob", 2, &[(3, 6), (10, 13), (19, 0)]), team.member("cid", 2, &[])])]);
    assert_eq!(team.read(&mut node, "ann", ALL), Some((1, 20, seqs.collect())));
    for stranger in ["cid", "eve"] {
        assert_eq!(team.read(&mut node, stranger, ALL), None, "{stranger}");
    }
    let mut bob = |after, before: Option<u64>, newest| {
        let range = Range { after: Seq(after), before: before.map(Seq), newest, ..ALL };
        team.read(&mut node, "bob", range).unwrap()
    };
    assert_eq!(bob(0, None, false), (3, 20, vec![3, 4, 5]));
    assert_eq!(bob(4, None, false), (3, 20, vec![5]));
    assert_eq!(bob(5, None, false), (10, 20, vec![10, 11, 12]));
    assert_eq!(bob(12, None, false), (19, 20, vec![19, 20]));
    assert_eq!(bob(5, Some(12), false), (10, 20, vec![10, 11]));
    assert_eq!(bob(5, Some(10), false), (10, 20, vec![]), "where to go on");
    assert_eq!(bob(5, Some(10), true), (3, 20, vec![]));
    assert_eq!(bob(20, None, false), (3, 20, vec![]));
    assert_eq!(bob(0, None, true), (3, 20, vec![19, 20]));
    assert_eq!(bob(0, Some(19), true), (3, 20, vec![10, 11, 12]));
    assert_eq!(bob(11, Some(19), true), (3, 20, vec![12]));
    assert_eq!(bob(0, Some(10), true), (3, 20, vec![3, 4, 5]));
}

pub fn group_lists(open: Opener<'_>) {
    let mut node = Node::new(open(3));
    let (team, club, old) = (Team::new("#team"), Team::new("#club"), Team::new("#old"));
    for (team, dissolved, memberships) in [(&team, 0, &[(1, 0)][..]), (&club, 0, &[(2, 4)]), (&old, 6, &[(1, 0)])] {
        let rows = vec![team.group(1, dissolved), team.member("bob", 1, memberships)];
        node.commit(&[Record::Change(Box::new(Change { message: Some(team.message(1).into()), rows }))]);
        node.commit(&(2..=6).map(|seq| Record::Message(team.message(seq).into())).collect::<Vec<_>>());
    }
    let read = ReceiptRow { delivered: Seq(5), read: Seq(4) };
    let receipt = RowKey::Receipt(team.id, name("bob"));
    node.commit(&[change(vec![Row { key: receipt, stamp: 9, value: Some(RowValue::Receipt(read)) }])]);
    let pinned = MarkRow { pinned: true, muted_until_ms: 77 };
    let key = RowKey::Mark(name("bob"), team.id);
    node.commit(&[change(vec![Row { key, stamp: 1, value: Some(RowValue::Mark(pinned)) }])]);
    let mut waits = 0;
    let rows = loop {
        let rows = node.conversations(&name("bob"), DeviceId(1), 2);
        let there = |team: &Team, head| rows.iter().any(|row| row.conversation == team.id && row.head == Seq(head));
        let marked = rows.iter().any(|row| row.read == Seq(4) && row.pinned);
        if there(&team, 6) && there(&club, 3) && there(&old, 6) && marked {
            break rows;
        }
        assert!(waits < 2_000, "{rows:#?}");
        wait(&mut waits, "the list");
    };
    assert_eq!(rows.len(), 3);
    let of = |team: &Team| rows.iter().find(|row| row.conversation == team.id).unwrap();
    let row = of(&team);
    assert_eq!((row.with.as_str(), row.title.as_str(), row.first), ("#team", "title 1", Seq(1)));
    assert_eq!((row.standing, row.last_time_ms), (Some(Standing::Member), 1_006));
    assert_eq!((row.read, row.pinned, row.muted_until_ms), (Seq(4), true, 77));
    let row = of(&club);
    assert_eq!((row.standing, row.first, row.head, row.last_time_ms), (Some(Standing::Left), Seq(2), Seq(3), 500));
    for (user, count) in [("bob", 1), ("eve", 0)] {
        let answer = node.ask(name(user).partition(), Query::GroupCount { user: name(user) });
        assert_eq!(answer, Answer::Count(count), "one was left, one was dissolved");
    }
}

pub fn extras(open: Opener<'_>) {
    let team = Team::new("#team");
    let change = StoredChange { what: What::Renamed, users: vec![name("bob")], text: "new".into(), number: 3 };
    let extra = StoredExtra {
        mentions: vec![name("ann"), name("bob")],
        mention_all: true,
        refers: Seq(1),
        state: MessageState::Edited,
        amended_ms: 6,
        change: Some(change),
    };
    let marked = StoredMessage { extra: Some(Box::new(extra)), ..team.message(2) };
    let rows = vec![team.group(2, 0)];
    let both = StoredMessage { client_seq: 3, ..StoredMessage { seq: Seq(3), ..marked.clone() } };
    let mut node = Node::new(open(1));
    node.commit(&[
        Record::Message(team.message(1).into()),
        Record::Message(marked.clone().into()),
        Record::Change(Box::new(Change { message: Some(both.clone().into()), rows })),
    ]);
    let wanted = vec![team.message(1), marked, both];
    assert_eq!(node.messages(team.id, ALL).2, wanted);
    node.close();
    let mut node = Node::new(open(1));
    assert_eq!(node.messages(team.id, ALL).2, wanted);
    assert_eq!(node.row(RowKey::Group(team.id)), Some(team.group(2, 0)));
}

pub fn amendments(open: Opener<'_>) {
    let team = Team::new("#team");
    let amendment = |seq: u64, refers: u64, state| {
        let body = bytes::Bytes::from(format!("edit {seq}"));
        let extra = StoredExtra { refers: Seq(refers), state, amended_ms: seq, ..StoredExtra::default() };
        let message = StoredMessage { kind: BodyKind::Amendment, body, ..team.message(seq) };
        let value = RowValue::Amended(AmendedRow { state, by: Seq(seq), at_ms: seq });
        let row = Row { key: RowKey::Amended(team.id, Seq(refers)), stamp: seq, value: Some(value) };
        let message = Some(StoredMessage { extra: Some(Box::new(extra)), ..message });
        Record::Change(Box::new(Change { message: message.map(Into::into), rows: vec![row] }))
    };
    let check = |node: &mut Node, bodies: &[&str]| {
        let shown: Vec<_> = node.messages(team.id, ALL).2.into_iter().map(|message| message.body).collect();
        assert_eq!(shown, bodies.iter().map(|body| body.as_bytes()).collect::<Vec<_>>());
    };
    let (first, second) = (team.message(1), team.message(2));
    let second_body = String::from_utf8(second.body.to_vec()).unwrap();
    let mut node = Node::new(open(1));
    node.commit(&[
        Record::Message(first.into()),
        Record::Message(second.into()),
        amendment(3, 1, MessageState::Edited),
    ]);
    check(&mut node, &["edit 3", &second_body, "edit 3"]);
    node.close();
    let mut node = Node::new(open(1));
    check(&mut node, &["edit 3", &second_body, "edit 3"]);
    node.commit(&[amendment(4, 1, MessageState::Edited)]);
    check(&mut node, &["edit 4", &second_body, "", "edit 4"]);
    let original = node.messages(team.id, ALL).2.remove(0).extra.unwrap();
    assert_eq!((original.state, original.amended_ms, original.refers), (MessageState::Edited, 4, Seq::ZERO));
    let overtaken = node.messages(team.id, ALL).2.remove(2).extra.unwrap();
    assert_eq!((overtaken.state, overtaken.refers), (MessageState::AsSent, Seq(1)));
    node.commit(&[amendment(5, 1, MessageState::Recalled), amendment(6, 2, MessageState::Deleted)]);
    let gone = ["", "", "", "", "edit 5", "edit 6"];
    check(&mut node, &gone);
    node.close();
    check(&mut Node::new(open(2)), &gone);
}

pub fn hidden(open: Opener<'_>) {
    let (ann, bob) = (name("ann"), name("bob"));
    let conversation = ConversationId::direct(&ann, &bob);
    let message = |seq: u64| StoredMessage {
        conversation,
        seq: Seq(seq),
        from: ann.clone(),
        to: bob.clone(),
        device: DeviceId(1),
        client_seq: seq,
        time_ms: seq,
        kind: BodyKind::Text,
        body: bytes::Bytes::from(format!("body {seq}")),
        extra: None,
    };
    let hide = |user: &UserName, seq: u64| {
        let row =
            Row { key: RowKey::Hidden(user.clone(), conversation, Seq(seq)), stamp: 1, value: Some(RowValue::Hidden) };
        Record::Change(Box::new(Change { message: None, rows: vec![row] }))
    };
    let shown = |node: &mut Node, reader: Option<&UserName>| {
        let query = Query::Messages { conversation, range: ALL, reader: reader.cloned() };
        let Answer::Messages { messages, .. } = node.ask(conversation.partition(), query) else { panic!("messages") };
        let shown = |message: StoredMessage| {
            let state = message.extra.map_or(MessageState::AsSent, |extra| extra.state);
            (message.seq.0, state, message.body.len())
        };
        messages.into_iter().map(shown).collect::<Vec<_>>()
    };
    let mut node = Node::new(open(1));
    let members = [ann.clone(), bob.clone()];
    node.commit(&[Record::Conversation { conversation, members, created_ms: 1 }]);
    node.commit(&[
        Record::Message(message(1).into()),
        Record::Message(message(2).into()),
        Record::Message(message(3).into()),
    ]);
    node.commit(&[hide(&bob, 2), hide(&bob, 3)]);
    let as_sent = |seq| (seq, MessageState::AsSent, 6);
    let check = |node: &mut Node| {
        let gone = |seq| (seq, MessageState::Hidden, 0);
        assert_eq!(shown(node, Some(&bob)), [as_sent(1), gone(2), gone(3)]);
        assert_eq!(shown(node, Some(&ann)), [as_sent(1), as_sent(2), as_sent(3)]);
        assert_eq!(shown(node, None), [as_sent(1), as_sent(2), as_sent(3)]);
    };
    check(&mut node);
    node.close();
    check(&mut Node::new(open(2)));
}

pub fn dropped_devices(open: Opener<'_>) {
    let (ann, bob) = (name("ann"), name("bob"));
    let conversation = ConversationId::direct(&ann, &bob);
    let cursor = |device: u64, seq| {
        let (user, device, seq) = (ann.clone(), DeviceId(device), Seq(seq));
        Record::Cursor { user, device, conversation, seq }
    };
    let device = |device: u64, stamp, alive: bool| {
        let (kind, agent) = (DeviceKind::Phone, String::new());
        let value = alive.then_some(RowValue::Device(DeviceRow { kind, agent, first_ms: 1, last_ms: 1 }));
        change(vec![Row { key: RowKey::Device(ann.clone(), DeviceId(device)), stamp, value }])
    };
    let acked = |node: &mut Node| {
        [1, 2].map(|device| node.conversations(&ann, DeviceId(device), 10).first().map_or(0, |row| row.acked.0))
    };
    let mut node = Node::new(open(1));
    let members = [ann.clone(), bob.clone()];
    node.commit(&[Record::Conversation { conversation, members, created_ms: 1 }, device(1, 1, true)]);
    node.commit(&[cursor(1, 9), cursor(2, 8), device(1, 2, false)]);
    assert_eq!(acked(&mut node), [0, 8], "in one batch");
    node.commit(&[cursor(1, 7)]);
    assert_eq!(acked(&mut node), [7, 8], "it came back");
    node.close();
    let mut node = Node::new(open(1));
    assert_eq!(acked(&mut node), [7, 8]);
    node.commit(&[device(1, 3, false)]);
    assert_eq!(acked(&mut node), [0, 8], "after a restart");
    node.commit(&[cursor(1, 3)]);
    assert_eq!(acked(&mut node), [3, 8]);
    node.close();
    assert_eq!(acked(&mut Node::new(open(1))), [3, 8]);
}

/// Of a long row of groups only the last still knows the user.
pub fn withdrawn(open: Opener<'_>) {
    let mut node = Node::new(open(2));
    let mut teams: Vec<Team> = (0..9).map(|number| Team::new(&format!("#team-{number}"))).collect();
    teams.sort_by_key(|team| team.id);
    for team in &teams {
        node.commit(&[change(vec![team.group(1, 0), team.member("bob", 1, &[(1, 0)])])]);
    }
    for team in &teams[..8] {
        let key = RowKey::Member(team.id, name("bob"));
        node.commit(&[change(vec![Row { key, stamp: 2, value: None }])]);
    }
    let mut waits = 0;
    while node.conversations(&name("bob"), DeviceId(1), 3).len() != 1 {
        wait(&mut waits, "the list");
    }
    node.close();
    let rows = Node::new(open(1)).conversations(&name("bob"), DeviceId(1), 3);
    assert_eq!(rows.iter().map(|row| row.conversation).collect::<Vec<_>>(), [teams[8].id]);
}

pub fn deletions(open: Opener<'_>) {
    let row = |user: &str, stamp: u64, stage: Option<DeletionStage>| {
        let value = |stage| RowValue::Deletion(DeletionRow { stage, recall: true, done: ConversationId(stamp.into()) });
        Row { key: RowKey::Deletion(name(user)), stamp, value: stage.map(value) }
    };
    let mut node = Node::new(open(3));
    for user in ["ann", "bob", "carl", "dora"] {
        node.commit(&[change(vec![row(user, 1, Some(DeletionStage::Leaving))])]);
    }
    node.commit(&[change(vec![row("carl", 2, Some(DeletionStage::Erasing))])]);
    node.commit(&[change(vec![row("bob", 2, None)])]);
    node.close();
    let wanted = [
        row("ann", 1, Some(DeletionStage::Leaving)),
        row("carl", 2, Some(DeletionStage::Erasing)),
        row("dora", 1, Some(DeletionStage::Leaving)),
    ];
    for shards in [1, 2] {
        let mut node = Node::new(open(shards));
        assert_eq!(node.rows(RowList::Deletions, 2), wanted);
        node.close();
    }
}
