"""Claims: the figures of a defence as one small file that others can check, recompute and rank."""
