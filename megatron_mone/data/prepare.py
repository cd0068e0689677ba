"""Text files -> Megatron indexed dataset, in four stages: read, tokenizer, tokenize, merge.

Everything happens in `PREFIX.work/`, which survives a kill. The file `plan` there is the
fingerprint of what the shards are made of; the same command goes on with them, another one starts
afresh.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_mone.common.files import atomic_write
from megatron_mone.data.discovery import discover
from megatron_mone.data.documents import BadLine, read_unit
from megatron_mone.data.errors import DataError
from megatron_mone.data.manifest import (
    BAD_LINES_KEPT,
    Manifest,
    TokenizerFacts,
    file_facts,
    load_manifest,
    sha256_of,
)
from megatron_mone.data.merge import (
    OutputPaths,
    megatron_version,
    merge_shards,
    publish,
    unigram_entropy,
    verify_merged,
)
from megatron_mone.data.plan import Plan, PrepareConfig, Progress, cut_of, make_plan
from megatron_mone.data.recognise import LeftOut
from megatron_mone.data.shards import ShardFacts, ShardJob
from megatron_mone.data.tokenizers import Encoder, TokenizerSpec, parse_spec, write_tokenizer
from megatron_mone.data.workers import locked_folder, run_shards

_BPE_SAMPLE_BYTES = 1 << 30


def prepare(config: PrepareConfig, progress: Progress = lambda *_: None) -> Manifest:
    """Build the dataset of `config`, or finish a killed run's; returns its manifest.

    Does nothing if the dataset is there and was made of the same. Raises DataError on a user's
    mistake, among them (with `strict`) the first bad line.
    """
    spec = parse_spec(config.tokenizer, config.eod_token)
    outputs = OutputPaths(config.output_prefix)
    found = discover(config.inputs, config.name_root, config.json_key, outputs)
    if config.strict and (wrong := next((entry for entry in found.left_out if entry.wrong), None)):
        raise DataError(f"--input {wrong}; repair or remove it, or run without --strict")
    config = replace(config, txt_documents=cut_of(config, found.sources))
    with locked_folder(outputs.work):
        plan = make_plan(config, spec, found.sources, progress)
        if (ready := _already_there(config, outputs, plan)) is None:
            ready = _build(config, spec, outputs, plan, found.left_out, progress)
        _empty(outputs.work)
    # The files read may be those of an earlier run; those left out are what lies there now.
    return replace(ready, **_left_out(found.left_out))


def _already_there(config: PrepareConfig, outputs: OutputPaths, plan: Plan) -> Manifest | None:
    """The manifest of a finished dataset made by this very plan; refuses to replace another."""
    if config.overwrite:
        return None
    manifest = load_manifest(outputs.manifest)
    stored = [path for path in (outputs.bin, outputs.idx) if path.exists()]
    if manifest is None:
        # Without a manifest, what stands there is the first half of our own killed publish() ...
        ours = _stored_fingerprint(outputs.work) == plan.fingerprint
        if not stored or ours:
            return None
    elif manifest.plan_sha256 == plan.fingerprint:
        whole = len(stored) == 2 and all(
            path.stat().st_size == facts.bytes
            for path, facts in ((outputs.bin, manifest.bin), (outputs.idx, manifest.idx))
        )
        return manifest if whole and outputs.tokenizer.is_dir() else None
    # ... or somebody else's.
    raise DataError(
        f"--output-prefix {config.output_prefix}: holds a dataset made from other inputs or "
        "options; pass --overwrite to replace it, or choose another prefix"
    )


def _stored_fingerprint(work: Path) -> str | None:
    path = work / "plan"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _build(
    config: PrepareConfig,
    spec: TokenizerSpec,
    outputs: OutputPaths,
    plan: Plan,
    left_out: list[LeftOut],
    progress: Progress,
) -> Manifest:
    work = outputs.work
    if _stored_fingerprint(work) != plan.fingerprint:
        _empty(work)
        atomic_write(work / "plan", plan.fingerprint.encode())
    encoder = _ready_tokenizer(config, spec, plan, work, progress)
    jobs = _jobs(config, plan, work, encoder)
    facts = run_shards(jobs, config.workers, lambda n: progress("tokenizing", n, plan.size))
    if not any(fact.documents for fact in facts):
        raise DataError(_no_documents(facts))
    counts = merge_shards(
        jobs, work / "merged", encoder.vocab_size, lambda n: progress("merging", n, plan.size)
    )
    verify_merged(work / "merged", facts, counts)
    manifest = _describe(config, spec, outputs, plan, encoder, facts)
    manifest = replace(manifest, unigram_loss=unigram_entropy(counts), **_left_out(left_out))
    atomic_write(work / "manifest.json", manifest.to_json())
    publish(work, outputs)
    return manifest


def _empty(work: Path) -> None:
    """Remove all but the lock; the plan first, so that nobody goes on with what is half removed."""
    (work / "plan").unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _ready_tokenizer(
    config: PrepareConfig, spec: TokenizerSpec, plan: Plan, work: Path, progress: Progress
) -> Encoder:
    folder, beside = work / "tokenizer", work / "tokenizer.tmp"
    if not folder.is_dir():
        shutil.rmtree(beside, ignore_errors=True)
        write_tokenizer(spec, beside, _sample_texts(config, plan, progress))
        beside.replace(folder)
    return Encoder(folder)


def _sample_texts(config: PrepareConfig, plan: Plan, progress: Progress) -> Iterator[str]:
    """What a BPE is trained on: all shards, or every k-th so that about 1 GiB is read."""
    stride = max(1, -(-plan.size // _BPE_SAMPLE_BYTES))
    sample = plan.shards[::stride]
    total = sum(size for _, size in sample)
    for units, size in sample:
        for unit in units:
            for document in read_unit(unit, config.json_key, config.txt_documents):
                if not isinstance(document, BadLine):
                    yield document
        progress("training tokenizer", size, total)


def _jobs(config: PrepareConfig, plan: Plan, work: Path, encoder: Encoder) -> list[ShardJob]:
    digest = sha256_of(work / "tokenizer" / "tokenizer.json")
    return [
        ShardJob(
            index=index,
            size=size,
            units=tuple(units),
            folder=work,
            tokenizer=work / "tokenizer",
            tokenizer_sha256=digest,
            dtype=_dtype(encoder),
            json_key=config.json_key,
            txt_documents=config.txt_documents,
            strict=config.strict,
        )
        for index, (units, size) in enumerate(plan.shards)
    ]


def _dtype(encoder: Encoder) -> str:
    # Megatron's rule (indexed_dataset.DType.optimal_dtype); the merge asserts it still is.
    return "uint16" if encoder.vocab_size < 65500 else "int32"


def _no_documents(facts: list[ShardFacts]) -> str:
    bad = sum(fact.bad_total for fact in facts)
    first = next((f", the first {fact.bad[0]}" for fact in facts if fact.bad), "")
    empty = sum(fact.empty_documents for fact in facts)
    return (
        f"--input: no document in it ({empty} empty documents, {bad} bad lines{first}); "
        "check --json-key and the files"
    )


def _left_out(left_out: list[LeftOut]) -> dict[str, Any]:
    named = [str(entry) for entry in left_out[:BAD_LINES_KEPT]]
    return {"left_out": len(left_out), "left_out_named": named}


def _describe(
    config: PrepareConfig,
    spec: TokenizerSpec,
    outputs: OutputPaths,
    plan: Plan,
    encoder: Encoder,
    facts: list[ShardFacts],
) -> Manifest:
    documents_of: Counter[str] = Counter()
    for fact in facts:
        documents_of.update(fact.documents_of)
    named = [str(bad) for fact in facts for bad in fact.bad][:BAD_LINES_KEPT]
    return Manifest(
        inputs=[replace(entry, documents=documents_of[entry.name]) for entry in plan.inputs],
        tokenizer=TokenizerFacts(
            kind=spec.kind,
            spec=spec.text,
            folder=outputs.tokenizer.name,
            sha256=sha256_of(outputs.work / "tokenizer" / "tokenizer.json"),
            vocab_size=encoder.vocab_size,
            eod_id=encoder.eod_id,
            eod_token=encoder.eod_token,
        ),
        json_key=config.json_key,
        txt_documents=config.txt_documents,
        documents=sum(fact.documents for fact in facts),
        tokens=sum(fact.tokens for fact in facts),
        empty_documents=sum(fact.empty_documents for fact in facts),
        bad_lines=sum(fact.bad_total for fact in facts),
        bad_lines_named=named,
        dtype=_dtype(encoder),
        unigram_loss=0.0,
        bin=file_facts(outputs.work / "merged.bin", outputs.bin.name),
        idx=file_facts(outputs.work / "merged.idx", outputs.idx.name),
        licence=config.licence,
        plan_sha256=plan.fingerprint,
        megatron_core=megatron_version(),
        tokenizers=version("tokenizers"),
    )
