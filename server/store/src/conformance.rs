//! The suite that every backend passes: what the core relies on, checked through the [`Store`] trait alone.
//!
//! A backend's tests run each of [`CASES`] with an opener of its own: its first call opens a new store, each later call
//! opens the same store again after its handles were closed. Runs on the caller's thread, which plays all shards.

mod keyed;

use ringline_schema::ids::{ConversationId, DeviceId, DeviceKey, Partition, Seq, UserName};
use ringline_schema::limits::DUPLICATE_WINDOW;
use ringline_schema::message::BodyKind;
use ringline_schema::record::{Answer, ConversationRow, Head, Query, Range, Record, StoredMessage, User};

use crate::{LoadToken, Lsn, RECORD_BYTES_MAX, Refused, Store, StoreError, StoreEvent};

/// Opens the store of a case for a number of shards.
pub type Opener<'a> = &'a mut dyn FnMut(u16) -> Vec<Box<dyn Store>>;

/// One property.
#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    /// Panics when the property does not hold.
    pub check: fn(Opener<'_>),
}

/// Everything that a store has to show.
pub const CASES: &[Case] = &[
    Case { name: "commits come in the order of appends", check: commits_in_order },
    Case { name: "close commits what is queued and takes nothing more", check: close_commits },
    Case { name: "messages are read from both ends and within every bound", check: ranges },
    Case { name: "heads and filters follow the messages", check: heads_and_filters },
    Case { name: "the duplicate filter keeps the highest client_seqs", check: duplicate_window },
    Case { name: "users are found by name", check: users },
    Case { name: "conversation lists span shards and come in pages", check: conversation_lists },
    Case { name: "cursors keep the highest, for each device", check: cursors },
    Case { name: "of keyed rows the highest stamp counts, in lists and alone", check: keyed::stamps },
    Case { name: "lists of keyed rows come in pages, whatever was flushed", check: keyed::pages },
    Case { name: "a member reads between joining and leaving", check: keyed::memberships },
    Case { name: "groups are in the lists of their members and are counted", check: keyed::group_lists },
    Case { name: "a message keeps what it carries", check: keyed::extras },
    Case { name: "readers see what a message has become", check: keyed::amendments },
    Case { name: "what a reader has deleted for himself is there for others", check: keyed::hidden },
    Case { name: "what is gone from a list does not end it", check: keyed::withdrawn },
    Case { name: "deletions under way are listed for all users", check: keyed::deletions },
    Case { name: "a device that is gone has no cursors", check: keyed::dropped_devices },
    Case { name: "full queues refuse and recover", check: full },
    Case { name: "a record that is too large is refused", check: too_large },
    Case { name: "everything is there after a restart", check: restart },
    Case { name: "the number of shards may change", check: other_shard_numbers },
];

/// Waits this often for a moment before a case gives up.
const WAITS_MAX: u32 = 100_000;
const WAIT_US: u64 = 200;

fn wait(waits: &mut u32, what: &str) {
    *waits += 1;
    assert!(*waits < WAITS_MAX, "{what}: nothing came");
    std::thread::sleep(std::time::Duration::from_micros(WAIT_US));
}

/// All shards of a node, played by one thread.
pub struct Node {
    pub shards: Vec<Box<dyn Store>>,
    tokens: u64,
}

impl Node {
    pub fn new(shards: Vec<Box<dyn Store>>) -> Self {
        Self { shards, tokens: 0 }
    }

    fn owner(&mut self, partition: Partition) -> &mut dyn Store {
        let shard = usize::from(partition.number()) % self.shards.len();
        self.shards[shard].as_mut()
    }

