-- Version 1 of the event log: one step of what schema.py puts together. Later versions are later files; this one does
-- not change once it is released. The numbers in the functions' names let old and new code run side by side in a deploy.
--
-- All functions are SECURITY DEFINER: who may call them needs no right on the tables. schema.py takes EXECUTE from PUBLIC
-- in the transaction that creates them.

-- One row, as in `retention`: see rows.sql.
CREATE TABLE flask_pg_sse.installation (
    version integer NOT NULL,
    -- Signs the ids that travel by NOTIFY, which every role of the database can send: see number_v1().
    key bytea NOT NULL
);

-- The log. Only committed, numbered events stand in it, in the order of their commits.
CREATE TABLE flask_pg_sse.event (
    id bigint PRIMARY KEY,
    channel text NOT NULL,
    fields json NOT NULL,  -- event, id, retry and comment as far as they are given; data too, if it holds U+0000
    data text,
    created_at timestamptz NOT NULL
);
CREATE INDEX event_channel_id ON flask_pg_sse.event (channel, id);

-- Events between their notify() and the commit of its transaction. A row lives for one transaction, so nothing is lost
-- if a crash empties the table. Each leaves four dead versions behind and there is no index: vacuum early, it is cheap.
CREATE UNLOGGED TABLE flask_pg_sse.pending (
    channel text NOT NULL,
    fields json NOT NULL,
    data text,
    -- How often its trigger has put it off during one statement of the client, and which statement that was.
    requeued integer NOT NULL DEFAULT 0,
    requeued_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_insert_threshold = -1);

-- Everything up to pruned_through has left the log. Not in `installation`, whose row publishers read and nobody changes.
CREATE TABLE flask_pg_sse.retention (pruned_through bigint NOT NULL);

-- Neither has a key, and where there is a publication FOR ALL TABLES, no row without an identity can be changed.
ALTER TABLE flask_pg_sse.installation REPLICA IDENTITY FULL;
ALTER TABLE flask_pg_sse.retention REPLICA IDENTITY FULL;

CREATE SEQUENCE flask_pg_sse.event_id;
-- Which server, and database, numbered the last event. A sequence, because setval() is at once there for all and no cause
-- of a serialization failure.
CREATE SEQUENCE flask_pg_sse.numbered_by;

-- The start of the server in microseconds, and the numbers of the database and the table: a sum that changes with a restart
-- or a failover, and where a copy of the database or of the schema takes the place of the former.
CREATE FUNCTION flask_pg_sse.server_v1() RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint + d.oid::bigint
        + 'flask_pg_sse.event'::regclass::oid::bigint
    FROM pg_database d WHERE d.datname = current_database()
$function$;

