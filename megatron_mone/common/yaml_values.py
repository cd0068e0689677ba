"""YAML scalars as YAML 1.2 reads them, where PyYAML's rules of 2005 lose what was written.

PyYAML takes 1e-3 for text, 4:00:00 for 14400 and 010 for 8. Here an exponent makes a number (a
whole one an integer), and the other two stay the text they are. A key given twice is an error,
where PyYAML takes the last. Loads safely: no tag runs code.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_LARGEST_EXACT = 2**53  # of a float's whole numbers
_LONGEST_REASON = 400  # characters: a value inside itself is told by its thousand places
_FLOAT = r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+
             |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"""
_SCALARS = (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
     "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+", "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)  # fmt: skip


class KeysOnce(yaml.constructor.BaseConstructor):
    """Of a safe loader: a key given twice is an error, where PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Loader(KeysOnce, yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # as its base class has it

    def number(self, node: yaml.ScalarNode) -> float | int:
        """A float; an integer where an exponent makes a whole number."""
        value: float = self.construct_yaml_float(node)
        if "e" in node.value.lower() and abs(value) < _LARGEST_EXACT and value == math.floor(value):
            return int(value)
        return value


for tag, pattern, first in _SCALARS:
    compiled = re.compile(rf"^(?:{pattern})$", re.VERBOSE)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", compiled, list(first))
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


def read_scalar(text: str) -> Any:
    """The value of a short YAML text, such as one of a command line.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader


def read_mapping(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file; `${name}` stands for another value of it.

    Raises:
        ValueError: one line that names the file and what is wrong.
    """
    try:
        values = read_scalar(path.read_text(encoding="utf-8"))
        if values is None:
            return {}
        if isinstance(values, dict):
            values = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        system = error.strerror if isinstance(error, OSError) else None
        reason = " ".join(str(system or error).split())
        raise ValueError(f"{path} cannot be read: {reason[:_LONGEST_REASON]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of names to values")
    return {str(key): value for key, value in values.items()}
