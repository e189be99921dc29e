-- Fill the tables before the first event. This runs when `installation` is empty: in a fresh installation, and after a
-- restore from a dump without rows. After such a restore the sequence and the other tables may have values.

INSERT INTO flask_pg_sse.installation (version, key, timelines)
SELECT flask_pg_sse.version_v1(), sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid()), 'UTF8')), false;

-- Keep the events that SQL has published meanwhile.
INSERT INTO flask_pg_sse.retention
SELECT coalesce((SELECT min(e.id) - 1 FROM flask_pg_sse.event e), flask_pg_sse.draw_v1(1))
WHERE NOT EXISTS (SELECT FROM flask_pg_sse.retention);
