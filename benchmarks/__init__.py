"""What the package costs, measured: programs to run by hand, each of which prints its tables."""
