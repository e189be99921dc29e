"""The engine on PostgreSQL: LISTEN and pg_notify(), through psycopg2."""
