"""Tests of what the docs guarantee, while clients, connections and servers come and go."""
