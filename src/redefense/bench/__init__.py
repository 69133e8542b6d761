"""Benchmarks that users can repeat, with other libraries compared in one process."""
