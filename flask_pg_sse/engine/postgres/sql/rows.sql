-- Fill `installation` before the first event. This runs when it is empty: in a fresh installation, and after a restore
-- from a dump without rows.

INSERT INTO flask_pg_sse.installation (version, key, timelines)
SELECT flask_pg_sse.version_v1(), sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid()), 'UTF8')), false;
