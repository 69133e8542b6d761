"""Claims: files with the figures of a defence, which others can check, recompute and rank."""
