"""What the demo, the tests and the benchmarks stand on: their environment and their PostgreSQL. Not in the wheel."""
