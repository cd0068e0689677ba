"""The studies, a file each. To add one: a module here with a STUDY, named in MODULES."""

from importlib import import_module

from megatron_mone.common.spelling import nearest_name
from megatron_mone.studies.study import Preset, Study

MODULES = ("ratio", "balance", "activation", "block")


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
