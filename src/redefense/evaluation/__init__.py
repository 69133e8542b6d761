"""Honest measurement: suites, records, headlines, checks and reports."""
