"""The demo: a live order board for a small kitchen. Start it with ``./demo/run``."""
