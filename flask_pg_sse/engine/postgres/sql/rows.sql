-- Fill the tables before the first event. This runs when `installation` is empty: in a fresh installation, and after a
-- restore from a dump without rows. After such a restore the sequences and the other tables may have values.

INSERT INTO flask_pg_sse.installation (version, key)
SELECT flask_pg_sse.version_v1(), sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid()), 'UTF8'));

-- Ids begin at the clock's time in microseconds. So ids of a dropped log, or ids that other senders made up, are smaller.
-- Ids rise more slowly than the clock, because no app publishes a million events a second. So every id that was ever given
-- out is below the clock's time.
SELECT setval('flask_pg_sse.event_id', greatest(
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
    (SELECT s.last_value + 100000 FROM flask_pg_sse.event_id s)));
SELECT setval('flask_pg_sse.numbered_by', flask_pg_sse.server_v1());

-- Keep the events that SQL has published meanwhile.
INSERT INTO flask_pg_sse.retention
SELECT coalesce((SELECT min(e.id) - 1 FROM flask_pg_sse.event e), (SELECT s.last_value FROM flask_pg_sse.event_id s))
WHERE NOT EXISTS (SELECT FROM flask_pg_sse.retention);
