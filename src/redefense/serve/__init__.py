"""Serves a bundle over HTTP with a secret draw per image. Nothing here imports torch."""
