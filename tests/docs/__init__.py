"""Tests of the README and of docs/: the examples run."""
