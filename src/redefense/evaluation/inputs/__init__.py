"""Arguments of `evaluate`: validation, attack objects, dtypes and several radii."""
