"""Imports, exports and logits of tiny models of every family, on ranks that are started once."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import yaml

LAYOUTS = {
    "TP2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "EP2": ("--expert-model-parallel-size", "2"),
}
MTP, QUARTER = "with MTP", "quarter"


def convert_all(
    folder: str, names: list[str], as_mone: list[str], family: str, wrong: dict[str, list[str]]
) -> None:
    """Of each source: a checkpoint, its export, and the checkpoint's logits on this one rank.

    Of `as_mone` also as a MoNE model of ours. `family` is the text of a module with one more
    family. Then the commands of `wrong`, name -> words: their status and what they said go to
    wrong.json.
    """
    import torch

    from megatron_mone.conversion.exporting import export_model
    from megatron_mone.conversion.importing import import_model

    _add(family)
    for name in names:
        here = Path(folder) / name
        said = import_model(here / "source", here / "checkpoint", quiet)
        (here / "said.json").write_text(json.dumps(said))
        export_model(here / "checkpoint", here / "export", quiet, shard_bytes=30_000)
        if not name.endswith(MTP):
            save_logits(here, "one", ())
            torch.distributed.destroy_process_group()  # the next import makes its own
    for name in as_mone:
        here = Path(folder) / name
        import_model(here / "source", here / "mone checkpoint", quiet, mone=QUARTER)
        export_model(here / "mone checkpoint", here / "mone", quiet, mone=True)
        save_logits(here, "mone", (), "mone checkpoint")
        torch.distributed.destroy_process_group()
    _stop_and_go_on(Path(folder) / names[0])
    _wrong(Path(folder), wrong)


def _add(family: str) -> None:
    """Have one more family known in this process."""
    from megatron_mone.conversion import families

    module: dict[str, Any] = {}
    exec(family, module)  # noqa: S102  # of our own docs
    added, known = module["FAMILY"], families.families()
    families.families = lambda: {**known, **{kind: added for kind in added.model_types}}


def make_all(
    folder: str, made: dict[str, list[str]], losses: list[str], wrong: dict[str, list[str]]
) -> None:
    """Of each made, name -> words of `convert`: a checkpoint, its export, its logits, what was
    said. Then the command `losses`, twice, its file changed in between: said-1.txt, said-2.txt; and
    `wrong` as convert_all's."""
    import torch

    from megatron_mone.commands.app import main
    from megatron_mone.conversion.exporting import export_model

    del os.environ["LOCAL_RANK"]  # building a model gives one, and takes it back
    for name, words in made.items():
        here = Path(folder) / name
        here.mkdir()
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main([*words, "--out", str(here / "checkpoint")]) == 0
        (here / "said.txt").write_text(out.getvalue())
        export_model(here / "checkpoint", here / "export", quiet)
        assert "LOCAL_RANK" not in os.environ
        save_logits(here, "one", ())
        torch.distributed.destroy_process_group()  # the next one makes its own
    for time in (1, 2):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(losses) == 0
        (Path(folder) / f"said-{time}.txt").write_text(out.getvalue())
        if time == 1:
            path = Path(folder) / "losses" / "losses.json"
            (path.parent / "first.json").write_bytes(path.read_bytes())
            document = json.loads(path.read_text())
            del document["losses"]["1/2 in layer 1"]
            document["losses"]["1/4 in layer 1"] = 100.0
            path.write_text(json.dumps(document))
    _wrong(Path(folder), wrong)


def _stop_and_go_on(here: Path) -> None:
    """An import that is stopped after its first part; resumed.json: that part's file, twice."""
    from megatron_mone.conversion.importing import import_model

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    out, seen = here / "resumed", []
    with contextlib.suppress(KeyboardInterrupt):
        import_model(here / "source", out, stop)
    part = here / "resumed.partial" / "release" / "__0_0.distcp"
    seen.append((part.stat().st_ino, out.exists()))
    import_model(here / "source", out, quiet)
    seen.append(((out / "release" / part.name).stat().st_ino, out.exists()))
    (here / "resumed.json").write_text(json.dumps(seen))


def _wrong(folder: Path, wrong: dict[str, list[str]]) -> None:
    from megatron_mone.commands.app import main

    answers = {}
    for name, words in wrong.items():
        error = io.StringIO()
        with contextlib.redirect_stderr(error):
            answers[name] = (main(words), error.getvalue())
    (folder / "wrong.json").write_text(json.dumps(answers))


def check_refused(folder: Path, name: str, said: str) -> None:
    """A command of wrong.json ended with status 2 and one line, and left nothing."""
    status, error = json.loads((folder / "wrong.json").read_text())[name]
    lines = [line for line in error.splitlines() if "error:" in line]
    assert status == 2
    assert len(lines) == 1, error
    assert said in lines[0]
    assert not list(folder.glob("refused*"))


def laid_out(folder: str, names: list[str], family: str) -> None:
    """Logits of each checkpoint in every layout of two ranks."""
    _add(family)
    for name in names:
        here = Path(folder) / name
        has_experts = "num_experts" in (here / "checkpoint/model.yaml").read_text()
        for layout, flags in LAYOUTS.items():
            if layout != "EP2" or has_experts:
                save_logits(here, layout, flags)


def save_logits(here: Path, layout: str, flags: tuple[str, ...], name: str = "checkpoint") -> None:
    """Load a checkpoint as a run does and write its logits of `tokens.pt` [B, T] to LAYOUT.pt."""
    import torch
    from megatron.training.training import destroy_global_state

    logits = logits_of(here / name, torch.load(here.parent / "tokens.pt"), flags)
    if torch.distributed.get_rank() == 0:
        torch.save(logits, here / f"{layout}.pt")
    destroy_global_state()


def logits_of(checkpoint: Path, tokens, flags: tuple[str, ...]):
    """[B, T, V] on every rank, of the model that the checkpoint's model file says."""
    import torch

    from megatron_mone import cpu_emulation

    cpu_emulation.install()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_mone.conversion.placing import words_of_shape
    from megatron_mone.model import patches
    from megatron_mone.model.arguments import parse_arguments
    from megatron_mone.model.config_builder import build_model_config

    patches.install()
    words = [
        *words_of_shape(yaml.safe_load((checkpoint / "model.yaml").read_text()), checkpoint),
        *("--global-batch-size", os.environ["WORLD_SIZE"], "--exit-on-missing-checkpoint"),
        *("--load", str(checkpoint), "--no-load-optim", "--no-load-rng", *flags),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        args = parse_arguments(words)
        builder = build_model_config(args)
        initialize_megatron()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = builder.get_builder_cls()(builder).build_model(
            groups, pre_process=True, post_process=True
        )
        load_checkpoint([model], None, None)
    model.eval()
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(model(tokens, places, None))
    return logits[..., : args.vocab_size].float()


def quiet(done: int, total: int, what: str) -> None:
    """No progress."""
