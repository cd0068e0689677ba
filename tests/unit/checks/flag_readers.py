"""Which of Megatron's arguments anything reads that our entry reaches, found in its source by ast.

An argument is read where code loads `args.NAME`, or loads NAME from an object where NAME is a field
of a config class that Megatron fills from its arguments by name. What only validation looks at
(training/arguments.py) has no effect by that.
"""

import ast
import dataclasses
import re
import typing
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import megatron.core

import megatron_mone

MEGATRON = Path(megatron.core.__file__).parent.parent
OURS = Path(megatron_mone.__file__).parent

VALIDATION = re.compile(r"training/(arguments|yaml_arguments)\.py")
UNREACHED = re.compile(
    r"core/(inference|export|post_training|resharding)/"
    r"|core/models/(mimo|vision|multimodal|mamba|T5|bert|huggingface|audio)/"
    r"|core/tokenizers/vision/|core/datasets/(masked|bert|t5|multimodal)"
    r"|core/safe_globals\.py"
    r"|training/(distillation/cached|theoretical_memory_usage|inprocess_restart)"
    r"|training/datasets/(sft|fim)_dataset|training/config/inference_config"
)
"""Files that no training from megatron_mone.pretrain comes to."""
UNREACHED_FUNCTIONS = {
    "inference_cfg_from_args", "inference_cfg_container_from_args",
    "vlm_config_from_args",
}  # fmt: skip


def config_classes() -> list[type]:
    """The classes whose fields Megatron or we set from the arguments of the same names."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.fault_injector import FaultInjectorConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import (
        HeterogeneousTransformerConfig,
    )
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training.argument_utils import PretrainConfigContainer

    from megatron_mone.config import MoNEFields

    parts = typing.get_type_hints(PretrainConfigContainer).values()
    of_container = [t for part in parts for t in (part, *typing.get_args(part))]
    return [
        HeterogeneousTransformerConfig, MLATransformerConfig, OptimizerConfig, MoNEFields,
        DistributedDataParallelConfig, FaultInjectorConfig,
        *(t for t in of_container if isinstance(t, type) and dataclasses.is_dataclass(t)),
    ]  # fmt: skip


def readers(names: set[str]) -> dict[str, set[str]]:
    """Argument -> files that read it, of those our entry reaches."""
    fields = {f.name for cls in config_classes() for f in dataclasses.fields(cls)}
    found: dict[str, set[str]] = defaultdict(set)
    for path, file in _sources():
        for name, of_args in _loads(ast.parse(path.read_text())):
            if name in names and (of_args or name in fields):
                found[name].add(file)
    return found


def _sources() -> Iterator[tuple[Path, str]]:
    for root in (MEGATRON / "core", MEGATRON / "training", OURS):
        for path in sorted(root.rglob("*.py")):
            file = path.relative_to(root.parent).as_posix()
            if not VALIDATION.search(file) and not UNREACHED.search(file):
                yield path, file


def _loads(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(attribute, whether of the arguments) of every load outside UNREACHED_FUNCTIONS."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name in UNREACHED_FUNCTIONS:
            continue
        match node:
            case ast.Attribute(value=value, attr=name, ctx=ast.Load()):
                yield name, _is_args(value)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(str(name)), *_]):
                yield name, _is_args(value)
        yield from _loads(node)


def _is_args(value: ast.expr) -> bool:
    return ast.unparse(value) in ("args", "get_args()", "self.args")
