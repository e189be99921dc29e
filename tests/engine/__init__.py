"""Tests of what stands behind the hub: the contract of every engine, and each engine's own."""
