"""Megatron's argument parser with our flags, imported in silence. Touches nothing."""

from __future__ import annotations

import logging
import warnings
from argparse import ArgumentParser


def flag_parser() -> ArgumentParser:
    """A parser of its own for each caller, who may change it.

    Raises:
        ImportError: Megatron-Core is not installed here.
    """
    with warnings.catch_warnings():
        # On import Megatron and torch say which GPU packages are missing: no news here.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from megatron_mone import pretrain

        return pretrain.flag_parser()
