"""Compile every Triton kernel ahead of time for sm_80, sm_90 and sm_100, without a GPU.

    python -m tests.unit.kernels.triton_aot OUT.json [again]

Writes what the compiler and cuobjdump say of each: registers, stack (spills live there), shared
memory, tensor-core instruction, asynchronous 16-byte copies, loads by TMA; and a digest of what
was compiled, by which the suite knows that a row is of the kernel as it is. Rows of OUT.json that
are of the same kernel and compiler stay. The suite compiles a few rows anew (`again`). Compiled,
not run: no timing here. Needs its own process, as Triton's interpreter and compiler cannot share
one.
"""

import ast
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from megatron_mone.kernels import Selection
from megatron_mone.kernels.triton import decode, ops, segments
from megatron_mone.kernels.triton.device import (
    block_selection,
    decode_products,
    hidden_products,
    neuron_products,
    row_map,
    segment_map,
    segment_products,
    selection,
    statistics,
    weight_grads,
)
from megatron_mone.kernels.triton.row_map import TILE

ARCHITECTURES = (80, 90, 100)
OPTIONS = ("num_warps", "num_stages")
SPILLS = ("gate_product_fp32 sm_80",)  # three TF32 products; float32 is for comparisons
TENSOR_CORE = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
INTS, FLOATS = "*i32", "*fp32"
# The pointers (by name) that do not hold the activations' type.
POINTERS = {
    **dict.fromkeys(("offset_ptr", "chunk_offset_ptr", "tile_expert_ptr", "tile_row_ptr"), INTS),
    **dict.fromkeys(("word_ptr", "rows_ptr", "order_ptr", "union_ptr", "number_ptr"), INTS),
    **dict.fromkeys(("segment_offset_ptr", "tile_segment_ptr"), INTS),
    **dict.fromkeys(("ticket_ptr", "count_ptr"), INTS),
    **dict.fromkeys(("p_ptr", "dp_ptr", "part_ptr", "weight_ptr", "level_ptr", "loss_ptr"), FLOATS),
    **dict.fromkeys(("tally_ptr", "total_ptr", "loss_scale_ptr"), FLOATS),
    **dict.fromkeys(("share_ptr", "sum_ptr", "whole_ptr"), FLOATS),
    **dict.fromkeys(("load_ptr", "load_rows_ptr", "first_ptr", "block_of_chunk_ptr"), "*i64"),
    "base_ptr": "*i16", "bad_ptr": "*i8", "real_ptr": "*i8",
}  # fmt: skip
OTHER_POINTERS = {
    "row_map": {"count_ptr": "*i64"},
    "weight_grad": {"out_ptr": FLOATS},
    "down_product_parts": {"out_ptr": FLOATS},
}  # by the start of a row's name
CHOICE = {
    "selection.select": selection.select_kernel,
    "selection.select_wide": selection.select_wide_kernel,
    "block_selection.select_blocks": block_selection.select_blocks_kernel,
}
NUMBERS = {"scale": "fp32", "over_experts": "fp32", "tally_scale": "fp32"}
# F, S, H and strides as a real model has them
DIVISIBLE = ("neurons", "hidden", "kept", "w_stride", "w2_stride", "out_stride", "width")


