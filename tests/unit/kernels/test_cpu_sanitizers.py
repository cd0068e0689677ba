"""The native kernels under AddressSanitizer and UBSan, with vectors of 8 and 16 floats.

16 lanes are compiled without AVX-512 instructions, so that their code runs on any AVX2 processor.
"""

import subprocess
from pathlib import Path

import pytest

from megatron_mone.kernels.cpu import build, native

SMOKE = Path(__file__).with_name("cpu_kernels_smoke.cpp")
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def compiler():
    found = build.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    probe = [found, *SANITIZE, "-x", "c++", "-", "-o", "/dev/null"]
    if subprocess.run(probe, input="int main(){}", text=True, capture_output=True).returncode:
        pytest.skip("the compiler has no libasan")
    return found


@pytest.fixture(scope="module")
def builds(compiler, tmp_path_factory):
    """{lanes: (running compiler, its program)}, both started at once; what calls the kernels is
    compiled once, and without a sanitizer, which makes that five times as long."""
    if native.load().mone_best_set() < 1:
        pytest.skip("this processor has no AVX2")
    folder = tmp_path_factory.mktemp("sanitized")
    flags = [flag for flag in build.FLAGS if flag not in ("-O3", "-fvisibility=hidden")]
    flags += ["-mavx2", "-mfma", "-DMONE_TABLE=mone_smoke", f"-I{build.SOURCES}"]
    callers = [compiler, *flags, "-O1", "-c", str(SMOKE), "-o", str(folder / "smoke.o")]
    done = subprocess.run(callers, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    started = {}
    for lanes in (8, 16):
        program = folder / f"lanes-{lanes}"
        sources = [str(folder / "smoke.o"), str(build.SOURCES / "kernels.cpp")]
        process = subprocess.Popen(
            [compiler, *flags, *SANITIZE, f"-DMONE_LANES={lanes}", *sources, "-o", str(program)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started[lanes] = (process, program)
    return started


@pytest.mark.parametrize("lanes", [8, 16])
def test_kernels_under_sanitizers(lanes, builds):
    process, program = builds[lanes]
    _, said = process.communicate()
    assert process.returncode == 0, said[:4000]
    # worker threads of the OpenMP runtime live until exit and own their stacks
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert done.stdout.strip() == "0 failures"
