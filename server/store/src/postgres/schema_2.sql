-- Version 2: who may write. Every start of a node is an owner of its own.

CREATE TABLE ringline.owners (
    owner bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    node text NOT NULL,
    since timestamptz NOT NULL DEFAULT now()
);

-- The epoch rises whenever a partition changes hands.
CREATE TABLE ringline.partitions (
    partition smallint PRIMARY KEY,
    epoch bigint NOT NULL,
    owner bigint NOT NULL
) WITH (fillfactor = 50);

INSERT INTO ringline.partitions SELECT number, 0, 0 FROM generate_series(0, 1023) AS number;

-- One a shard of an owner. The epoch rises with every connection, so what an older one left behind writes nothing;
-- commits counts what was committed.
CREATE TABLE ringline.writers (
    owner bigint NOT NULL,
    shard integer NOT NULL,
    epoch bigint NOT NULL,
    commits bigint NOT NULL,
    PRIMARY KEY (owner, shard)
) WITH (fillfactor = 50);
