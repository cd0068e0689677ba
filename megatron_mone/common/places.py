"""Where the project's own files lie. Touches nothing."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
"""The folder that holds `megatron_mone`: a checkout, or the site-packages of an installation."""

CONFIG_ROOT = ROOT / "configs"
