"""The one exception a person can cause."""


class DataError(ValueError):
    """A user's mistake: one line that names the field or file, the value and the fix."""
