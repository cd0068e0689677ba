"""A save that is complete, summed and named by the tracker, or that never happened.

Wraps Megatron's `save_checkpoint` and, in its torch_dist save, these places, in this order:

1. before: rank 0 makes the save a folder of its own (aside.py) and removes what earlier saves left
   and what this one replaces; a tracker that names it goes back to the iteration the run came from;
2. while: an OSError on one rank (a full disk) is kept, not raised, where Megatron would raise it
   on that rank alone and leave the others waiting in a collective;
3. after: every rank sums the shards it wrote, rank 0 writes integrity.json, stages the tracker and
   gives the folder its final name; an error of any rank is raised on all of them;
4. only then does Megatron advance the tracker, in one rename.

With async save, 3 is one of the request's finalize functions. Before 1, with the others' results in
each exchange of 2 and 3, and before each of its own writes to what outlives the save, rank 0 looks
whether this run still holds the folder (lease.py): if not, LeaseLostError on all ranks, and nothing
more is written or removed. May touch: Megatron's modules, the folder of the checkpoints.
"""

import contextlib
import functools
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.training import checkpointing, get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mone.checkpoint import aside, ownership
from megatron_mone.checkpoint.integrity import Entry, own_files, sum_files, write_sums
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
from megatron_mone.common.patch import Patch, Replaced, in_source, wrap, wrapping

_errors: list[str] = []
"""What went wrong on this rank during the save under way."""
_under_way: dict[Path, Path] = {}
"""Where a checkpoint will be -> the folder its save is written into; several with async save."""


class SaveFailedError(Exception):
    """A checkpoint could not be written; raised on every rank, before the tracker moved."""


class _HeldTracker(TrackerFile):
    """The tracker, moved by rank 0 after a last look at the lease; a background save ends here.

    Leaving the block raises LeaseLostError on this rank alone, which ends the others: another run
    took the folder while the ranks went from their last agreement to here.
    """

    last_look = staticmethod(ownership.check)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        with _lost_rather():
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
        _under_way[folder] = _agree(folder, share=aside.beside(folder))[0]
        _on_rank_0(_prepare, folder)
        _agree(folder)
        try:
            with _lost_rather():
                request = save(state_dict, str(_under_way[folder]), *args, **kwargs)
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


