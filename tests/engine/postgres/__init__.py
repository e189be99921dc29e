"""Tests of PostgreSQL's own: the log, its listener, its roles, its commands."""