    /// Appends records at their owners and waits until all are committed.
    pub fn commit(&mut self, records: &[Record]) {
        let mut wanted = vec![Lsn::default(); self.shards.len()];
        for record in records {
            let shard = usize::from(record.partition().number()) % self.shards.len();
            let mut waits = 0;
            wanted[shard] = loop {
                match self.shards[shard].append(record) {
                    Ok(lsn) => break lsn,
                    Err(StoreError::Full) => {
                        self.shards[shard].submit();
                        self.shards[shard].poll(&mut Vec::new());
                        wait(&mut waits, "room");
                    }
                    Err(error) => panic!("{error}"),
                }
            };
        }
        for (store, wanted) in self.shards.iter_mut().zip(wanted).filter(|(_, wanted)| wanted.0 > 0) {
            committed(store.as_mut(), wanted);
        }
    }

    /// Asks the owner of `partition`. A test asks one question at a time.
    pub fn ask(&mut self, partition: Partition, query: Query) -> Answer {
        self.tokens += 1;
        let token = LoadToken(self.tokens);
        let store = self.owner(partition);
        store.load(token, query).unwrap();
        answers(store, 1).remove(0).1
    }

    pub fn messages(&mut self, conversation: ConversationId, range: Range) -> (Seq, Seq, Vec<StoredMessage>) {
        match self.ask(conversation.partition(), Query::Messages { conversation, range, reader: None }) {
            Answer::Messages { first, head, messages } => (first, head, messages),
            other => panic!("{other:?}"),
        }
    }

    pub fn head(&mut self, conversation: ConversationId, device: DeviceKey) -> Head {
        match self.ask(conversation.partition(), Query::Head { conversation, device }) {
            Answer::Head(head) => head,
            other => panic!("{other:?}"),
        }
    }

