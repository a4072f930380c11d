"""The portable kernels compiled ahead of time, on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from portable_support import program_of
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from attn_dsl.backend.portable.launch import Call, backward, forward
from attn_dsl.backend.portable.launch_permute import permuted
from attn_dsl.backend.portable.launch_sort import sorted_positions
from attn_dsl.backend.portable.run import Compiler
from attn_dsl.passes.order_by_data import BLOCK

TABLE = """attention bias
tensor table: float32[H, 257]
score = score + table[h, clamp(k - q, -128, 128) + 128]
mask = q >= k
"""


def compiled(
    text: str, capability: int, dim: int, length: int = 4096, window: tuple[Any, ...] = (), table: bool = False
) -> list[Any]:
    """All kernels of a call with B=2, H=16, in 16 bits; where there is a table, with its gradient."""
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    query = torch.empty(2, 16, length, dim, dtype=dtype, device="meta")
    tensors = (torch.empty(16, 257, device="meta"),) if table else ()
    call = Call(query, query, query, window, tensors, (), 0.1, capability=divmod(capability, 10))
    run, kernels = Compiler(GPUTarget("cuda", capability, 32)), program_of(text).kernels
    out, _, shifted = forward(kernels, call, run)
    backward(kernels, call, out, shifted, out, None, frozenset({"table"} if table else ()), run=run)
    return run.compiled


def spilled(kernel: Any, capability: int, folder: Path) -> int:
    """Bytes that ptxas spills; a wgmma that it serializes is an error."""
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    name = f"sm_{capability}{'a' if capability == 90 else ''}"
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", str(source), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "C75" not in said, said  # wgmma serialized
    return sum(int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill stores", said))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["noop", "causal", "softcap"])
def test_default_tiles_compile_with_few_spills(name: str, dim: int, capability: int, tmp_path: Path) -> None:
    kernels = compiled(name, capability, dim, window=(50.0,) if name == "softcap" else ())
    assert len(kernels) == 4
    for kernel in kernels:
        limit = 400 if kernel.metadata.name == "attention_keys_backward" else 32
        assert spilled(kernel, capability, tmp_path) <= limit, kernel.metadata.name


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_gradients_of_a_table_compile(capability: int) -> None:
    *_, keys, queries = compiled(TABLE, capability, 64, table=True)
    added = [re.search(r"(atom|red)\.global\S*add", kernel.asm["ptx"]) for kernel in (keys, queries)]
    assert added[0] is None and added[1] is not None


SHARED = {75: 64, 80: 163, 86: 99, 90: 227}
"""KiB of shared memory that a program may have."""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dim"), [(75, 128), (80, 64), (86, 64), (86, 256), (90, 128)])
def test_look_ups_of_pairs_leave_room_in_shared_memory(capability: int, dim: int) -> None:
    for kernel in compiled(TABLE, capability, dim, table=True):
        assert kernel.metadata.shared <= SHARED[capability] * 1024, kernel.metadata.name


def test_lengths_and_windows_do_not_specialize_kernels() -> None:
    first = compiled("sliding_window", 80, 32, 4096, (1024,))
    for length, window in ((1, 1), (17, 16), (5000, 2**20)):
        for one, other in zip(first, compiled("sliding_window", 80, 32, length, (window,)), strict=True):
            assert one.hash == other.hash


def test_kernels_for_hopper_multiply_on_the_tensor_cores_asynchronously() -> None:
    out = compiled("causal", 90, 128)[0]
    assert "wgmma.mma_async" in out.asm["ptx"] and "cp.async" in out.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
def test_orders_are_set_up_and_taken_without_spills(capability: int, tmp_path: Path) -> None:
    run = Compiler(GPUTarget("cuda", capability, 32))
    bucket = torch.empty(2, 16, 8192, dtype=torch.int32, device="meta")
    order, _ = sorted_positions(bucket, BLOCK, ("first",), run=run)
    sorted_positions(bucket, BLOCK, ("last",), ordered=False, run=run)
    assert order is not None
    rows = torch.empty(2, 16, 8192, 128, dtype=torch.bfloat16, device="meta")
    permuted((rows, rows, rows), (order, order, order), scatter=False, run=run)
    permuted((rows,), (order,), (torch.empty(2, 16, 8192, device="meta"),), scatter=True, run=run)
    sorts = ["count_bins", "sort_positions"]
    assert [kernel.metadata.name for kernel in run.compiled] == sorts * 2 + ["permute_rows"] * 2
    for kernel in run.compiled:
        assert spilled(kernel, capability, tmp_path) == 0
        if kernel.metadata.name == "permute_rows":
            assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]
