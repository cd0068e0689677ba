"""Race MoNE's experts against dense MoE experts: one cell, or a grid with a report.

    python tools/bench_experts.py --tokens 4096 --hidden 512 --neurons 1408 --experts 8 \
        --ratio 0.25 --dtype fp32 --json out/cell.json
    python tools/bench_experts.py --grid quick --out out/bench

See megatron_mone/benchmarking/cli.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_mone.benchmarking.cli import main

    sys.exit(main())
