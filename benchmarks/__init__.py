"""Measure what the package costs: programs to run by hand, each of which prints tables."""
