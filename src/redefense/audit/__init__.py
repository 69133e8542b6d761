"""Audit of tables of claims: which figures cannot be right, and why."""
