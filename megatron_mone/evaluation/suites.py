"""Names that stand for several tasks, and what of lm-eval is there. Imports lm-eval where asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mone.common.machine import version
from megatron_mone.common.spelling import nearest_name

SUITES: dict[str, tuple[str, ...]] = {
    "paper": (
        "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "boolq", "openbookqa",
        "sciq", "lambada_openai", "mmlu",
    ),
    "quick": ("mone_cloze", "mone_choice", "mone_prose", "mone_recall"),
}  # fmt: skip
"""`paper`: what papers of this kind report; the list of the MoNE paper itself was not found.
`quick`: our own, of this folder, without a network."""

OWN_TASKS = Path(__file__).resolve().parent / "tasks"


def check_installed() -> None:
    """lm-eval is optional.

    Raises:
        ValueError: it is not installed.
    """
    if not version("lm-eval"):
        raise ValueError(
            "the package lm-eval is not installed, evaluation needs it: "
            "pip install 'megatron-mone[eval]'"
        )


def task_names(given: Sequence[str]) -> list[str]:
    """Tasks of `NAME,NAME` words, suites written out, each once.

    Raises:
        ValueError: none is given.
    """
    names = [name.strip() for word in given for name in word.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--tasks is empty: name tasks, or a suite of {', '.join(SUITES)}")
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))


def task_manager(names: Sequence[str], include: Path | None) -> Any:
    """lm-eval's TaskManager over its own tasks, ours and those of a folder.

    Args:
        names: of `task_names`; lm-eval's own tasks are read only where one is not found without.
        include: folder of YAML tasks.

    Raises:
        ValueError: a task is unknown, or the folder is missing.
    """
    if include is not None and not include.is_dir():
        raise ValueError(f"--include-path {include} is no folder: name one with YAML tasks")

    folders = [OWN_TASKS, *([include] if include is not None else [])]
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folders, include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            known = [*SUITES, *manager.all_tasks]
            raise ValueError(
                f"--tasks {name}: no such task{nearest_name(name, known)}; `lm-eval ls tasks` "
                "lists lm-eval's, --include-path adds a folder of YAML tasks"
            )
    return manager
