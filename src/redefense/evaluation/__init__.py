"""Evaluation of ensembles under suites of attacks, with exact expectations and a headline."""
