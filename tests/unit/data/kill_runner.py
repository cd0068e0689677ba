"""Kill `prepare` with SIGKILL and let the same call go on; run by test_data_resume.py.

A fork per trial, so that Megatron is imported once. Prints one JSON line of findings.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from megatron_mone.data.merge import OutputPaths, _indexed_dataset_module
from megatron_mone.data.plan import PrepareConfig
from megatron_mone.data.prepare import prepare


def digests(prefix: Path) -> dict[str, str]:
    """sha256 of every file under a final name."""
    outputs = OutputPaths(prefix)
    folder = outputs.tokenizer.iterdir() if outputs.tokenizer.is_dir() else ()
    files = [outputs.bin, outputs.idx, outputs.manifest, *folder]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.exists()}


def attempt(config: PrepareConfig, rename: int | None = None, seconds: float | None = None) -> bool:
    """One try in a fork, killed before its n-th rename or after some seconds; True if it ended."""
    pid = os.fork()
    if pid == 0:
        if rename is not None:
            kill_at_rename(rename)
        try:
            prepare(config)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(3)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("prepare failed")
    return os.WIFEXITED(status)


def kill_at_rename(count: int) -> None:
    """Let `count` renames happen, then die in place of the next."""
    real, left = Path.replace, [count]

    def replace(self: Path, target: Path) -> Path:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(self, target)

    Path.replace = replace  # type: ignore[method-assign]


def main(folder: Path) -> None:
    _indexed_dataset_module()
    text = " ".join(f"word{i % 97} and {i % 31}" for i in range(3000))
    for index in range(3):
        (folder / f"{index}.txt").write_text(text[index * 5000 :])
    clean = PrepareConfig((folder,), folder / "clean", "bpe:400", shard_bytes=50_000)
    attempt(clean)
    expected = {
        name.replace("clean", "trial"): d for name, d in digests(clean.output_prefix).items()
    }
    # The two names in the manifest differ, so it is compared by what it says of the others.
    manifest = "trial.manifest.json"
    expected.pop(manifest)
    findings = {"renames": 0, "timed": 0, "wrong": [], "half": [], "mixed": []}
    prefix = folder / "trial"

    def check(label: str, ended: bool) -> None:
        found = digests(prefix)
        whole = found.pop(manifest, None) is not None
        if ended and (found != expected or not whole or OutputPaths(prefix).work.exists()):
            findings["wrong"].append(label)
        pair = {p.name for p in (OutputPaths(prefix).bin, OutputPaths(prefix).idx)} <= set(found)
        if (pair or whole) and any(found.get(n) != expected[n] for n in found):
            findings["half"].append(label)

    def reset() -> None:
        for path in folder.glob("trial*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    config = PrepareConfig((folder,), prefix, "bpe:400", shard_bytes=50_000)
    count, ended = 0, False
    while not ended:
        reset()
        begin = time.monotonic()
        ended = attempt(config, rename=count)
        duration = time.monotonic() - begin  # the last one is that of a whole run
        check(f"rename {count}", ended)
        check(f"rename {count}, resumed", attempt(config))
        count += 1
    findings["renames"] = count - 1
    # Kill an --overwrite while it publishes: old or new may stand there, never some of each.
    old_config = PrepareConfig((folder / "0.txt",), prefix, "byte", overwrite=True)
    over = PrepareConfig((folder,), prefix, "bpe:400", shard_bytes=50_000, overwrite=True)
    for rename in range(count - 6, count - 1):
        reset()
        attempt(old_config)
        old = digests(prefix)
        attempt(over, rename=rename)
        now = digests(prefix)
        kept = [n for n in now if n in old and not n.startswith("token") and now[n] == old[n]]
        new = [n for n in now if now[n] == expected.get(n) and not n.startswith("token")]
        if (kept and new) or (manifest in now and now[manifest] == old[manifest] and now != old):
            findings["mixed"].append(f"rename {rename}: {sorted(now)}")
        check(f"overwrite {rename}, resumed", attempt(over))
    rng = random.Random(int(sys.argv[2]))
    for trial in range(4):
        reset()
        workers = 1 + trial % 2
        config = PrepareConfig((folder,), prefix, "bpe:400", workers=workers, shard_bytes=50_000)
        for _ in range(2):
            seconds = rng.uniform(0, duration if workers == 1 else duration + 1)
            ended = attempt(config, seconds=seconds)
            check(f"seed {sys.argv[2]}, trial {trial}, {seconds:.3f} s", False)
            findings["timed"] += not ended
            if ended:  # the machine is faster now than it was for the whole run
                duration /= 2
        if workers == 2:
            time.sleep(0.5)  # orphaned workers leave within their polling time
        check(f"trial {trial}, resumed", attempt(config))
    print(json.dumps(findings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
