-- What stands in the tables before the first event. Run where `installation` is empty: in a fresh installation, and in one
-- that was restored from a dump without rows, whose sequences and other tables may have theirs.

INSERT INTO flask_pg_sse.installation (version, key)
SELECT flask_pg_sse.version_v1(), sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid()), 'UTF8'));

-- Ids begin at the clock's microseconds: those of a log that was dropped, or that other senders made up, lie below. And as
-- nobody publishes a million events a second, all ids that were ever given out are below what the clock shows.
SELECT setval('flask_pg_sse.event_id', greatest(
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
    (SELECT s.last_value + 100000 FROM flask_pg_sse.event_id s)));
SELECT setval('flask_pg_sse.numbered_by', flask_pg_sse.server_v1());

-- What SQL has published meanwhile stays.
INSERT INTO flask_pg_sse.retention
SELECT coalesce((SELECT min(e.id) - 1 FROM flask_pg_sse.event e), (SELECT s.last_value FROM flask_pg_sse.event_id s))
WHERE NOT EXISTS (SELECT FROM flask_pg_sse.retention);