    /// The whole list of a user, read in pages.
    pub fn conversations(&mut self, user: &UserName, device: DeviceId, page: u16) -> Vec<ConversationRow> {
        let (mut rows, device) = (Vec::<ConversationRow>::new(), DeviceKey::new(user, device));
        loop {
            let cursor = rows.last().map_or(FIRST, |row| row.conversation);
            let query = Query::Conversations { user: user.clone(), device, cursor, limit: page };
            match self.ask(user.partition(), query) {
                Answer::Conversations(more) if more.is_empty() => return rows,
                Answer::Conversations(more) => {
                    assert!(more.len() <= usize::from(page));
                    rows.extend(more);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Asks until the answer is as wanted: for what another shard committed, which may be seen a moment late.
    fn list_becomes(&mut self, user: &UserName, device: DeviceId, wanted: &[ConversationRow]) {
        let mut waits = 0;
        loop {
            let rows = self.conversations(user, device, 7);
            if rows == wanted {
                return;
            }
            assert!(waits < 2000, "{rows:#?}\n is not {wanted:#?}");
            wait(&mut waits, "the list");
        }
    }

    pub fn close(mut self) {
        for store in &mut self.shards {
            store.close().unwrap();
        }
    }
}

/// Submits and polls until `wanted` is committed.
pub fn committed(store: &mut dyn Store, wanted: Lsn) {
    let (mut events, mut waits) = (Vec::new(), 0);
    loop {
        store.submit();
        store.poll(&mut events);
        for event in events.drain(..) {
            match event {
                StoreEvent::Committed(lsn) if lsn >= wanted => return,
                StoreEvent::Committed(_) => {}
                other => panic!("{other:?}"),
            }
        }
        wait(&mut waits, "the commit");
    }
}

/// Polls until `count` answers are there.
pub fn answers(store: &mut dyn Store, count: usize) -> Vec<(LoadToken, Answer)> {
    let (mut found, mut events, mut waits) = (Vec::new(), Vec::new(), 0);
    loop {
        store.poll(&mut events);
        for event in events.drain(..) {
            match event {
                StoreEvent::Loaded(token, answer) => found.push((token, answer)),
                other => panic!("{other:?}"),
            }
        }
        if found.len() >= count {
            return found;
        }
        wait(&mut waits, "the answer");
    }
}

pub fn name(text: &str) -> UserName {
    UserName::new(text).unwrap()
}

/// Two users and their conversation.
#[derive(Clone, Debug)]
pub struct Pair {
    pub one: UserName,
    pub other: UserName,
    pub id: ConversationId,
}

impl Pair {
    pub fn new(one: &str, other: &str) -> Self {
        let (one, other) = (name(one), name(other));
        Self { id: ConversationId::direct(&one, &other), one, other }
    }

    pub fn record(&self) -> Record {
        let members = [self.one.clone(), self.other.clone()];
        Record::Conversation { conversation: self.id, members, created_ms: 1_000 }
    }

    /// Message `seq`, sent by `one`'s device 1 with client_seq `seq`, at a time and with a body that follow from it.
    pub fn message(&self, seq: u64) -> StoredMessage {
        StoredMessage {
            conversation: self.id,
            seq: Seq(seq),
            from: self.one.clone(),
            to: self.other.clone(),
            device: DeviceId(1),
            client_seq: seq,
            time_ms: 2_000 + seq,
            kind: BodyKind::Text,
            body: vec![b'a' + (seq % 26) as u8; 1 + (seq * 7 % 100) as usize].into(),
            extra: None,
        }
    }

    /// The conversation and its messages up to `head`.
    pub fn history(&self, head: u64) -> Vec<Record> {
        let messages = (1..=head).map(|seq| Record::Message(self.message(seq).into()));
        std::iter::once(self.record()).chain(messages).collect()
    }

    fn row(&self, head: u64, acked: u64) -> ConversationRow {
        ConversationRow {
            conversation: self.id,
            with: self.other.clone(),
            first: Seq(head.min(1)),
            head: Seq(head),
            last_time_ms: if head == 0 { 1_000 } else { 2_000 + head },
            acked: Seq(acked),
            read: Seq(0),
            pinned: false,
            muted_until_ms: 0,
            standing: None,
            title: String::new(),
        }
    }
}

/// Below every conversation: where a list begins.
pub const FIRST: ConversationId = ConversationId(0);

/// All of a conversation, from its beginning.
pub const ALL: Range = Range { after: Seq(0), before: None, limit: u16::MAX, bytes_max: u32::MAX, newest: false };

fn commits_in_order(open: Opener<'_>) {
    let mut store = open(1).remove(0);
    let pair = Pair::new("ann", "bob");
    let (mut last, mut announced, mut events) = (Lsn(0), Lsn(0), Vec::new());
    for seq in 1..=1000 {
        let lsn = store.append(&Record::Message(pair.message(seq).into())).unwrap();
        assert_eq!(lsn, Lsn(last.0 + 1));
        last = lsn;
        if seq % 3 == 0 {
            store.submit();
        }
        store.poll(&mut events);
        for event in events.drain(..) {
            let StoreEvent::Committed(lsn) = event else { panic!("{event:?}") };
            assert!(lsn > announced && lsn <= last, "{lsn:?} after {announced:?}");
            announced = lsn;
        }
    }
    if announced < last {
        committed(store.as_mut(), last);
    }
    assert_eq!(Node::new(vec![store]).messages(pair.id, ALL).2.len(), 1000);
}

fn close_commits(open: Opener<'_>) {
    let pair = Pair::new("ann", "bob");
    let mut store = open(1).remove(0);
    for record in pair.history(10) {
        store.append(&record).unwrap();
    }
    store.close().unwrap();
    let mut events = Vec::new();
    store.poll(&mut events);
    assert_eq!(events, [StoreEvent::Committed(Lsn(11))]);
    assert!(matches!(store.append(&pair.record()), Err(StoreError::Poisoned)));
    let query = Query::User { name: pair.one.clone() };
    let refused = store.load(LoadToken(1), query.clone()).unwrap_err();
    assert_eq!(refused, Refused { error: StoreError::Poisoned, query: Box::new(query) });
    assert!(matches!(store.close(), Err(StoreError::Poisoned)));
    drop(store);
    let mut node = Node::new(open(1));
    assert_eq!(node.messages(pair.id, ALL).1, Seq(10));
    node.close();
}

/// What a range should give, computed the slow way.
fn expected(pair: &Pair, head: u64, range: Range) -> Vec<StoredMessage> {
    let inside = |seq: &u64| *seq > range.after.0 && range.before.is_none_or(|before| *seq < before.0);
    let mut matching: Vec<_> = (1..=head).filter(inside).map(|seq| pair.message(seq)).collect();
    if range.newest {
        matching.reverse();
    }
    let mut bytes = 0;
    let mut messages = Vec::new();
    for message in matching.into_iter().take(usize::from(range.limit)) {
        bytes += message.body.len();
        if bytes > range.bytes_max as usize && !messages.is_empty() {
            break;
        }
        messages.push(message);
    }
    if range.newest {
        messages.reverse();
    }
    messages
}

fn ranges(open: Opener<'_>) {
    const HEAD: u64 = 300;
    let mut node = Node::new(open(1));
    let pair = Pair::new("ann", "bob");
    assert_eq!(node.messages(pair.id, ALL), (Seq(0), Seq(0), Vec::new()));
    node.commit(&pair.history(HEAD));
    let edges = [0, 1, 2, 63, 64, 65, 128, 150, 299, 300, 301, 1000, u64::MAX];
    for after in edges {
        for before in edges.map(|seq| Some(Seq(seq))).into_iter().chain([None]) {
            for (limit, bytes_max) in [(0, 9), (1, 0), (50, u32::MAX), (200, 700), (u16::MAX, u32::MAX)] {
                for newest in [false, true] {
                    let range = Range { after: Seq(after), before, limit, bytes_max, newest };
                    let (first, head, messages) = node.messages(pair.id, range);
                    assert_eq!((first, head), (Seq(1), Seq(HEAD)));
                    assert_eq!(messages, expected(&pair, HEAD, range), "{range:?}");
                }
            }
        }
    }
}

fn heads_and_filters(open: Opener<'_>) {
    let mut node = Node::new(open(1));
    let pair = Pair::new("ann", "bob");
    let (phone, desk) = (DeviceKey::new(&pair.one, DeviceId(1)), DeviceKey::new(&pair.other, DeviceId(2)));
    assert_eq!(node.head(pair.id, phone), Head::default());
    node.commit(&[pair.record()]);
    assert_eq!(node.head(pair.id, phone), Head { exists: true, ..Head::default() });

    let mut answer = pair.message(2);
    (answer.from, answer.to) = (pair.other.clone(), pair.one.clone());
    (answer.device, answer.client_seq) = (DeviceId(2), 77);
    let messages = [pair.message(1), answer.clone(), pair.message(3)];
    node.commit(&messages.clone().map(Record::from));
    let head = Head { exists: true, first: Seq(1), head: Seq(3), filter: Vec::new() };
    let filter = vec![messages[0].accepted(), messages[2].accepted()];
    assert_eq!(node.head(pair.id, phone), Head { filter, ..head.clone() });
    assert_eq!(node.head(pair.id, desk), Head { filter: vec![answer.accepted()], ..head.clone() });
    assert_eq!(node.head(pair.id, DeviceKey(5)), head);
}

fn duplicate_window(open: Opener<'_>) {
    let mut node = Node::new(open(1));
    let pair = Pair::new("ann", "bob");
    let phone = DeviceKey::new(&pair.one, DeviceId(1));
    let mut sent = Vec::new();
    for round in 0..6 {
        // Client_seqs rise, with gaps, and now and then one comes late.
        for step in 1..=50 {
            let seq = round * 50 + step;
            let mut message = pair.message(seq);
            message.client_seq = if seq % 10 == 0 { seq * 3 - 7 } else { seq * 3 };
            sent.push(message);
        }
        let new: Vec<_> = sent.iter().skip(round as usize * 50).cloned().map(Record::from).collect();
        node.commit(&new);
        let mut filter: Vec<_> = sent.iter().map(StoredMessage::accepted).collect();
        filter.sort_by_key(|accepted| accepted.client_seq);
        let filter = filter.split_off(filter.len().saturating_sub(DUPLICATE_WINDOW));
        assert_eq!(node.head(pair.id, phone).filter, filter);
    }
}

fn users(open: Opener<'_>) {
    let mut node = Node::new(open(2));
    for number in 0..50u64 {
        let user = User {
            name: name(&format!("user with quite a long name {number}")),
            password_hash: (number % 2 == 0).then(|| format!("$argon2id${number}")),
            created_ms: number,
        };
        let query = Query::User { name: user.name.clone() };
        let partition = user.name.partition();
        assert_eq!(node.ask(partition, query.clone()), Answer::User(None));
        node.commit(&[Record::User(user.clone())]);
        assert_eq!(node.ask(partition, query), Answer::User(Some(user)));
    }
}

fn conversation_lists(open: Opener<'_>) {
    let mut node = Node::new(open(4));
    let ann = name("ann");
    let mut pairs: Vec<_> = (0..40).map(|number| Pair::new("ann", &format!("friend {number}"))).collect();
    pairs.push(Pair::new("ann", "ann"));
    let stranger = Pair::new("ann2", "bob");
    node.commit(&stranger.history(2));
    for (number, pair) in (0..).zip(&pairs) {
        node.commit(&pair.history(number % 5));
    }
    let mut wanted: Vec<_> = (0..).zip(&pairs).map(|(number, pair)| pair.row(number % 5, 0)).collect();
    wanted.sort_by_key(|row| row.conversation);
    node.list_becomes(&ann, DeviceId(1), &wanted);
    assert_eq!(node.conversations(&ann, DeviceId(1), 100), wanted);
    assert_eq!(node.conversations(&name("nobody"), DeviceId(1), 100), []);
    let friend = node.conversations(&pairs[3].other, DeviceId(1), 100);
    assert_eq!(friend, [ConversationRow { with: ann, ..pairs[3].row(3, 0) }]);
}

fn cursors(open: Opener<'_>) {
    let mut node = Node::new(open(2));
    let pair = Pair::new("ann", "bob");
    node.commit(&pair.history(9));
    let cursor = |device, seq| {
        let (user, conversation) = (pair.one.clone(), pair.id);
        Record::Cursor { user, device: DeviceId(device), conversation, seq: Seq(seq) }
    };
    node.commit(&[cursor(1, 3), cursor(2, 1), cursor(1, 7), cursor(1, 5)]);
    for (device, acked) in [(1, 7), (2, 1), (3, 0)] {
        node.list_becomes(&pair.one, DeviceId(device), &[pair.row(9, acked)]);
    }
    node.commit(&[cursor(1, 6), cursor(2, 9)]);
    for (device, acked) in [(1, 7), (2, 9)] {
        node.list_becomes(&pair.one, DeviceId(device), &[pair.row(9, acked)]);
    }
}

fn full(open: Opener<'_>) {
    let mut store = open(1).remove(0);
    let pair = Pair::new("ann", "bob");
    let mut seq = 0;
    let last = loop {
        let mut message = pair.message(seq + 1);
        message.body = vec![7; 60_000].into();
        match store.append(&Record::Message(message.into())) {
            Ok(lsn) => seq = lsn.0,
            Err(StoreError::Full) => break Lsn(seq),
            Err(error) => panic!("{error}"),
        }
        assert!(seq < 100_000, "a bound must be met");
    };
    committed(store.as_mut(), last);
    let lsn = store.append(&Record::Message(pair.message(seq + 1).into())).unwrap();
    assert_eq!(lsn, Lsn(last.0 + 1), "a refused record has no number");
    committed(store.as_mut(), lsn);

    let mut asked = 0;
    let name = pair.one.clone();
    while store.load(LoadToken(asked), Query::User { name: name.clone() }).is_ok() {
        asked += 1;
        assert!(asked < 1_000_000, "a bound must be met");
    }
    let answered = answers(store.as_mut(), asked as usize);
    assert!(answered.iter().map(|(token, _)| token.0).eq(0..asked), "each question once, in order");
    let mut node = Node::new(vec![store]);
    assert_eq!(node.messages(pair.id, Range { limit: 2, ..ALL }).1, Seq(seq + 1));
}

fn too_large(open: Opener<'_>) {
    let mut store = open(1).remove(0);
    let pair = Pair::new("ann", "bob");
    let with_body = |seq, bytes| {
        let mut message = pair.message(seq);
        message.body = vec![1; bytes].into();
        Record::Message(message.into())
    };
    assert!(matches!(store.append(&with_body(1, RECORD_BYTES_MAX + 1)), Err(StoreError::TooLarge)));
    let lsn = store.append(&with_body(1, RECORD_BYTES_MAX)).unwrap();
    assert_eq!(lsn, Lsn(1));
    committed(store.as_mut(), lsn);
    let mut node = Node::new(vec![store]);
    assert_eq!(node.messages(pair.id, ALL).2[0].body.len(), RECORD_BYTES_MAX);
}

fn restart(open: Opener<'_>) {
    let pairs: Vec<_> = (0..10).map(|number| Pair::new("ann", &format!("friend {number}"))).collect();
    for round in 1..=3 {
        let mut node = Node::new(open(2));
        for pair in &pairs {
            let history = pair.history(round * 70);
            let new = if round == 1 { &history[..] } else { &history[1 + (round as usize - 1) * 70..] };
            node.commit(new);
            let device = DeviceId(1);
            let (user, conversation, seq) = (pair.one.clone(), pair.id, Seq(round * 60));
            node.commit(&[Record::Cursor { user, device, conversation, seq }]);
        }
        node.close();
        let mut node = Node::new(open(2));
        check(&mut node, &pairs, round * 70);
        let mut wanted: Vec<_> = pairs.iter().map(|pair| pair.row(round * 70, round * 60)).collect();
        wanted.sort_by_key(|row| row.conversation);
        assert_eq!(node.conversations(&name("ann"), DeviceId(1), 4), wanted, "after a start nothing is late");
        node.close();
    }
}

/// Every conversation has its messages up to `head`, and the filter that goes with them.
pub fn check(node: &mut Node, pairs: &[Pair], head: u64) {
    for pair in pairs {
        let (first, found, messages) = node.messages(pair.id, ALL);
        assert_eq!((first, found), (Seq(1), Seq(head)));
        assert_eq!(messages, expected(pair, head, ALL));
        let filter = node.head(pair.id, DeviceKey::new(&pair.one, DeviceId(1))).filter;
        let window = messages.len().saturating_sub(DUPLICATE_WINDOW);
        assert!(filter.iter().eq(messages[window..].iter().map(StoredMessage::accepted).collect::<Vec<_>>().iter()));
    }
}

fn other_shard_numbers(open: Opener<'_>) {
    let pairs: Vec<_> = (0..20).map(|number| Pair::new(&format!("ann {number}"), "bob")).collect();
    let mut head = 0;
    for shards in [1, 4, 2, 3] {
        let mut node = Node::new(open(shards));
        for pair in &pairs {
            let history = pair.history(head + 33);
            let new = if head == 0 { &history[..] } else { &history[1 + head as usize..] };
            node.commit(new);
        }
        head += 33;
        check(&mut node, &pairs, head);
        node.close();
    }
    let mut node = Node::new(open(1));
    check(&mut node, &pairs, head);
    assert_eq!(node.conversations(&name("bob"), DeviceId(1), 6).len(), pairs.len());
    node.close();
}
