-- `token`: the highest number given so far, as a fencing token or a message's id.
-- `rewrites`: how often records were sealed or pruned.
CREATE TABLE IF NOT EXISTS onlyonce_meta (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID, STRICT;

-- How much time was seen to pass since the file was made, in milliseconds, as all times here are but `published_at`; and
-- when that was so, by the uptime of which boot. One row.
CREATE TABLE IF NOT EXISTS onlyonce_time (
    time   INTEGER NOT NULL,
    uptime INTEGER NOT NULL,
    boot   INTEGER NOT NULL
) STRICT;

-- Claims that are held or have expired: small and hot, one row per message in progress.
CREATE TABLE IF NOT EXISTS onlyonce_claim (
    key         BLOB PRIMARY KEY,
    fingerprint BLOB NOT NULL,
    owner       INTEGER NOT NULL,
    token       INTEGER NOT NULL,
    until       INTEGER NOT NULL,
    started     INTEGER NOT NULL, -- the token of the last claim that was marked as started, or 0
    starts      INTEGER NOT NULL, -- how many were
    takeovers   INTEGER NOT NULL  -- how many claims before it have expired
) WITHOUT ROWID, STRICT;

-- What took effect, in the order in which it did.
CREATE TABLE IF NOT EXISTS onlyonce_recent (
    id          INTEGER PRIMARY KEY,
    key         BLOB NOT NULL,
    fingerprint BLOB NOT NULL,
    outcome     BLOB,
    expires     INTEGER NOT NULL
) STRICT;

-- What took effect before that, sorted by key within each segment.
CREATE TABLE IF NOT EXISTS onlyonce_done (
    segment     INTEGER NOT NULL,
    key         BLOB NOT NULL,
    fingerprint BLOB NOT NULL,
    outcome     BLOB,
    expires     INTEGER NOT NULL,
    PRIMARY KEY (segment, key)
) WITHOUT ROWID, STRICT;

CREATE TABLE IF NOT EXISTS onlyonce_segment (
    id      INTEGER PRIMARY KEY,
    expires INTEGER NOT NULL, -- the last of its records
    filter  BLOB NOT NULL     -- which keys may be in it
) STRICT;

CREATE TABLE IF NOT EXISTS onlyonce_queue (
    id       INTEGER PRIMARY KEY,
    name     TEXT NOT NULL UNIQUE,
    identity TEXT NOT NULL            -- random, so that a queue of this name in another file is another
) STRICT;

-- Where each queued message stands. Apart from the bodies, so that a lease does not rewrite a large row.
CREATE TABLE IF NOT EXISTS onlyonce_message (
    id           INTEGER PRIMARY KEY AUTOINCREMENT, -- in the order of publication; never given again
    queue        INTEGER NOT NULL,
    grp          TEXT,
    head         INTEGER NOT NULL,    -- 1: has no group, or is the first of its group
    free_at      INTEGER NOT NULL,    -- leased or delayed until then
    lease        INTEGER NOT NULL,    -- token of the last lease; 0 once given back
    attempts     INTEGER NOT NULL,
    published_at INTEGER NOT NULL,    -- milliseconds since 1970, for people
    queued_at    INTEGER NOT NULL,
    reason       TEXT                 -- why it was dead-lettered
) STRICT;

-- Whatever may be received next, first those that wait longest.
CREATE INDEX IF NOT EXISTS onlyonce_message_ready ON onlyonce_message (queue, free_at, id) WHERE head = 1;

-- Who follows within a group.
CREATE INDEX IF NOT EXISTS onlyonce_message_group ON onlyonce_message (queue, grp, id) WHERE grp IS NOT NULL;

CREATE TABLE IF NOT EXISTS onlyonce_body (
    id         INTEGER PRIMARY KEY,
    dedup_id   TEXT,
    attributes TEXT,                  -- a JSON object of strings, or NULL
    body       BLOB NOT NULL
) STRICT;

-- What is to be published. The first columns but one are named as Debezium's outbox event router expects them.
CREATE TABLE IF NOT EXISTS onlyonce_outbox (
    seq           INTEGER PRIMARY KEY,          -- in the order in which it was written
    id            TEXT NOT NULL UNIQUE,         -- a UUID
    aggregatetype TEXT NOT NULL,                -- the destination
    aggregateid   TEXT,                         -- the group
    type          TEXT NOT NULL,                -- the attribute `type`, or nothing
    payload       BLOB NOT NULL,
    dedup_id      TEXT,
    attributes    TEXT,                         -- a JSON object of strings, or NULL
    attempts      INTEGER NOT NULL DEFAULT 0,
    ready_at      INTEGER NOT NULL DEFAULT 0,   -- delayed until then; 0 as long as nothing has failed
    set_aside     INTEGER NOT NULL DEFAULT 0,   -- 1: nobody tries again
    reason        TEXT                          -- why it failed last, or was set aside
) STRICT;

-- What comes next.
CREATE INDEX IF NOT EXISTS onlyonce_outbox_next ON onlyonce_outbox (aggregatetype, seq, aggregateid, ready_at)
    WHERE set_aside = 0;

-- Behind what a group may have to wait.
CREATE INDEX IF NOT EXISTS onlyonce_outbox_held ON onlyonce_outbox (aggregatetype, aggregateid, seq, ready_at, set_aside)
    WHERE ready_at > 0;

-- What is delayed, and what was set aside.
CREATE INDEX IF NOT EXISTS onlyonce_outbox_delayed ON onlyonce_outbox (aggregatetype, set_aside, ready_at)
    WHERE ready_at > 0;

-- Which relay publishes to a destination.
CREATE TABLE IF NOT EXISTS onlyonce_relay (
    destination TEXT PRIMARY KEY,
    owner       INTEGER NOT NULL,
    until       INTEGER NOT NULL
) WITHOUT ROWID, STRICT;
