"""Rules over a table of claims: which figures cannot be believed, and why."""
