"""A profile for people."""
