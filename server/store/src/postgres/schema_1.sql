-- Version 1: what a store keeps. A conversation or a device key is a uuid: sixteen bytes, compared as such.
-- Numbers of 64 bits are stored bit by bit: what is negative here is above 2^63 there.

CREATE TABLE ringline.users (
    name text COLLATE "C" PRIMARY KEY,
    password_hash text,
    created_ms bigint NOT NULL
);

-- A direct conversation has its two members. Below its floor nothing is kept; gone_ms is the time of the last message
-- that went.
CREATE TABLE ringline.conversations (
    conversation uuid PRIMARY KEY,
    one text COLLATE "C",
    other text COLLATE "C",
    created_ms bigint NOT NULL,
    floor bigint NOT NULL DEFAULT 0,
    gone_ms bigint NOT NULL DEFAULT 0
);

CREATE TABLE ringline.messages (
    conversation uuid NOT NULL,
    seq bigint NOT NULL,
    device bigint NOT NULL,
    client_seq bigint NOT NULL,
    time_ms bigint NOT NULL,
    body_hash bigint NOT NULL,
    device_key uuid NOT NULL,
    kind smallint NOT NULL,
    sender text COLLATE "C" NOT NULL,
    receiver text COLLATE "C" NOT NULL,
    body bytea NOT NULL,
    extra bytea,
    PRIMARY KEY (conversation, seq)
);

-- The duplicate filter is read from here: the highest client_seqs of a device in a conversation.
CREATE INDEX messages_accepted ON ringline.messages (conversation, device_key, (client_seq < 0), client_seq)
    WHERE client_seq <> 0;

-- Which conversations a user has.
CREATE TABLE ringline.lists (
    name text COLLATE "C" NOT NULL,
    conversation uuid NOT NULL,
    PRIMARY KEY (name, conversation)
);

CREATE TABLE ringline.cursors (
    device_key uuid NOT NULL,
    conversation uuid NOT NULL,
    seq bigint NOT NULL,
    PRIMARY KEY (device_key, conversation)
) WITH (fillfactor = 80);

-- Everything else, by the bytes of its key. No value: the key is gone, and its stamp remembers since when.
CREATE TABLE ringline.keyed (
    key bytea PRIMARY KEY,
    stamp bigint NOT NULL,
    value bytea
) WITH (fillfactor = 80);
