"""The native build; pyproject.toml says all else."""

import runpy
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup


class BuildKernels(Command):
    """`python setup.py build_kernels`: compile the CPU kernels beside their sources."""

    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Build; without a compiler, one line that says so."""
        build = Path(__file__).parent / "megatron_mone/kernels/cpu/build.py"
        runpy.run_path(str(build))["main"]()


setup(cmdclass={"build_kernels": BuildKernels})
