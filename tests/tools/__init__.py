"""Tests of what is not the package: the two commands, the demo, the benchmarks."""
