"""Train, attack, measure and deploy robust classifier ensembles, above all randomized ones."""

__version__ = "0.1.0"
