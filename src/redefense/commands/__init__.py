"""The commands, grouped by what a user is doing. Torch is imported inside those that need it."""
