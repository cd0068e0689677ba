"""Where the native library is built and found: beside the sources, or in a cache folder."""

import os
from pathlib import Path

import pytest

from megatron_mone.kernels.cpu import backend as cpu_backend
from megatron_mone.kernels.cpu import build, native

COMPILER = """#!/bin/sh
[ "$1" != -dumpmachine ] || echo "${MACHINE:-x86_64}-linux-gnu"
while [ $# -gt 1 ]; do [ "$1" != -o ] || echo built >"$2"; shift; done
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """The folder of the sources, without a library; compilers only write a word."""
    folder, compiler = tmp_path / "package", tmp_path / "compiler"
    folder.mkdir()
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "FOLDER", folder)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_library_beside_the_sources_is_taken_and_replaces_older_ones(beside, tmp_path):
    (beside / "mone_cpu-0-0.so").touch()
    built = build.build(folder=beside)
    assert sorted(beside.glob("*.so")) == [built]
    assert build.build(folder=tmp_path / "cache") == built
    assert not (tmp_path / "cache").exists()


def test_a_cache_folder_is_made_and_keeps_what_other_versions_built(beside, tmp_path):
    other = tmp_path / "cache" / "mone_cpu-0-0.so"
    built = build.build(folder=other.parent)
    other.touch()
    built.unlink()
    assert build.build(folder=other.parent) == built
    assert sorted(other.parent.glob("*.so")) == sorted([other, built])
    assert list(beside.iterdir()) == []


def test_without_a_compiler_a_library_of_either_folder_does(beside, tmp_path, monkeypatch):
    cached, own = build.build(folder=tmp_path / "cache"), None
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert build.build(folder=tmp_path / "cache") == cached
    own = beside / cached.name
    cached.rename(own)
    assert build.build(folder=tmp_path / "cache") == own
    own.unlink()
    with pytest.raises(build.BuildError, match=r"compiler: install .* or set CXX"):
        build.build(folder=tmp_path / "cache")


def test_a_folder_that_cannot_be_made_is_said(beside, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(build.BuildError, match=r"cannot be built: .*file"):
        build.build(folder=tmp_path / "file" / "kernels")


def test_the_compiler_says_which_instruction_sets_are_built(beside, tmp_path, monkeypatch):
    """No flag of one processor goes to the compiler of another."""
    asked, compiler = tmp_path / "asked", Path(os.environ["CXX"])
    compiler.write_text(compiler.read_text().replace("while", f'echo "$@" >>{asked}\nwhile', 1))
    for machine, sets in build.VARIANTS.items():
        monkeypatch.setenv("MACHINE", machine)
        build.build(folder=beside).unlink()
        said = asked.read_text()
        for name, (_, flags) in sets.items():
            assert f"MONE_TABLE=mone_{name}" in said
            assert all(flag in said for flag in flags)
        others = {flag for sets in build.VARIANTS.values() for _, f in sets.values() for flag in f}
        wanted = {flag for _, flags in sets.values() for flag in flags}
        assert not any(flag in said for flag in others - wanted)
        asked.unlink()
    monkeypatch.setenv("MACHINE", "riscv64")
    with pytest.raises(build.BuildError, match=r"x86_64 or aarch64; .* for riscv64-linux-gnu"):
        build.build(folder=beside)


@pytest.mark.skipif(not cpu_backend.available()[0], reason="the CPU kernels cannot be built here")
def test_a_lower_instruction_set_can_be_named(monkeypatch):
    best = native.default_set()
    monkeypatch.setenv(native.SET_ENV, native.INSTRUCTION_SETS[0])
    assert native.default_set() == native.INSTRUCTION_SETS[0]
    monkeypatch.setenv(native.SET_ENV, "sse9")
    cpu_backend.available.cache_clear()  # asked before anything is computed
    with pytest.raises(ValueError, match=rf"^MONE_KERNEL_SET = 'sse9': .* runs .*{best}$"):
        cpu_backend.available()


@pytest.mark.parametrize(
    ("checkout", "writable", "cached"),
    [(True, True, False), (True, False, True), (False, True, True)],
)
def test_who_builds_where(beside, monkeypatch, tmp_path, checkout, writable, cached):
    monkeypatch.setattr(native, "IS_CHECKOUT", checkout)
    monkeypatch.setattr(os, "access", lambda path, mode: writable and Path(path) == beside)
    expected = tmp_path / "cache" / "megatron-mone" / "kernels" if cached else beside
    assert native._folder() == expected
