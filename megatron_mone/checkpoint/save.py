"""A save that is complete, summed and named by the tracker, or that never happened.

Wraps Megatron's `save_checkpoint` and, in its torch_dist save, these places, in this order:

1. before: what a killed save left in the folder is removed, and a tracker that names this very
   folder goes back to the iteration the run came from;
2. while: an OSError on one rank (a full disk) is kept, not raised, where Megatron would raise it
   on that rank alone and leave the others waiting in a collective;
3. after: every rank sums the shards it wrote, rank 0 writes integrity.json and stages the tracker;
   an error of any rank is raised on all of them;
4. only then does Megatron advance the tracker, in one rename.

With async save, 3 is one of the request's finalize functions. Before 1, with the others' results in
each exchange of 2 and 3, and before 4, rank 0 looks whether this run still holds the folder
(lease.py): if not, LeaseLostError on all ranks, and nothing more is written or removed. May touch:
Megatron's modules, the folder being saved.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.training import checkpointing, get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mone.checkpoint import ownership
from megatron_mone.checkpoint.integrity import SUMS_NAME, Entry, own_files, sum_files, write_sums
from megatron_mone.checkpoint.lease.lease import LeaseLostError
from megatron_mone.checkpoint.tracker import (
    ITERATION_FORMAT,
    TRACKER_NAME,
    TrackerFile,
    TrackerStorage,
    commit,
    iteration_of,
    iterations,
    read_tracker,
    stage,
)
from megatron_mone.common.patch import Patch, in_source, wrap, wrapping

_errors: list[str] = []
"""What went wrong on this rank during the save under way."""


class SaveFailedError(Exception):
    """A checkpoint could not be written; raised on every rank, before the tracker moved."""


class _HeldTracker(TrackerFile):
    """The tracker, moved by rank 0 after a last look at the lease; a background save ends here.

    Leaving the block raises LeaseLostError on this rank alone, which ends the others: another run
    took the folder while the ranks went from their last agreement to here.
    """

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is None:
            ownership.check()
        super().__exit__(kind, value, trace)
        if get_args().async_save:
            ownership.end_save()


class _HeldTrackerStorage(TrackerStorage):
    """Megatron's storage, with that tracker."""

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """As `TrackerStorage.open`."""
        file = super().open(path, mode, *args, **kwargs)
        return _HeldTracker(path) if isinstance(file, TrackerFile) else file


