"""The flags of trackers, and what they need of one another. Imports and touches nothing.

W&B's are Megatron's own; MLflow's have the names that Megatron-Bridge gives them.
"""

import re
from argparse import ArgumentParser, Namespace

WANDB, MLFLOW = "wandb_project", "mlflow_experiment"  # each asks for a tracker
OTHERS = {
    WANDB: ("wandb_exp_name", "wandb_save_dir", "wandb_entity"),
    MLFLOW: ("mlflow_run_name", "mlflow_tracking_uri"),
}
"""The argument that asks for a tracker -> those that mean nothing without it; the first names the
run."""
_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")


def add_arguments(parser: ArgumentParser) -> None:
    """Add MLflow's flags to Megatron's parser."""
    group = parser.add_argument_group("MLflow")
    group.add_argument("--mlflow-experiment", metavar="NAME", help="track the run in it")
    group.add_argument("--mlflow-run-name", metavar="NAME", help="default: one of MLflow's making")
    group.add_argument(
        "--mlflow-tracking-uri", metavar="URI",
        help="server, database or folder; default: MLFLOW_TRACKING_URI, else MLflow's own",
    )  # fmt: skip


def asked(args: Namespace) -> list[str]:
    """WANDB, MLFLOW: what a run is tracked by."""
    return [name for name in OTHERS if getattr(args, name)]


def check_trackers(args: Namespace) -> None:
    """What the trackers' flags need of one another.

    Args:
        args: Megatron's, parsed.

    Raises:
        ValueError: one line; a flag without the one that it belongs to or needs.
    """
    for asks, others in OTHERS.items():
        value = getattr(args, asks)
        for name in others:
            if getattr(args, name) and not value:
                raise ValueError(
                    f"{name} = {getattr(args, name)!r} has no effect without {flag(asks)}: give "
                    "both or neither"
                )
        if value and not args.tensorboard_dir:
            raise ValueError(
                f"{asks} = {value!r} needs --tensorboard-dir: it gets what is written there"
            )
    if args.wandb_project and not args.wandb_exp_name:
        raise ValueError(
            f"wandb_project = {args.wandb_project!r} needs a name for the run: give "
            "--wandb-exp-name"
        )
    if args.wandb_project and not (args.save or args.wandb_save_dir):
        raise ValueError(
            f"wandb_project = {args.wandb_project!r} needs a folder for W&B's files: give --save "
            "or --wandb-save-dir"
        )
    check_address(args.mlflow_tracking_uri)


def check_address(uri: str | None) -> None:
    """A password in an argument would stand in scripts, logs and the tracked run itself.

    Args:
        uri: mlflow_tracking_uri.

    Raises:
        ValueError: it has one; one line, without it.
    """
    if uri and (shown := without_password(uri)) != uri:
        raise ValueError(
            f"mlflow_tracking_uri = {shown!r} holds a password, which would be written to files: "
            "leave it out, and export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "all of it as MLFLOW_TRACKING_URI"
        )


def without_password(text: str) -> str:
    """The text with `USER:PASSWORD@` taken out of every address in it."""
    return _PASSWORD.sub("", text)


def flag(name: str) -> str:
    """`--wandb-project` of wandb_project."""
    return f"--{name.replace('_', '-')}"
