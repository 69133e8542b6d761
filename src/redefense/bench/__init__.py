"""Measurements that users can repeat: tables of ours beside others, in one process."""