@contextlib.contextmanager
def _lost_rather() -> Iterator[None]:
    """An OSError of this rank, where it cannot be kept, is that of a folder it holds no more."""
    try:
        yield
    except OSError:
        ownership.check()
        raise


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep an OSError for `_agree` instead of leaving the other ranks alone in a collective.

    In a folder that is lost nothing is done.
    """

    @functools.wraps(function)
    def kept(*args: Any, **kwargs: Any) -> Any:
        if get_args().ckpt_format != "torch_dist":
            return function(*args, **kwargs)
        try:
            if ownership.look() is None:
                return function(*args, **kwargs)
        except OSError as error:
            _errors.append(_reason(error))

    return kept


def _not_yet(ensure_directory_exists: Callable[..., Any]) -> Callable[..., Any]:
    """A torch_dist checkpoint has no folder of its name before it is whole."""

    @functools.wraps(ensure_directory_exists)
    def not_yet(filename: Any, check_parent: bool = True) -> Any:
        other_format = get_args().ckpt_format != "torch_dist"
        if check_parent or other_format or MultiStorageClientFeature.is_enabled():
            ensure_directory_exists(filename, check_parent)

    return not_yet


def _beside_too(save_sharded_modelopt_state: Callable[..., Any]) -> Callable[..., Any]:
    """What goes into a checkpoint after its shards goes where they are."""

    @functools.wraps(save_sharded_modelopt_state)
    def beside_too(model: Any, checkpoint_name: Any, *args: Any, **kwargs: Any) -> Any:
        folder = _under_way.get(Path(checkpoint_name), checkpoint_name)
        return save_sharded_modelopt_state(model, str(folder), *args, **kwargs)

    return beside_too


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
    """Remove what earlier saves left and what this one replaces, and make its own folder."""
    for path in aside.left_in(folder.parent):
        if path not in _under_way.values():
            aside.remove(path)
    _retreat(folder)
    replaced = aside.take_away(folder)
    if replaced is None:
        _under_way[folder].mkdir(parents=True)
    else:
        for path in replaced.iterdir():
            if path.is_file():  # Megatron has put a dataloader's state into a folder there
                path.unlink()
        replaced.rename(_under_way[folder])


def _retreat(folder: Path) -> None:
    """Before the checkpoint that the tracker names is overwritten, name the one before it.

    Happens after --ckpt-step took the run back, or in a new run over an old folder. A kill during
    the save would otherwise leave a tracker that names a folder that is not there.
    """
    iteration, text = iteration_of(folder), read_tracker(folder.parent)
    if iteration is None or text is None or not text.isdigit() or int(text) != iteration:
        return
    came_from = _loaded_iteration(folder.parent)
    if came_from is not None and came_from >= iteration:
        came_from = next((i for i in iterations(folder.parent) if i < iteration), None)
    if came_from is None:
        aside.remove(folder.parent / TRACKER_NAME)
    else:
        commit(folder.parent / TRACKER_NAME, str(came_from), ownership.check)


def _loaded_iteration(folder: Path) -> int | None:
    """The iteration that this run loaded from `folder`, None when it loaded none from there."""
    args, loaded = get_args(), checkpointing.get_loaded_iteration()
    if not args.load or Path(args.load).resolve() != folder.resolve():
        return None
    return loaded if loaded is not None and loaded > 0 else None


def _seal(folder: Path) -> None:
    """Sum the files, write the sums, stage the tracker, give the folder its name. Collective.

    Raises SaveFailedError, LeaseLostError.
    """
    mine, rank = _under_way[folder], torch.distributed.get_rank()
    entries: dict[str, Entry] = {}
    try:
        if not _errors:
            entries = sum_files(mine, own_files(mine, rank))
    except OSError as error:
        _errors.append(_reason(error))
    shares = _agree(folder, share=entries)

    def finish(folder: Path) -> None:
        write_sums(mine, {name: entry for share in shares for name, entry in share.items()})
        iteration = iteration_of(folder)
        if iteration is not None:
            ownership.check()
            stage(folder.parent / TRACKER_NAME, str(iteration))
        aside.publish(mine, folder)

    _on_rank_0(finish, folder)
    _agree(folder)
    del _under_way[folder]


def _on_rank_0(function: Callable[[Path], None], folder: Path) -> None:
    """Call it there; the `_agree` that follows tells all ranks of an error or a lost lease."""
    if torch.distributed.get_rank() == 0:
        try:
            function(folder)
        except OSError as error:
            _errors.append(_reason(error))
        except LeaseLostError:
            pass


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
    text, mine = read_tracker(folder.parent), _under_way.pop(folder, None)
    if torch.distributed.get_rank() == 0 and mine is not None:
        with contextlib.suppress(OSError, LeaseLostError):  # then the next save removes it
            aside.remove(mine)
    fix = "make room there or give another --save, then start the same command again"
    before = "there is no earlier checkpoint"
    if text is not None:
        name = ITERATION_FORMAT.format(int(text)) if text.isdigit() else text
        before = f"{name} is still there and will be resumed from"
    raise SaveFailedError(f"checkpoint {folder} could not be written ({cause}): {fix}; {before}")


def _without_server(save: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save)
    def saved(*args: Any, **kwargs: Any) -> None:
        with Replaced(filesystem_async, "get_write_results_queue", queue.Queue):
            save(*args, **kwargs)

    return saved


def _keep_errors() -> None:
    wrap(checkpointing, "ensure_directory_exists", lambda ensure: _kept(_not_yet(ensure)))
    if checkpointing.has_nvidia_modelopt:
        wrap(checkpointing, "save_sharded_modelopt_state", _beside_too)
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
        why="it writes where readers look, and where a newer attempt may write by then; what a "
        "killed save left stays among the new, and no sums tell whether it is whole",
        needed_while="async_save_request = dist_checkpointing.save(",
    ),
    wrapping(
        "no-server-for-a-sync-save",
        "megatron.core.dist_checkpointing.strategies.torch: TorchDistSaveShardedStrategy.save",
        _without_server,
        why="to hand what it wrote to itself each rank starts a process, which imports torch anew "
        "and stays to the end of the run",
        needed_while='strategy="mcore")\n        async_request.execute_sync()',
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
