"""As much of MLflow as is called: a run is a file in the folder of the tracking URI, ID.jsonl."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.stand_ins import note, noted


class MlflowClient:
    """Refuses what is no folder; an experiment named `gone` takes no metrics."""

    def __init__(self, tracking_uri: str | None = None) -> None:
        if tracking_uri is None or not tracking_uri.startswith("/"):
            raise ValueError(f"unsupported URI {tracking_uri!r}")
        self._folder = Path(tracking_uri)

    def _file(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.jsonl"

    def get_experiment_by_name(self, name: str) -> Any:
        """None, or its id."""
        found = (self._folder / name).is_dir()
        return SimpleNamespace(experiment_id=name) if found else None

    def create_experiment(self, name: str) -> str:
        """Its id; fails where there is one."""
        (self._folder / name).mkdir(parents=True)
        return name

    def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
        """A run that is under way."""
        run_id = f"run{len(list(self._folder.glob('*.jsonl')))}"
        note(self._file(run_id), kind="create", experiment=experiment_id, name=run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def get_run(self, run_id: str) -> Any:
        """The last value of each metric."""
        if not self._file(run_id).exists():
            raise ValueError(f"no run {run_id}")
        metrics: dict[str, float] = {}
        for entry in noted(self._file(run_id), "log"):
            metrics |= entry["values"]
        return SimpleNamespace(data=SimpleNamespace(metrics=metrics))

    def update_run(self, run_id: str, status: str) -> None:
        """Another status."""
        note(self._file(run_id), kind="status", status=status)

    set_terminated = update_run

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        """Parameters, at most 100 and each once; metrics of one step."""
        experiment = noted(self._file(run_id), "create")[0]["experiment"]
        if params:
            assert len(params) <= 100
            note(self._file(run_id), kind="params", values=dict(params))
        if metrics and experiment == "gone":
            raise ConnectionError("https://me:secret@host is unreachable")
        if metrics:
            (step,) = {metric.step for metric in metrics}
            values = {metric.key: metric.value for metric in metrics}
            note(self._file(run_id), kind="log", step=step, values=values)
