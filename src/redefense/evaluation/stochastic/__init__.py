"""Evaluation of networks that draw in their forward pass: estimates from fresh draws."""
