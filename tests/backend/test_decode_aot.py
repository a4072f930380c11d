"""The decode kernel compiled ahead of time, on a machine without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import ask, compilations, fake_gpu
from portable_support import compiled as compile_variant
from portable_support import program_of
from test_portable_aot import spilled
from triton.backends.compiler import GPUTarget

from attn_dsl.backend.build import Request, build
from attn_dsl.backend.portable import launch_decode
from attn_dsl.backend.portable.launch import Call
from attn_dsl.backend.portable.run import Compiler
from attn_dsl.frontend import load
from attn_dsl.passes.lengths import with_lengths, with_pages, with_scales


def compiled(
    name: str, capability: int, tokens: int = 1, length: int = 16384, batch: int = 8, dim: int = 128,
    dtype: torch.dtype = torch.bfloat16, parameters: tuple[Any, ...] = (), tensors: tuple[torch.Tensor, ...] = (),
) -> list[Any]:  # fmt: skip
    """The kernels of a call with 32 heads on 8."""
    query = torch.empty(batch, 32, tokens, dim, dtype=dtype, device="meta")
    key = torch.empty(batch, 8, length, dim, dtype=dtype, device="meta")
    offsets = torch.empty(batch, dtype=torch.int64, device="meta")
    call = Call(query, key, key, parameters, tensors, (), 0.1, offsets, capability=divmod(capability, 10))
    run = Compiler(GPUTarget("cuda", capability, 32))
    launch_decode.forward(program_of(name).kernels, call, run)
    return run.compiled


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("tokens", "dim", "dtype"), [
    (1, 128, torch.bfloat16), (8, 128, torch.bfloat16), (16, 64, torch.float16), (1, 256, torch.bfloat16),
    (1, 128, torch.float32),
])  # fmt: skip
def test_layouts_compile_without_spills(
    tokens: int, dim: int, dtype: torch.dtype, capability: int, tmp_path: Path
) -> None:
    decode, merge = compiled("causal", capability, tokens, dim=dim, dtype=dtype)
    assert spilled(decode, capability, tmp_path) <= 32 and spilled(merge, capability, tmp_path) == 0
    assert "cp.async" in decode.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "bits", "capability"), [(16, 16, 80), (64, 16, 90), (16, 8, 89), (64, 8, 90)])
def test_pages_and_8_bits_compile_and_copy_ahead(page: int, bits: int, capability: int, tmp_path: Path) -> None:
    """A page number is loaded a tile ahead, so that the copies of keys and values need not wait for it."""
    variant, slabs = with_lengths(load("causal")), 8 * 16384 // page
    dtype = torch.bfloat16 if bits == 16 else torch.float8_e4m3fn
    tensors = [torch.empty(8, dtype=torch.int32, device="meta")]
    if bits == 8:
        variant, tensors = with_scales(variant), [torch.empty(slabs, 8, device="meta")] * 2 + tensors
    program = compile_variant(with_pages(variant))
    tensors = [torch.empty(8, 16384 // page, dtype=torch.int32, device="meta"), *tensors]
    query = torch.empty(8, 32, 1, 128, dtype=torch.bfloat16, device="meta")
    pool = torch.empty(slabs, 8, page, 128, dtype=dtype, device="meta")
    extents = {"pages_of_a_sequence": 16384 // page, "slabs_of_the_cache": slabs}
    call = Call(
        query, pool, pool, (), tuple(tensors), tuple(extents[e.name] for e in program.kernels.extents), 0.1, 0,
        capability=divmod(capability, 10), dims=(8, 32, 8, 1, 16384, 128),
    )  # fmt: skip
    run = Compiler(GPUTarget("cuda", capability, 32))
    launch_decode.forward(program.kernels, call, run)
    decode, _ = run.compiled
    assert spilled(decode, capability, tmp_path) <= 48  # 32 by Triton 3.6, 44 by 3.9
    assert "cp.async" in decode.asm["ptx"]


def test_lengths_batches_and_splits_do_not_specialize_kernels() -> None:
    first = compiled("sliding_window", 90, parameters=(1024,))
    for length, batch, window in ((5000, 3, 1), (131072, 1, 2**20)):
        for one, other in zip(
            first, compiled("sliding_window", 90, 1, length, batch, parameters=(window,)), strict=True
        ):
            assert one.hash == other.hash
    assert len(compiled("sliding_window", 90, length=4096, batch=64, parameters=(1024,))) == 1  # one split: no merge


def test_the_merge_begins_while_the_splits_run() -> None:
    slope = (torch.empty(32, device="meta"),)
    for name, tensors, tokens in (("noop", (), 1), ("alibi", slope, 1), ("alibi", slope, 8)):
        decode, merge = (kernel.asm["ptx"] for kernel in compiled(name, 90, tokens, tensors=tensors))
        limit = re.search(r"\.maxnreg (\d+)", decode)
        assert limit, "registers of two programs of 128 threads and one of the merge must fit a multiprocessor"
        assert 2 * 128 * int(limit[1]) + 128 * 64 <= 2**16 and ".maxnreg" not in merge
    decode, merge = compiled("noop", 90)
    assert "griddepcontrol.launch_dependents" in decode.asm["ptx"] and "griddepcontrol.wait" in merge.asm["ptx"]
    assert all("griddepcontrol" not in kernel.asm["ptx"] for kernel in compiled("noop", 80))


def test_what_is_built_ahead_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path))
    of = program_of("sliding_window")
    request = Request("sm_80", head_dim=64, backward=False, decode=True)
    names = [kernel.name for kernel in build(of, request)]
    assert names.count("attention_decode") == 6 and names.count("merge_splits") == 1
    for tokens, batch, length in ((1, 1, 5000), (3, 9, 777), (7, 300, 100), (40, 2, 64), (64, 1, 9000)):
        query = torch.empty(batch, 4, tokens, 64, dtype=torch.bfloat16)
        key = torch.empty(batch, 2, length, 64, dtype=torch.bfloat16)
        call = Call(query, key, key, (33,), (), (), 0.1, 7, capability=(8, 0))
        with fake_gpu(80), compilations() as cached:
            launch_decode.forward(of.kernels, call, ask)
        assert cached and all(cached), (tokens, batch, length)
