"""Package metadata. Pins live in constraints.txt; `make` installs exactly those."""

import runpy
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup

HERE = Path(__file__).parent


class BuildKernels(Command):
    """`python setup.py build_kernels`: compile the CPU kernels beside their sources."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Build; without a compiler, one line that says so."""
        runpy.run_path(str(HERE / "megatron_mone/kernels/cpu/build.py"))["main"]()


setup(
    name="megatron-mone",
    version="0.1.0",
    description="Mixture of Neuron Experts (MoNE) as a Megatron-Core MoE variant",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_mone*", "launch*", "tools"]),
    package_data={
        "megatron_mone": ["py.typed", "kernels/cpu/src/*", "kernels/measured.json"],
        "launch": ["templates/*"],
    },
    cmdclass={"build_kernels": BuildKernels},
    install_requires=[
        "megatron-core>=0.19,<0.20",
        "torch>=2.13",
        "numpy",
        "tensorboard",
        "transformers>=5",
        "tokenizers",
        "omegaconf>=2.3",
        "pyyaml",
        "pydantic>=2.12",
        "jinja2",
        "rich",
        "matplotlib",
        "psutil",
        "zstandard",
        "einops",  # Megatron-Core imports it in some of its layouts, without asking for it
        "pybind11",  # compiles Megatron's dataset helper where its wheel's own does not fit
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.10"],
        "deepspeed": ["deepspeed>=0.19"],
        "bench": ["deepspeed>=0.19"],
        "optimizers": ["emerging-optimizers>=0.3"],
        "parquet": ["pyarrow"],
        "hf": ["transformers>=5", "safetensors"],
        "eval": ["lm-eval>=0.4.13"],
        "dev": ["pytest", "hypothesis", "ruff", "mypy", "types-PyYAML"],
    },
)
