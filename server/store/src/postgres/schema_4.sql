-- Version 4: retention. Bytes of messages: body, what is kept beside it, and 200 for the rest of the row. Each writer
-- counts its own in the row that a commit writes anyway (a retainer's are below 0); those of writers that are gone are
-- in the row of ownership.

SET LOCAL statement_timeout = 0;

ALTER TABLE ringline.writers ADD COLUMN bytes bigint NOT NULL DEFAULT 0;
ALTER TABLE ringline.ownership ADD COLUMN bytes bigint NOT NULL DEFAULT 0;

UPDATE ringline.ownership SET bytes =
    (SELECT coalesce(sum(octet_length(body) + coalesce(octet_length(extra), 0) + 200), 0) FROM ringline.messages);

-- Of messages that went, what the duplicate filter has to know: the highest client_seqs of a device in a conversation.
CREATE TABLE ringline.accepted (
    conversation uuid NOT NULL,
    device_key uuid NOT NULL,
    client_seq bigint NOT NULL,
    seq bigint NOT NULL,
    time_ms bigint NOT NULL,
    body_hash bigint NOT NULL
);

CREATE UNIQUE INDEX accepted_newest ON ringline.accepted (conversation, device_key, (client_seq < 0), client_seq);
