-- Version 1 of the event log: the first step that schema.py runs. Later versions are later files, and this file does not
-- change once it is released. The functions' names have numbers, so old and new code can run side by side in a deploy.
--
-- All functions are SECURITY DEFINER: a role with EXECUTE needs no rights on the tables. schema.py revokes EXECUTE from
-- PUBLIC in the transaction that creates them.

-- One row, as in `retention`: see one_row_v1().
CREATE TABLE flask_pg_sse.installation (
    version integer NOT NULL,
    -- Signs the events in NOTIFY payloads, because every role of the database can send a NOTIFY: see number_v1().
    key bytea NOT NULL,
    -- Whether this server tells its timeline: see draw_v1(). Some servers that are only similar to PostgreSQL do not.
    timelines boolean NOT NULL
);

-- The log. It contains only committed events, with ids in the order of their commits.
CREATE TABLE flask_pg_sse.event (
    id bigint PRIMARY KEY,
    channel text NOT NULL,
    fields json NOT NULL,  -- event, id, retry and comment, if given; also data, if it contains U+0000
    data text,
    created_at timestamptz NOT NULL
);
CREATE INDEX event_channel_id ON flask_pg_sse.event (channel, id);

-- Events between their notify() and the commit of its transaction: a row for each call. A row lives for one transaction,
-- so nothing is lost if a crash empties the table. It leaves two dead versions, the first one of a transaction four.
-- Vacuum runs early; it is cheap, as there is no index.
CREATE UNLOGGED TABLE flask_pg_sse.pending (
    channel text NOT NULL,
    fields json[] NOT NULL,
    data text[] NOT NULL,
    before tid,  -- where the transaction's row before this one is, set at the commit; of the first row: where it was
    -- How often the trigger has deferred the first row during one statement of the client, and which statement that was.
    requeued integer NOT NULL DEFAULT 0,
    requeued_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_insert_threshold = -1);

-- Events up to pruned_through have been deleted from the log. This is not a column of `installation`, because publishers
-- read that table's row and it must never change.
CREATE TABLE flask_pg_sse.retention (pruned_through bigint NOT NULL);

-- A second row is impossible, whatever is restored or replicated into the tables. The triggers keep it out: ALWAYS, because
-- others do not fire for logical replication, which would try forever if there were only the indexes. The indexes make it
-- an error where pg_restore --disable-triggers has switched the triggers off.
CREATE UNIQUE INDEX installation_has_one_row ON flask_pg_sse.installation ((true));
CREATE UNIQUE INDEX retention_has_one_row ON flask_pg_sse.retention ((true));

CREATE FUNCTION flask_pg_sse.one_row_v1() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF TG_RELID = 'flask_pg_sse.installation'::regclass THEN
        -- The row that is there describes this installation: workers know its key.
        IF EXISTS (SELECT FROM flask_pg_sse.installation) THEN
            RETURN NULL;
        END IF;
    ELSIF TG_RELID = 'flask_pg_sse.retention'::regclass THEN
        -- The new row describes the events that are restored or replicated with it.
        UPDATE flask_pg_sse.retention SET pruned_through = NEW.pruned_through;
        IF FOUND THEN
            RETURN NULL;
        END IF;
    END IF;
    RETURN NEW;
END $function$;

CREATE TRIGGER one_row BEFORE INSERT ON flask_pg_sse.installation
FOR EACH ROW EXECUTE FUNCTION flask_pg_sse.one_row_v1();
CREATE TRIGGER one_row BEFORE INSERT ON flask_pg_sse.retention
FOR EACH ROW EXECUTE FUNCTION flask_pg_sse.one_row_v1();
ALTER TABLE flask_pg_sse.installation ENABLE ALWAYS TRIGGER one_row;
ALTER TABLE flask_pg_sse.retention ENABLE ALWAYS TRIGGER one_row;

-- Neither table has a key. With a publication FOR ALL TABLES a row without a replica identity cannot be changed.
ALTER TABLE flask_pg_sse.installation REPLICA IDENTITY FULL;
ALTER TABLE flask_pg_sse.retention REPLICA IDENTITY FULL;

-- Locks that only these functions can take. An advisory lock is open to every role that can connect. A lock on a view
-- needs a right on the view, and no role has one. It is not a lock on a table: an open transaction with an ANALYZE, a
-- COMMENT or a CREATE INDEX for that table would hold it too. A transaction that publishes takes `numbering`, and
-- `numbered` when its events have their ids.
CREATE VIEW flask_pg_sse.numbering AS SELECT true AS locked;
CREATE VIEW flask_pg_sse.numbered AS SELECT true AS locked;
CREATE VIEW flask_pg_sse.pruning AS SELECT true AS locked;

-- Its last value is the last id that was drawn, or that logical replication has brought.
CREATE SEQUENCE flask_pg_sse.event_id;

