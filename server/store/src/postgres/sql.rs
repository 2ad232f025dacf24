//! Every statement that a session prepares, in one table. Plain SQL, tables named with their schema.

use futures_util::future::try_join_all;
use ringline_schema::limits::DUPLICATE_WINDOW;
use tokio_postgres::{Client, Error, Statement};

macro_rules! statements {
    ($(#[$about:meta])* $group:ident { $($(#[$doc:meta])* $name:ident = $sql:expr;)* }) => {
        $(#[$about])*
        pub(super) struct $group {
            $($(#[$doc])* pub $name: Statement,)*
        }

        impl $group {
            /// Prepares all of them at once.
            pub async fn prepare(client: &Client) -> Result<Self, Error> {
                let all = try_join_all([$($sql),*].map(|sql| client.prepare(sql))).await?;
                let mut all = all.into_iter();
                $(let $name = match all.next() {
                    Some(statement) => statement,
                    None => client.prepare($sql).await?,
                };)*
                Ok(Self { $($name),* })
            }
        }
    };
}

/// The run of a server, see `Server`.
pub(super) const SERVER: &str = "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::int8";

const HOLD: &str = "SELECT partition, epoch FROM ringline.partitions WHERE partition = ANY($1) AND owner = $2 \
     ORDER BY partition FOR SHARE";

const VALUES: &str = "SELECT key, value FROM ringline.keyed WHERE key = ANY($1) AND value IS NOT NULL";

/// The first words of a session: whatever an older one left behind can't write any more once this is committed.
const BEGIN_SESSION: &str = "UPDATE ringline.writers SET epoch = epoch + 1 WHERE owner = $1 AND shard = $2 \
     RETURNING epoch, commits, (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::int8";

/// Who has what was an owner's: the newest start of the same node, else the newest of all.
pub(super) const TAKEN_BY: &str = "SELECT node, owner FROM ringline.owners WHERE owner > $1 ORDER BY \
     (node = (SELECT node FROM ringline.owners WHERE owner = $1)) DESC NULLS LAST, owner DESC LIMIT 1";

/// What a write takes beside its values: the name of `unnest`'s columns is their order.
const MESSAGES_IN: &str = "unnest($1::uuid[], $2::int8[], $3::int8[], $4::int8[], $5::int8[], $6::int8[], $7::uuid[], \
     $8::int2[], $9::text[], $10::text[], $11::bytea[], $12::bytea[])";

statements! {
    /// Of the connection that writes.
    Writes {
        /// Counts the commit, unless this session is not the newest of its writer, or the count is another.
        count = "UPDATE ringline.writers SET commits = $4::int8, bytes = bytes + $5::int8 \
                 WHERE owner = $1 AND shard = $2 AND epoch = $3 AND commits = $4::int8 - 1";
        /// Holds the partitions that are ours until the end of the transaction, so that nobody takes them over meanwhile.
        hold = HOLD;
        users = "INSERT INTO ringline.users SELECT * FROM unnest($1::text[], $2::text[], $3::int8[]) \
                 ON CONFLICT (name) DO UPDATE SET password_hash = excluded.password_hash, created_ms = excluded.created_ms";
        conversations = "INSERT INTO ringline.conversations (conversation, one, other, created_ms) \
                 SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::int8[]) \
                 ON CONFLICT (conversation) DO UPDATE SET one = excluded.one, other = excluded.other, \
                 created_ms = excluded.created_ms";
        lists = "INSERT INTO ringline.lists SELECT * FROM unnest($1::text[], $2::uuid[]) ON CONFLICT DO NOTHING";
        messages = &format!("INSERT INTO ringline.messages SELECT * FROM {MESSAGES_IN} ON CONFLICT DO NOTHING");
        /// Of messages that are there already, one with other content.
        differing = &format!(
            "SELECT kept.conversation::text, kept.seq FROM {MESSAGES_IN} \
             AS sent (conversation, seq, device, client_seq, time_ms, body_hash, device_key, kind, sender, receiver, body, extra) \
             JOIN ringline.messages AS kept ON kept.conversation = sent.conversation AND kept.seq = sent.seq \
             WHERE (kept.device, kept.client_seq, kept.time_ms, kept.kind, kept.sender, kept.receiver, kept.body, kept.extra) \
             IS DISTINCT FROM \
             (sent.device, sent.client_seq, sent.time_ms, sent.kind, sent.sender, sent.receiver, sent.body, sent.extra) \
             LIMIT 1");
        /// Before the rows that say so are written: an older row than the one that is kept drops nothing.
        dropped = "DELETE FROM ringline.cursors AS gone USING unnest($1::uuid[], $2::bytea[], $3::int8[]) \
                 AS sent (device_key, key, stamp) WHERE gone.device_key = sent.device_key AND NOT EXISTS \
                 (SELECT FROM ringline.keyed AS kept WHERE kept.key = sent.key AND kept.stamp > sent.stamp)";
        cursors = "INSERT INTO ringline.cursors AS kept SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::int8[]) \
                 ON CONFLICT (device_key, conversation) DO UPDATE SET seq = greatest(kept.seq, excluded.seq)";
        keyed = "INSERT INTO ringline.keyed AS kept SELECT * FROM unnest($1::bytea[], $2::int8[], $3::bytea[]) \
                 ON CONFLICT (key) DO UPDATE SET stamp = excluded.stamp, value = excluded.value \
                 WHERE kept.stamp <= excluded.stamp";
        begin_session = BEGIN_SESSION;
        /// Of some partitions, one that is not this owner's, and whose it is.
        lost_to = "SELECT lost.partition, lost.owner, owners.node FROM ringline.partitions AS lost \
                 LEFT JOIN ringline.owners ON owners.owner = lost.owner \
                 WHERE lost.partition = ANY($1) AND lost.owner <> $2 ORDER BY lost.partition LIMIT 1";
    }
}

statements! {
    /// Of the registrar. Whoever takes locks writers, then partitions, each in order, and the version at last: as commits
    /// and starts do.
    Registers {
        begin_session = BEGIN_SESSION;
        count = "UPDATE ringline.writers SET commits = commits + 1 WHERE owner = $1 AND shard = $2 AND epoch = $3";
        version = "SELECT version FROM ringline.ownership";
        partitions = "SELECT partition, epoch, owner FROM ringline.partitions ORDER BY partition";
        starts = "SELECT owners.owner, owners.node, nodes.number, \
                 EXISTS (SELECT FROM ringline.writers WHERE writers.owner = owners.owner) \
                 FROM (SELECT owner FROM ringline.writers UNION SELECT owner FROM ringline.partitions) AS named \
                 JOIN ringline.owners ON owners.owner = named.owner \
                 LEFT JOIN ringline.nodes ON nodes.name = owners.node ORDER BY owners.owner";
        /// Keeps the owners of before from beginning one commit after the other: a lock that waits for a row is never
        /// overtaken at the row of a writer, and may be at that of a partition, which commits share. Registrars do not
        /// wait for each other here.
        stop_writers = "SELECT FROM ringline.writers WHERE shard >= 0 AND owner IN \
                 (SELECT owner FROM ringline.partitions WHERE partition = ANY($1) AND owner <> $2) \
                 ORDER BY owner, shard FOR UPDATE";
        /// Waits for commits that are under way there.
        hold = "SELECT partition, epoch, owner FROM ringline.partitions WHERE partition = ANY($1) \
                 ORDER BY partition FOR UPDATE";
        take = "UPDATE ringline.partitions AS kept SET owner = $3, epoch = kept.epoch + 1 \
                 FROM unnest($1::int2[], $2::int8[]) AS wanted (partition, epoch) \
                 WHERE kept.partition = wanted.partition AND kept.epoch = wanted.epoch AND kept.owner <> $3 \
                 RETURNING kept.partition, kept.epoch";
        release = "UPDATE ringline.partitions SET owner = 0, epoch = epoch + 1 \
                 WHERE partition = ANY($1) AND owner = $2";
    }
}

/// From the first and the last message that there is.
const FIRST: &str = "(SELECT seq FROM ringline.messages WHERE conversation = $1 ORDER BY seq LIMIT 1)";
const LAST: &str = "(SELECT seq FROM ringline.messages WHERE conversation = $1 ORDER BY seq DESC LIMIT 1)";
const ROW_OF_MESSAGE: &str = "seq, device, client_seq, time_ms, kind, sender, receiver, body, extra";

/// A page of messages: at most $4 of them, and of bodies $5 bytes or a little more; the caller counts exactly.
fn page(order: &str) -> String {
    format!(
        "SELECT {ROW_OF_MESSAGE} FROM (SELECT {ROW_OF_MESSAGE}, \
         sum(octet_length(body)) OVER (ORDER BY seq {order} ROWS UNBOUNDED PRECEDING) - octet_length(body) AS before \
         FROM ringline.messages WHERE conversation = $1 AND seq > $2 AND seq < $3 ORDER BY seq {order} LIMIT $4) AS page \
         WHERE before <= $5 ORDER BY seq {order}"
    )
}

statements! {
    /// Of the connection that reads.
    Reads {
        user = "SELECT password_hash, created_ms FROM ringline.users WHERE name = $1";
        /// The head, with the filter of a device in rows beside it: the highest client_seqs first.
        head = &format!(
            "SELECT head.known, head.floor, head.first, head.last, sent.client_seq, sent.seq, sent.time_ms, sent.body_hash \
             FROM (SELECT EXISTS (SELECT FROM ringline.conversations WHERE conversation = $1) AS known, \
             (SELECT floor FROM ringline.conversations WHERE conversation = $1) AS floor, \
             {FIRST} AS first, {LAST} AS last) AS head \
             LEFT JOIN LATERAL (SELECT client_seq, seq, time_ms, body_hash FROM (\
             (SELECT client_seq, seq, time_ms, body_hash FROM ringline.messages \
             WHERE conversation = $1 AND device_key = $2 AND client_seq <> 0 \
             ORDER BY (client_seq < 0) DESC, client_seq DESC LIMIT $3) UNION ALL \
             (SELECT client_seq, seq, time_ms, body_hash FROM ringline.accepted \
             WHERE conversation = $1 AND device_key = $2 \
             ORDER BY (client_seq < 0) DESC, client_seq DESC LIMIT $3)) AS each_of \
             ORDER BY (client_seq < 0) DESC, client_seq DESC LIMIT $3) AS sent ON true");
        /// The ends of a conversation, and one row that is asked for beside it.
        bounds = &format!(
            "SELECT (SELECT floor FROM ringline.conversations WHERE conversation = $1), {FIRST}, {LAST}, \
             (SELECT value FROM ringline.keyed WHERE key = $2)");
        oldest = &page("ASC");
        newest = &page("DESC");
        bodies = "SELECT seq, body FROM ringline.messages WHERE conversation = $1 AND seq = ANY($2)";
        row = "SELECT key, stamp, value FROM ringline.keyed WHERE key = $1 AND value IS NOT NULL";
        values = VALUES;
        /// Rows of a list: those with a key between two.
        rows = "SELECT key, stamp, value FROM ringline.keyed WHERE key > $1 AND key < $2 AND value IS NOT NULL \
                ORDER BY key LIMIT $3";
        cursors = "SELECT conversation, seq FROM ringline.cursors WHERE device_key = $1 AND conversation = ANY($2)";
        /// A page of a user's list with all that is told of each conversation. $5: the name as bytes, $6: what the keys of
        /// the user's marks begin with. The other keys are put together as `RowKey::encode` does.
        conversations = "SELECT list.conversation, kept.one, kept.other, kept.created_ms, kept.floor, kept.gone_ms, \
                 oldest.seq, newest.seq, newest.time_ms, cursors.seq, groups.value, members.value, receipts.value, marks.value \
                 FROM (SELECT conversation FROM ringline.lists WHERE name = $1 AND conversation > $2 \
                 ORDER BY conversation LIMIT $3) AS list \
                 LEFT JOIN ringline.conversations AS kept ON kept.conversation = list.conversation \
                 LEFT JOIN LATERAL (SELECT seq FROM ringline.messages \
                 WHERE conversation = list.conversation ORDER BY seq LIMIT 1) AS oldest ON true \
                 LEFT JOIN LATERAL (SELECT seq, time_ms FROM ringline.messages \
                 WHERE conversation = list.conversation ORDER BY seq DESC LIMIT 1) AS newest ON true \
                 LEFT JOIN ringline.cursors ON cursors.device_key = $4 AND cursors.conversation = list.conversation \
                 LEFT JOIN ringline.keyed AS groups ON groups.key = 'g'::bytea || uuid_send(list.conversation) \
                 LEFT JOIN ringline.keyed AS members ON members.key = 'm'::bytea || uuid_send(list.conversation) || $5::bytea \
                 LEFT JOIN ringline.keyed AS receipts ON receipts.key = 'r'::bytea || uuid_send(list.conversation) || $5::bytea \
                 LEFT JOIN ringline.keyed AS marks ON marks.key = $6::bytea || uuid_send(list.conversation) \
                 ORDER BY list.conversation";
        /// Membership and group of every group on a user's list; $2: the name as bytes.
        groups = "SELECT list.conversation, members.value, groups.value FROM ringline.lists AS list \
                 JOIN ringline.keyed AS members ON members.key = 'm'::bytea || uuid_send(list.conversation) || $2::bytea \
                 JOIN ringline.keyed AS groups ON groups.key = 'g'::bytea || uuid_send(list.conversation) \
                 WHERE list.name = $1 AND members.value IS NOT NULL AND groups.value IS NOT NULL";
    }
}

/// Messages below the floors that are given beside their conversations.
const GOING: &str = "unnest($1::uuid[], $2::int8[]) AS going (conversation, floor) \
     JOIN ringline.messages AS gone ON gone.conversation = going.conversation AND gone.seq < going.floor";

statements! {
    /// Of the retainer.
    Retains {
        begin_session = BEGIN_SESSION;
        count = "UPDATE ringline.writers SET commits = commits + 1, bytes = bytes + $4::int8 \
                 WHERE owner = $1 AND shard = $2 AND epoch = $3";
        hold = HOLD;
        kept_bytes = "SELECT ((SELECT bytes FROM ringline.ownership) \
                 + (SELECT coalesce(sum(bytes), 0) FROM ringline.writers))::int8";
        /// Some conversations that have messages, each with its first and its last: from one to the next by the key, so
        /// the messages in between are not read.
        oldest = "WITH RECURSIVE walk AS ((SELECT conversation, seq, time_ms FROM ringline.messages \
                 WHERE conversation >= $1 AND conversation <= $2 ORDER BY conversation, seq LIMIT 1) \
                 UNION ALL SELECT next.conversation, next.seq, next.time_ms FROM walk CROSS JOIN LATERAL \
                 (SELECT conversation, seq, time_ms FROM ringline.messages \
                 WHERE conversation > walk.conversation AND conversation <= $2 ORDER BY conversation, seq LIMIT 1) AS next) \
                 SELECT walk.conversation, walk.seq, walk.time_ms, (SELECT newest.seq FROM ringline.messages AS newest \
                 WHERE newest.conversation = walk.conversation ORDER BY newest.seq DESC LIMIT 1) FROM walk LIMIT $3";
        /// Of some conversations what may go: below the floor given or older than $3, at most $4 messages and $5 bytes of
        /// each, without a gap.
        beginnings = "SELECT wanted.conversation, max(going.seq), max(going.time_ms), count(*), sum(going.bytes)::int8 \
                 FROM unnest($1::uuid[], $2::int8[]) AS wanted (conversation, floor) CROSS JOIN LATERAL \
                 (SELECT seq, time_ms, bytes FROM (SELECT seq, time_ms, bytes, \
                 bool_and(seq < wanted.floor OR time_ms < $3::int8) OVER up AS goes, sum(bytes) OVER up AS so_far \
                 FROM (SELECT seq, time_ms, octet_length(body) + coalesce(octet_length(extra), 0) + 200 AS bytes \
                 FROM ringline.messages WHERE conversation = wanted.conversation ORDER BY seq LIMIT $4) AS beginning \
                 WINDOW up AS (ORDER BY seq ROWS UNBOUNDED PRECEDING)) AS summed \
                 WHERE goes AND so_far <= $5::int8) AS going GROUP BY wanted.conversation";
        floors = "INSERT INTO ringline.conversations AS kept (conversation, created_ms, floor, gone_ms) \
                 SELECT conversation, 0, floor, gone_ms FROM unnest($1::uuid[], $2::int8[], $3::int8[]) \
                 AS raised (conversation, floor, gone_ms) ON CONFLICT (conversation) DO UPDATE \
                 SET floor = greatest(kept.floor, excluded.floor), gone_ms = excluded.gone_ms";
        keep_accepted = &format!("INSERT INTO ringline.accepted \
                 SELECT gone.conversation, gone.device_key, gone.client_seq, gone.seq, gone.time_ms, gone.body_hash \
                 FROM {GOING} WHERE gone.client_seq <> 0 ON CONFLICT DO NOTHING");
        /// Of the devices that sent what goes, what is below the window.
        drop_accepted = &format!("DELETE FROM ringline.accepted AS old USING \
                 (SELECT DISTINCT gone.conversation, gone.device_key FROM {GOING} WHERE gone.client_seq <> 0) AS sender \
                 WHERE old.conversation = sender.conversation AND old.device_key = sender.device_key \
                 AND (old.client_seq < 0, old.client_seq) < (SELECT kept.client_seq < 0, kept.client_seq \
                 FROM ringline.accepted AS kept WHERE kept.conversation = sender.conversation \
                 AND kept.device_key = sender.device_key \
                 ORDER BY (kept.client_seq < 0) DESC, kept.client_seq DESC OFFSET {} LIMIT 1)", DUPLICATE_WINDOW - 1);
        messages = "DELETE FROM ringline.messages AS gone USING unnest($1::uuid[], $2::int8[]) \
                 AS going (conversation, floor) WHERE gone.conversation = going.conversation AND gone.seq < going.floor";
        rows = "SELECT key, stamp FROM ringline.keyed WHERE key > $1 AND key < $2 AND value IS NOT NULL ORDER BY key LIMIT $3";
        values = VALUES;
        firsts = "SELECT wanted.conversation, coalesce((SELECT seq FROM ringline.messages AS kept \
                 WHERE kept.conversation = wanted.conversation ORDER BY seq LIMIT 1), (SELECT floor \
                 FROM ringline.conversations AS kept WHERE kept.conversation = wanted.conversation)) \
                 FROM unnest($1::uuid[]) AS wanted (conversation)";
        /// Unless they have changed since they were seen.
        drop_rows = "DELETE FROM ringline.keyed AS gone USING unnest($1::bytea[], $2::int8[]) AS seen (key, stamp) \
                 WHERE gone.key = seen.key AND gone.stamp = seen.stamp";
    }
}
