"""The name that a user may have meant. Imports nothing of Megatron, so that commands start fast."""

import difflib


def nearest_name(name: str, known: list[str]) -> str:
    """' (did you mean X?)' for the closest known name, or ''."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
