-- Version 3: clusters. A node has its number for ever, by its name.

CREATE TABLE ringline.nodes (
    number smallint PRIMARY KEY CHECK (number BETWEEN 0 AND 63),
    name text COLLATE "C" NOT NULL UNIQUE,
    since timestamptz NOT NULL DEFAULT now()
);

-- One row. It rises whenever a partition changes hands or a node starts, in the same transaction.
CREATE TABLE ringline.ownership (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    version bigint NOT NULL
) WITH (fillfactor = 50);

INSERT INTO ringline.ownership (version) VALUES (1);