-- Number an event, write it to the log and notify. Called last in a transaction: what waits for the lock waits for its end.
CREATE FUNCTION flask_pg_sse.number_v1(channel text, fields json, data text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    server bigint := flask_pg_sse.server_v1();
    number bigint;
    head text;
    payload text;
    utf8 bytea;
BEGIN
    -- What cannot be read would keep all that comes after it from who reads the log.
    IF json_typeof(fields) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'The fields of an event are a JSON object.';
    END IF;
    IF getdatabaseencoding() <> 'UTF8' THEN
        PERFORM convert_to(concat(channel, fields, data), 'UTF8');
    END IF;
    -- From here to the end of the transaction no other can number: ids are in the order of commits. The key is the text
    -- "flaskpgs" as a number.
    PERFORM pg_advisory_xact_lock(7380381037705062259);
    -- Listeners receive an event only after its commit: it must not be lost in a crash then.
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    -- A server that was failed over to, or a database that was restored, may have lost events whose ids were seen: leave
    -- those behind. By the clock, because nothing here says how many they were, or how often there was a jump since the
    -- backup; and by a tenth of a second at least, less than a restart takes, in case the clock is wrong.
    IF (SELECT s.last_value FROM flask_pg_sse.numbered_by s) <> server THEN
        PERFORM setval('flask_pg_sse.event_id', greatest(
            (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
            nextval('flask_pg_sse.event_id') + 100000));
        PERFORM setval('flask_pg_sse.numbered_by', server);
    END IF;
    number := nextval('flask_pg_sse.event_id');
    INSERT INTO flask_pg_sse.event VALUES (number, channel, fields, data, clock_timestamp());

    head := concat(chr(30), '1{"i":', number, ',"s":"',
        left(encode(sha256((SELECT i.key FROM flask_pg_sse.installation i) || int8send(number)), 'hex'), 16), '"');
    IF coalesce(octet_length(data), 0) <= 7999 THEN  -- many megabytes are not copied for nothing
        payload := concat(
            head, CASE WHEN fields::text = '{}' THEN '}' ELSE ',' || substr(fields::text, 2) END, E'\n' || data);
    END IF;
    IF payload IS NULL OR octet_length(payload) > 7999 THEN
        payload := head || ',"f": true}';  -- to be fetched from the log
    END IF;
    IF octet_length(channel) > 21 THEN  -- it may be longer than 63 bytes in UTF-8
        utf8 := convert_to(channel, 'UTF8');
        IF octet_length(utf8) > 63 THEN
            channel := 'flask_pg_sse' || chr(58) || left(encode(sha256(utf8), 'hex'), 40);
        END IF;
    END IF;
    PERFORM pg_notify(channel, payload);
    RETURN number;
END $function$;

-- The trigger of pending fires four times at commit, and but for the last only to be called again. Deferred triggers fire
-- in rounds: those that were queued before, in that order, and then those that the round has queued. So this comes after
-- all that the transaction's own constraints and triggers have to do, what they cause in turn included, down to the third
-- level; the lock is held for the shortest time, and nobody who has it waits for a row that another publisher holds.
-- By its ctid and not by a key: scans for one would make SERIALIZABLE transactions fail.
CREATE FUNCTION flask_pg_sse.publish_pending_v1() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    -- On a table of a caller's own, the columns' types could bring casts that would run with our rights.
    IF TG_RELID <> 'flask_pg_sse.pending'::regclass THEN
        RAISE EXCEPTION 'This trigger function is that of flask_pg_sse.pending alone.';
    END IF;
    IF NEW.requeued_at IS DISTINCT FROM statement_timestamp() THEN
        -- The commit, or the user's SET CONSTRAINTS ALL IMMEDIATE. It is no reason to take the lock before the commit.
        SET CONSTRAINTS flask_pg_sse.publish DEFERRED;
        UPDATE flask_pg_sse.pending SET requeued = 1, requeued_at = statement_timestamp() WHERE ctid = NEW.ctid;
    ELSIF NEW.requeued < 3 THEN
        UPDATE flask_pg_sse.pending SET requeued = NEW.requeued + 1 WHERE ctid = NEW.ctid;
    ELSE
        DELETE FROM flask_pg_sse.pending WHERE ctid = NEW.ctid;
        PERFORM flask_pg_sse.number_v1(NEW.channel, NEW.fields, NEW.data);
    END IF;
    RETURN NULL;
END $function$;

CREATE CONSTRAINT TRIGGER publish AFTER INSERT OR UPDATE ON flask_pg_sse.pending
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION flask_pg_sse.publish_pending_v1();

-- Publish events in the caller's transaction, when it commits.
CREATE FUNCTION flask_pg_sse.enqueue_v1(channel text, fields json[], data text[]) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    INSERT INTO flask_pg_sse.pending (channel, fields, data)
    SELECT $1, item.fields, item.data FROM unnest($2, $3) AS item (fields, data)
$function$;

-- Publish events now, and return the last id. For connections in autocommit mode: in a longer transaction all other
-- publishers would wait for its end.
CREATE FUNCTION flask_pg_sse.publish_v1(channel text, fields json[], data text[]) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    number bigint;
BEGIN
    FOR item IN 1 .. coalesce(cardinality(fields), 0) LOOP
        number := flask_pg_sse.number_v1(channel, fields[item], data[item]);
    END LOOP;
    RETURN number;
END $function$;

-- Send an event from SQL: SELECT flask_pg_sse.notify('orders', '{"id": 7}', event => 'created'). It leaves on commit.
CREATE FUNCTION flask_pg_sse.notify(
    channel text, data text DEFAULT '', event text DEFAULT NULL, id text DEFAULT NULL, retry bigint DEFAULT NULL,
    comment text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    wrong text := CASE
        WHEN channel IS NULL OR octet_length(convert_to(channel, 'UTF8')) NOT BETWEEN 1 AND 255
            THEN 'A channel name has 1 to 255 bytes in UTF-8.'
        -- By the bytes of its UTF-8: the numbers of characters are other ones in other encodings.
        WHEN encode(convert_to(channel, 'UTF8'), 'hex') ~ '^(..)*([01].|7f|c2[89].)'
            THEN 'A channel name holds no control characters.'
        WHEN starts_with(channel, 'flask_pg_sse')
            THEN 'Channel names that begin with "flask_pg_sse" are reserved; choose another.'
        WHEN starts_with(event, 'sse-') THEN 'Event names that begin with "sse-" are reserved; choose another.'
        WHEN event ~ '[\n\r]' THEN 'The event''s name may not hold a line end: it is one line of the stream.'
        WHEN id ~ '[\n\r]' THEN 'The event''s id may not hold a line end: it is one line of the stream.'
        WHEN retry < 0 THEN 'The event''s retry must be a number of milliseconds, 0 or more.'
    END;
BEGIN
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = wrong;
    END IF;
    IF getdatabaseencoding() <> 'UTF8' THEN  -- number_v1() would refuse it, at the commit
        PERFORM convert_to(concat(data, event, id, comment), 'UTF8');
    END IF;
    INSERT INTO flask_pg_sse.pending (channel, fields, data) VALUES (
        channel,
        json_strip_nulls(json_build_object('event', nullif(event, ''), 'id', id, 'retry', retry, 'comment', comment)),
        coalesce(data, ''));
END $function$;

-- The head of the log: whoever has read up to it has seen all that is committed. (A sequence's last value may be the id
-- of an event whose transaction goes on.)
CREATE FUNCTION flask_pg_sse.head_v1() RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT greatest(r.pruned_through, (SELECT max(e.id) FROM flask_pg_sse.event e)) FROM flask_pg_sse.retention r
$function$;

-- Notify the control channel of the head, and of the caller's own number. NOTIFY delivers in the order of commits: who
-- receives this from its own connection has received everything up to the head.
CREATE FUNCTION flask_pg_sse.beat_v1(nonce text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT pg_notify('flask_pg_sse', json_build_object('beat', $1, 'head', flask_pg_sse.head_v1())::text)
$function$;

-- The version once more, where a dump without rows has it too. What installs a later version replaces it: a default of the
-- column would do as well, but to change that takes a lock for which publishers and an upgrade could wait in a circle.
CREATE FUNCTION flask_pg_sse.version_v1() RETURNS integer
LANGUAGE sql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT 1
$function$;

-- The version and the key of the installation.
CREATE FUNCTION flask_pg_sse.installed_v1() RETURNS TABLE (version integer, key bytea)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT i.version, i.key FROM flask_pg_sse.installation i
$function$;

-- Read the log of some channels after an id: a page of max_bytes, or one event alone that is larger (what is larger than
-- max_event too comes empty, with its size). Every row says how far back the log reaches, where it ends, and up to which
-- id the page is complete; without an event there is one row that says only that. One snapshot for all of it: a page
-- never misses what was pruned while it was read.
CREATE FUNCTION flask_pg_sse.page_v1(channels text[], after bigint, max_bytes bigint, max_event bigint)
RETURNS TABLE (pruned_through bigint, head bigint, upto bigint, id bigint, channel text, fields json, data text,
    size bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    most constant integer := CASE WHEN cardinality(channels) > 16 THEN 5000 ELSE 500 END;
    most_event constant bigint := greatest(max_bytes, max_event);
    pruned bigint;
    top bigint;
    complete bigint;
    ids bigint[];
    kept bigint;
BEGIN
    SELECT r.pruned_through, flask_pg_sse.head_v1() INTO pruned, top FROM flask_pg_sse.retention r;
    IF most = 500 THEN  -- few channels: by the index on channel and id
        SELECT array_agg(f.id ORDER BY f.id), CASE WHEN count(*) < most THEN top ELSE max(f.id) END INTO ids, complete
        FROM (
            SELECT e.id FROM (SELECT DISTINCT name FROM unnest(channels) AS name) AS wanted, LATERAL (
                SELECT e.id FROM flask_pg_sse.event e WHERE e.channel = wanted.name AND e.id > after
                ORDER BY e.id LIMIT most
            ) AS e ORDER BY e.id LIMIT most
        ) AS f;
    ELSE  -- many: whatever comes next, and of that what is wanted
        SELECT array_agg(f.id ORDER BY f.id) FILTER (WHERE f.wanted), CASE WHEN count(*) < most THEN top ELSE max(f.id) END
        INTO ids, complete
        FROM (
            SELECT e.id, wanted.name IS NOT NULL AS wanted
            FROM (SELECT e.id, e.channel FROM flask_pg_sse.event e WHERE e.id > after ORDER BY e.id LIMIT most) AS e
            LEFT JOIN (SELECT DISTINCT name FROM unnest(channels) AS name) AS wanted ON wanted.name = e.channel
        ) AS f;
    END IF;
    SELECT count(*) INTO kept FROM (
        SELECT row_number() OVER w AS number, sum(s.size) OVER w AS total
        FROM (
            SELECT e.id, octet_length(e.fields::text) + coalesce(octet_length(e.data), 0) AS size
            FROM flask_pg_sse.event e WHERE e.id = ANY (ids)
        ) AS s WINDOW w AS (ORDER BY s.id)
    ) AS t WHERE t.number = 1 OR t.total <= max_bytes;
    IF kept < cardinality(ids) THEN
        ids := ids[1:kept];
        complete := ids[kept];
    END IF;
    RETURN QUERY
    SELECT pruned, top, greatest(after, complete), e.id, e.channel,
        CASE WHEN e.id IS NULL OR e.size <= most_event THEN e.fields ELSE '{}' END,
        CASE WHEN e.size <= most_event THEN e.data END, e.size
    FROM (VALUES (1)) AS one LEFT JOIN (
        SELECT e.*, (octet_length(e.fields::text) + coalesce(octet_length(e.data), 0))::bigint AS size
        FROM flask_pg_sse.event e WHERE e.id = ANY (ids)
    ) AS e ON true
    ORDER BY e.id;
END $function$;

-- Read the last events of each of some channels up to an id of each, at most a thousand, and max_bytes: what streams that
-- come back after a moment have missed. Every row says after which id the channel's events are complete.
CREATE FUNCTION flask_pg_sse.tail_v1(channels text[], uptos bigint[], max_bytes bigint)
RETURNS TABLE (channel text, complete_after bigint, id bigint, fields json, data text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT wanted.channel, tail.complete_after, e.id, e.fields, e.data
    FROM unnest($1, $2) AS wanted (channel, upto)
    CROSS JOIN LATERAL (
        SELECT CASE
                WHEN count(*) > 1000 OR max(t.total) > $3
                    THEN coalesce(min(t.id) FILTER (WHERE t.total <= $3 AND t.number <= 1000) - 1, wanted.upto)
                ELSE (SELECT r.pruned_through FROM flask_pg_sse.retention r)
            END AS complete_after
        FROM (
            SELECT s.id, row_number() OVER w AS number, sum(s.size) OVER w AS total
            FROM (
                SELECT e.id, octet_length(e.fields::text) + coalesce(octet_length(e.data), 0) AS size
                FROM flask_pg_sse.event e WHERE e.channel = wanted.channel AND e.id <= wanted.upto
                ORDER BY e.id DESC LIMIT 1001
            ) AS s WINDOW w AS (ORDER BY s.id DESC)
        ) AS t
    ) AS tail
    LEFT JOIN flask_pg_sse.event e
        ON e.channel = wanted.channel AND e.id > tail.complete_after AND e.id <= wanted.upto
    ORDER BY e.id
$function$;

-- Delete the oldest events, the last that is older than max_age before the first that is younger and all before it, at most
-- `batch` of them. Return how many, or NULL while another session is at it. By ids and not by time alone, so that what is
-- left has no holes. What is dated in the future, by a clock that was wrong, is as old as what follows it.
CREATE FUNCTION flask_pg_sse.prune_v1(max_age interval, batch integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    pruned bigint;
    cut bigint;
    last bigint;
    deleted integer := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(7380381037705062260) THEN
        RETURN NULL;
    END IF;
    -- First, because publishers lock pending and then event: an upgrade that locks both would deadlock with the other
    -- order.
    LOCK TABLE flask_pg_sse.pending IN ROW EXCLUSIVE MODE;
    SELECT r.pruned_through INTO pruned FROM flask_pg_sse.retention r;
    SELECT max(e.id) FILTER (WHERE e.expired AND NOT e.kept), max(e.id) INTO cut, last
    FROM (
        SELECT e.id, e.created_at < clock_timestamp() - max_age AS expired,
            bool_or(e.created_at BETWEEN clock_timestamp() - max_age AND clock_timestamp()) OVER (ORDER BY e.id) AS kept
        FROM (SELECT e.id, e.created_at FROM flask_pg_sse.event e WHERE e.id > pruned ORDER BY e.id LIMIT batch) AS e
    ) AS e;
    IF cut IS NULL AND (
        SELECT e.created_at < clock_timestamp() - max_age FROM flask_pg_sse.event e
        WHERE e.id > pruned AND e.created_at <= clock_timestamp() ORDER BY e.id LIMIT 1
    ) THEN  -- the whole batch is dated in the future, and what follows it has expired
        cut := last;
    END IF;
    DELETE FROM flask_pg_sse.event e WHERE e.id > pruned AND e.id <= cut;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    IF deleted > 0 THEN
        UPDATE flask_pg_sse.retention r SET pruned_through = cut;
        PERFORM pg_notify('flask_pg_sse', json_build_object('pruned', cut)::text);  -- processes remember recent events
    END IF;
    -- Rows that were written where triggers do not fire (session_replication_role = replica) would stay for ever. Once a
    -- round, with its last batch: after a burst the table is large, and all of it has to be looked through.
    IF deleted < batch THEN
        DELETE FROM flask_pg_sse.pending p WHERE p.created_at < now() - interval '1 hour';
    END IF;
    RETURN deleted;
END $function$;
