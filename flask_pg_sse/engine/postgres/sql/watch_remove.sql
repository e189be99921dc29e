    -- Triggers on partitions go with those of their table. Functions without a trigger are left by tables that were dropped.
    FOR statement IN
        SELECT concat('DROP TRIGGER ', quote_ident(t.tgname), ' ON ', t.tgrelid::regclass)
        FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
        WHERE t.tgrelid = relation AND NOT t.tgisinternal AND t.tgparentid = 0
            AND t.tgname ~ '^flask_pg_sse_[0-9a-f]{8}_' AND p.proname ~ '^flask_pg_sse_watch_[0-9a-f]{16}$'
            AND (mark IS NULL OR starts_with(t.tgname, concat('flask_pg_sse_', mark, '_')))
    LOOP
        EXECUTE statement;
        removed := removed + 1;
    END LOOP;
    FOR statement IN
        SELECT concat('DROP FUNCTION ', p.oid::regprocedure) FROM pg_proc p
        WHERE p.proname ~ '^flask_pg_sse_watch_[0-9a-f]{16}$' AND p.prorettype = 'trigger'::regtype
            AND pg_has_role(p.proowner, 'USAGE') AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgfoid = p.oid)
    LOOP
        EXECUTE statement;
    END LOOP;
