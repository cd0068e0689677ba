"""The cache of traces: what it gives back, what it forgets, and which questions it tells apart."""

import json
import os
import threading
from pathlib import Path

import pytest

from megatron_mone.common.places import PACKAGE, user_cache
from megatron_mone.planning.tracing import trace_cache
from megatron_mone.planning.tracing.trace_cache import TraceCache, cache_key
from tests.unit.test_rooms import GRAPH, MODULES


def numbers(path):
    return json.loads(path.read_bytes())["numbers"]


def document(value):
    return json.dumps({"numbers": value}).encode()


def test_what_was_put_comes_back(tmp_path):
    cache = TraceCache(tmp_path / "new" / "folder")
    assert cache.get("k", numbers) is None
    cache.put("k", document([1, 2]))
    assert cache.get("k", numbers) == [1, 2]
    assert cache.get("other", numbers) is None
    assert TraceCache(tmp_path / "new" / "folder").get("k", numbers) == [1, 2]


@pytest.mark.parametrize("damage", [b"", b'{"numb', b"\xff\xfe\x00", b"[]"])
def test_a_damaged_file_counts_as_absent(tmp_path, damage):
    def checked(path):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value["numbers"]

    cache = TraceCache(tmp_path)
    cache.put("k", document(3))
    (file,) = tmp_path.glob("*.json")
    file.write_bytes(damage)
    assert cache.get("k", checked) is None
    cache.put("k", document(4))
    assert cache.get("k", checked) == 4


def test_the_longest_unused_goes_first(tmp_path):
    cache = TraceCache(tmp_path, largest_mib=1)
    size = 300 << 10  # three fit
    for at, key in enumerate("abc"):
        cache.put(key, document("x" * size))
        os.utime(tmp_path / f"{key}.json", (at, at))
    assert cache.get("a", numbers)  # used: now b is the oldest
    cache.put("d", document("x" * size))
    kept = {key for key in "abcd" if cache.get(key, numbers) is not None}
    assert kept == {"a", "c", "d"}


def test_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("x" * (2 << 20))
    TraceCache(tmp_path, largest_mib=1).put("k", document(1))
    assert (tmp_path / "notes.txt").exists()


def test_writers_at_once_leave_a_whole_file(tmp_path):
    cache, long = TraceCache(tmp_path), document("x" * 100_000)
    failures = []

    def write():
        try:
            for _ in range(20):
                cache.put(f"mine-{threading.get_ident()}", long)
                cache.get("k", numbers)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {path.read_bytes() for path in tmp_path.glob("*.json")} == {long}


def test_the_key_follows_from_everything(tmp_path, monkeypatch):
    asked = {"flags": ["--a", "1"], "world_size": 8, "rows": None}
    key = cache_key(**asked)
    assert key == cache_key(**dict(reversed(asked.items())))
    others = [{"flags": ["--a", "2"]}, {"world_size": 16}, {"rows": [1, 2]}]
    assert len({key, *(cache_key(**{**asked, **other}) for other in others)}) == 4
    by = trace_cache._answered_by()
    assert set(by) == {"torch", "megatron-core", "source"}
    for name in by:
        monkeypatch.setattr(trace_cache, "_answered_by", lambda name=name: {**by, name: "other"})
        assert cache_key(**asked) != key


def test_the_digest_reads_the_source(tmp_path, monkeypatch):
    root = tmp_path / "package"
    (root / "planning" / "tracing").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "planning" / "tracing" / "build.py").write_text("a = 1\n")
    monkeypatch.setattr(trace_cache, "PACKAGE", root)

    before = digest()
    (root / "planning" / "tracing" / "build.py").write_text("a = 2\n")
    changed = digest()
    (root / "planning" / "tracing" / "build.py").rename(root / "planning" / "tracing" / "built.py")
    assert len({before, changed, digest()}) == 3


def test_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache("traces") == tmp_path / "megatron-mone" / "traces"
    for none in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert user_cache("traces") == Path.home() / ".cache" / "megatron-mone" / "traces"


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache folder .*/file/in' cannot be made") as failure:
        TraceCache(tmp_path / "file" / "in")
    assert "\n" not in str(failure.value)


def test_a_changed_file_that_a_trace_may_follow_from_misses(tmp_path, monkeypatch):
    """Whatever a trace imports, and the table of measured kernels, however deep it lies."""
    read = {path.relative_to(PACKAGE).as_posix() for path in trace_cache.sources(PACKAGE)}
    seen: set[str] = set()
    waiting = {module for module in GRAPH if module.startswith("megatron_mone.planning.tracing")}
    while waiting:
        seen |= (now := waiting)
        waiting = {name for module in now for name in GRAPH[module]} - seen
    followed = {MODULES[name].relative_to(PACKAGE).as_posix() for name in seen}
    assert "planning/tracing/stand_ins/op.py" in followed
    assert followed <= read
    assert "kernels/measured.json" in read

    for name in read:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((PACKAGE / name).read_bytes())
    monkeypatch.setattr(trace_cache, "PACKAGE", tmp_path)
    digests = [digest()]
    for name in sorted(read)[:: len(read) // 20]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"#")
        digests.append(digest())
    assert len(set(digests)) == len(digests) > 20


def digest() -> str:
    """Of the source, read anew."""
    trace_cache._answered_by.cache_clear()
    try:
        return trace_cache._answered_by()["source"]
    finally:
        trace_cache._answered_by.cache_clear()
