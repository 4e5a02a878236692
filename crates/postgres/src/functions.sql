-- What is done to the tables of schema.sql: each call is one round trip for a whole batch. Rows are locked in the order of
-- their keys, claims before records, so that two calls on the same keys do not wait for each other in a circle.
--
-- All are in plpgsql, which keeps its plans. Each statement sees what was committed before it began, if the transaction is READ
-- COMMITTED. The planner is told to use the indexes: it makes its plans while the tables are still empty.

-- The server may have lost tokens that were given: tokens go on above them. The caller waits until this is on disk.
CREATE OR REPLACE FUNCTION {begin_epoch}() RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock({lock}, 2);
    IF NOT EXISTS (SELECT FROM {epoch} WHERE written_by = xmin AND server_started = pg_postmaster_start_time()) THEN
        -- Hundredths of seconds since 1970, so that tokens rise over the restore of a backup, too.
        PERFORM setval('{token}',
            greatest((SELECT last_value >> 24 FROM {token}) + 1, floor(extract(epoch FROM clock_timestamp()) * 100)::bigint) << 24);
        DELETE FROM {epoch};
        INSERT INTO {epoch} (server_started, written_by) VALUES (pg_postmaster_start_time(), pg_current_xact_id()::xid);
    END IF;
END $$;

-- Claims each key. Claims first, records then: whoever waited for a claim's row sees the record that its owner has made.
CREATE OR REPLACE FUNCTION {claim_keys}(_keys uuid[], _fingerprints uuid[], _owner bigint, _lease bigint)
RETURNS TABLE (answer text, token bigint, started bigint, starts integer, takeovers integer, retry_in bigint, outcome text)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    _now timestamptz := clock_timestamp();
    _until timestamptz := _now + _lease * interval '1 millisecond';
    _made uuid[]; _tokens bigint[]; _started bigint[]; _starts integer[]; _takeovers integer[];
    _done uuid[]; _fingerprints_done uuid[]; _outcomes text[];
    _before bigint; _used bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM {epoch} WHERE written_by = xmin AND server_started = pg_postmaster_start_time()) THEN
        RAISE EXCEPTION 'tokens may have been lost' USING ERRCODE = 'OO002';
    END IF;
    _before := nextval('{token}');
    WITH entry AS (
        SELECT DISTINCT ON (key) key, fingerprint
        FROM unnest(_keys, _fingerprints) WITH ORDINALITY AS e (key, fingerprint, place) ORDER BY key, place
    ), made AS (
        INSERT INTO {claim} AS c (key, fingerprint, owner, token, until, started, starts, takeovers)
        SELECT key, fingerprint, _owner, nextval('{token}'), _until, 0, 0, 0 FROM entry
        ON CONFLICT (key) DO UPDATE SET
            fingerprint = excluded.fingerprint, owner = excluded.owner, token = excluded.token, until = excluded.until,
            takeovers = c.takeovers + (c.until <= _now)::integer
        -- What expired without having been started has had no effect, so its payload does not bind the key.
        WHERE (c.owner = excluded.owner OR c.until <= _now)
            AND (c.fingerprint = excluded.fingerprint OR (c.until <= _now AND c.starts = 0))
        RETURNING c.key, c.token, c.started, c.starts, c.takeovers
    )
    SELECT array_agg(key), array_agg(token), array_agg(started), array_agg(starts), array_agg(takeovers), (SELECT count(*) FROM entry)
    INTO _made, _tokens, _started, _starts, _takeovers, _used FROM made;
    IF _made IS NOT NULL AND (SELECT last_value FROM {token}) > _before + _used THEN
        -- Somebody else was given tokens meanwhile: for a key that this waited for, perhaps, and then a higher one.
        WITH made AS (
            UPDATE {claim} SET token = nextval('{token}') WHERE key = ANY (_made) RETURNING key, token, started, starts, takeovers
        )
        SELECT array_agg(key), array_agg(token), array_agg(started), array_agg(starts), array_agg(takeovers)
        INTO _made, _tokens, _started, _starts, _takeovers FROM made;
    END IF;

    SELECT array_agg(key), array_agg(fingerprint), array_agg(encode(outcome, 'hex'))
    INTO _done, _fingerprints_done, _outcomes FROM {record} WHERE key = ANY (_keys) AND expires > _now;
    IF _done IS NOT NULL THEN
        -- This one, and what is left of somebody who was too late.
        DELETE FROM {claim} WHERE key = ANY (_done);
    END IF;

    RETURN QUERY
    SELECT
        CASE
            WHEN d.key IS NOT NULL THEN CASE WHEN d.fingerprint = e.fingerprint THEN 'completed' ELSE 'mismatch' END
            WHEN m.key IS NOT NULL AND e.nth = 1 THEN 'acquired'
            WHEN c.fingerprint <> e.fingerprint AND (c.until > _now OR c.starts > 0) THEN 'mismatch'
            ELSE 'busy'
        END,
        m.token, m.started, m.starts, m.takeovers,
        greatest(ceil(extract(epoch FROM c.until - _now) * 1000), 0)::bigint,
        d.outcome
    FROM (
        SELECT u.*, row_number() OVER (PARTITION BY u.key ORDER BY u.place) AS nth
        FROM unnest(_keys, _fingerprints) WITH ORDINALITY AS u (key, fingerprint, place)
    ) AS e
    LEFT JOIN unnest(_made, _tokens, _started, _starts, _takeovers) AS m (key, token, started, starts, takeovers) ON m.key = e.key
    LEFT JOIN unnest(_done, _fingerprints_done, _outcomes) AS d (key, fingerprint, outcome) ON d.key = e.key
    LEFT JOIN {claim} AS c ON c.key = e.key
    ORDER BY e.place;
