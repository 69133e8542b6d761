"""Evaluation of stochastic networks by estimates from fresh draws."""
