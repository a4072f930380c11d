"""Caches in pages, caches in 8 bits and packed sequences on a GPU: `pytest -m gpu tests/gpu/test_paged.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_dsl
from attn_dsl import PagedKVCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
H, HK, D = 8, 2, 128
LENGTHS = (700, 64, 333)
TEXTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding_window": {"window": 150},
    "alibi": {"slope": 0.5 ** torch.arange(1, H + 1)},
    "gemma2_local": {"window": 150, "cap": 5.0},
    "gpt_oss": {"window": 150, "sinks": torch.linspace(-1, 2, H)},
}


def moved(bindings: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in bindings.items()}


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def filled(page: int, **options: Any) -> tuple[PagedKVCache, list[int], list[tuple[Tensor, Tensor]]]:
    """A cache of some sequences, appended to in turns so that their pages alternate, and their keys and values."""
    cache = PagedKVCache(2000 // page * 2, page, HK, D, device="cuda", **options)
    sequences = [cache.allocate() for _ in LENGTHS]
    whole = [(normal(1, HK, n, D, seed=n), normal(1, HK, n, D, seed=n + 1)) for n in LENGTHS]
    for first in range(0, max(LENGTHS), 50):
        for sequence, (key, value) in zip(sequences, whole, strict=True):
            if first < key.shape[2]:
                cache.append([sequence], key[:, :, first : first + 50], value[:, :, first : first + 50])
    return cache, sequences, whole


def dense(whole: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    key, value = torch.zeros(2, len(whole), HK, max(LENGTHS), D, device="cuda", dtype=torch.bfloat16)
    for i, (k, v) in enumerate(whole):
        key[i, :, : k.shape[2]], value[i, :, : k.shape[2]] = k[0], v[0]
    return key, value


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    return [x.float().cpu() for x in tensors]


@pytest.mark.parametrize(("name", "page"), [
    ("causal", 16), ("causal", 256), ("sliding_window", 32), ("alibi", 128), ("gemma2_local", 64), ("gpt_oss", 16),
])  # fmt: skip
def test_pages_give_what_the_cache_in_one_piece_gives(name: str, page: int) -> None:
    attention, bindings = attn_dsl.compile(name), moved(TEXTS[name])
    cache, sequences, whole = filled(page)
    key, value = dense(whole)
    step = cache.extend(sequences, 0)
    for tokens in (1, 64, 200):
        query = normal(len(LENGTHS), H, tokens, D, seed=9)
        offsets = (step.kv_len - tokens).clamp(min=0)
        given = {"kv_len": step.kv_len.cpu(), "q_offset": offsets.cpu(), "return_lse": True, **TEXTS[name]}
        expected = attention(*on_cpu(query, key, value), **given)
        found = attention(query, **{**step.layer(), "q_offset": offsets}, return_lse=True, **bindings)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.float().cpu(), other, atol=1e-2, rtol=1e-2)
        said = attention.explain(query, **{**step.layer(), "q_offset": offsets}, **bindings)
        prefill = "hopper: compute" if HOPPER else "portable, since the GPU has"
        assert ("decode, since" if tokens <= 64 else prefill) in said


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("name", "page", "dim"), [
    ("causal", 16, 128), ("sliding_window", 64, 64), ("alibi", 32, 256), ("gpt_oss", 256, 128),
])  # fmt: skip
def test_prefill_from_pages_has_the_bits_of_one_piece_and_reads_nothing_past_the_end(
    name: str, page: int, dim: int
) -> None:
    """Two sequences share 256 keys; what belongs to none is nan, and table entries past the end name any page."""
    attention, bindings, room = attn_dsl.compile(name), moved(TEXTS[name]), 1024
    count = len(LENGTHS) * room // page
    table = torch.randperm(count, device="cuda").view(len(LENGTHS), -1).int()
    table[2, : 256 // page] = table[0, : 256 // page]
    query, pieces, pools = normal(len(LENGTHS), H, 200, dim, seed=9), [], []
    for seed in (1, 2):
        piece = normal(len(LENGTHS), HK, room, dim, seed=seed)
        piece[2, :, :256] = piece[0, :, :256]
        for entry, length in zip(piece, LENGTHS, strict=True):
            entry[:, length:] = torch.nan
        pool = torch.full((count, HK, page, dim), torch.nan, dtype=piece.dtype, device="cuda")
        for entry, pages, length in zip(piece, table.long(), LENGTHS, strict=True):
            held = -(-length // page)
            pool[pages[:held]] = entry[:, : held * page].unflatten(1, (-1, page)).transpose(0, 1)
        pieces.append(piece)
        pools.append(pool)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    given = {"kv_len": lengths, "q_offset": (lengths.long() - 200).clamp(min=0), **bindings}
    assert "hopper: compute" in attention.explain(query, *pools, page_table=table, **given)
    found = attention(query, *pools, page_table=table, return_lse=True, **given)
    whole = attention(query, *pieces, return_lse=True, **given)
    assert not found[0].isnan().any()
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])


@pytest.mark.parametrize(("page", "scales"), [(16, "page"), (64, "head"), (256, "page")])
def test_eight_bits(page: int, scales: str) -> None:
    attention = attn_dsl.compile("causal")
    given = {n: torch.tensor([0.02, 0.03], device="cuda") for n in ("key_scale", "value_scale")}
    cache, sequences, whole = filled(
        page, dtype=torch.float8_e4m3fn, scales=scales, **(given if scales == "head" else {})
    )
    kept = []
    for pool, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        assert scale is not None
        rows = pool[0].float() * (scale[0][:, :, None, None] if scales == "page" else scale[0][:, None, None])
        kept.append([rows[list(cache.pages_of(s))].transpose(0, 1).flatten(1, 2)[None] for s in sequences])
    step = cache.extend(sequences, 0)
    for tokens in (1, 200):
        query = normal(len(LENGTHS), H, tokens, D, seed=9)
        offsets = (step.kv_len - tokens).clamp(min=0)
        found = attention(query, **{**step.layer(), "q_offset": offsets})
        for i, length in enumerate(LENGTHS):
            k, v = (x[i][:, :, :length] for x in kept)
            assert ((k - whole[i][0]).abs() <= 0.0625 * whole[i][0].abs() + 1e-3).all()
            expected = attention(*on_cpu(query[i : i + 1], k, v), q_offset=max(length - tokens, 0))
            torch.testing.assert_close(found[i : i + 1].float().cpu(), expected, atol=2e-2, rtol=2e-2)


def test_eight_bits_in_one_piece() -> None:
    attention = attn_dsl.compile("causal")
    scales = [torch.rand(3, HK, device="cuda") * 0.01 + 0.015 for _ in range(2)]
    key, value = (
        (normal(3, HK, 500, D, seed=i).float() / s[..., None, None]).to(torch.float8_e4m3fn)
        for i, s in enumerate(scales)
    )
    wide = [x.float() * s[..., None, None] for x, s in zip((key, value), scales, strict=True)]
    for tokens in (1, 200):
        query = normal(3, H, tokens, D, seed=9)
        found = attention(query, key, value, q_offset=500 - tokens, key_scale=scales[0], value_scale=scales[1])
        expected = attention(*on_cpu(query, *wide), q_offset=500 - tokens)
        torch.testing.assert_close(found.float().cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("scales", [None, "head", "page"])
def test_one_cuda_graph_writes_and_reads_a_cache_that_grows(scales: str | None) -> None:
    options = {} if scales is None else {"dtype": torch.float8_e4m3fn, "scales": scales}
    attention = attn_dsl.compile("causal")
    cache, sequences, _ = filled(64, **options)
    step = cache.extend(sequences, 1, width=16)
    query, key, value = normal(3, H, 1, D), normal(3, HK, 1, D, seed=1), normal(3, HK, 1, D, seed=2)

    def run() -> Tensor:
        step.write(key, value)
        return attention(query, **step.layer())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for i in range(70):  # past the end of a page
        if i:
            cache.extend(sequences, 1, into=step)
        for j, x in enumerate((query, key, value)):
            x.copy_(normal(*x.shape, seed=10 * i + j))
        graph.replay()
        if i % 23 == 0:
            found = out.clone()
            expected = attention(query, **cache.extend(sequences, 0).layer() | {"q_offset": step.q_offset})
            torch.testing.assert_close(found, expected)


def test_nothing_waits_for_the_gpu() -> None:
    attention = attn_dsl.compile("causal")
    cache, sequences, _ = filled(16)
    fork = cache.fork(sequences[0])
    query, key, value = normal(4, H, 1, D), normal(4, HK, 1, D, seed=1), normal(4, HK, 1, D, seed=2)
    packed = [x.squeeze(2).contiguous() for x in (query, key, value)]
    ends = torch.tensor([0, 1, 4], device="cuda")

    def run() -> None:
        attention(query, **cache.append([*sequences, fork], key, value).layer())
        attention.varlen(*packed, ends, longest_query=3)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            run()
        attention(query, **cache.append([*sequences, cache.fork(fork)], key, value).layer())  # with a page to copy
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("name", "dim"), [("causal", 128), ("alibi", 64), ("gpt_oss", 256)])
def test_nothing_of_a_packed_sequence_reaches_another(name: str, dim: int) -> None:
    attention, lengths, bindings = attn_dsl.compile(name), [300, 1, 129, 64, 0, 700], moved(TEXTS[name])
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    query, key, value = (normal(sum(lengths), heads, dim, seed=i) for i, heads in enumerate((H, HK, HK)))
    out, lse = attention.varlen(query, key, value, ends, longest_query=700, return_lse=True, **bindings)
    inside = torch.zeros(sum(lengths), dtype=torch.bool, device="cuda")
    inside[300:301] = inside[430:494] = True
    for x in (query, key, value):
        x[inside] = torch.nan
    found, found_lse = attention.varlen(query, key, value, ends, longest_query=700, return_lse=True, **bindings)
    assert torch.equal(found[~inside], out[~inside]) and torch.equal(found_lse[~inside], lse[~inside])


@pytest.mark.parametrize(("name", "dtype", "tolerance"), [
    ("causal", torch.bfloat16, 2e-2), ("sliding_window", torch.bfloat16, 2e-2), ("alibi", torch.float32, 1e-3),
    ("gpt_oss", torch.float32, 1e-3),
], ids=str)  # fmt: skip
def test_packed_sequences_equal_the_loop_forward_and_backward(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The loop is that of the CPU."""
    attention, lengths = attn_dsl.compile(name), [300, 1, 129, 64, 0, 700]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    inputs = [normal(sum(lengths), heads, 64, seed=i).to(dtype) for i, heads in enumerate((H, HK, HK))]
    upstream = normal(sum(lengths), H, 64, seed=7).to(dtype)
    results = []
    for device, precision in (("cuda", dtype), ("cpu", torch.float32)):
        leaves = [x.to(device, precision).requires_grad_() for x in inputs]
        bindings = {n: x.clone().to(device) if isinstance(x, Tensor) else x for n, x in TEXTS[name].items()}
        captured = [x.requires_grad_() for x in bindings.values() if isinstance(x, Tensor)]
        out = attention.varlen(*leaves, ends.to(device), longest_query=700, **bindings)
        grads = torch.autograd.grad(out, [*leaves, *captured], upstream.to(device, precision))
        results.append([x.float().cpu() for x in (out, *grads)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
