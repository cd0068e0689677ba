"""Compile every Triton kernel ahead of time for sm_80, sm_90 and sm_100, without a GPU.

    python -m tests.unit.kernels.triton_aot OUT.json

Writes what the compiler and cuobjdump say of each: registers, stack (spills live there), shared
memory, tensor-core instruction, asynchronous 16-byte copies. Compiled, not run: no timing here.
Needs its own process, as Triton's interpreter and compiler cannot share one.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from megatron_mone.kernels.triton import (
    block_expand,
    block_sampled,
    block_weight_grad,
    gated,
    sampled_up,
    select,
    sparse_down,
)

ARCHITECTURES = (80, 90, 100)
OPTIONS = ("num_warps", "num_stages")
TENSOR_CORE = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
# The pointers (by name) that do not hold bf16.
POINTERS = {
    "index_ptr": "*i16",
    "expert_ptr": "*i32",
    "pair_ptr": "*i32",
    "offset_ptr": "*i32",
    "tile_segment_ptr": "*i32",
    "tile_first_ptr": "*i32",
    "p_ptr": "*fp32",
    "dp_ptr": "*fp32",
    "partial_ptr": "*fp32",
}
DIVISIBLE = ("width", "kept", "hidden", "share")  # F, S, H as a real model has them


def cases() -> dict[str, tuple]:
    """{name: (kernel, constexprs and options as the launcher passes them)}."""
    gate = {"ACTIVATION": "silu", **gated.config(512)}
    found = {
        "gate_forward": (gated.gate_forward_kernel, {**gate, "SCATTERED": True}),
        "gate_backward": (
            gated.gate_backward_kernel,
            {**gate, "SCATTERED": True, "HAS_DGATE": True},
        ),
        "sampled_up": (sampled_up.sampled_up_kernel, sampled_up.CONFIG),
        "sparse_down": (sparse_down.sparse_down_kernel, sparse_down.CONFIG),
    }
    for width in (1408, 14336):
        chosen = {"ACTIVATION": "silu", "BITS": 15, **select.config(width)}
        found[f"select_{width}"] = (select.select_kernel, chosen)
    gelu = {"ACTIVATION": "gelu", "BITS": 31, **select.config(2048)}
    found["select_2048_fp32"] = (select.select_kernel, gelu)
    for block in (16, 128):
        shared = {"BLOCK": block, "UPCAST": False}
        found[f"block_sampled_{block}"] = (
            block_sampled.block_sampled_kernel,
            {**shared, **block_sampled.config(block)},
        )
        found[f"block_expand_{block}"] = (
            block_expand.block_expand_kernel,
            {**shared, "TWO": True, **block_expand.config(block)},
        )
        found[f"block_weight_grad_{block}"] = (
            block_weight_grad.block_weight_grad_kernel,
            {**shared, **block_weight_grad.config(block)},
        )
    return found


def compile_kernel(name: str, kernel, given: dict, architecture: int) -> dict[str, object]:
    """One row of the table."""
    constants = {key: value for key, value in given.items() if key not in OPTIONS}
    signature, hints = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        pointer = "*fp32" if name.endswith("fp32") else "*bf16"
        is_pointer = argument.endswith("_ptr")
        signature[argument] = POINTERS.get(argument, pointer) if is_pointer else "i32"
        if is_pointer or argument in DIVISIBLE:
            hints[(place,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", architecture, 32)
    options = {key: given[key] for key in OPTIONS if key in given}
    options = CUDABackend(target).parse_options({**options, "enable_fp_fusion": True})
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    ptx = compiled.asm["ptx"]
    found = [text for text in TENSOR_CORE if text in ptx]
    return {
        **resources(compiled.asm["cubin"]),
        "dynamic_shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "tensor_core": found[0] if found else "",
        "async_copies_16": len(
            re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
        ),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and stack bytes, as cuobjdump reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert registers, text
    return {"registers": int(registers[1]), "stack": int(registers[2])}


def table() -> dict[str, object]:
    """{"kernel sm_NN": row} and the compiler's version."""
    rows = {
        f"{name} sm_{architecture}": compile_kernel(name, *case, architecture)
        for name, case in cases().items()
        for architecture in ARCHITECTURES
    }
    return {"note": "compiled, not run", "triton": triton.__version__, "kernels": rows}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(table(), indent=1) + "\n")
