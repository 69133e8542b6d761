"""Processes, devices and files: what training and evaluation share."""
