@variables@
    logged boolean;
    found_now pg_catalog.text;
    events refcursor;
    destination pg_catalog.text;
    heads pg_catalog.json[];
    data pg_catalog.text[];
    keys pg_catalog.text[];
    notify_name pg_catalog.text;
    payload pg_catalog.text;
    illegal pg_catalog.text;
    number_illegal bigint := 0;
    number_cut bigint := 0;
    number_lost bigint := 0;
    advice pg_catalog.text := 'Run "flask sse watch" for it again, or "flask sse unwatch".';
    this pg_catalog.text := concat('flask_pg_sse, changes of ', TG_RELID::regclass, chr(58), ' ');
BEGIN
    SELECT EXISTS (
        SELECT FROM pg_namespace s JOIN pg_proc f ON f.pronamespace = s.oid
        WHERE s.nspname = 'flask_pg_sse' AND f.proname = 'enqueue_v1' AND f.proowner = s.nspowner AND f.prosecdef
            AND (@trusted@ OR pg_get_userbyid(s.nspowner) = log_owner)
            AND has_schema_privilege(s.oid, 'USAGE') AND has_function_privilege(f.oid, 'EXECUTE')
    ), (
        SELECT string_agg(concat(a.attname, ' ', a.atttypid, a.attgenerated), ',' ORDER BY a.attname::text COLLATE "C")
        FROM pg_attribute a
        WHERE a.attrelid = TG_RELID AND a.attname = ANY (needs::name[]) AND a.attnum > 0 AND NOT a.attisdropped
    )
    INTO logged, found_now;
    IF NOT logged AND to_regnamespace('flask_pg_sse') IS NOT NULL THEN
        RAISE WARNING USING MESSAGE = concat(this, 'the event log is there, but the role ', quote_ident(current_user),
            ' may not use it or does not trust its owner. The events are sent without it.'), HINT = advice;
    END IF;

    IF TG_OP = 'TRUNCATE' THEN
        IF cardinality(channel) > 1 THEN
            RAISE WARNING USING MESSAGE = concat(this, 'TRUNCATE was not sent, because the channel depends on the row.');
            RETURN NULL;
        END IF;
        OPEN events FOR SELECT channel[1], ARRAY['{"event":"truncate"}']::json[], ARRAY['{}'], ARRAY['{}'];
    ELSIF found_now = known AND NOT look_at_casts THEN
        CASE TG_OP@open@
        END CASE;
    ELSE
        -- A column was dropped, renamed or given another type, or the database was restored. No statement of the table's
        -- writers fails for it.
        operation := TG_OP;
        relation := TG_RELID;
        row_source := CASE TG_LEVEL WHEN 'ROW' THEN '($1).*' END;
@query@
        IF missing IS NOT NULL THEN
            RAISE WARNING USING MESSAGE = concat(this, 'there is no column ', missing, ' any more. The events are sent ',
                'without it.'), HINT = advice;
        END IF;
        IF casts IS NOT NULL THEN
            RAISE WARNING USING MESSAGE = concat(this, 'nothing was sent, because the condition might call functions of ',
                'other roles with the rights of ', quote_ident(current_user), chr(58), ' ', casts), HINT = advice;
            RETURN NULL;
        END IF;
        OPEN events FOR EXECUTE query USING NEW, OLD;
    END IF;

    LOOP
        FETCH events INTO destination, heads, data, keys;
        EXIT WHEN NOT FOUND;
        IF octet_length(convert_to(destination, 'UTF8')) NOT BETWEEN 1 AND 255 OR starts_with(destination, 'flask_pg_sse')
            OR encode(convert_to(destination, 'UTF8'), 'hex') ~ '^(..)*([01].|7f|c2[89].)'
        THEN
            illegal := coalesce(illegal, destination);
            number_illegal := number_illegal + cardinality(data);
        ELSIF logged THEN
            PERFORM flask_pg_sse.enqueue_v1(destination, heads, data);
        ELSE
            notify_name := CASE WHEN octet_length(convert_to(destination, 'UTF8')) <= 63 THEN destination ELSE concat(
                'flask_pg_sse', chr(58), left(encode(sha256(convert_to(destination, 'UTF8')), 'hex'), 40)) END;
            FOR number IN 1 .. cardinality(data) LOOP
                -- The wire form of codec.py. Its "n" makes equal events of a transaction two: NOTIFY would send one.
                payload := concat(chr(30), '1{"n":"', left(gen_random_uuid()::text, 13), '",',
                    substr(heads[number]::text, 2), chr(10));
                IF octet_length(payload) + octet_length(data[number]) <= 7999 THEN
                    PERFORM pg_notify(notify_name, concat(payload, data[number]));
                ELSIF keys[number] <> '{}' AND keys[number] <> '{"old":{}}'
                    AND octet_length(payload) + octet_length(keys[number]) <= 7999
                THEN
                    PERFORM pg_notify(notify_name, concat(payload, keys[number]));
                    number_cut := number_cut + 1;
                ELSE
                    number_lost := number_lost + 1;
                END IF;
            END LOOP;
        END IF;
    END LOOP;
    CLOSE events;  -- each subtransaction walks through all that are open
    IF number_illegal > 0 THEN
        RAISE WARNING USING MESSAGE = concat(this, number_illegal, ' events were not sent, because ',
            quote_literal(left(illegal, 100)), ' is no name for a channel.'),
            HINT = 'A name has 1 to 255 bytes, no control characters, and does not begin with "flask_pg_sse".';
    END IF;
    IF number_cut + number_lost > 0 THEN
        RAISE WARNING USING MESSAGE = concat(this, number_cut + number_lost, ' events are larger than NOTIFY can send. ',
            number_cut, ' were sent with the key columns alone, and ', number_lost, ' not at all.'),
            HINT = 'Install the event log (flask sse init), which sends events of any size; or name fewer columns.';
    END IF;
    RETURN NULL;
EXCEPTION
    -- A condition that fails for some row, or a column that it needs is gone. The table's writer must not suffer for it.
    WHEN data_exception OR syntax_error_or_access_rule_violation OR feature_not_supported THEN
        RAISE WARNING USING MESSAGE = concat(this, 'nothing was sent: ', SQLERRM), HINT = advice;
        RETURN NULL;
END
