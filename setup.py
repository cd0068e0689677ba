"""Package metadata. Pins live in constraints.txt; `make` installs exactly those."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-mone",
    version="0.1.0",
    description="Mixture of Neuron Experts (MoNE) as a Megatron-Core MoE variant",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_mone*", "tools"]),
    package_data={"megatron_mone": ["py.typed"]},
    install_requires=[
        "megatron-core>=0.19,<0.20",
        "torch>=2.13",
        "numpy",
        "tensorboard",
        "transformers>=5",
        "tokenizers",
        "omegaconf>=2.3",
        "pyyaml",
        "rich",
        "matplotlib",
        "psutil",
        "zstandard",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.10"],
        "deepspeed": ["deepspeed>=0.19"],
        "hf": ["transformers>=5", "safetensors"],
        "eval": ["lm-eval>=0.4.13"],
        "dev": ["pytest", "hypothesis", "ruff", "mypy", "types-PyYAML"],
    },
)
