"""Classes of tokens by rules on their text. Pure."""

from collections.abc import Sequence

CLASSES = (
    "word start", "continuation", "punctuation", "newline", "digit", "capitals", "space",
)  # fmt: skip


def class_of(text: str, before: str) -> str:
    """The class of a token.

    A break of the line decides first, then a digit, then two or more letters all of them capitals
    (in plays, who speaks). A word starts after a space or line break, also one that the token
    before ends with, or after what is no letter.

    Args:
        text: of the token.
        before: of the token before it, "" where there is none.
    """
    word = text.strip()
    if "\n" in text:
        return "newline"
    if not word:
        return "space"
    if any(one.isdigit() for one in word):
        return "digit"
    if not any(one.isalpha() for one in word):
        return "punctuation"
    if len(word) > 1 and word.isupper():
        return "capitals"
    starts = text[0].isspace() or not before or not before[-1].isalpha()
    return "word start" if starts else "continuation"


def classes_of(texts: Sequence[str]) -> list[int]:
    """Place in CLASSES of each token of a text."""
    return [
        CLASSES.index(class_of(text, before))
        for text, before in zip(texts, ["", *texts[:-1]], strict=True)
    ]
