"""Lengths of each batch entry in the portable kernels, both passes: `TRITON_INTERPRET=1 pytest tests/backend`."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from portable_support import Problem, assert_close, compiled, program_of
from variant_cases import Case, Sizes

from attn_dsl.passes.lengths import with_ends


@pytest.mark.parametrize("name", ["noop", "causal", "sliding_window", "alibi", "gpt_oss"])
def test_rows_and_keys_past_the_ends_take_no_part(name: str) -> None:
    case = Case(name, {}, Sizes(B=4, H=2, HK=1, Q=19, KV=35, D=16, DV=16))
    variant = program_of(name).variant
    parameters = {"window": 20} if "window" in {p.name for p in variant.parameters} else {}
    lengths = {
        "kv_len": torch.tensor([35, 20, 0, 33], dtype=torch.int32),
        "q_end": torch.tensor([19, 16, 5, 0], dtype=torch.int32),
    }
    query, key, value = case.inputs()
    bindings = {**parameters, **case.tensors(), **lengths}
    problem = Problem(compiled(with_ends(variant)), query, key, value, bindings)
    upstream = problem.upstream()
    truth = problem.truth(upstream)
    assert_close(problem.portable(upstream), truth, 3e-5)
    for b, (rows, keys) in enumerate(zip(lengths["q_end"], lengths["kv_len"], strict=True)):
        query[b, :, rows:] = key[b, :, keys:] = value[b, :, keys:] = torch.nan
    assert_close(replace(problem, query=query, key=key, value=value).portable(upstream), truth, 3e-5)