def cases() -> dict[str, tuple]:
    """{name: (kernel, constants and options as the launcher passes them)}, of F 1408, H 2048; by
    segments, of blocks of 352."""
    product = ops.product_config(torch.bfloat16, TILE, 1408, 2048)
    wide = ops.product_config(torch.float32, TILE, 1408, 2048)
    act = {**product, "ACTIVATION": "silu"}
    down = {**product, "TWO": False, "CHECKED": True, "ORDERED": False, "TILE_N": 128}
    grads = [
        {**ops.grad_config(torch.bfloat16, TILE, 1408, 2048, ordered), "ADDS": True}
        for ordered in (False, True)
    ]
    found: dict[str, tuple] = {
        "gate_product": (neuron_products.gate_product_kernel, product),
        "gate_product_fp32": (neuron_products.gate_product_kernel, wide),
        "up_product": (neuron_products.up_product_kernel, act),
        "dh_product": (neuron_products.dh_product_kernel, {**act, "BALANCED": True}),
        "down_product": (hidden_products.hidden_product_kernel, down),
        "dx_product": (
            hidden_products.hidden_product_kernel, {**down, "TWO": True, "CHECKED": False},
        ),
        "weight_grad": (weight_grads.weight_grad_kernel, grads[0]),
        "up_product_segments": (segment_products.up_segments_kernel, act),
        "dh_product_segments": (segment_products.dh_segments_kernel, {**act, "BALANCED": True}),
        "down_product_segments": (
            hidden_products.hidden_product_kernel, {**down, "ORDERED": True},
        ),
        "down_product_parts": (
            hidden_products.hidden_product_kernel, {**down, "CHECKED": False, "ORDERED": True},
        ),
        "dx_product_segments": (
            hidden_products.hidden_product_kernel,
            {**down, "TWO": True, "CHECKED": False, "ORDERED": True},
        ),
        "weight_grad_segments": (weight_grads.weight_grad_kernel, grads[1]),
    }  # fmt: skip
    for dtype, suffix in ((torch.bfloat16, ""), (torch.float32, "_fp32")):
        few = decode.neuron_config(dtype)
        found |= {
            f"decode_gate{suffix}": (decode_products.decode_gate_kernel, few),
            f"decode_up{suffix}": (
                decode_products.decode_up_kernel, {**few, "ACTIVATION": "silu"},
            ),
            f"decode_down{suffix}": (
                decode_products.decode_down_kernel, decode.hidden_config(dtype),
            ),
        }  # fmt: skip
    found["union"] = (decode_products.union_kernel, ops.row_config(1408))
    beside = {"TILE_M": TILE, "ACTIVATION": "silu", "num_warps": 8}
    found["up_entries"] = (neuron_products.up_entries_kernel, beside)
    found["dh_entries"] = (neuron_products.dh_entries_kernel, {**beside, "BALANCED": True})
    for neurons, choose in (
        (1408, Selection(352)), (1408, Selection(352, 4)), (1408, Selection(704, 352)),
        (1408, Selection(352, 1, 32)), (1408, Selection(352, 1, 11)),
        (1408, Selection(352, 1, 352)), (2048, Selection(512, 2, 128)),
        (14336, Selection(3584, 1, 896)), (14336, Selection(3584)),
    ):  # fmt: skip
        kernel, constants = ops.select_config(neurons, torch.bfloat16, choose)
        name = f"select_{neurons}_{choose.groups}_{choose.block}"
        found[name] = (CHOICE[kernel], {**constants, "ACTIVATION": "silu"})
    row = {**ops.row_config(1408), "ACTIVATION": "silu"}
    found["compact"] = (selection.compact_kernel, row)
    for slope in ("whole", "sums", "rest"):
        found[f"rebuild_{slope}"] = (
            selection.rebuild_kernel,
            {**row, "SLOPE": slope, "SCALE_FREE": True, "HAS_REAL": False, "CHUNKS": 64},
        )
    found |= {
        "probability_grad": (
            selection.probability_grad_kernel, {"ROWS": 64, "PARTS": 16, "num_warps": 4},
        ),
        "row_map": (
            row_map.row_map_kernel, {"TILE": TILE, "EXPERTS": 64, "SOURCES": 8, "TILES": 128},
        ),
        "statistics": (
            statistics.statistics_kernel,
            {"ACTIVATION": "silu", "SHARES": True, "SCALE_FREE": True, "HAS_REAL": False,
             **ops.STATISTICS},
        ),
        "gather": (statistics.gather_kernel, {
            "SHARES": True, "LOADS": True, "WEIGHTS": "make", "ENTROPY": False, "PARTS": 64,
            "TALLY": True, **ops.GATHER,
        }),
        "weigh": (
            statistics.weigh_kernel, {"ENTROPY": False, "PARTS": 64, "TALLY": True, **ops.WEIGH},
        ),
        "note_bad": (statistics.note_bad_kernel, ops.LOOK),
        "mark_bad": (hidden_products.mark_bad_kernel, ops.LOOK),
        "add_slots": (
            hidden_products.add_slots_kernel, {"SLOTS": 4, "CHECKED": True, **ops.ADD},
        ),
        "segment_map": (segment_map.segment_map_kernel, {"TILE": TILE, **segments.MAP}),
    }  # fmt: skip
    return found


def compile_kernel(name: str, kernel, given: dict, architecture: int) -> dict[str, object]:
    """One row of the table."""
    constants = {key: value for key, value in given.items() if key not in OPTIONS}
    other = next((kinds for start, kinds in OTHER_POINTERS.items() if name.startswith(start)), {})
    signature, hints = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        pointer = "*fp32" if name.endswith("fp32") else "*bf16"
        is_pointer = argument.endswith("_ptr")
        if is_pointer:
            signature[argument] = other.get(argument, POINTERS.get(argument, pointer))
        else:
            signature[argument] = NUMBERS.get(argument, "i32")
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
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.[^ ]*global", ptx)),
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


def compiled() -> list[tuple[str, str, int]]:
    """(row, case, architecture) of the table."""
    every = [(f"{name} sm_{number}", name, number) for name in cases() for number in ARCHITECTURES]
    return [row for row in every if row[0] not in SPILLS]


def again() -> list[tuple[str, str, int]]:
    """Those of `compiled` that the suite compiles anew: the largest product, and one choice."""
    return [row for row in compiled() if row[1] == "dh_product" or row[0] == "compact sm_90"]


def digest(kernel, given: dict) -> str:
    """Of a kernel's code, that of the device functions that it calls, what they read of their
    modules, and the constants and options that it is compiled with; not of comments."""
    parts, seen, ahead = [repr(sorted(given.items()))], set(), [kernel]
    while ahead:
        function = ahead.pop()
        if function.fn in seen:
            continue
        seen.add(function.fn)
        tree = ast.parse(function.src)
        if ast.get_docstring(tree.body[0]):
            del tree.body[0].body[0]
        parts.append(ast.dump(tree))
        for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            value = function.fn.__globals__.get(name)
            if isinstance(value, triton.JITFunction):
                ahead.append(value)
            elif isinstance(value, triton.language.constexpr):
                parts.append(f"{name} = {value.value!r}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def table(rows: list[tuple[str, str, int]], known: dict[str, dict]) -> dict[str, object]:
    """{"kernel sm_NN": row} and the compiler's version; `known` rows of the same kernels stay."""
    found, made = cases(), {}
    for row, name, number in rows:
        of = digest(*found[name])
        if known.get(row, {}).get("of") == of:
            made[row] = known[row]
        else:
            made[row] = {**compile_kernel(name, *found[name], number), "of": of}
    return {"note": "compiled, not run", "triton": triton.__version__, "kernels": made}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    kept = json.loads(out.read_text()) if out.exists() else {"triton": None}
    known = kept["kernels"] if kept["triton"] == triton.__version__ else {}
    found = table(again() if sys.argv[2:] == ["again"] else compiled(), known)
    out.write_text(json.dumps(found, indent=1) + "\n")
