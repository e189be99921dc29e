    SELECT c.oid INTO relation FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname::text = schema_name AND c.relname::text = table_name AND c.relkind IN ('r', 'p', 'v', 'm', 'f');
