"""Reading what Slurm's commands print, whatever a site's wrappers print around it. Pure."""

import json
import re
from typing import Any

_SHOWN = 80
_SUBMITTED = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S+| on cluster \S+)?\s*", re.ASCII)


def submitted_id(said: str) -> str | None:
    """The job's number in what sbatch printed: the last line that is one; None where none is.

    "123" or, on one of several clusters, "123;cluster"; a wrapper may have its own words before
    it, or may leave --parsable out.
    """
    found = [match for line in said.splitlines() if (match := _SUBMITTED.fullmatch(line))]
    return found[-1][1] if found else None


def json_answer(said: str) -> dict[str, list[Any]] | None:
    """The `jobs` (mappings) and `errors` (texts) of an answer in JSON; None where it holds none.

    Args:
        said: all that was printed; a banner may stand before or after.
    """
    for start in re.finditer(r"(?m)^\s*\{", said):
        try:
            answer, _ = json.JSONDecoder().raw_decode(said[start.end() - 1 :])
        except (ValueError, RecursionError):
            continue
        jobs = answer.get("jobs")
        if isinstance(jobs, list) and all(isinstance(job, dict) for job in jobs):
            errors = answer.get("errors") or []
            return {"jobs": jobs, "errors": [_error(error) for error in _listed(errors)]}
    return None


def shown(said: str) -> str:
    """The begin of what a program printed, as one line of an error."""
    words = " ".join(said.split())
    if not words:
        return "nothing"
    return repr(words if len(words) <= _SHOWN else f"{words[:_SHOWN]}...")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _error(error: Any) -> str:
    """An entry of `errors`, whose names changed over the releases."""
    if not isinstance(error, dict):
        return str(error)
    return f"{error.get('source', 'squeue')}: {error.get('description') or error.get('error')}"
