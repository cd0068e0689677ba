"""How tokens spread over experts: balanced, by Zipf's law, or as a profile recorded it.

All ranks of an expert-parallel group wait for the one whose experts have the most rows, so that is
the rank to trace: the experts are ordered such that it is the first. As a job's experts are on
ranks at random, so are they here (by a fixed seed), unless a profile says where they are.
May touch: the profile it is given.
Shapes: E experts, T tokens of one router call, each with K_E different experts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_mone.common.checked_json import Field, column, load

BALANCED = "balanced"
ZIPF = "zipf"
REPLAYED = "replayed"
_SEED = 20510
_FIX = "give the profile.json of tools/profile.py"


@dataclass(frozen=True)
class Skew:
    """How unlike the experts' shares are.

    Attributes:
        kind: BALANCED, ZIPF or REPLAYED.
        exponent: of Zipf's law: the i-th most chosen expert has a share of i ** -exponent.
        layers: of REPLAYED: rows of each expert, layer after layer.
    """

    kind: str = BALANCED
    exponent: float = 0.0
    layers: tuple[tuple[float, ...], ...] = ()


def parse_skew(text: str) -> Skew:
    """Of "balanced", "zipf:0.5", or the path of a profile.json.

    Raises:
        ValueError: one line naming what is wrong.
    """
    if text == BALANCED:
        return Skew()
    kind, _, exponent = text.partition(":")
    if kind == ZIPF:
        try:
            value = float(exponent or "0.5")
        except ValueError:
            value = -1.0
        if not 0 <= value <= 4:
            raise ValueError(f"--routing {text!r}: the exponent must be 0 to 4, as zipf:0.5")
        return Skew(ZIPF, value)
    path = Path(text)
    if not path.is_file():
        raise ValueError(
            f"--routing {text!r} is neither balanced, zipf:EXPONENT nor the profile.json of a run"
        )
    return Skew(REPLAYED, 0.0, tuple(_recorded(path)))


def _recorded(path: Path) -> list[tuple[float, ...]]:
    document = Field(load(path, _FIX), path, _FIX)
    for run in document["runs"].elements():
        layers = [
            tuple(float(rows) for rows in layer["rows"].checked(column))
            for layer in run["routing"]["layers"].elements()
        ]
        if layers:
            return layers
    document.fail("no run of it has routed rows")


def expert_rows(skew: Skew, tokens: int, topk: int, experts: int, ranks: int) -> list[int] | None:
    """E rows that one router call sends to each expert, the fullest rank's experts first.

    Args:
        skew: which spread. Of a recorded one the layer whose fullest rank is the median.
        tokens: T.
        topk: K_E.
        experts: E.
        ranks: of the expert-parallel group, which E divides by.

    Returns:
        None for a balanced spread.

    Raises:
        ValueError: a recorded spread over other experts.
    """
    if skew.kind == BALANCED:
        return None
    if skew.kind == ZIPF:
        shares = np.arange(1, experts + 1, dtype=np.float64) ** -skew.exponent
        shares = np.random.default_rng(_SEED).permutation(shares)
        return _fullest_first(_whole(shares, tokens, topk), ranks)
    found = []
    for layer in skew.layers:
        if len(layer) != experts:
            raise ValueError(
                f"the recorded routing is over {len(layer)} experts, the model has {experts}: "
                "replay a profile of the same number of experts"
            )
        found.append(_whole(np.array(layer), tokens, topk))
    found.sort(key=lambda rows: hottest(rows.tolist(), ranks))
    return _fullest_first(found[len(found) // 2], ranks)


def hottest(rows: list[int] | None, ranks: int) -> float:
    """Rows of the fullest rank over the mean of all; 1 where `rows` is None."""
    if rows is None:
        return 1.0
    of_ranks = np.array(rows, dtype=np.float64).reshape(ranks, -1).sum(axis=1)
    return float(of_ranks.max() / of_ranks.mean())


def _whole(shares: ArrayLike, tokens: int, topk: int) -> NDArray[np.int64]:
    """Rows nearest to `shares` that add up to T x K_E, none above T (a token's experts differ)."""
    shares_E = np.maximum(np.asarray(shares, dtype=np.float64), 1e-12)
    total = tokens * topk
    full = np.zeros(len(shares_E), dtype=bool)
    while True:  # what passes the cap goes to the others, by their shares
        rest = total - tokens * int(full.sum())
        rows_E = np.where(full, tokens, shares_E * (rest / max(shares_E[~full].sum(), 1e-300)))
        over = (rows_E > tokens) & ~full
        if not over.any():
            break
        full |= over
    whole = np.floor(rows_E).astype(np.int64)
    missing = total - int(whole.sum())
    # One more where the most was cut off; those at the cap have nothing cut off.
    whole[np.argsort(whole - rows_E, kind="stable")[:missing]] += 1
    return whole


def _fullest_first(rows: NDArray[np.int64], ranks: int) -> list[int]:
    of_ranks = rows.reshape(ranks, -1)
    return np.roll(of_ranks, -int(of_ranks.sum(axis=1).argmax()), axis=0).reshape(-1).tolist()
