"""The studies, a file each. To add one: a module here with a STUDY, named in MODULES."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from megatron_mone.common.spelling import nearest_name
from megatron_mone.studies.study import Preset, Study

MODULES = (
    "ratio", "balance", "activation", "block", "split", "scale", "analysis", "prune", "finetune",
    "sparsity",
)  # fmt: skip


def study_of(name: str) -> Study:
    """The study of a name.

    Raises:
        ValueError: there is none; names those that are.
    """
    if name not in MODULES:
        hint = nearest_name(name, list(MODULES))
        raise ValueError(f"study {name!r} is none{hint}: {', '.join(MODULES)}")
    found: Study = import_module(f"{__name__}.{name}").STUDY
    return found


def preset_of(study: Study, name: str) -> Preset:
    """A study's preset.

    Raises:
        ValueError: it has none of that name.
    """
    if name not in study.presets:
        raise ValueError(
            f"--preset {name}: {study.name} has {', '.join(study.presets)}"
            f"{nearest_name(name, list(study.presets))}"
        )
    return study.presets[name]


def with_text(preset: Preset, study: Study, text: Path | None) -> Preset:
    """A preset whose measurements read a text of the user's, where one is given.

    Raises:
        ValueError: the study measures no text, or there is no such file.
    """
    if text is None:
        return preset
    if "text" not in preset.measuring:
        raise ValueError(f"--text {text}: {study.name} measures no text; leave it out")
    if not text.is_file():
        raise ValueError(f"--text {text} is no file: name one of plain text")
    return replace(preset, measuring={**preset.measuring, "text": str(text)})


def models_of(study: Study, words: Sequence[str]) -> dict[str, Path]:
    """The models that a study is given, by name.

    Args:
        study: which.
        words: "folder", named as the folder is, or "name=folder".

    Raises:
        ValueError: it takes none, one is missing, or two have one name.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.rpartition("=")
        path = Path(folder)
        name = name or path.resolve().name
        if not study.takes_models:
            raise ValueError(f"--model {word}: {study.name} measures only what it trains")
        if not path.is_dir():
            raise ValueError(f"--model {word}: {folder} is no folder")
        if name in found:
            raise ValueError(f"--model {word}: two models are called {name}: give NAME=FOLDER")
        found[name] = path
    return found
