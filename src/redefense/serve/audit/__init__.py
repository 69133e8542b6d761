"""Attacks on the secrecy of one's own server's draws, from outside."""