END $$;

-- Which of these claims are held: they last for as long again.
CREATE OR REPLACE FUNCTION {renew}(_keys uuid[], _tokens bigint[], _lease bigint)
RETURNS TABLE (key uuid, token bigint) LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH held AS (
        SELECT c.key, c.token FROM {claim} AS c JOIN unnest(_keys, _tokens) AS e (key, token) ON c.key = e.key AND c.token = e.token
        ORDER BY c.key FOR UPDATE OF c
    )
    UPDATE {claim} AS c SET until = clock_timestamp() + _lease * interval '1 millisecond'
    FROM held WHERE c.key = held.key AND c.token = held.token
    RETURNING c.key, c.token;
END $$;

-- Which of these claims are held: they are marked as started.
CREATE OR REPLACE FUNCTION {start}(_keys uuid[], _tokens bigint[])
RETURNS TABLE (key uuid, token bigint) LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH held AS (
        SELECT c.key, c.token FROM {claim} AS c JOIN unnest(_keys, _tokens) AS e (key, token) ON c.key = e.key AND c.token = e.token
        ORDER BY c.key FOR UPDATE OF c
    )
    UPDATE {claim} AS c SET started = c.token, starts = c.starts + (c.started <> c.token)::integer
    FROM held WHERE c.key = held.key AND c.token = held.token
    RETURNING c.key, c.token;
END $$;

-- Which of these claims were held: they are gone.
CREATE OR REPLACE FUNCTION {release}(_keys uuid[], _tokens bigint[])
RETURNS TABLE (key uuid, token bigint) LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH held AS (
        SELECT c.key, c.token FROM {claim} AS c JOIN unnest(_keys, _tokens) AS e (key, token) ON c.key = e.key AND c.token = e.token
        ORDER BY c.key FOR UPDATE OF c
    )
    DELETE FROM {claim} AS c USING held WHERE c.key = held.key AND c.token = held.token
    RETURNING c.key, c.token;
END $$;

