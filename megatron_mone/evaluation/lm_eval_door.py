"""lm-eval's own program, in which `--model mone` is known.

    torchrun --nproc-per-node 2 -m megatron_mone.evaluation.lm_eval_door --model mone \\
        --model_args 'load=out/run,flags=--expert-model-parallel-size 2' --tasks arc_easy
"""

import sys
from importlib import import_module

from megatron_mone.common.command_line import fail
from megatron_mone.evaluation.suites import check_installed


def main() -> int:
    """Run `lm_eval` with this process's words; one line and status 2 for wrong model_args."""
    try:
        check_installed()
        from lm_eval.__main__ import cli_evaluate

        import_module("megatron_mone.evaluation.language_model")  # registers the name
        cli_evaluate()
    except ValueError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
