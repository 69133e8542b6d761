"""Audits, from outside, whether a server's draws are secret."""
