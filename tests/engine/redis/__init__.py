"""Tests of Redis' own: its URLs, payloads, listener and refusals."""