-- The sessions that hold one of the locks. `committing` is true from the moment when a commit takes NOTIFY's own lock,
-- which is one on "database 0".
CREATE FUNCTION flask_pg_sse.holding_v1(name text) RETURNS TABLE (pid integer, transaction text, committing boolean)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    WITH locks AS MATERIALIZED (SELECT * FROM pg_locks)
    SELECT l.pid, l.virtualtransaction, EXISTS (
        SELECT FROM locks n WHERE n.virtualtransaction = l.virtualtransaction AND n.locktype = 'object'
            AND n.database = 0 AND n.classid = 'pg_database'::regclass AND n.objid = 0)
    FROM locks l
    WHERE l.locktype = 'relation' AND l.granted AND l.mode = 'ShareUpdateExclusiveLock'
        AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
        AND l.relation = (SELECT c.oid FROM pg_class c
            WHERE c.relname = $1 AND c.relnamespace = 'flask_pg_sse'::regnamespace)
$function$;

-- The sessions that hold one of the locks, in words. A role without pg_read_all_stats does not see the state of other
-- roles' sessions.
CREATE FUNCTION flask_pg_sse.holders_v1(name text) RETURNS text
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(string_agg(concat(
        'session ', h.pid, ' of role "', a.usename, '" (application_name "', a.application_name, '", ',
        coalesce(a.state, 'state not visible to ' || quote_ident(current_user)), ')', CASE
            WHEN a.wait_event = 'SyncRep' THEN ', whose commit waits for a synchronous standby'
            WHEN h.committing THEN ', whose commit is not done yet'
            WHEN h.numbered THEN ', which has numbered its events, and does something else before its commit'
        END), ', '), 'no session any more')
    FROM (
        SELECT h.*, $1 = 'numbering' AND h.pid IN (SELECT n.pid FROM flask_pg_sse.holding_v1('numbered') AS n) AS numbered
        FROM flask_pg_sse.holding_v1($1) AS h
    ) AS h LEFT JOIN pg_stat_activity a ON a.pid = h.pid
$function$;

-- Wait for the lock `numbering`: for 8 s at most, or for a shorter lock_timeout of the caller; and only for 3 s where a
-- session neither numbers nor commits all that time, as with a deferred trigger of its own that sleeps.
CREATE FUNCTION flask_pg_sse.wait_v1() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    own_timeout text := current_setting('lock_timeout');
    until timestamptz := clock_timestamp() + CASE
        WHEN own_timeout::interval BETWEEN '1 ms' AND '8 s' THEN own_timeout::interval ELSE '8 s' END;
    seconds integer;
    most numeric;
    idle_before text;
    idle text;
BEGIN
    FOREACH seconds IN ARRAY ARRAY[2, 1, 5] LOOP  -- each time from the end of the queue, so not more often
        most := ceil(1000 * least(seconds, extract(epoch FROM until - clock_timestamp())));
        EXIT WHEN most <= 0;
        BEGIN
            PERFORM set_config('lock_timeout', most::text, true);
            LOCK TABLE flask_pg_sse.numbering IN SHARE UPDATE EXCLUSIVE MODE;
            PERFORM set_config('lock_timeout', own_timeout, true);
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            idle_before := idle;
            idle := (SELECT h.transaction FROM flask_pg_sse.holding_v1('numbered') AS h WHERE NOT h.committing LIMIT 1);
        END;
        EXIT WHEN idle = idle_before;
    END LOOP;
    RAISE EXCEPTION USING ERRCODE = 'lock_not_available', MESSAGE = concat(
        'The event log could not number an event in time. Transactions that publish commit one after the other, ',
        'and the lock for that is held by ', flask_pg_sse.holders_v1('numbering'), '.'),
        HINT = 'Try again. If that session does not go on, end it with pg_terminate_backend().';
END $function$;

