"""The CPU backend against the dense evaluator: values and gradients, on shipped and on random variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import strategies
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from variant_cases import Case, cases

import attn_dsl
from attn_dsl.api import Attention
from attn_dsl.backend import operators
from attn_dsl.backend.binding import Call
from attn_dsl.backend.cpu import attention as cpu
from attn_dsl.backend.cpu import pieces, tiles
from attn_dsl.backend.cpu import problem as cpu_problem
from attn_dsl.backend.cpu.shapes import TileShape
from attn_dsl.backend.execute import Options, program_for
from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import attention as dense
from attn_dsl.ir.evaluate import environment
from attn_dsl.ir.types import DType
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(
    variant: Variant,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_offset: int | Tensor = 0,
    bindings: dict[str, Any],
    tolerance: float = 1e-9,
) -> None:
    """Output, log-sum-exp and every gradient, against the evaluator in float64. `variant` is without `const`."""
    variant = pipeline.run(variant, stop_after="simplify").variant
    plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in bindings.items()}
    sizes = environment(variant, query, key, value, q_offset=q_offset, bindings=plain).sizes
    parameters = {p.name: bindings.get(p.name, p.default) for p in variant.parameters}
    tensors = {t.name: bindings[t.name] for t in variant.tensors}
    call = Call(query, key, value, query.shape[-1] ** -0.5, q_offset, sizes, parameters, tensors)  # type: ignore[arg-type]
    out, lse = operators.attention(program_for(variant), call, Options("cpu"))
    expected_out, expected_lse = dense(variant, query, key, value, q_offset=q_offset, bindings=bindings)
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, rtol=tolerance, atol=tolerance, equal_nan=True)
    floats = [x for x in (query, key, value, *bindings.values()) if isinstance(x, Tensor) and x.requires_grad]
    if not floats or not out.requires_grad:
        return
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(lse.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    finite = expected_lse.isfinite()

    def gradients(out: Tensor, lse: Tensor) -> list[Tensor]:
        loss = (out * direction).sum() + (torch.where(finite, lse, 0.0) * weight).sum()
        found = torch.autograd.grad(loss, floats, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, floats, strict=True)]

    for got, expected in zip(gradients(out, lse), gradients(expected_out, expected_lse), strict=True):
        single = got.dtype is torch.float32
        bound = 1e-5 if single else max(tolerance, 1e-8)
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
@pytest.mark.parametrize("threads", [1, 2])
def test_shipped_variants_and_their_gradients_agree(case: Case, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if threads == 2:
        monkeypatch.setattr(cpu, "FEW_OPERATIONS", 0)
        torch.set_num_threads(2)
    bindings: dict[str, Any] = dict(case.arguments)
    variant = pipeline.run(load(case.name), case.constants, stop_after="simplify").variant
    for parameter in variant.parameters:
        number = bindings.get(parameter.name, parameter.default)
        if isinstance(number, float):
            bindings[parameter.name] = torch.tensor(number, dtype=torch.float64, requires_grad=True)
    tensors = case.tensors()
    for tensor in tensors.values():
        tensor.requires_grad_(tensor.is_floating_point())
    query, key, value = (x.requires_grad_() for x in case.inputs(dtype=torch.float64))
    compare(variant, query, key, value, q_offset=case.sizes.q_offset, bindings={**bindings, **tensors})


SMALL = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@SMALL
@given(variant=strategies.variants(), seed=st.integers(0, 100), shape=st.tuples(st.integers(1, 7), st.integers(1, 9)))
def test_random_variants_agree(variant: Variant, seed: int, shape: tuple[int, int]) -> None:
    _compare_random(variant, seed, *shape)


@SMALL
@given(
    variant=strategies.variants(mask=strategies.affine_masks(), score=st.just(strategies.ir.SCORE)),
    seed=st.integers(0, 100),
    rows=st.sampled_from([1, 3, 4]),
    offset=st.integers(0, 9),
)
def test_random_affine_masks_agree_whatever_the_tiles(variant: Variant, seed: int, rows: int, offset: int) -> None:
    shape = TileShape(rows, 4, 1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (pieces, cpu_problem, tiles):
            patch.setattr(module, "BLOCK", 4)
        patch.setattr(cpu_problem.Problem, "shaped", lambda problem: replace(problem, shape=shape))
        _compare_random(variant, seed, 9, 18, offset)


def _compare_random(variant: Variant, seed: int, q_len: int, kv_len: int, offset: int = 0) -> None:
    sizes = {**strategies.SIZES, "Q": q_len, "KV": kv_len}
    make = torch.Generator().manual_seed(seed)

    def real(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_()

    query = real(sizes["B"], sizes["H"], q_len, 4)
    key, value = real(sizes["B"], sizes["HK"], kv_len, 4), real(sizes["B"], sizes["HK"], kv_len, 3)
    bindings = strategies.bindings(seed, sizes)
    plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in bindings.items()}
    dtypes = {t.name: DType(str(plain[t.name].dtype).removeprefix("torch.")) for t in variant.tensors}
    variant = replace(variant, tensors=tuple(replace(t, dtype=dtypes[t.name]) for t in variant.tensors))
    try:
        _, lse = dense(variant, query, key, value, q_offset=offset, bindings=plain)
    except (IndexError, ZeroDivisionError):
        assume(False)
    assume(not lse.isnan().any() and not (lse.abs() > 1e6).logical_and(lse.isfinite()).any())
    compare(variant, query, key, value, q_offset=offset, bindings=bindings, tolerance=1e-7)


LENGTHS = [(1, 1), (1, 300), (65, 64), (257, 130), (300, 601)]


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("name", ["noop", "causal", "sliding_window", "softcap", "packed_causal", "alibi"])
def test_any_length_in_single_precision(name: str, q_len: int, kv_len: int) -> None:
    attn, bindings = _prepared(name, 2, 4, kv_len)
    offset = max(kv_len - q_len, 0)
    make = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, q_len, 16, generator=make)
    key, value = (torch.randn(2, 2, kv_len, width, generator=make) for width in (16, 24))
    if name == "packed_causal" and q_len > kv_len:
        query, q_len = query[:, :, :kv_len], kv_len
    out, lse = attn(query, key, value, q_offset=offset, return_lse=True, **bindings)
    expected, expected_lse = dense(attn.variant, query, key, value, q_offset=offset, bindings=bindings)
    assert out.dtype is torch.float32 and out.shape == (2, 4, q_len, 24)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-6)


def _prepared(name: str, batch: int, heads: int, kv_len: int) -> tuple[Attention, dict[str, Any]]:
    bindings: dict[str, Any] = {}
    if name == "packed_causal":
        bindings["doc"] = (torch.arange(kv_len, dtype=torch.int32) // 50).expand(batch, -1).contiguous()
    if name == "alibi":
        bindings["slope"] = 2.0 ** -torch.arange(1.0, heads + 1)
    if name == "sliding_window":
        bindings["window"] = 33
    return attn_dsl.compile(name), bindings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 200, 32, generator=make).to(dtype).requires_grad_() for _ in range(3))
    attn = attn_dsl.compile("causal")
    out, lse = attn(query, key, value, return_lse=True)
    assert out.dtype is dtype and lse.dtype is torch.float32
    expected, _ = dense(attn.variant, query, key, value)
    error = (out.double() - expected).abs().max().item()
    rounded = (expected.to(dtype).double() - expected).abs().max().item()
    assert error <= 1.1 * rounded + 1e-6
    out.sum().backward()
    assert query.grad is not None and query.grad.dtype is dtype


def test_the_offset_may_differ_for_each_batch() -> None:
    make = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 5, 8, generator=make, dtype=torch.float64).requires_grad_()
    key, value = (torch.randn(3, 1, 90, 8, generator=make, dtype=torch.float64).requires_grad_() for _ in range(2))
    offsets = torch.tensor([3, 70, 0])
    for name in ("causal", "sliding_window"):
        variant = pipeline.run(load(name), stop_after="simplify").variant
        compare(variant, query, key, value, q_offset=offsets, bindings={"window": 9} if name != "causal" else {})


@pytest.mark.parametrize("name", ["causal", "softcap", "sliding_window"])
def test_strides_do_not_matter(name: str) -> None:
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 70, 4, 8, generator=make).transpose(1, 2) for _ in range(3))
    attn, bindings = _prepared(name, 2, 4, 70)
    expected = attn(*(x.contiguous() for x in (query, key, value)), **bindings)
    torch.testing.assert_close(attn(query, key, value, **bindings), expected)
    expanded = query[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(
        attn(expanded, key, value, **bindings), attn(expanded.contiguous(), key, value, **bindings)
    )


PER_HEAD = """attention per_head
tensor window: int32[B, H]
tensor length: int32[B]
mask = 0 <= q - k < window[b, h] and k < length[b]
"""


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_windows_and_lengths_may_differ_for_each_head_and_batch(kv_heads: int) -> None:
    make = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 200, 4, generator=make, dtype=torch.float64).requires_grad_()
    key, value = (
        torch.randn(2, kv_heads, 200, 4, generator=make, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    window = torch.tensor([[5, 5, 200, 200, 200, 7], [300, 1, 1, 70, 70, 70]], dtype=torch.int32)
    bindings = {"window": window, "length": torch.tensor([200, 90], dtype=torch.int32)}
    compare(pipeline.run(load(PER_HEAD), stop_after="simplify").variant, query, key, value, bindings=bindings)


@pytest.mark.parametrize("name", ["noop", "alibi", "softcap"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_tall_tiles_where_all_rows_see_the_same_keys(name: str, kv_heads: int) -> None:
    make = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 2100, 4, generator=make, dtype=torch.float64).requires_grad_()
    key, value = (
        torch.randn(1, kv_heads, 400, 4, generator=make, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    attn, bindings = _prepared(name, 1, 4, 400)
    compare(pipeline.run(attn.variant, stop_after="simplify").variant, query, key, value, bindings=bindings)


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """The largest tensor that a forward and backward pass makes is an input's size or a tile's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                Largest.elements = max(Largest.elements, out.untyped_storage().nbytes() // out.element_size())
            return out

    query, key, value = (torch.randn(1, 2, 3000, 16).requires_grad_() for _ in range(3))
    attn = attn_dsl.compile("softcap")
    attn(query[:, :, :8], key, value)  # grow the kept buffers outside
    with Largest():
        attn(query, key, value).sum().backward()
    assert Largest.elements <= 2 * 3000 * 16 + 2 * 256 * 512 + 2 * 512 * 1024
