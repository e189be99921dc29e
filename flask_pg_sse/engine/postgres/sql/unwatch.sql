-- Stop sending the changes of a table: the reverse of watch.sql. It is no error if the table is gone, or not watched.
DO $do$
DECLARE
    own_path pg_catalog.text := pg_catalog.current_setting('search_path');
    schema_name pg_catalog.text := @schema@;
    table_name pg_catalog.text := @table@;
    mark pg_catalog.text := @mark@;
    relation pg_catalog.oid;
    statement pg_catalog.text;
    removed integer := 0;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
@find@
@remove@
    PERFORM pg_catalog.set_config('flask_pg_sse.removed', removed::text, true);  -- for the command line
    PERFORM pg_catalog.set_config('search_path', own_path, true);
END $do$;
