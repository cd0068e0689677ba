"""Running shards on processes, and keeping two runs off one work folder."""

import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path

from megatron_mone.common.child_processes import end_with
from megatron_mone.data.errors import DataError
from megatron_mone.data.shards import ShardFacts, ShardJob, tokenize_shard


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and hold it for this process; DataError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("a")
    except OSError as error:
        raise DataError(
            f"--output-prefix {folder.with_suffix('')}: cannot write beside it "
            f"({error.strerror}: {error.filename}); choose a folder you may write to"
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run before us may have removed the folder between our open and our lock.
            held = os.path.samestat(os.fstat(stream.fileno()), (folder / "lock").stat())
        except OSError:
            held = False
        if not held:
            raise DataError(
                f"{folder}: another process is preparing this output; wait for it to end"
            )
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == ["lock"]:
                (folder / "lock").unlink()
                folder.rmdir()


def run_shards(
    jobs: Sequence[ShardJob], workers: int, finished: Callable[[int], None]
) -> list[ShardFacts]:
    """Tokenize every shard on `workers` processes; facts in the order of `jobs`.

    `finished` is told the input bytes of each. Raises DataError on the first bad line in input
    order if the jobs are strict, and when a worker was killed.
    """
    facts: list[ShardFacts] = []
    with closing(_results(jobs, min(workers, len(jobs)))) as results:
        for job, fact in zip(jobs, results, strict=True):
            if job.strict and fact.bad:
                raise DataError(f"{fact.bad[0]}; repair the line, or run without --strict")
            facts.append(fact)
            finished(job.size)
    return facts


def _results(jobs: Sequence[ShardJob], workers: int) -> Generator[ShardFacts, None, None]:
    if workers == 1:
        yield from map(tokenize_shard, jobs)
        return
    # spawn: a fork would inherit the lock, and threads of torch and tokenizers in unknown states.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (os.getpid(),)
    )
    try:
        yield from pool.map(tokenize_shard, jobs)
    except BrokenProcessPool:
        raise DataError(
            f"--workers {workers}: a worker process was killed (out of memory?); run the same "
            "command again with fewer: finished shards are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    # One thread each: the processes already fill the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is the parent's to answer; a traceback from each worker would only hide its line.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)  # the pool's own pipe never tells a worker that its parent was killed
