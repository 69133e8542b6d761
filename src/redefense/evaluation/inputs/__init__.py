"""What callers hand to `evaluate`: arguments, objects, types and several radii."""