-- Looks keys up. The generation says which partition new records went to when this was so: it is seen together with all that is in
-- the ones before.
CREATE OR REPLACE FUNCTION {look_up}(_keys uuid[], _fingerprints uuid[])
RETURNS TABLE (answer text, outcome text, generation bigint, at bigint) LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT
        CASE
            WHEN r.key IS NOT NULL THEN CASE WHEN r.fingerprint = e.fingerprint THEN 'completed' ELSE 'mismatch' END
            WHEN EXISTS (SELECT FROM {claim} AS c WHERE c.key = e.key) THEN 'claimed'
            ELSE 'new'
        END,
        encode(r.outcome, 'hex'), s.generation, floor(extract(epoch FROM now()) * 1000)::bigint
    FROM unnest(_keys, _fingerprints) WITH ORDINALITY AS e (key, fingerprint, place)
    CROSS JOIN {store} AS s
    LEFT JOIN {record} AS r ON r.key = e.key AND r.expires > now()
    ORDER BY e.place;
END $$;

-- Records what took effect, and ends the claims. An entry has the token of its claim, or else the generation of its look-up and
-- when that ends to count. Answers for each entry; within a handler's transaction it is all of them, or an error.
--
-- A key is unique among the records, although they are in several partitions: all new ones go to one, which has a unique index.
-- Whoever writes has the lock in common until its transaction ends, and the partition is changed under the lock alone, so all that
-- was written to the one before has been committed by then. It is looked at if it was not when the key was looked up.
CREATE OR REPLACE FUNCTION {complete}(
    _keys uuid[], _tokens bigint[], _generations bigint[], _ends bigint[],
    _fingerprints uuid[], _outcomes text[], _retentions bigint[], _transaction text
) RETURNS boolean[] LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    _now timestamptz := clock_timestamp();
    _generation bigint;
    _retention bigint;
    _longest bigint := (SELECT max(ms) FROM unnest(_retentions) AS ms);
    _claimed uuid[]; _claimed_tokens bigint[];
    _recorded uuid[];
    _places bigint[];
    _written uuid[];
BEGIN
    -- Set within the transaction, so it is gone if the handler has ended that.
    IF _transaction <> coalesce(current_setting('onlyonce.transaction', true), '') THEN
        RAISE EXCEPTION 'not the same transaction' USING ERRCODE = 'OO003';
    END IF;
    PERFORM pg_advisory_xact_lock_shared({lock}, 1);
    IF current_setting('transaction_isolation') = 'read committed' THEN
        SELECT s.generation, p.retention INTO _generation, _retention
        FROM {store} AS s JOIN {slot} AS p ON p.id = s.generation % 8;
    ELSE
        -- The transaction's snapshot may be older than the partition: then this fails, and all of it is done again.
        SELECT s.generation, p.retention INTO _generation, _retention
        FROM {store} AS s JOIN {slot} AS p ON p.id = s.generation % 8 FOR SHARE OF s;
    END IF;
    IF _retention < _longest THEN
        UPDATE {slot} SET retention = greatest(retention, _longest) WHERE id = _generation % 8;
    END IF;

    SELECT array_agg(key), array_agg(token) INTO _claimed, _claimed_tokens
    FROM (SELECT key, token FROM {claim} WHERE key = ANY (_keys) ORDER BY key FOR UPDATE) AS c;
    IF EXISTS (SELECT FROM unnest(_generations) AS g WHERE g IS DISTINCT FROM _generation) THEN
        SELECT array_agg(key) INTO _recorded FROM {record} WHERE key = ANY (_keys) AND expires > _now;
    END IF;

    WITH entry AS (
        SELECT e.*
        FROM unnest(_keys, _tokens, _ends) WITH ORDINALITY AS e (key, token, ends, place)
        LEFT JOIN unnest(_claimed, _claimed_tokens) AS c (key, token) ON c.key = e.key
        WHERE (e.token = c.token OR (e.token IS NULL AND e.ends > extract(epoch FROM _now) * 1000))
            AND (_recorded IS NULL OR e.key <> ALL (_recorded))
    )
    SELECT array_agg(place) INTO _places FROM (SELECT min(place) AS place FROM entry GROUP BY key) AS f;

    WITH written AS (
        INSERT INTO {record} (key, fingerprint, expires, slot, outcome)
        SELECT _keys[place], _fingerprints[place], _now + _retentions[place] * interval '1 millisecond', _generation % 8,
            decode(_outcomes[place], 'hex')
        FROM unnest(_places) AS p (place) ORDER BY _keys[place]
        ON CONFLICT DO NOTHING
        RETURNING key
    )
    SELECT array_agg(key) INTO _written FROM written;
    IF cardinality(_written) IS DISTINCT FROM cardinality(_places) THEN
        -- One that has expired is still there, if others of its partition are kept for longer.
        WITH written AS (
            UPDATE {record} AS r
            SET fingerprint = _fingerprints[place], expires = _now + _retentions[place] * interval '1 millisecond',
                outcome = decode(_outcomes[place], 'hex')
            FROM unnest(_places) AS p (place)
            WHERE r.key = _keys[place] AND r.slot = _generation % 8 AND r.expires <= _now
            RETURNING key
        )
        SELECT _written || array_agg(key) INTO _written FROM written;
    END IF;

    IF _transaction IS NOT NULL AND coalesce(cardinality(_written), 0) < cardinality(_keys) THEN
        RAISE EXCEPTION 'fenced' USING ERRCODE = 'OO001';
    END IF;
    IF _claimed IS NOT NULL THEN
        DELETE FROM {claim} AS c USING unnest(_places) AS p (place) WHERE c.key = _keys[p.place];
    END IF;
    RETURN (
        SELECT array_agg(coalesce(e.place = ANY (_places) AND e.key = ANY (_written), false) ORDER BY e.place)
        FROM unnest(_keys) WITH ORDINALITY AS e (key, place)
    );