def _held(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Any kind of save begins only in a folder that the run holds; it keeps it meanwhile."""

    @functools.wraps(save_checkpoint)
    def held(*args: Any, **kwargs: Any) -> Any:
        try:
            ownership.begin_save(get_args())
        except OSError as error:
            raise SaveFailedError(
                f"checkpoint folder {get_args().save} cannot be reached ({error.strerror}): start "
                "the same command again when it can"
            ) from error
        try:
            return save_checkpoint(*args, **kwargs)
        finally:
            ownership.end_save()

    return held


def _sealed(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def sealed(state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if MultiStorageClientFeature.is_enabled():
            return save(state_dict, checkpoint_dir, *args, **kwargs)
        folder = Path(checkpoint_dir)
        _on_rank_0(_prepare, folder)
        _agree(folder)
        try:
            request = save(state_dict, checkpoint_dir, *args, **kwargs)
        except CheckpointException as error:  # on all ranks; the cause only on rank 0
            causes = [str(cause) for cause, _ in error.failures.values()]
            _agree(folder, causes[0] if causes else "the writer failed")
            raise AssertionError("unreachable") from error
        if request is not None:
            request.add_finalize_fn(functools.partial(_seal, folder))
            ownership.extend_save()
            return request
        _seal(folder)
        return None

    return sealed


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an OSError for `_agree` instead of leaving the other ranks alone in a collective."""

    @functools.wraps(function)
    def kept(*args: Any, **kwargs: Any) -> Any:
        if get_args().ckpt_format != "torch_dist":
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except OSError as error:
            _errors.append(_reason(error))

    return kept


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Note the error that the shard writer hands back; Megatron reports only its type."""

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        error = output[1] if output else None
        if isinstance(error, Exception):
            _errors.append(_reason(error))
        return output

    return noted


def _reason(error: BaseException) -> str:
    """The operating system's words, where an exception has them in its chain.

    On a full disk torch.save raises "unexpected pos 704 vs 598" while the OSError is handled.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return str(error)


def _prepare(folder: Path) -> None:
    """Empty the folder of what an earlier save left, the marks of a whole checkpoint first."""
    _retreat(folder)
    if folder.is_dir():
        for name in (SUMS_NAME, CONFIG_FNAME):
            (folder / name).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()


def _retreat(folder: Path) -> None:
    """Before the checkpoint that the tracker names is overwritten, name the one before it.

    Happens after --ckpt-step took the run back, or in a new run over an old folder. A kill during
    the save would otherwise leave a tracker that names a half-written folder.
    """
    iteration, text = iteration_of(folder), read_tracker(folder.parent)
    if iteration is None or text is None or not text.isdigit() or int(text) != iteration:
        return
    came_from = _loaded_iteration(folder.parent)
    if came_from is not None and came_from >= iteration:
        came_from = next((i for i in iterations(folder.parent) if i < iteration), None)
    if came_from is None:
        (folder.parent / TRACKER_NAME).unlink()
    else:
        commit(folder.parent / TRACKER_NAME, str(came_from))


def _loaded_iteration(folder: Path) -> int | None:
    """The iteration that this run loaded from `folder`, None when it loaded none from there."""
    args, loaded = get_args(), checkpointing.get_loaded_iteration()
    if not args.load or Path(args.load).resolve() != folder.resolve():
        return None
    return loaded if loaded is not None and loaded > 0 else None


def _seal(folder: Path) -> None:
    """Sum the files, write the sums, stage the tracker. Collective; raises SaveFailedError."""
    rank = torch.distributed.get_rank()
    entries: dict[str, Entry] = {}
    try:
        if not _errors:
            entries = sum_files(folder, own_files(folder, rank))
    except OSError as error:
        _errors.append(_reason(error))
    shares = _agree(folder, share=entries)

    def finish(folder: Path) -> None:
        write_sums(folder, {name: entry for share in shares for name, entry in share.items()})
        iteration = iteration_of(folder)
        if iteration is not None:
            stage(folder.parent / TRACKER_NAME, str(iteration))

    _on_rank_0(finish, folder)
    _agree(folder)


def _on_rank_0(function: Callable[[Path], None], folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        try:
            function(folder)
        except OSError as error:
            _errors.append(_reason(error))


def _agree(folder: Path, error: str | None = None, share: Any = None) -> list[Any]:
    """Exchange errors and shares; every rank raises if any has an error, or the folder is lost.

    Args:
        folder: being saved.
        error: known to have happened somewhere, for want of a better one.
        share: this rank's part of a common result, small and picklable.

    Returns:
        All ranks' shares, in rank order.

    Raises:
        LeaseLostError: another run took the folder; whatever is in it stays.
        SaveFailedError: one line, the same on all ranks, naming folder, cause and fix.
    """
    lost = None
    try:
        lost = ownership.look()
    except OSError as failure:
        _errors.append(_reason(failure))
    mine = (list(_errors), error, share, lost)
    _errors.clear()
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for *_, lost in everyone:
        if lost is not None:
            raise LeaseLostError(lost)
    for rank, (errors, *_) in enumerate(everyone):
        if errors:
            _give_up(folder, f"{errors[0]} on rank {rank}")
    for _, known, *_ in everyone:
        if known is not None:
            _give_up(folder, known)
    return [part for _, _, part, _ in everyone]


def _give_up(folder: Path, cause: str) -> NoReturn:
    """Free the space that the failed save took, and raise."""
    text = read_tracker(folder.parent)
    if torch.distributed.get_rank() == 0 and _still_ours():
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_file():
                path.unlink(missing_ok=True)
    fix = "make room there or give another --save, then start the same command again"
    before = "there is no earlier checkpoint"
    if text is not None:
        name = ITERATION_FORMAT.format(int(text)) if text.isdigit() else text
        before = f"{name} is still there and will be resumed from"
    raise SaveFailedError(f"checkpoint {folder} could not be written ({cause}): {fix}; {before}")


def _still_ours() -> bool:
    """Whether what is in the folder is this run's to remove."""
    try:
        return ownership.look() is None
    except OSError:
        return False


def _keep_errors() -> None:
    wrap(checkpointing, "ensure_directory_exists", _kept)
    wrap(serialization, "save_config", _kept)
    wrap(serialization, "save_integrity_manifest", _kept)
    wrap(FileSystemWriterAsync, "finish", _kept)
    wrap(FileSystemWriterAsync, "write_preloaded_data", lambda write: staticmethod(_noted(write)))


PATCHES = (
    wrapping(
        "tracker-in-one-step",
        "megatron.training.checkpointing: maybe_msc",
        _HeldTrackerStorage,
        why="a rank killed between opening the tracker and writing it leaves it empty",
        needed_while="with maybe_msc.open(tracker_filename, 'w') as f:",
    ),
    wrapping(
        "save-in-own-folder",
        "megatron.training.training: save_checkpoint",
        _held,
        why="it writes into a folder that another run has taken",
        needed_while="    save_checkpoint(\n",
    ),
    wrapping(
        "sealed-save",
        "megatron.training.checkpointing: dist_checkpointing.save",
        _sealed,
        why="what a killed save left stays among the new, and no sums tell whether it is whole",
        needed_while="async_save_request = dist_checkpointing.save(",
    ),
    Patch(
        name="errors-on-all-ranks",
        needed_by="megatron/core/dist_checkpointing/serialization.py: save_config, on rank 0",
        why="an OSError is raised on one rank alone, and the others wait in a collective for ever; "
        "that of a shard's writer is reported by its type",
        apply=_keep_errors,
        still_needed=in_source(
            "core/dist_checkpointing/serialization.py", "get_rank() == 0:\n            save_config("
        ),
    ),
)
