"""Plan a job before there are devices: does it fit, how long is a step, what does MoNE change.

    python tools/plan_scale.py --model moe-30b-a3b-mone --gpus 128 --layout tp=1,ep=8,pp=4 \\
        --cluster h100-ndr --against moe --json out/plan/plan.json
    python tools/plan_scale.py --config configs/plan/moe-671b-a37b-mone-1024.yaml --gpus 1024
    python tools/plan_scale.py --model moe-30b-a3b-mone --gpus 128 --search --limit 200
    python tools/plan_scale.py --calibrate out/profile/profile.json --cluster cpu-avx2 \\
        --json out/plan/efficiency.json

Megatron's own model is built without weights, its operations, collectives and bytes recorded
(docs/PLANNER.md), then costed on the cluster. Writes the JSON, and beside it report.html, plots,
timeline.json.gz for ui.perfetto.dev, and NAME.run.yaml, which the entry point and the launcher
take.
Exit status: 0; 2 after a wrong input, said in one line; 4 if the layout does not fit.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):  # run as a file: it must not stand before the library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_mone.common import child_processes
from megatron_mone.common.command_line import OneLineParser, fail
from megatron_mone.common.exit_status import INTERRUPTED

DOES_NOT_FIT = 4


def main() -> int:
    """Run the command line."""
    parser = OneLineParser(__doc__)
    _add_options(parser)
    parsed = parser.parse_args()
    child_processes.end_with_starter()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    try:
        from megatron_mone.commands import plan

        return DOES_NOT_FIT if not plan.run(parsed) else 0
    except (ValueError, RuntimeError, OSError) as error:
        return fail(error if isinstance(error, OSError) else ValueError(str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _stop(number: int, frame: object) -> NoReturn:
    """End with a shell's status for the signal, so that files and processes are put away."""
    raise SystemExit(128 + number)


def _add_options(parser: OneLineParser) -> None:
    add = parser.add_argument
    add("--model", help="of configs/model/, or a YAML file")
    add("--config", type=Path, help="a whole run file instead of --model, --layout and --train")
    add("--gpus", type=int, help="devices of the job, W")
    add("--layout", help="of configs/parallel/, a YAML file, or tp=..,cp=..,pp=..,vpp=..,ep=..,etp=..,mbs=..,gbs=..,recompute=..")  # fmt: skip  # noqa: E501
    add("--train", default="plan-4k", help="of configs/train/, or a YAML file (plan-4k)")
    add("--cluster", default="h100-ndr", help="of configs/cluster/hardware/, or a YAML file (h100-ndr)")  # fmt: skip  # noqa: E501
    add("--flags", default="gpu", help="Megatron's flags on it: of configs/cluster/, or a YAML file (gpu)")  # fmt: skip  # noqa: E501
    add("--against", default="", help="models compared, by comma: moe, moe-active, NAME:field=value")  # fmt: skip  # noqa: E501
    add("--routing", default="balanced", help="balanced, zipf:EXPONENT, or the profile.json of a run")  # fmt: skip  # noqa: E501
    add("--efficiency", type=Path, help="file of --calibrate; without, what is fitted for the cluster, or assumptions")  # fmt: skip  # noqa: E501
    add("--calibrate", type=Path, help="fit efficiencies to a profile.json instead of planning")
    add("--search", action="store_true", help="try layouts instead of planning one")
    add("--limit", type=int, default=200, help="layouts that a search plans (200)")
    add("--sweep", action="store_true", help="also plan other r, and other K_E x K_N")
    add("--json", type=Path, default=Path("out/plan/plan.json"), help="file to write (out/plan/plan.json)")  # fmt: skip  # noqa: E501


if __name__ == "__main__":
    raise SystemExit(main())
