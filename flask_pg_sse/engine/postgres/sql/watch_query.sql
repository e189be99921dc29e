    -- Make the query that reads the changed rows and returns the events, from `relation`, `operation` and `row_source`.
    --
    -- The function that runs it has its owner's rights, and the table may be another role's. So values of types that are
    -- not PostgreSQL's own are never converted by a cast, which may be that role's function, but by the type's output
    -- function.
    SELECT string_agg(concat(c.source, ' AS ', c.ident), ', ' ORDER BY c.number), coalesce(array_agg(c.name), '{}'),
        string_agg(concat(c.name, ' ', c.type), ',' ORDER BY c.name COLLATE "C"), bool_or(NOT c.own),
        string_agg(c.value_new, ', ' ORDER BY c.number) FILTER (WHERE c.sent OR c.key),
        string_agg(c.value_old, ', ' ORDER BY c.number) FILTER (WHERE c.sent OR c.key),
        coalesce(string_agg(c.value_new, ', ' ORDER BY c.number) FILTER (WHERE c.key), ''),
        coalesce(string_agg(c.value_old, ', ' ORDER BY c.number) FILTER (WHERE c.key), ''),
        string_agg(c.cast_by, ', '),
        (SELECT string_agg(quote_ident(u), ', ') FROM unnest(columns) AS u
            WHERE u <> ALL (coalesce(array_agg(c.name), '{}')))
    INTO source_columns, needed, fingerprint, foreign_types, row_new, row_old, key_new, key_old, casts, missing
    FROM (
        SELECT a.attname::text AS name, a.attnum AS number, i.ident, a.attname::text = ANY (columns) AS sent, b.own,
            concat(a.atttypid, a.attgenerated) AS type,
            coalesce(a.attnum = ANY (k.numbers), false) AS key,
            -- Triggers do not see the value of a virtual column.
            CASE a.attgenerated WHEN 'v' THEN pg_get_expr(d.adbin, d.adrelid) ELSE concat('r.', i.ident) END AS source,
            CASE WHEN b.own THEN concat('new.', i.ident)
                ELSE concat('CASE WHEN new.', i.ident, ' IS NOT NULL THEN concat(new.', i.ident, ') END AS ', i.ident)
            END AS value_new,
            CASE WHEN b.own THEN concat('old.', i.ident)
                ELSE concat('CASE WHEN old.', i.ident, ' IS NOT NULL THEN concat(old.', i.ident, ') END AS ', i.ident)
            END AS value_old,
            CASE WHEN NOT b.own AND condition IS NOT NULL THEN (
                SELECT string_agg(u.name, ', ') FROM (
                    SELECT p.oid::regprocedure::text FROM pg_cast x JOIN pg_proc p ON p.oid = x.castfunc
                    WHERE x.castsource IN (t.oid, t.typelem, t.typbasetype) AND NOT @cast_trusted@
                    UNION ALL  -- the owner of a row type can give its columns other types
                    SELECT y.oid::regtype::text FROM pg_type y
                    WHERE y.oid IN (t.oid, t.typelem, t.typbasetype) AND y.typtype = 'c' AND NOT @type_trusted@
                ) AS u (name))
            END AS cast_by
        FROM pg_attribute a
        JOIN pg_type t ON t.oid = a.atttypid
        CROSS JOIN LATERAL (
            SELECT y.typnamespace = 'pg_catalog'::regnamespace AND y.typtype IN ('b', 'r', 'm') AS own
            FROM pg_type y WHERE y.oid = CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END
        ) AS b
        CROSS JOIN LATERAL (SELECT quote_ident(a.attname)) AS i (ident)
        LEFT JOIN pg_attrdef d ON a.attgenerated = 'v' AND d.adrelid = a.attrelid AND d.adnum = a.attnum
        LEFT JOIN LATERAL (
            SELECT (x.indkey::smallint[])[0 : x.indnkeyatts - 1] AS numbers FROM pg_index x
            WHERE x.indrelid = relation AND (x.indisprimary OR x.indisreplident) AND x.indisvalid
            ORDER BY x.indisprimary DESC LIMIT 1
        ) AS k ON true
        WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped
    ) AS c
    WHERE c.sent OR c.key OR condition IS NOT NULL OR c.name = ANY (channel);

    SELECT concat('CASE WHEN true', string_agg(p.is_new, ''), ' THEN concat(', string_agg(p.part_new, ', ' ORDER BY n),
            ') END'),
        concat('CASE WHEN true', string_agg(p.is_old, ''), ' THEN concat(', string_agg(p.part_old, ', ' ORDER BY n),
            ') END')
    INTO channel_new, channel_old
    FROM (
        SELECT u.n,
            CASE WHEN u.n & 1 = 0 THEN concat(' AND new.', quote_ident(u.part), ' IS NOT NULL') END AS is_new,
            CASE WHEN u.n & 1 = 0 THEN concat(' AND old.', quote_ident(u.part), ' IS NOT NULL') END AS is_old,
            CASE WHEN u.n & 1 = 0 THEN concat('new.', quote_ident(u.part)) ELSE quote_literal(u.part) END AS part_new,
            CASE WHEN u.n & 1 = 0 THEN concat('old.', quote_ident(u.part)) ELSE quote_literal(u.part) END AS part_old
        FROM unnest(channel) WITH ORDINALITY AS u (part, n)
    ) AS p;

    -- The names NEW and OLD are there for the condition in every operation; what an operation does not have is NULL.
    -- PostgreSQL puts the old and the new row of an UPDATE into both tables at the same time, so the rows at the same
    -- place belong together, also if there is no key, or if the key was changed.
    new_rows := CASE WHEN row_source IS NULL THEN 'new_rows AS r' ELSE concat('(SELECT ', row_source, ') AS r') END;
    old_rows := CASE WHEN row_source IS NULL THEN 'old_rows AS r'
        ELSE concat('(SELECT ', CASE row_source WHEN 'NEW.*' THEN 'OLD.*' ELSE '($2).*' END, ') AS r') END;
    sources := concat(' FROM (SELECT ', source_columns, ', row_number() OVER () AS "row of flask_pg_sse" FROM ');
    sources := CASE operation
        WHEN 'INSERT' THEN concat(sources, new_rows, ') AS new LEFT JOIN (SELECT ', source_columns, ' FROM ', new_rows,
            ' WHERE false) AS old ON true')
        WHEN 'DELETE' THEN concat(sources, old_rows, ') AS old LEFT JOIN (SELECT ', source_columns, ' FROM ', old_rows,
            ' WHERE false) AS new ON true')
        ELSE concat(sources, new_rows, ') AS new JOIN (SELECT ', source_columns,
            ', row_number() OVER () AS "row of flask_pg_sse" FROM ', old_rows,
            ') AS old USING ("row of flask_pg_sse")')
    END;
    -- JSON objects: of all that is sent, and of the key alone, for where the rest does not fit. The lists may be empty.
    opening := '(SELECT row_to_json(flask_pg_sse) FROM (SELECT ';
    closing := ') AS flask_pg_sse)';
    row_old := concat(opening, row_old, closing, ' AS old');
    old_key := concat(opening, key_old, closing, ' AS old');
    inserted := concat(opening, row_new, closing, ' AS data, ', opening, key_new, closing, ' AS key');
    updated := concat(opening, concat_ws(', ', row_new, row_old), closing, ' AS data, ',
        opening, concat_ws(', ', nullif(key_new, ''), old_key), closing, ' AS key');
    deleted := concat(opening, concat_ws(', ', nullif(key_old, ''), row_old), closing, ' AS data, ',
        opening, concat_ws(', ', nullif(key_old, ''), old_key), closing, ' AS key');
    inserted := concat($$SELECT 'insert' AS event, $$, channel_new, ' AS channel, ', inserted);
    updated := concat($$SELECT 'update' AS event, $$, channel_new, ' AS channel, ', updated);
    deleted := concat($$SELECT 'delete' AS event, $$, channel_old, ' AS channel, ', deleted);
    lines := CASE operation WHEN 'INSERT' THEN inserted WHEN 'DELETE' THEN deleted ELSE updated END;
    IF operation = 'UPDATE' AND cardinality(channel) > 1 THEN
        -- A row that moves from one channel to another one leaves the first, and appears in the second: the listeners of
        -- one channel must not read the other's values.
        lines := concat(updated, ' WHERE ', channel_new, ' = ', channel_old,
            ' UNION ALL ', deleted, ' WHERE ', channel_old, ' IS DISTINCT FROM ', channel_new,
            ' UNION ALL ', inserted, ' WHERE ', channel_old, ' IS DISTINCT FROM ', channel_new);
    END IF;
    query := concat($$SELECT e.channel, array_agg(CAST(concat('{"event":"', e.event, '"}') AS json) ORDER BY e.n), $$,
        'array_agg(CAST(e.data AS text) ORDER BY e.n), array_agg(CAST(e.key AS text) ORDER BY e.n) FROM (SELECT ',
        '"row of flask_pg_sse" AS n, l.*', sources, ' CROSS JOIN LATERAL (', lines, ') AS l',
        CASE WHEN condition IS NOT NULL THEN concat(' WHERE (', condition, E'\n)') END,
        ') AS e WHERE e.channel IS NOT NULL GROUP BY e.channel, e.n / 1000 ORDER BY min(e.n)');
