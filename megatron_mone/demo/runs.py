"""The demo's training runs: jobs of `launch` in the demo's folder."""

import math
from pathlib import Path
from typing import Any

from launch.runs.kept_runs import PYTHON, KeptRun
from launch.spec.file import read_fields
from launch.spec.training_job import training_job
from megatron_mone.common.places import CONFIG_ROOT, ROOT
from megatron_mone.model.run_config import load_run

CONFIGS = {"mone": "demo-mone", "moe_total": "demo-moe-total", "moe_active": "demo-moe-active"}
WITHOUT_NG = "mone_without_ng"
WITHOUT_NG_SHARE = 0.4
"""How far the run without NG-LBL goes, as a share of the others' steps."""
_SCALED = ("lr_warmup_iters", "eval_interval", "log_interval", "save_interval")


def demo_runs(out: Path, prefix: Path, steps: int | None) -> list[KeptRun]:
    """The three runs and the shorter one without NG-LBL.

    Args:
        out: the demo's folder, from the repository.
        prefix: of the prepared data.
        steps: optimizer steps of each run; None for the configured number.
    """
    data = ["--data-path", f"{prefix}_text_document", "--tokenizer-model", f"{prefix}.tokenizer"]
    runs = []
    for name, model in [*CONFIGS.items(), (WITHOUT_NG, CONFIGS["mone"])]:
        config = CONFIG_ROOT / f"{model}.yaml"
        values = load_run(config)
        flags = scaled_flags(values, steps)
        if name == WITHOUT_NG:
            whole = steps or int(values["train_iters"])
            short = short_steps(whole, int(flags.get("log_interval", values["log_interval"])))
            # The learning rate follows the long run's schedule: only then are equal steps equal.
            flags |= {"train_iters": short, "lr_decay_iters": whole, "mone_ng_loss_coeff": 0}
        words = [*data]
        for flag, value in flags.items():
            words += [f"--{flag.replace('_', '-')}", str(value)]
        command = (PYTHON, "-m", "launch", "run", "--config", str(config.relative_to(ROOT)),
                   "--name", name, "--runs", str(out), "--", *words)  # fmt: skip
        job = training_job(config, name, out, words, (), read_fields("local"))
        runs.append(KeptRun(job, command))
    return runs


def scaled_flags(config: dict[str, Any], steps: int | None) -> dict[str, int]:
    """Megatron arguments that turn a configured run into one of `steps` steps.

    Warm-up and intervals shrink in proportion and are at least 1.
    """
    configured = int(config["train_iters"])
    if steps is None or steps == configured:
        return {}
    share = min(1.0, steps / configured)
    flags = {name: max(1, round(int(config[name]) * share)) for name in _SCALED}
    # A few windows a run, so that the first, which holds the start-up, can be left out.
    flags["log_interval"] = max(1, min(int(config["log_interval"]), steps // 5))
    flags["eval_interval"] = max(flags["eval_interval"], math.ceil(steps / 6))
    return {"train_iters": steps, **flags}


def short_steps(steps: int, log_interval: int) -> int:
    """WITHOUT_NG_SHARE of `steps` in whole logging windows, at least one."""
    windows = max(1, round(WITHOUT_NG_SHARE * steps / log_interval))
    return min(steps, windows * log_interval)
