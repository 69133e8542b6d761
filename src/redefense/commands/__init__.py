"""The commands, grouped by task. Torch is imported inside those that need it."""
