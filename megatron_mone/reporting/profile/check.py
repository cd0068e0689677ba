"""Refuses profiles that are no points of one scaling curve. Touches nothing."""

from collections.abc import Sequence

from megatron_mone.common.checked_json import differences
from megatron_mone.profiling.profile_document import Profile


def check_one_model(profiles: Sequence[Profile], names: Sequence[str]) -> None:
    """Raise a ValueError unless `profiles` can be points of one scaling curve.

    Args:
        profiles: drawn together.
        names: of the profiles, for the message.
    """
    first = {run.name: run.model for run in profiles[0].runs}
    sizes: dict[int, str] = {}
    for profile, name in zip(profiles, names, strict=True):
        world = profile.ranks.world_size
        if world in sizes:
            raise ValueError(
                f"ranks.world_size is {world} in both {sizes[world]} and {name}; a scaling curve "
                "needs another number of ranks in each: leave one out"
            )
        sizes[world] = name
        common = [run for run in profile.runs if run.name in first]
        if not common:
            raise ValueError(
                f"{name} has no run of {names[0]}'s ({', '.join(first)}): a scaling curve needs a "
                "common run, leave it out"
            )
        for run in common:
            for field, ours, theirs in differences(first[run.name], run.model):
                raise ValueError(
                    f"run {run.name!r}: model.{field} is {ours!r} in {names[0]} and {theirs!r} "
                    f"in {name}; a scaling curve needs one model: leave one out"
                )
