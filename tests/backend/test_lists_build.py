"""Kernels that walk lists, and those that make them, compiled ahead of time for Hopper, without a GPU."""

from __future__ import annotations

import pytest
import torch
from portable_support import program_of
from triton.backends.compiler import GPUTarget

from attn_dsl.backend.execute import Program
from attn_dsl.backend.hopper import check, launch, launch_backward
from attn_dsl.backend.portable.launch import Call, forward
from attn_dsl.backend.portable.run import Compiler

READ = {"packed_causal": (2, 8192), "hash_buckets": (2, 16, 8192), "bigbird": (16, 128, 3)}
TWO_TERMS = """attention two_terms()
tensor birth: int32[Q]
tensor rank: float32[Q]
tensor since: int32[KV]
tensor least: float32[KV]

mask = (birth[q] >= since[k]) and (rank[q] >= least[k])
"""


def call(name: str) -> tuple[Program, Call]:
    query = torch.empty(2, 16, 8192, 128, dtype=torch.bfloat16, device="meta")
    tensor = torch.empty(READ[name], dtype=torch.int32, device="meta")
    if name != "bigbird":
        return program_of(name), Call(query, query, query, (), (tensor,), (), 0.1, capability=(9, 0))
    of = program_of(name, (("random", 3),))
    return of, Call(query, query, query, (64, 1, 2), (tensor,), (128,), 0.1, capability=(9, 0))


@pytest.mark.parametrize("name", ["packed_causal", "bigbird"])
def test_the_preferred_forward_configuration_is_sound_with_a_list(name: str) -> None:
    of, bound = call(name)
    choice = launch.Kernels(of.kernels).choice(bound, launch.compile_ahead)
    assert choice.config is not None and not choice.rejected, choice.rejected
    assert choice.build is not None and choice.build.spilled <= check.SPILLS
    assert not choice.build.notes and not choice.build.missing


@pytest.mark.parametrize("name", ["packed_causal", "bigbird"])
def test_some_backward_configuration_is_sound_with_a_list(name: str) -> None:
    of, bound = call(name)
    choice = launch_backward.Kernels(of.kernels).choice(bound, compile=launch.compile_ahead)
    assert choice.config is not None, choice.rejected
    assert choice.build is not None and not choice.build.notes and not choice.build.missing


@pytest.mark.parametrize("name", READ)
def test_what_makes_a_list_spills_nothing(name: str) -> None:
    of, bound = call(name)
    run = Compiler(GPUTarget("cuda", 90, 32))
    forward(of.kernels, bound, run)
    built = {kernel.metadata.name: check.inspected(name, kernel) for kernel in run.compiled}
    assert "list_tiles" in built and built["list_tiles"].spilled == 0
    assert ("summarize_tiles" in built) == (name == "hash_buckets"), "keys are summarized, whose order is not known"


def test_several_terms_of_several_types_are_summarized() -> None:
    query = torch.empty(2, 4, 1001, 128, dtype=torch.bfloat16, device="meta")
    of = program_of(TWO_TERMS)
    dtypes = [getattr(torch, tensor.dtype.value) for tensor in of.variant.tensors]
    tensors = tuple(torch.empty(1001, dtype=dtype, device="meta") for dtype in dtypes)
    run = Compiler(GPUTarget("cuda", 90, 32))
    forward(of.kernels, Call(query, query, query, (), tensors, (), 0.1, capability=(9, 0)), run)
    assert {"list_tiles", "summarize_tiles"} <= {kernel.metadata.name for kernel in run.compiled}
