"""The engine: PostgreSQL as the bus, through psycopg2's LISTEN and pg_notify()."""
