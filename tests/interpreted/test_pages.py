"""Caches in pages and in 8 bits in the decode and the portable kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from portable_support import Problem, Result, assert_close, compiled, program_of
from torch import Tensor
from variant_cases import Case, Sizes

from attn_dsl.backend.execute import Options, portable_call
from attn_dsl.backend.portable import launch, launch_decode
from attn_dsl.passes.lengths import with_lengths, with_pages, with_scales

LENGTHS = (5, 96, 61)
ROOM = 128


@dataclass
class Cache:
    """A cache in pages, shuffled."""

    key: Tensor
    value: Tensor
    table: Tensor

    @staticmethod
    def of(key: Tensor, value: Tensor, page: int) -> Cache:
        """Pages of `[B, HK, ROOM, D]`; those that nobody has hold nan."""
        batch, heads, room, _ = key.shape
        count = batch * room // page
        order = torch.randperm(count + 5, generator=torch.Generator().manual_seed(1))[:count]
        table = order.view(batch, -1).int()

        def paged(x: Tensor) -> Tensor:
            pool = x.new_full((count + 5, heads, page, x.shape[3]), torch.nan)
            pool[table.long()] = x.unflatten(2, (-1, page)).transpose(1, 2)
            return pool

        return Cache(paged(key), paged(value), table)


def problem(name: str, tokens: int, **bindings: Any) -> Problem:
    """Each batch entry with a length of its own; what lies past it is nan."""
    case = Case(name, {}, Sizes(B=3, H=4, HK=2, Q=tokens, KV=ROOM, D=16, DV=24, q_offset=0))
    query, key, value = case.inputs()
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    captured = {**case.tensors(), **bindings, "kv_len": lengths}
    program = compiled(with_lengths(program_of(name).variant))
    found = Problem(program, query, key, value, captured, q_offset=lengths.long() - min(tokens, 5))
    return replace(found, key=key.clone(), value=value.clone())


def run(found: Problem, cache: Cache, decode: bool, splits: int, keys: int, **scales: Tensor) -> Result:
    variant = found.program.variant
    program = compiled(with_pages(with_scales(variant) if scales else variant))
    bindings = {**found.all_bindings, "page_table": cache.table, **scales}
    call = program.binder.bind(found.query, cache.key, cache.value, None, found.q_offset, bindings)
    bound = portable_call(program, call, Options("decode"))
    if not decode:
        return Result(*launch.forward(program.kernels, bound)[:2])
    layout = replace(launch_decode.layout_of(program.kernels, bound, splits), keys=keys)
    return Result(*launch_decode.forward(program.kernels, bound, layout=layout)[:2])


VARIANTS: dict[str, dict[str, Any]] = {"noop": {}, "causal": {}, "sliding_window": {"window": 37}, "alibi": {}}


@pytest.mark.parametrize(("name", "page"), [("noop", 32), ("causal", 16), ("sliding_window", 128), ("alibi", 16)])
def test_pages_give_what_the_cache_in_one_piece_gives(name: str, page: int) -> None:
    for tokens, decode in ((2, True), (18, False)):
        found = problem(name, tokens, **VARIANTS[name])
        truth = found.truth()
        for b, length in enumerate(LENGTHS):
            found.key[b, :, length:] = found.value[b, :, length:] = torch.nan
        cache = Cache.of(found.key, found.value, page)
        for splits, keys in ((1, 16), (3, 64)) if decode else ((1, 0),):
            assert_close(run(found, cache, decode, splits, keys), truth, 3e-5)


@pytest.mark.parametrize(("page", "by_page"), [(16, True), (64, True), (32, False)])
def test_eight_bits_stand_for_as_much_as_their_scales_say(page: int, by_page: bool) -> None:
    for name, tokens, decode in (("softcap", 2, True), ("alibi", 18, False)):
        found = problem(name, tokens, **({"cap": 2.0} if name == "softcap" else {}))
        cache = Cache.of(found.key, found.value, page)
        slabs = cache.key.shape[0] if by_page else 1
        scales = {n: torch.rand(slabs, 2) + 0.1 for n in ("key_scale", "value_scale")}
        scales = {n: x.expand(cache.key.shape[0], -1) for n, x in scales.items()}
        key, value = (
            (pool / scale[:, :, None, None]).to(torch.float8_e4m3fn)
            for pool, scale in zip((cache.key, cache.value), scales.values(), strict=True)
        )
        dense = [
            (pool.float() * scale[:, :, None, None])[cache.table.long()].transpose(1, 2).flatten(2, 3)
            for pool, scale in zip((key, value), scales.values(), strict=True)
        ]
        truth = replace(found, key=dense[0], value=dense[1]).truth()
        for splits, keys in ((3, 64 if page < 64 else 16),) if decode else ((1, 0),):
            said = run(found, replace(cache, key=key, value=value), decode, splits, keys, **scales)
            assert_close(said, truth, 3e-5)


def test_tables_and_pages_of_any_stride() -> None:
    found = problem("causal", 2)
    cache = Cache.of(found.key, found.value, 32)
    cache.key = cache.key.transpose(1, 2).contiguous().transpose(1, 2)
    cache.value = torch.stack([cache.value, cache.value + 1], dim=-1).flatten(3)[..., ::2]
    cache.table = cache.table.t().contiguous().t()
    assert_close(run(found, cache, True, 2, 64), found.truth(), 3e-5)


def test_a_window_reads_only_its_pages() -> None:
    found = problem("sliding_window", 1, window=20)
    truth = found.truth()
    found.key[1, :, :64] = found.value[1, :, :64] = torch.nan  # entry 1 sees the keys from 76 on
    cache = Cache.of(found.key, found.value, 16)
    cache.table[1, :4] = 2**30  # what is not visited is not even looked for
    assert_close(run(found, cache, True, 2, 16), truth, 3e-5)
