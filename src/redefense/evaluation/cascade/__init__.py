"""Attacks in order, the points and records they leave, and the worst case of each image."""
