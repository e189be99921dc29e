-- Send the changes of a table as events. triggers.py fills in the values between signs, and documents them.
--
-- One statement, without anything that drivers take for a parameter, for the same reasons as in schema.py.
DO $do$
DECLARE
    own_path pg_catalog.text := pg_catalog.current_setting('search_path');
    schema_name pg_catalog.text := @schema@;
    table_name pg_catalog.text := @table@;
    channel pg_catalog.text[] := @channel@;  -- the text between columns, and the columns' names, by turns
    mark pg_catalog.text := @mark@;
    operations pg_catalog.text[] := @on@;
    columns pg_catalog.text[] := @columns@;
    condition pg_catalog.text := @when@;
    log_owner pg_catalog.text := @log_owner@;
    about pg_catalog.text := @about@;
    relation pg_catalog.oid;
    by_row boolean;
    removed integer := 0;
    wrong pg_catalog.text;
    hint pg_catalog.text;
    name pg_catalog.text;
    source pg_catalog.text;
    statement pg_catalog.text;
    opened pg_catalog.text := '';
@variables@
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
@find@
    IF relation IS NULL THEN
        SELECT concat('Did you mean ', quote_ident(n.nspname), '.', quote_ident(c.relname), '?') INTO hint
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND (lower(c.relname) = lower(table_name)
            OR concat(n.nspname, '.', c.relname) = table_name)
        ORDER BY n.nspname <> schema_name LIMIT 1;
        RAISE EXCEPTION USING ERRCODE = 'undefined_table', HINT = coalesce(hint, 'Names are taken exactly as they are.'),
            MESSAGE = concat('there is no table ', quote_ident(table_name), ' in the schema ', quote_ident(schema_name));
    END IF;
    SELECT c.relkind = 'p' OR c.relispartition, CASE
        WHEN n.nspname = 'flask_pg_sse' THEN 'is a part of the event log itself'
        WHEN c.relpersistence = 't' THEN 'is a temporary table'
        WHEN c.relkind NOT IN ('r', 'p') THEN 'is not a table with rows of its own'
    END INTO by_row, wrong
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type',
            MESSAGE = concat(relation::regclass, ' ', wrong, ', so its changes cannot be watched');
    END IF;

    -- All columns of today, if none are named. Columns that are added later are not sent: they may be secret.
    columns := coalesce(columns, ARRAY(
        SELECT a.attname::text FROM pg_attribute a
        WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum));
    SELECT string_agg(quote_ident(u.name), ', ') INTO wrong
    FROM (
        SELECT unnest(columns) UNION SELECT part FROM unnest(channel) WITH ORDINALITY AS p (part, number) WHERE number & 1 = 0
    ) AS u (name)
    WHERE NOT EXISTS (SELECT FROM pg_attribute a
        WHERE a.attrelid = relation AND a.attname::text = u.name AND a.attnum > 0 AND NOT a.attisdropped);
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_column',
            MESSAGE = concat('the table ', relation::regclass, ' has no column ', wrong),
            HINT = 'Names are taken exactly as they are.';
    END IF;
    IF 'old' = ANY (columns) AND operations && ARRAY['update', 'delete'] THEN
        RAISE EXCEPTION USING ERRCODE = 'duplicate_column',
            MESSAGE = 'a column is called "old", as the part of an event with the old values',
            HINT = 'Name the other columns (--columns), or watch inserts alone (--on insert).';
    END IF;
    -- Otherwise the triggers would send past the log, by NOTIFY alone.
    IF EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname = 'flask_pg_sse' AND p.proname = 'enqueue_v1'
            AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_function_privilege(p.oid, 'EXECUTE')))
    THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = concat('the role ', quote_ident(current_user), ' may not send events through the event log'),
            HINT = concat('Run "flask sse init --grant-to ', current_user, '" as the role that owns the log.');
    END IF;

@remove@
    row_source := CASE WHEN by_row THEN 'NEW.*' END;
    FOREACH operation IN ARRAY ARRAY['INSERT', 'UPDATE', 'DELETE'] LOOP