END $$;

-- What several handlers wrote in one transaction is recorded when the last of them is done. Should one of them commit by its own SQL,
-- the others would take effect without their records: so this makes every commit fail that does not come with the records.
CREATE OR REPLACE FUNCTION {share}(_transaction text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    _row tid;
BEGIN
    IF _transaction <> coalesce(current_setting('onlyonce.transaction', true), '') THEN
        RAISE EXCEPTION 'not the same transaction' USING ERRCODE = 'OO003';
    END IF;
    INSERT INTO {shared} (transaction) VALUES (_transaction) RETURNING ctid INTO _row;
    DELETE FROM {shared} WHERE ctid = _row;
END $$;

CREATE OR REPLACE FUNCTION {refuse_unrecorded}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(current_setting('onlyonce.recorded', true), '') <> 'yes' THEN
        RAISE EXCEPTION 'this transaction is ended by onlyonce, not by a handler' USING ERRCODE = 'OO003';
    END IF;
    RETURN NULL;
END $$;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = '{shared}'::regclass AND NOT tgisinternal) THEN
        CREATE CONSTRAINT TRIGGER refuse_unrecorded AFTER INSERT ON {shared} DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION {refuse_unrecorded}();
    END IF;
END $$;

-- Empties partitions whose records have all expired. It does not wait for those who read them: another time will do.
CREATE OR REPLACE FUNCTION {empty_expired}() RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET lock_timeout = '20ms' AS $$
DECLARE
    _id smallint;
BEGIN
    FOR _id IN
        SELECT id FROM {slot} WHERE closed_at + retention * interval '1 millisecond' <= clock_timestamp() FOR UPDATE SKIP LOCKED
    LOOP
        EXECUTE format('TRUNCATE %s', ('{record}_' || _id)::regclass);
        UPDATE {slot} SET opened_at = NULL, closed_at = NULL, retention = 0 WHERE id = _id;
    END LOOP;
EXCEPTION WHEN lock_not_available THEN
    RETURN;
END $$;

-- Goes on to the next partition, if the present one has had its third of the retention and the next is empty.
CREATE OR REPLACE FUNCTION {change_slot}() RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET lock_timeout = '20ms' AS $$
DECLARE
    _generation bigint;
