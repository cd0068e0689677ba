"""Write the tables of fields in docs/ from the classes that write and read those files.

    python -m megatron_mone.commands.write_schemas

Replaces what stands between `<!-- fields of MODULE.CLASS, ... -->` and `<!-- end of fields -->` in
docs/*.md. A row is a field, or neighbours of one kind that need no words; an object that a page has
shown is not shown again.
"""

from collections.abc import Iterator
from importlib import import_module
from types import UnionType
from typing import Any, Union, get_args, get_origin

from megatron_mone.common.documents import Kind, Part
from megatron_mone.common.marked_text import with_parts
from megatron_mone.common.places import ROOT

Row = tuple[list[str], str, str]
"""Names of fields, their kind, what they mean."""


def with_tables(text: str) -> str:
    """A page of docs/ with its tables of fields written anew."""
    seen: dict[type[Part], str] = {}

    def table(of: str) -> str:
        module, _, name = of.rpartition(".")
        return f"\n{_table(getattr(import_module(module), name), seen)}"

    return with_parts(text, "fields", table)


def _table(document: type[Part], seen: dict[type[Part], str]) -> str:
    rows: list[Row] = []
    for names, kind, meaning in _rows(document, "", seen):
        before, _, name = names[0].rpartition(".")
        if rows and not meaning and rows[-1][1:] == (kind, "") and _inside(rows[-1]) == before:
            rows[-1][0].append(f".{name}")
        else:
            rows.append((names, kind, meaning))
    lines = ["| field | kind | meaning |", "| --- | --- | --- |"]
    for names, kind, meaning in rows:
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {kind} | {meaning} |")
    return "\n".join(lines) + "\n"


def _inside(row: Row) -> str:
    return row[0][0].rpartition(".")[0]


def _rows(part: type[Part], path: str, seen: dict[type[Part], str]) -> Iterator[Row]:
    for name, field in part.model_fields.items():
        kind, suffix, inside = _kind((field.annotation, *field.metadata))
        place = f"{path}{name}{suffix}"
        meaning = " ".join((field.description or "").split())
        meaning = meaning[:1].upper() + meaning[1:]
        known = inside is None or inside in seen
        said = [
            "" if known or inside is None else " ".join((inside.__doc__ or "").split()),
            f"{meaning.removesuffix('.')}." if meaning else "",
            "" if field.is_required() else "May be absent.",
            f"As `{seen[inside]}` above." if inside in seen else "",
        ]
        yield [place], kind, " ".join(filter(None, said))
        if inside is not None and not known:
            seen[inside] = place
            yield from _rows(inside, f"{place}.", seen)


def _kind(annotation: Any) -> tuple[str, str, type[Part] | None]:
    """(in words, what follows the name in paths, the class of the objects inside) of a field."""
    if isinstance(annotation, tuple):  # a type with its Annotated values
        kinds = [one.words for one in annotation if isinstance(one, Kind)]
        return (kinds[0], "", None) if kinds else _kind(annotation[0])
    if hasattr(annotation, "__metadata__"):
        return _kind((annotation.__origin__, *annotation.__metadata__))
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return "object", "", annotation
    origin, values = get_origin(annotation), get_args(annotation)
    if origin in (UnionType, Union):
        kind, suffix, inside = _kind(values[0])
        return f"{kind} or null", suffix, inside
    if origin is list:
        kind, suffix, inside = _kind(values[0])
        return f"list: {kind}", f"[]{suffix}", inside
    if origin is tuple:
        return "list", "", None
    if origin is dict:
        kind, suffix, inside = _kind(values[1])
        return f"by name: {kind}", f".NAME{suffix}", inside
    return "true or false" if annotation is bool else "any", "", None


if __name__ == "__main__":
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(with_tables(text), encoding="utf-8")
