-- What a store consists of. {name} stands for a table, a sequence or a function of that name with the prefix, in the schema.
-- Every statement can be run again.

-- One row: which version of these tables it is, and which of the record's partitions is written to: `generation` modulo 8.
CREATE TABLE IF NOT EXISTS {store} (
    id         smallint PRIMARY KEY DEFAULT 0 CHECK (id = 0),
    version    integer NOT NULL,
    generation bigint NOT NULL DEFAULT 0
);

-- Claims that are held or have expired: small and hot, one row per message in progress.
CREATE TABLE IF NOT EXISTS {claim} (
    key         uuid PRIMARY KEY,
    fingerprint uuid NOT NULL,
    owner       bigint NOT NULL,
    token       bigint NOT NULL,
    until       timestamptz NOT NULL,
    started     bigint NOT NULL,  -- the token of the last claim that was marked as started, or 0
    starts      integer NOT NULL, -- how many were
    takeovers   integer NOT NULL  -- how many claims before it have expired
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0);

-- Tokens, and what tells that the server has lost some: commits of claims are not waited for, so a crash or a failover can take back
-- the highest tokens that were given. It also empties this table, which is not logged, and then the sequence jumps ahead. So does
-- the restore of a backup, in which the row may be: of a copy of the files it tells an earlier start of the server, of a dump another
-- transaction than the one that wrote it.
CREATE SEQUENCE IF NOT EXISTS {token};
CREATE UNLOGGED TABLE IF NOT EXISTS {epoch} (
    id             smallint PRIMARY KEY DEFAULT 0 CHECK (id = 0),
    server_started timestamptz NOT NULL,
    written_by     xid NOT NULL
);

-- What took effect. A partition is written to for a third of the retention, and emptied as a whole when the last of its records
-- has expired, so that nothing has to be deleted or vacuumed. A vacuum that only inserts call for is not done: it would be in the way
-- of emptying the partition.
CREATE TABLE IF NOT EXISTS {record} (
    key         uuid NOT NULL,
    fingerprint uuid NOT NULL,
    expires     timestamptz NOT NULL,
    slot        smallint NOT NULL,
    outcome     bytea
) PARTITION BY LIST (slot);

CREATE TABLE IF NOT EXISTS {slot} (
    id        smallint PRIMARY KEY,
    opened_at timestamptz,                -- null: it is empty
    closed_at timestamptz,                -- null: it is empty, or written to
    retention bigint NOT NULL DEFAULT 0   -- the longest among its records, in milliseconds
);

CREATE TABLE IF NOT EXISTS {record_0} PARTITION OF {record} (PRIMARY KEY (key)) FOR VALUES IN (0)
    WITH (autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE IF NOT EXISTS {record_1} PARTITION OF {record} (PRIMARY KEY (key)) FOR VALUES IN (1)
    WITH (autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE IF NOT EXISTS {record_2} PARTITION OF {record} (PRIMARY KEY (key)) FOR VALUES IN (2)
    WITH (autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE IF NOT EXISTS {record_3} PARTITION OF {record} (PRIMARY KEY (key)) FOR VALUES IN (3)
    WITH (autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE IF NOT EXISTS {record_4} PARTITION OF {record} (PRIMARY KEY (key)) FOR VALUES IN (4)
    WITH (autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE IF NOT EXISTS {record_5} PARTITION OF {record} (PRIMARY KEY (key)) FOR VALUES IN (5)
    WITH (autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE IF NOT EXISTS {record_6} PARTITION OF {record} (PRIMARY KEY (key)) FOR VALUES IN (6)
    WITH (autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_insert_threshold = -1);
CREATE TABLE IF NOT EXISTS {record_7} PARTITION OF {record} (PRIMARY KEY (key)) FOR VALUES IN (7)
    WITH (autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_insert_threshold = -1);

-- A row in it forbids to commit without records: see `share`. It is gone when it is written.
CREATE UNLOGGED TABLE IF NOT EXISTS {shared} (
    transaction text NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

INSERT INTO {store} (version) VALUES ({version}) ON CONFLICT DO NOTHING;
INSERT INTO {slot} (id, opened_at) SELECT n, CASE n WHEN 0 THEN clock_timestamp() END FROM generate_series(0, 7) AS n
    ON CONFLICT DO NOTHING;
