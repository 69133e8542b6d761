"""Stored records: read, joined by image, with accuracies and intervals; without torch."""