-- Draw ids for some events, and return the first one. The others follow in steps of four.
--
-- From here to the end of the transaction no other transaction can draw ids. So ids are in the order of commits.
--
-- An id is 4 * the microseconds since 2020 + the server's timeline modulo 4, or higher if the last id was not lower. So no
-- id is given out twice, whatever was lost, restored or copied in between: the clock has gone on. Two servers that publish
-- after a failover, because the old one lives on, have different timelines and cannot draw the same id. The steps keep the
-- timeline where the clock is behind. All ids are below 2^53 until 2091, so they are exact in JavaScript. (The largest id
-- in the log is not read for this: publishers in SERIALIZABLE transactions would fail.)
CREATE FUNCTION flask_pg_sse.draw_v1(events integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    number bigint;
    timelines boolean;
    timeline integer := 0;
BEGIN
    -- The first attempt does not wait, because to set a timeout and to set it back takes longer than all the rest.
    BEGIN
        LOCK TABLE flask_pg_sse.numbering IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
    EXCEPTION WHEN lock_not_available THEN
        PERFORM flask_pg_sse.wait_v1();
    END;
    SELECT s.last_value, i.timelines INTO number, timelines
    FROM flask_pg_sse.event_id s LEFT JOIN flask_pg_sse.installation i ON true;
    IF timelines THEN  -- a statement of its own, or a server without the functions would refuse all of it
        timeline := strpos('123456789ABCDEF', substr(pg_walfile_name(pg_current_wal_lsn()), 8, 1)) & 3;
    END IF;
    number := 4 * greatest(number / 4 + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - 1577836800000000)
        + timeline;
    RETURN setval('flask_pg_sse.event_id', number + 4 * (events - 1)) - 4 * (events - 1);
END $function$;

-- Rows that logical replication brings into the log move the sequence, so the events that this server publishes later
-- have higher ids. It takes the same lock as draw_v1(): otherwise a publisher could put the sequence back.
CREATE FUNCTION flask_pg_sse.replicated_v1() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    -- An ordinary trigger, as pg_restore --disable-triggers leaves it, also fires for the log's own events.
    IF TG_RELID <> 'flask_pg_sse.event'::regclass OR current_setting('session_replication_role') <> 'replica' THEN
        RETURN NULL;
    END IF;
    IF NEW.id > (SELECT s.last_value FROM flask_pg_sse.event_id s) THEN
        LOCK TABLE flask_pg_sse.numbering IN SHARE UPDATE EXCLUSIVE MODE;
        PERFORM setval('flask_pg_sse.event_id', greatest(NEW.id, s.last_value)) FROM flask_pg_sse.event_id s;
    END IF;
    RETURN NULL;
END $function$;

CREATE TRIGGER replicated AFTER INSERT ON flask_pg_sse.event
FOR EACH ROW EXECUTE FUNCTION flask_pg_sse.replicated_v1();
ALTER TABLE flask_pg_sse.event ENABLE REPLICA TRIGGER replicated;

-- Number events, write them to the log and notify. Return the last id. Call it last in a transaction, because other
-- publishers wait until the transaction ends. All that does not need the ids is done before the lock is taken.
--
-- The signature covers the id, the channel, and everything that follows it in the payload. It is sha256() of the key and
-- these, of which only 64 of 256 bits are sent. So nobody can compute from it the signature of a longer text, which is the
-- weakness of a hash with a key in front. The id has a fixed length and the channel its length in front, so two different
-- events never give the same bytes.
CREATE FUNCTION flask_pg_sse.number_v1(channels text[], fields json[], data text[]) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    count integer := coalesce(cardinality(channels), 0);
    wrong boolean;
    signing bytea;
    names text[];
    signed bytea[];
    rests text[];
    first bigint;
BEGIN
    IF count = 0 THEN
        RETURN NULL;
    END IF;
    IF getdatabaseencoding() <> 'UTF8' THEN
        PERFORM convert_to(concat(u.channel, u.fields, u.data), 'UTF8')
        FROM unnest(channels, fields, data) AS u (channel, fields, data);
    END IF;
    SELECT array_agg(CASE
            WHEN octet_length(r.utf8) <= 63 THEN r.channel
            ELSE 'flask_pg_sse' || chr(58) || left(encode(sha256(r.utf8), 'hex'), 40)
        END),
        array_agg(int4send(octet_length(r.utf8)) || r.utf8 || convert_to(r.rest, 'UTF8')), array_agg(r.rest),
        (SELECT i.key FROM flask_pg_sse.installation i), bool_or(json_typeof(r.fields) <> 'object')
    INTO names, signed, rests, signing, wrong
    FROM (
        SELECT u.channel, convert_to(u.channel, 'UTF8') AS utf8, u.fields, CASE
                -- More than NOTIFY can take with the longest id before it: the listener fetches it from the log.
                WHEN 50 + octet_length(u.fields::text) + coalesce(octet_length(u.data), 0) > 7999 THEN ',"f": true}'
                ELSE concat(CASE WHEN u.fields::text = '{}' THEN '}' ELSE ',' || substr(u.fields::text, 2) END,
                    E'\n' || u.data)
            END AS rest
        FROM unnest(channels, fields, data) AS u (channel, fields, data)
        OFFSET 0  -- or each expression is computed for each place that names it
    ) AS r;
    IF wrong THEN  -- it could not be read, and would block readers of the log from all later events
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'An event''s fields must be a JSON object.';
    END IF;
    -- Listeners receive an event after its commit. A crash must not lose it after that.
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;

    first := flask_pg_sse.draw_v1(count);
    INSERT INTO flask_pg_sse.event
    SELECT first + 4 * (u.number - 1), u.channel, u.fields, u.data, clock_timestamp()
    FROM unnest(channels, fields, data) WITH ORDINALITY AS u (channel, fields, data, number);
    PERFORM pg_notify(u.name, concat(chr(30), '1{"i":', first + 4 * (u.number - 1), ',"s":"',
        left(encode(sha256(signing || int8send(first + 4 * (u.number - 1)) || u.signed), 'hex'), 16), '"', u.rest))
    FROM unnest(names, signed, rests) WITH ORDINALITY AS u (name, signed, rest, number);
    LOCK TABLE flask_pg_sse.numbered IN SHARE UPDATE EXCLUSIVE MODE;
    RETURN first + 4 * (count - 1);
END $function$;

-- The trigger of `pending` publishes all events of the transaction when it commits, as its last deed.
--
-- It fires once for each row, and links the rows to a chain. The setting flask_pg_sse.last tells where the last row is; a
-- rollback to a savepoint sets it back. The rows are found by their ctid and not by a key, because scans for a key would
-- make SERIALIZABLE transactions fail.
--
-- For the first row it fires several times, and all but the last time only queues itself again. Deferred triggers fire in
-- rounds: first those that were queued before, in order, and then those that the round has queued. So the last call comes
-- after the transaction's own constraints and deferred triggers, and after those that they cause, down to the third level.
-- This keeps the lock for the shortest time, and no transaction with the lock waits for a row that another publisher holds.
--
-- SET CONSTRAINTS also fires it, and then the transaction may go on for as long as it likes. From a function, the context's
-- second line is one of SQL, which that of a COMMIT is not, in any language of the messages ("SQL", but not "PL/pgSQL").
-- From the client, each such statement fires it once, and there are at most as many of them as these words in the query.
CREATE FUNCTION flask_pg_sse.publish_pending_v1() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    next tid;
    own tid;
    rounds integer := 3;
    context text;
    query text;
    last_id bigint;
BEGIN
    -- On a caller's own table the columns' types could have casts that run with our rights.
    IF TG_RELID <> 'flask_pg_sse.pending'::regclass THEN
        RAISE EXCEPTION 'This trigger function is for flask_pg_sse.pending alone.';
    END IF;
    IF NEW.requeued = 0 THEN
        next := nullif(current_setting('flask_pg_sse.last', true), '');
        IF next IS NOT NULL THEN  -- not the first row
            UPDATE flask_pg_sse.pending SET before = next WHERE ctid = NEW.ctid RETURNING ctid INTO own;
            next := set_config('flask_pg_sse.last', own::text, true);
            RETURN NULL;
        END IF;
        NEW.before := NEW.ctid;
        next := set_config('flask_pg_sse.last', NEW.ctid::text, true);
    END IF;

    IF NEW.requeued_at IS DISTINCT FROM statement_timestamp() THEN
        SET CONSTRAINTS flask_pg_sse.publish DEFERRED;
        UPDATE flask_pg_sse.pending SET requeued = 1, requeued_at = statement_timestamp(), before = NEW.before
        WHERE ctid = NEW.ctid;
        RETURN NULL;
    END IF;
    IF NEW.requeued >= rounds THEN
        GET DIAGNOSTICS context = PG_CONTEXT;
        IF strpos(context, chr(10)) = 0 THEN
            query := lower(current_query() COLLATE "C");
            rounds := rounds + coalesce(length(query) - length(replace(replace(
                query, 'constraints', 'constraint'), 'execute', 'execut')), 0);
        ELSIF split_part(split_part(context, chr(10), 2), '"', 1) ~ '(^|[^a-z/])SQL' THEN
            rounds := 10000;
            IF NEW.requeued >= rounds THEN
                RAISE EXCEPTION USING MESSAGE = 'The event log cannot tell whether this transaction commits.';
            END IF;
        END IF;
        IF NEW.requeued < rounds THEN
            SET CONSTRAINTS flask_pg_sse.publish DEFERRED;
        END IF;
    END IF;
    IF NEW.requeued < rounds THEN
        UPDATE flask_pg_sse.pending SET requeued = NEW.requeued + 1 WHERE ctid = NEW.ctid;
        RETURN NULL;
    END IF;

    DELETE FROM flask_pg_sse.pending p WHERE p.ctid = NEW.ctid;
    next := nullif(current_setting('flask_pg_sse.last', true), '');
    context := set_config('flask_pg_sse.last', '', true);
    IF next = NEW.before THEN
        last_id := flask_pg_sse.number_v1(array_fill(NEW.channel, ARRAY[cardinality(NEW.fields)]), NEW.fields, NEW.data);
        RETURN NULL;
    END IF;
    DECLARE
        channels text[] := '{}';
        fields json[] := '{}';
        data text[] := '{}';
        channel text;
        some_fields json[];
        some_data text[];
    BEGIN
        WHILE next <> NEW.before LOOP  -- from the last row back to the second
            DELETE FROM flask_pg_sse.pending p WHERE p.ctid = next
            RETURNING p.before, p.channel, p.fields, p.data INTO next, channel, some_fields, some_data;
            EXIT WHEN next IS NULL;
            FOR number IN REVERSE cardinality(some_fields) .. 1 LOOP
                channels := array_append(channels, channel);
                fields := array_append(fields, some_fields[number]);
                data := array_append(data, some_data[number]);
            END LOOP;
        END LOOP;
        IF next IS NULL THEN
            RAISE EXCEPTION USING MESSAGE = 'The setting flask_pg_sse.last was changed during the commit.';
        END IF;
        SELECT array_agg(u.channel ORDER BY u.number DESC), array_agg(u.fields ORDER BY u.number DESC),
            array_agg(u.data ORDER BY u.number DESC)
        INTO channels, fields, data
        FROM unnest(channels, fields, data) WITH ORDINALITY AS u (channel, fields, data, number);
        last_id := flask_pg_sse.number_v1(array_fill(NEW.channel, ARRAY[cardinality(NEW.fields)]) || channels,
            NEW.fields || fields, NEW.data || data);
    END;
    RETURN NULL;
END $function$;

CREATE CONSTRAINT TRIGGER publish AFTER INSERT OR UPDATE OF requeued ON flask_pg_sse.pending
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION flask_pg_sse.publish_pending_v1();

-- Publish events in the caller's transaction, when it commits. (In PL/pgSQL, because sessions keep its plans.)
CREATE FUNCTION flask_pg_sse.enqueue_v1(channel text, fields json[], data text[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    INSERT INTO flask_pg_sse.pending (channel, fields, data) VALUES ($1, $2, $3);
END $function$;

-- Publish events now, and return the last id. It is for connections in autocommit mode. In a longer transaction all other
-- publishers would wait for the end of the transaction.
CREATE FUNCTION flask_pg_sse.publish_v1(channel text, fields json[], data text[]) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN flask_pg_sse.number_v1(array_fill($1, ARRAY[cardinality($2)]), $2, $3);
END $function$;

-- Send an event from SQL: SELECT flask_pg_sse.notify('orders', '{"id": 7}', event => 'created'). It is sent at commit.
CREATE FUNCTION flask_pg_sse.notify(
    channel text, data text DEFAULT '', event text DEFAULT NULL, id text DEFAULT NULL, retry bigint DEFAULT NULL,
    comment text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    wrong text := CASE
        WHEN channel IS NULL OR octet_length(convert_to(channel, 'UTF8')) NOT BETWEEN 1 AND 255
            THEN 'A channel name must have 1 to 255 bytes in UTF-8.'
        -- The bytes in UTF-8 are compared, because other encodings have other character numbers.
        WHEN encode(convert_to(channel, 'UTF8'), 'hex') ~ '^(..)*([01].|7f|c2[89].)'
            THEN 'A channel name must not contain control characters.'
        WHEN starts_with(channel, 'flask_pg_sse')
            THEN 'Channel names that begin with "flask_pg_sse" are reserved; choose another.'
        -- Also after what clients may trim: control characters, blanks of all kinds, a byte order mark.
        WHEN encode(convert_to(event, 'UTF8'), 'hex')
                ~ '^([01].|20|c285|c2a0|e19a80|e1a08e|e2808[0-9a]|e280a[89f]|e2819f|e38080|efbbbf)*7373652d'
            THEN 'Event names that begin with "sse-" are reserved; choose another.'
        WHEN event ~ '[\n\r]' THEN 'The event''s name must be one line: it must not contain a line end.'
        WHEN id ~ '[\n\r]' THEN 'The event''s id must be one line: it must not contain a line end.'
        WHEN retry NOT BETWEEN 100 AND 3600000
            THEN 'The event''s retry must be a number of milliseconds, from 100 to 3600000 (an hour).'
    END;
BEGIN
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = wrong;
    END IF;
    IF getdatabaseencoding() <> 'UTF8' THEN  -- otherwise number_v1() would refuse it later, at the commit
        PERFORM convert_to(concat(data, event, id, comment), 'UTF8');
    END IF;
    INSERT INTO flask_pg_sse.pending (channel, fields, data) VALUES (
        channel, ARRAY[json_strip_nulls(json_build_object(
            'event', nullif(event, ''), 'id', id, 'retry', retry, 'comment', comment))], ARRAY[coalesce(data, '')]);
END $function$;

-- The functions that read the log have settings for the planner, so no plan depends on statistics, or on how large the
-- log was when a session cached the plan. Without sorts, bitmaps and scans of whole tables, only an index in the order of
-- ORDER BY is left. `ORDER BY id` leads to the primary key, and `(channel, id)`, compared as a row, to the other index.
-- With `channel = X` the planner could take the primary key instead, and read all other channels' events. What is turned
-- off and used all the same (for `retention`) seems so dear that PostgreSQL would compile it, if not for `jit = off`.

-- The head of the log. A reader that has read up to it has seen every committed event. (The sequence's last value is not
-- used, because it may be the id of an event whose transaction is still open.)
CREATE FUNCTION flask_pg_sse.head_v1() RETURNS bigint
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $function$
BEGIN
    RETURN (
        SELECT greatest(r.pruned_through, (SELECT e.id FROM flask_pg_sse.event e ORDER BY e.id DESC LIMIT 1))
        FROM flask_pg_sse.retention r);
END $function$;

-- Send the head and the caller's number to the control channel. NOTIFY delivers in the order of commits. So when the
-- caller receives this from its own connection, it has received every event up to the head.
CREATE FUNCTION flask_pg_sse.beat_v1(nonce text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT pg_notify('flask_pg_sse', json_build_object('beat', $1, 'head', flask_pg_sse.head_v1())::text)
$function$;

-- The version in a form that a dump without rows includes. A later version's installation replaces this function. A default
-- of the column is not used, because changing it takes a lock on which publishers and an upgrade could deadlock.
CREATE FUNCTION flask_pg_sse.version_v1() RETURNS integer
LANGUAGE sql IMMUTABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT 1
$function$;

-- The version and the key of the installation.
CREATE FUNCTION flask_pg_sse.installed_v1() RETURNS TABLE (version integer, key bytea)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT i.version, i.key FROM flask_pg_sse.installation i
$function$;

-- Tell for each id why a stream cannot go on after it, or NULL if it can. Every id that a client can have is the id of an
-- event, or pruned_through. So one that is neither, and was not pruned, has been undone: a replica that lagged was
-- promoted, or a backup was restored. An id that lies more than a day in the future was made up.
CREATE FUNCTION flask_pg_sse.look_v1(ids bigint[])
RETURNS TABLE (id bigint, refusal text, pruned_through bigint, head bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT asked.id,
        CASE
            WHEN asked.id IN (0, log.pruned_through, next.id) THEN NULL
            WHEN asked.id < log.pruned_through THEN 'too-old'
            WHEN asked.id > greatest(log.head, log.clock) + 86400 * 4000000::bigint THEN 'future-id'
            ELSE 'undone'
        END,
        log.pruned_through, log.head
    FROM unnest(ids) AS asked (id)
    CROSS JOIN (
        SELECT r.pruned_through, flask_pg_sse.head_v1() AS head,
            (extract(epoch FROM clock_timestamp() - timestamptz '2020-01-01 00:00+00') * 4000000)::bigint AS clock
        FROM flask_pg_sse.retention r OFFSET 0
    ) AS log
    LEFT JOIN LATERAL (
        SELECT e.id FROM flask_pg_sse.event e WHERE e.id >= greatest(asked.id, log.pruned_through) ORDER BY e.id LIMIT 1
    ) AS next ON true;
END $function$;

-- Read the events of some channels after an id: a page of at most max_bytes, or one larger event alone. An event that is
-- also larger than max_event comes without its content, with its size. A last row has no event, but the log's head, the id
-- up to which the page is complete. If there can be no page after this id, it has the reason and, if the id was undone, the
-- last id before it. All of it is read in one snapshot, so a page never misses events that are pruned while it is read.
CREATE FUNCTION flask_pg_sse.page_v1(channels text[], after bigint, max_bytes bigint, max_event bigint)
RETURNS TABLE (id bigint, channel text, fields json, data text, size bigint, upto bigint, head bigint, refusal text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    most constant bigint := least(500, max_bytes / 64 + 1);  -- events; a stream needs so many bytes for the smallest
    names text[] := ARRAY(SELECT DISTINCT name FROM unnest(channels) AS name);
    number constant bigint := cardinality(names);
    near constant bigint := least(20 * number, 5000);
    top bigint;
    complete bigint;
    ids bigint[];
    looked_at bigint;
    afters bigint[];
    each bigint := greatest(most / greatest(number, 1), 1);
    found_names text[];
    found_ids bigint[];
    previous bigint;
    total bigint := 0;
BEGIN
    SELECT l.head, l.refusal, greatest(after, l.pruned_through) INTO top, refusal, after
    FROM flask_pg_sse.look_v1(ARRAY[after]) AS l;
    IF refusal IS NOT NULL THEN
        head := top;
        IF refusal <> 'too-old' THEN
            upto := (SELECT e.id FROM flask_pg_sse.event e WHERE e.id < after ORDER BY e.id DESC LIMIT 1);
        END IF;
        RETURN NEXT;
        RETURN;
    END IF;
    -- First the next events of all channels, for no more than it costs to look into the index for each channel. Their end
    -- is the log's for most streams, and many of them are wanted where many channels are.
    SELECT coalesce(array_agg(e.id ORDER BY e.id) FILTER (WHERE e.channel IN (SELECT unnest(names))), '{}'), count(*),
        max(e.id)
    INTO ids, looked_at, complete
    FROM (SELECT e.id, e.channel FROM flask_pg_sse.event e WHERE e.id > after ORDER BY e.id LIMIT near) AS e;
    IF looked_at < near OR number = 0 THEN
        complete := top;
    ELSIF cardinality(ids) * number < 20 * looked_at THEN
        -- Merge the channels: a few ids of each, and twice as many, time and again, of those that may have more among the
        -- first ids of all.
        ids := '{}';
        afters := array_fill(after, ARRAY[number::integer]);
        LOOP
            SELECT array_agg(e.name), array_agg(e.id) INTO found_names, found_ids
            FROM (
                SELECT open.name, e.id FROM unnest(names, afters) AS open (name, after)
                CROSS JOIN LATERAL (
                    SELECT e.id FROM flask_pg_sse.event e
                    WHERE (e.channel, e.id) > (open.name, open.after) AND (e.channel, e.id) <= (open.name, top)
                    ORDER BY e.channel, e.id LIMIT each
                ) AS e
            ) AS e;
            ids := ARRAY(SELECT one FROM unnest(ids || found_ids) AS one ORDER BY one LIMIT most);
            complete := CASE WHEN cardinality(ids) < most THEN top ELSE ids[most] END;
            SELECT array_agg(f.name), array_agg(f.last) INTO names, afters
            FROM (
                SELECT f.name, max(f.id) AS last FROM unnest(found_names, found_ids) AS f (name, id)
                GROUP BY f.name HAVING count(*) = each
            ) AS f WHERE f.last < complete;
            EXIT WHEN names IS NULL;
            each := 2 * each;
        END LOOP;
    END IF;
    -- No more rows are read than the page takes, and the 50 that PL/pgSQL reads ahead.
    FOR id, channel, fields, data, size IN
        SELECT e.id, e.channel, e.fields, e.data, octet_length(e.fields::text) + coalesce(octet_length(e.data), 0)
        FROM flask_pg_sse.event e WHERE e.id = ANY (ids) ORDER BY e.id
    LOOP
        total := total + size;
        IF total > max_bytes AND previous IS NOT NULL THEN
            complete := previous;
            EXIT;
        END IF;
        IF size > greatest(max_bytes, max_event) THEN
            fields := '{}';
            data := NULL;
        END IF;
        RETURN NEXT;
        previous := id;
    END LOOP;
    SELECT NULL, NULL, NULL, NULL, NULL, complete, top INTO id, channel, fields, data, size, upto, head;
    RETURN NEXT;
END $function$;

-- Read the last events of some channels, each up to its own id: at most 1,000 events and max_bytes for each channel. These
-- are the events that streams missed during a short disconnection. In every row, the channel's events are complete after
-- the id complete_after.
CREATE FUNCTION flask_pg_sse.tail_v1(channels text[], uptos bigint[], max_bytes bigint)
RETURNS TABLE (channel text, complete_after bigint, id bigint, fields json, data text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    pruned constant bigint := (SELECT r.pruned_through FROM flask_pg_sse.retention r);
    afters bigint[] := '{}';
    after bigint;
    number bigint;
    total bigint;
    size bigint;
    last bigint;
BEGIN
    FOR wanted IN 1 .. coalesce(cardinality(channels), 0) LOOP
        after := pruned;
        number := 0;
        total := 0;
        FOR last, size IN
            SELECT e.id, octet_length(e.fields::text) + coalesce(octet_length(e.data), 0) FROM flask_pg_sse.event e
            WHERE (e.channel, e.id) > (channels[wanted], pruned) AND (e.channel, e.id) <= (channels[wanted], uptos[wanted])
            ORDER BY e.channel DESC, e.id DESC
        LOOP
            number := number + 1;
            total := total + size;
            IF number > 1000 OR total > max_bytes THEN
                after := last;
                EXIT;
            END IF;
        END LOOP;
        afters := afters || after;
    END LOOP;
    RETURN QUERY
    SELECT wanted.channel, wanted.after, e.id, e.fields, e.data
    FROM unnest(channels, uptos, afters) AS wanted (channel, upto, after)
    LEFT JOIN LATERAL (
        SELECT e.id, e.fields, e.data FROM flask_pg_sse.event e
        WHERE (e.channel, e.id) > (wanted.channel, wanted.after) AND (e.channel, e.id) <= (wanted.channel, wanted.upto)
        ORDER BY e.channel, e.id
    ) AS e ON true;
END $function$;

-- Delete the oldest events, at most `batch`. Return how many, or NULL while another session is deleting. The first event
-- younger than max_age ends the deletion. The last older event before it is deleted, with all events before that one. The
-- cut is an id and not a time, so the rest of the log has no holes. An event dated in the future, by a clock that was
-- wrong, counts as old as the event after it.
--
-- The DELETE has no ORDER BY that leads to the primary key. So it is planned each time, for the table as it is then.
CREATE FUNCTION flask_pg_sse.prune_v1(max_age interval, batch integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off
SET plan_cache_mode = force_custom_plan AS $function$
DECLARE
    pruned bigint;
    cut bigint;
    last bigint;
    deleted integer := 0;
BEGIN
    BEGIN
        LOCK TABLE flask_pg_sse.pruning IN SHARE UPDATE EXCLUSIVE MODE NOWAIT;
    EXCEPTION WHEN lock_not_available THEN
        RETURN NULL;
    END;
    -- Lock `pending` first, because publishers lock `pending` and then `event`. With the other order an upgrade, which
    -- locks both, would deadlock.
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
    ) THEN  -- the whole batch is dated in the future, and the event after it has expired
        cut := last;
    END IF;
    DELETE FROM flask_pg_sse.event e WHERE e.id > pruned AND e.id <= cut;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    IF deleted > 0 THEN
        UPDATE flask_pg_sse.retention r SET pruned_through = cut;
        -- Processes keep recent events in memory, and forget these: a resume must not depend on the worker.
        PERFORM pg_notify('flask_pg_sse', json_build_object('pruned', cut)::text);
    END IF;
    -- Rows written while triggers do not fire (session_replication_role = replica) would stay forever. Delete them once a
    -- round, with its last batch: after a burst the table is large, and all of it must be scanned.
    IF deleted < batch THEN
        DELETE FROM flask_pg_sse.pending p WHERE p.created_at < now() - interval '1 hour';
    END IF;
    RETURN deleted;
END $function$;

-- What `flask sse doctor` looks at, for roles that cannot read the tables: the rows of the tables of one row, the age of
-- the oldest event in seconds, committed rows of `pending` (where the trigger did not fire), the last id that was drawn and
-- the highest one, triggers that are not as repair.sql sets them, and the channels of the last thousand events,
-- in the order of each one's last event.
CREATE FUNCTION flask_pg_sse.examine_v1()
RETURNS TABLE (installations bigint, retentions bigint, oldest double precision, pending bigint, drawn bigint,
    highest bigint, triggers text, channels text[])
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT (SELECT count(*) FROM flask_pg_sse.installation), (SELECT count(*) FROM flask_pg_sse.retention),
        (SELECT extract(epoch FROM clock_timestamp() - e.created_at)::double precision
            FROM flask_pg_sse.event e ORDER BY e.id LIMIT 1),
        (SELECT count(*) FROM flask_pg_sse.pending), (SELECT s.last_value FROM flask_pg_sse.event_id s),
        (SELECT e.id FROM flask_pg_sse.event e ORDER BY e.id DESC LIMIT 1),
        (SELECT string_agg(concat(m.relation, '.', m.name), ', ') FROM (VALUES
                ('installation', 'one_row', 'A'), ('retention', 'one_row', 'A'), ('event', 'replicated', 'R'),
                ('pending', 'publish', 'O')
            ) AS m (relation, name, state)
            LEFT JOIN pg_trigger t ON t.tgrelid = to_regclass('flask_pg_sse.' || m.relation) AND t.tgname = m.name
            WHERE t.tgenabled::text IS DISTINCT FROM m.state),
        ARRAY(SELECT e.channel FROM (
                SELECT e.id, e.channel FROM flask_pg_sse.event e ORDER BY e.id DESC LIMIT 1000
            ) AS e WHERE NOT starts_with(e.channel, 'flask_pg_sse') GROUP BY e.channel ORDER BY max(e.id));
END $function$;

-- Erase events before their time: those of a channel, those with some ids, or those of the ids that are the channel's.
-- Return how many. The rows and their ids stay, because a client may stand on each of them: see look_v1(). Channel, fields
-- and data go. Commands of the control channel stay.
--
-- Workers keep recent events in memory, so they are told, by an event of the control channel. It has a signature and an id,
-- so no other role can send it, and workers that are away read it from the log later. The plan is made each time, because
-- what is not asked for is not looked at.
CREATE FUNCTION flask_pg_sse.erase(channel text DEFAULT NULL, ids bigint[] DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan AS $function$
#variable_conflict use_variable
DECLARE
    number bigint;
    last bigint;
BEGIN
    IF channel IS NULL AND ids IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'Name a channel, ids of events, or both.';
    END IF;
    LOCK TABLE flask_pg_sse.pending IN ROW EXCLUSIVE MODE;  -- before `event`, as publishers do: see prune_v1()
    WITH erased AS (
        UPDATE flask_pg_sse.event e SET channel = '', fields = '{}', data = NULL
        WHERE (channel IS NULL OR e.channel = channel) AND (ids IS NULL OR e.id = ANY (ids))
            AND e.channel NOT IN ('', 'flask_pg_sse')
        RETURNING e.id
    )
    SELECT count(*), max(e.id) INTO number, last FROM erased e;
    IF number > 0 THEN
        INSERT INTO flask_pg_sse.pending (channel, fields, data) VALUES ('flask_pg_sse', ARRAY['{}'::json],
            ARRAY[json_build_object('erased', last, 'channel', channel)::text]);
    END IF;
    RETURN number;
END $function$;