@query@
        IF lower(operation) = ANY (operations) THEN
            opened := concat(opened, E'\n            WHEN ', quote_literal(operation), ' THEN OPEN events FOR', E'\n', query, ';');
        END IF;
    END LOOP;
    IF casts IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = concat(
            'the condition might call functions of other roles with the rights of ', quote_ident(current_user), chr(58), ' ',
            casts), HINT = 'Watch the table as its owner, or without a condition.';
    END IF;
    IF condition IS NOT NULL THEN
        source := concat('(SELECT (NULL::', relation::regclass, ').*) AS ');
        -- It is evaluated with rows of NULLs, as inserts and deletes have one: a type without "=" shows only then.
        EXECUTE concat('SELECT FROM ', source, 'new, ', source, 'old WHERE (', condition, E'\n)');
    END IF;
    FOR number IN 0 .. 99 LOOP  -- the name may be taken: a table was renamed, and another one has its name now
        name := concat('flask_pg_sse_watch_', left(encode(sha256(convert_to(concat(
            table_name, chr(10), mark, CASE WHEN number > 0 THEN number END), 'UTF8')), 'hex'), 16));
        EXIT WHEN NOT EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname = schema_name AND p.proname = name);
    END LOOP;
    name := concat(quote_ident(schema_name), '.', name);
    EXECUTE concat('CREATE FUNCTION ', name, '() RETURNS trigger ',
        'LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp ',
        'SET plan_cache_mode = force_generic_plan AS ', quote_literal(concat(
        '-- Made by flask sse watch. Change it by that command or by trigger_sql(), not by hand.
#variable_conflict use_column
DECLARE
    columns text[] := ', quote_literal(columns::text), ';
    channel text[] := ', quote_literal(channel::text), ';
    condition text := ', quote_nullable(condition), ';
    log_owner text := ', quote_nullable(log_owner), ';
    relation oid;
    needs text[] := ', quote_literal(needed::text), ';
    known text := ', quote_literal(fingerprint), ';
    look_at_casts boolean := ', (condition IS NOT NULL AND foreign_types)::text, ';', $body$
@body_start@$body$, opened, $body$@body_end@
$body$)));
    -- The function sends with the rights of its owner. With EXECUTE, a role could use it on a table of its own.
    FOR statement IN
        SELECT DISTINCT concat('REVOKE ALL ON FUNCTION ', name, '() FROM ', coalesce(quote_ident(r.rolname), 'PUBLIC'))
        FROM pg_proc p CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        LEFT JOIN pg_roles r ON r.oid = a.grantee
        WHERE p.oid = concat(name, '()')::regprocedure AND a.grantee <> p.proowner
    LOOP
        EXECUTE statement;
    END LOOP;
    EXECUTE concat('COMMENT ON FUNCTION ', name, '() IS ',
        quote_literal(about::jsonb || jsonb_build_object('sent', columns)));

    -- Statement-level triggers with all rows of a statement are many times cheaper than a call for each row. But on a
    -- partitioned table they would miss the statements that name a partition, and later partitions would have none.
    IF by_row THEN
        EXECUTE concat('CREATE TRIGGER flask_pg_sse_', mark, '_row AFTER ', array_to_string(operations, ' OR '), ' ON ',
            relation::regclass, ' FOR EACH ROW EXECUTE FUNCTION ', name, '()');
    ELSE
        FOR statement IN
            SELECT concat('CREATE TRIGGER flask_pg_sse_', mark, '_', o, ' AFTER ', o, ' ON ', relation::regclass,
                ' REFERENCING', CASE WHEN o <> 'delete' THEN ' NEW TABLE AS new_rows' END,
                CASE WHEN o <> 'insert' THEN ' OLD TABLE AS old_rows' END,
                ' FOR EACH STATEMENT EXECUTE FUNCTION ', name, '()')
            FROM unnest(operations) AS o
        LOOP
            EXECUTE statement;
        END LOOP;
    END IF;
    IF 'delete' = ANY (operations) THEN
        EXECUTE concat('CREATE TRIGGER flask_pg_sse_', mark, '_truncate AFTER TRUNCATE ON ', relation::regclass,
            ' FOR EACH STATEMENT EXECUTE FUNCTION ', name, '()');
    END IF;
    PERFORM pg_catalog.set_config('search_path', own_path, true);
END $do$;