BEGIN
    SELECT s.generation INTO _generation
    FROM {store} AS s JOIN {slot} AS p ON p.id = s.generation % 8 JOIN {slot} AS n ON n.id = (s.generation + 1) % 8
    WHERE n.opened_at IS NULL AND p.retention > 0 AND p.opened_at + p.retention / 3 * interval '1 millisecond' <= clock_timestamp();
    IF _generation IS NULL THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock({lock}, 1);
    UPDATE {store} SET generation = _generation + 1 WHERE generation = _generation;
    IF FOUND THEN
        UPDATE {slot} SET closed_at = clock_timestamp() WHERE id = _generation % 8;
        UPDATE {slot} SET opened_at = clock_timestamp(), retention = (SELECT retention FROM {slot} WHERE id = _generation % 8)
        WHERE id = (_generation + 1) % 8;
    END IF;
EXCEPTION WHEN lock_not_available THEN
    RETURN;
END $$;

-- As `complete` within a handler's transaction, for what was looked up in one generation, none of it before `_ends`: nearly always the partition is
-- still the same and nobody has claimed a key, and then this is one insert.
CREATE OR REPLACE FUNCTION {complete_looked_up}(
    _keys uuid[], _generation bigint, _ends bigint, _fingerprints uuid[], _outcomes text[], _retentions bigint[], _longest bigint, _transaction text
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _slot smallint := _generation % 8;
    _all integer := cardinality(_keys);
    _written bigint;
    _updated bigint;
BEGIN
    IF _transaction <> coalesce(current_setting('onlyonce.transaction', true), '') THEN
        RAISE EXCEPTION 'not the same transaction' USING ERRCODE = 'OO003';
    END IF;
    PERFORM pg_advisory_xact_lock_shared({lock}, 1);
    PERFORM FROM {store} AS s, {slot} AS p WHERE s.generation = _generation AND p.id = _slot AND p.retention >= _longest;
    IF NOT FOUND OR current_setting('transaction_isolation') <> 'read committed'
        OR EXISTS (SELECT FROM {claim} AS c WHERE c.key = ANY (_keys))
    THEN
        PERFORM {complete}(
            _keys, array_fill(NULL::bigint, ARRAY[_all]), array_fill(_generation, ARRAY[_all]), array_fill(_ends, ARRAY[_all]),
            _fingerprints, _outcomes, _retentions, _transaction
        );
        RETURN;
    END IF;
    IF extract(epoch FROM _now) * 1000 >= _ends THEN
        RAISE EXCEPTION 'fenced' USING ERRCODE = 'OO001';
    END IF;
    IF _all = 1 THEN
        INSERT INTO {record} (key, fingerprint, expires, slot, outcome)
        VALUES (_keys[1], _fingerprints[1], _now + _retentions[1] * interval '1 millisecond', _slot, decode(_outcomes[1], 'hex'))
        ON CONFLICT DO NOTHING;
    ELSE
        INSERT INTO {record} (key, fingerprint, expires, slot, outcome)
        SELECT e.key, e.fingerprint, _now + e.retention * interval '1 millisecond', _slot, decode(e.outcome, 'hex')
        FROM unnest(_keys, _fingerprints, _retentions, _outcomes) AS e (key, fingerprint, retention, outcome) ORDER BY e.key
        ON CONFLICT DO NOTHING;
    END IF;
    GET DIAGNOSTICS _written = ROW_COUNT;
    IF _written < _all THEN
        -- One that has expired is still there, if others of its partition are kept for longer.
        UPDATE {record} AS r
        SET fingerprint = e.fingerprint, expires = _now + e.retention * interval '1 millisecond', outcome = decode(e.outcome, 'hex')
        FROM unnest(_keys, _fingerprints, _retentions, _outcomes) AS e (key, fingerprint, retention, outcome)
        WHERE r.key = e.key AND r.slot = _slot AND r.expires <= _now;
        GET DIAGNOSTICS _updated = ROW_COUNT;
        IF _written + _updated < _all THEN
            RAISE EXCEPTION 'fenced' USING ERRCODE = 'OO001';
        END IF;
    END IF;
END $$;
