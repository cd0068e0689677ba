"""Parts of a page that a command writes, between two comments. Pure."""

import re


def with_part(text: str, name: str, part: str) -> str:
    """A text whose lines between `<!-- NAME, ... -->` and `<!-- end of NAME -->` are written anew.

    Args:
        text: of a Markdown page.
        name: of the part.
        part: its lines.
    """
    marks = re.compile(rf"(<!-- {name},[^\n]* -->\n).*?(<!-- end of {name} -->)", re.S)
    return marks.sub(lambda mark: f"{mark[1]}{part}\n{mark[2]}", text)
