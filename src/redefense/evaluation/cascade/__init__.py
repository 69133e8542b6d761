"""Runs attacks in order and stores their points, records and the worst case of each image."""
