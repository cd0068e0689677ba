"""Parts of a page that a command writes, between two comments. Pure."""

import re
from collections.abc import Callable


def with_parts(text: str, name: str, write: Callable[[str], str]) -> str:
    """A text whose lines between `<!-- NAME, ... -->` and `<!-- end of NAME -->` are written anew.

    Args:
        text: of a Markdown page.
        name: of the parts.
        write: the lines of one, given X where it begins with `<!-- NAME of X, ... -->`, else "".
    """
    marks = rf"(?s)(<!-- {name}(?: of ([\w.]+))?,[^\n]* -->\n).*?(<!-- end of {name} -->)"
    return re.sub(marks, lambda mark: f"{mark[1]}{write(mark[2] or '')}\n{mark[3]}", text)
