-- Messages that were committed with an effect and wait to be published. The columns that Debezium's outbox event router reads have
-- its names.
CREATE TABLE IF NOT EXISTS {outbox} (
    seq           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- in the order in which it was written
    id            uuid NOT NULL UNIQUE,
    aggregatetype text NOT NULL,                  -- the destination
    aggregateid   text,                           -- the group
    type          text NOT NULL,                  -- the attribute `type`, or nothing
    payload       bytea NOT NULL,
    dedup_id      text,
    attributes    jsonb,                          -- an object of strings
    attempts      integer NOT NULL DEFAULT 0,
    ready_at      timestamptz,                    -- it has failed, and is delayed until then
    set_aside     boolean NOT NULL DEFAULT false, -- nobody tries again
    reason        text                            -- why it failed last, or was set aside
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0);

-- What comes next.
CREATE INDEX IF NOT EXISTS {prefix_}outbox_next ON {outbox} (aggregatetype, seq) WHERE NOT set_aside;

-- Behind what a group may have to wait.
CREATE INDEX IF NOT EXISTS {prefix_}outbox_held ON {outbox} (aggregatetype, aggregateid, seq) WHERE ready_at IS NOT NULL OR set_aside;

-- Which relay publishes to a destination.
CREATE TABLE IF NOT EXISTS {relay} (
    destination text PRIMARY KEY,
    owner       bigint NOT NULL,
    until       timestamptz NOT NULL,
    waits       boolean NOT NULL  -- it has found nothing, and is to be told of the next message
) WITH (fillfactor = 50);

-- Writes a message. Nobody is told of it while a relay is at work, which finds it by itself: all who notify commit one after
-- another.
CREATE OR REPLACE FUNCTION {outbox_publish}(
    _id uuid, _destination text, _group text, _type text, _payload bytea, _dedup_id text, _attributes jsonb
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO {outbox} (id, aggregatetype, aggregateid, type, payload, dedup_id, attributes)
    VALUES (_id, _destination, _group, _type, _payload, _dedup_id, _attributes);
    IF EXISTS (SELECT FROM {relay} AS r WHERE r.destination = _destination AND r.waits) THEN
        PERFORM pg_catalog.pg_notify('{channel}', _destination);
    END IF;
END $$;

-- Leases a destination, unless another relay has it, and returns its first messages: a row for each, or one that tells what else is
-- so.
CREATE OR REPLACE FUNCTION {outbox_fetch}(
    _destination text, _owner bigint, _lease bigint, _messages bigint, _bytes bigint, _waits_for_set_aside boolean
) RETURNS TABLE (
    answer text, id text, grp text, payload text, dedup_id text, attributes text, attempts integer, wait_for bigint
) LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    _now timestamptz := clock_timestamp();
    _o record;
    _count bigint := 0;
    _sum bigint := 0;
BEGIN
    INSERT INTO {relay} AS r (destination, owner, until, waits)
    VALUES (_destination, _owner, _now + _lease * interval '1 millisecond', false)
    ON CONFLICT (destination) DO UPDATE SET owner = excluded.owner, until = excluded.until, waits = false
    WHERE r.owner = excluded.owner OR r.until <= _now;
    IF NOT FOUND THEN
        RETURN QUERY
        SELECT 'busy', NULL, NULL, NULL, NULL, NULL, NULL::integer,
            greatest(ceil(extract(epoch FROM r.until - _now) * 1000), 0)::bigint
        FROM {relay} AS r WHERE r.destination = _destination;
        RETURN;
    END IF;
    FOR _o IN
        SELECT * FROM {outbox} AS o
        WHERE o.aggregatetype = _destination AND NOT o.set_aside AND (o.ready_at IS NULL OR o.ready_at <= _now)
            AND NOT EXISTS (
                SELECT FROM {outbox} AS h
                WHERE h.aggregatetype = _destination AND h.aggregateid = o.aggregateid AND h.seq < o.seq
                    AND (h.ready_at IS NOT NULL OR h.set_aside)
                    AND CASE WHEN h.set_aside THEN _waits_for_set_aside ELSE h.ready_at > _now END
            )
        ORDER BY o.seq LIMIT _messages
    LOOP
        EXIT WHEN _count > 0 AND _sum >= _bytes;
        _count := _count + 1;
        _sum := _sum + octet_length(_o.payload) + coalesce(octet_length(_o.attributes::text), 0);
        RETURN QUERY SELECT
            'message', _o.id::text, _o.aggregateid, encode(_o.payload, 'hex'), _o.dedup_id, _o.attributes::text, _o.attempts, NULL::bigint;
    END LOOP;
    IF _count = 0 THEN
        UPDATE {relay} SET waits = true WHERE destination = _destination;
        RETURN QUERY
        SELECT 'empty', NULL, NULL, NULL, NULL, NULL, NULL::integer,
            CASE WHEN count(*) > 0 THEN greatest(ceil(extract(epoch FROM min(o.ready_at) - _now) * 1000), 0)::bigint END
        FROM {outbox} AS o WHERE o.aggregatetype = _destination AND NOT o.set_aside AND o.ready_at IS NOT NULL;
    END IF;
END $$;

-- Says what became of messages, one after another: 'sent', 'failed' or 'aside'. Answers whether it counts.
CREATE OR REPLACE FUNCTION {outbox_settle}(
    _destination text, _owner bigint, _ids uuid[], _dispositions text[], _reasons text[], _retries bigint[]
) RETURNS boolean[] LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    _holds boolean;
    _verdicts boolean[];
    _n integer;
BEGIN
    IF EXISTS (SELECT FROM unnest(_dispositions) AS d WHERE d <> 'sent') THEN
        -- The lease cannot be taken over meanwhile.
        PERFORM FROM {relay} WHERE destination = _destination AND owner = _owner FOR SHARE;
        _holds := FOUND;
    END IF;
    FOR _n IN 1 .. cardinality(_ids) LOOP
        IF _dispositions[_n] = 'sent' THEN
            DELETE FROM {outbox} WHERE id = _ids[_n];
            _verdicts := _verdicts || true;
        ELSIF NOT _holds THEN
            _verdicts := _verdicts || NOT EXISTS (SELECT FROM {outbox} WHERE id = _ids[_n]);
        ELSE
            UPDATE {outbox} SET
                attempts = attempts + 1, set_aside = _dispositions[_n] = 'aside',
                ready_at = CASE _dispositions[_n] WHEN 'failed' THEN clock_timestamp() + _retries[_n] * interval '1 millisecond' END,
                reason = convert_from(decode(_reasons[_n], 'hex'), 'UTF8')
            WHERE id = _ids[_n];
            _verdicts := _verdicts || true;
        END IF;
    END LOOP;
    RETURN _verdicts;
END $$;

-- Lets messages that were set aside be published again; how many.
CREATE OR REPLACE FUNCTION {outbox_requeue}(_destination text, _ids uuid[]) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    _count bigint;
BEGIN
    UPDATE {outbox} AS o SET set_aside = false, ready_at = NULL, attempts = 0, reason = NULL
    WHERE o.id = ANY (_ids) AND o.aggregatetype = _destination AND o.set_aside;
    GET DIAGNOSTICS _count = ROW_COUNT;
    PERFORM pg_catalog.pg_notify('{channel}', _destination);
    RETURN _count;
END $$;
