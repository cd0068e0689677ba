"""The runs of a sweep in one table."""
