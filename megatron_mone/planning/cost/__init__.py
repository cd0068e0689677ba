"""Seconds and bytes of what was traced, on a cluster."""
