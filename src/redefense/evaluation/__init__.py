"""Honest evaluation: suites, metrics, checks, report and audit."""
