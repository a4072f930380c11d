"""What a PyTorch user expects of an operator, on a GPU: `pytest -m gpu tests/gpu/test_citizen.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attn_dsl
from attn_dsl.backend import cache, operators
from attn_dsl.backend.execute import Options

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ALONE = "PYTEST_XDIST_WORKER" not in os.environ
"""Whether times of the host mean anything: not where other workers use its cores."""
SLACK = float(os.environ.get("ATTN_DSL_HOST_SLACK", 2))
"""By how much a busy host may be slower than the bounds, which are those of an idle one."""

BIAS = """attention bias(reach: int = 30, cap: float = 5.0)
tensor table: float32[H, 2 * reach + 1]
tensor sinks: float32[H]
score = cap * tanh((score + table[h, clamp(k - q, -reach, reach) + reach]) / cap)
mask = q >= k
sink = sinks[h]
"""


@pytest.fixture(scope="module")
def bias() -> attn_dsl.Attention:
    return attn_dsl.compile(BIAS)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def inputs(rows: int = 300, device: str = "cuda", grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((2, 4, rows, 64), (2, 2, rows, 64), (2, 2, rows, 64), (4, 61), (4,))
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    dtypes = (torch.bfloat16,) * 3 + (torch.float32,) * 2
    return [x.to(device, dtype).requires_grad_(grad) for x, dtype in zip(found, dtypes, strict=True)]


def loss(attention: attn_dsl.Attention, *leaves: Tensor, **more: object) -> Tensor:
    query, key, value, table, sinks = leaves
    out, lse = attention(query, key, value, table=table, sinks=sinks, return_lse=True, **more)  # type: ignore[call-overload]
    return out.float().sin().sum() + lse.cos().sum()


def gradients(attention: attn_dsl.Attention, *leaves: Tensor, **more: object) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(attention, *leaves, **more), leaves)


def test_the_operators_pass_opcheck(bias: attn_dsl.Attention) -> None:
    from attn_dsl.backend.select import options

    query, key, value, table, sinks = inputs(40)
    arguments = (
        query, key, value, [table, sinks], [], [0, 30], [0.125, 5.0], None, "if", bias._executable.text,
        options(query.device).text,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # sums of floats differ from run to run
    torch.library.opcheck(torch.ops.attn_dsl.attention.default, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_has_the_same_gradients(bias: attn_dsl.Attention, backend: str) -> None:
    leaves = inputs()
    whole = torch.compile(lambda *x: loss(bias, *x), fullgraph=True, backend=backend)
    found = torch.autograd.grad(whole(*leaves), leaves)
    for a, b in zip(found, gradients(bias, *leaves), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_new_lengths_do_not_recompile_a_graph(bias: attn_dsl.Attention) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(lambda *x: loss(bias, *x), fullgraph=True, backend=counter)
    for rows in range(10, 200, 17):
        whole(*inputs(rows))
    assert counter.frame_count <= 2


def test_a_cuda_graph_replays_forward_and_backward(bias: attn_dsl.Attention) -> None:
    leaves = inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(bias, *leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(bias, *leaves)
    others = [x.detach() for x in inputs(300)]
    others[0] = torch.randn_like(others[0])
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, gradients(bias, *leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_the_host_never_waits(bias: attn_dsl.Attention) -> None:
    leaves = inputs()
    offset = torch.zeros(2, dtype=torch.int64, device="cuda")
    gradients(bias, *leaves)
    gradients(bias, *leaves, q_offset=offset)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(bias, *leaves)
        gradients(bias, *leaves, q_offset=offset)
        gradients(bias, *leaves, deterministic=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_is_used(bias: attn_dsl.Attention) -> None:
    leaves = inputs(4000)
    expected = gradients(bias, *leaves)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [x.detach().mul(1).requires_grad_() for x in leaves]
        found = gradients(bias, *late)
    assert not stream.query(), "the call must come behind the sleep"
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current_is_used(bias: attn_dsl.Attention) -> None:
    expected = gradients(bias, *inputs())
    found = gradients(bias, *inputs(device="cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu(), atol=1e-3, rtol=1e-3)


def test_many_threads_may_make_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path))
    attention = attn_dsl.compile("attention threads(w: int = 37)\nmask = 0 <= q - k < w")
    query, key, value, *_ = inputs(grad=False)
    found: list[Tensor] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(attention(query, key, value))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(found) == 8
    assert all(torch.equal(found[0], x) for x in found)


def test_autocast_and_checkpoints(bias: attn_dsl.Attention) -> None:
    from torch.utils.checkpoint import checkpoint

    leaves = [x.detach().float().requires_grad_() for x in inputs()]
    with torch.autocast("cuda", torch.bfloat16):
        out = bias(*leaves[:3], table=leaves[3], sinks=leaves[4])
        assert out.dtype is torch.bfloat16
        again = checkpoint(lambda *x: bias(*x[:3], table=x[3], sinks=x[4]), *leaves, use_reentrant=False)
    expected = torch.autograd.grad(out.float().square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(again.float().square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_checkpoint_around_the_first_call_of_a_kind() -> None:
    from torch.utils.checkpoint import checkpoint

    attention = attn_dsl.compile("alibi")
    query, key, value, *_ = inputs(77)
    slope = torch.rand(4, device="cuda", requires_grad=True)
    for _ in range(3):  # what is computed again is a repeated call from the first pass on
        out = checkpoint(lambda *x: attention(*x[:3], slope=x[3]), query, key, value, slope, use_reentrant=False)
        found = torch.autograd.grad(out.float().square().sum(), (query, key, value, slope))
        expected = attention(query, key, value, slope=slope, validate=True)
        grads = torch.autograd.grad(expected.float().square().sum(), (query, key, value, slope))
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_no_grad_saves_nothing(bias: attn_dsl.Attention) -> None:
    leaves = inputs(4096)
    with torch.no_grad():
        bias(*leaves[:3], table=leaves[3], sinks=leaves[4])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = bias(*leaves[:3], table=leaves[3], sinks=leaves[4])
        kept = torch.cuda.memory_allocated() - before
    assert kept == out.numel() * out.element_size()


def test_parameters_as_tensors_of_either_device(bias: attn_dsl.Attention) -> None:
    leaves = inputs()
    for device in ("cuda", "cpu"):
        cap = torch.tensor(5.0, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(loss(bias, *leaves, cap=cap), cap)
        assert grad.device == cap.device and grad.isfinite()
        torch.testing.assert_close(loss(bias, *leaves, cap=cap), loss(bias, *leaves), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("backend", ["gpu", "portable"])
def test_a_hundred_lengths_and_windows_compile_what_the_first_did(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward; lengths of whole tiles and ragged ones. Up to 64 queries have a kernel of their own."""
    from triton import knobs

    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path))
    attention = attn_dsl.compile("attention windows(window: int)\nmask = 0 <= q - k < window")
    asked: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: asked.append(cache_hit))

    def call(rows: int, window: int, offset: int) -> int:
        """How many kernels Triton was asked for until now, be it to compile them or to load them."""
        query, key, value, *_ = inputs(rows)
        bound = attention._binder.bind(query, key, value, None, offset, {"window": window})
        out, _ = operators.attention(attention._executable, bound, Options(backend))
        out.sum().backward()
        return len(asked)

    first = call(1000, 64, 0)
    assert first >= 4
    counts = {call(65 + 16 * n + n % 7, 1 + 13 * n, n) for n in range(100)}
    assert counts == {first}
    assert call(128, 64, 0) == call(129, 1, 0) == first


@pytest.mark.parametrize("name", ["causal", "sliding_window"])
def test_long_sequences_take_less_than_100_mib_beside_what_they_are_given_and_give(name: str) -> None:
    attention, window = attn_dsl.compile(name), {"window": 1024} if name == "sliding_window" else {}
    shape = (2, 16, 131_072, 128)
    *leaves, upstream = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    for leaf in leaves:
        leaf.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(*leaves, **window)
    grads = torch.autograd.grad(out, leaves, upstream)
    torch.cuda.synchronize()
    results = sum(x.numel() * x.element_size() for x in (out, *grads))
    extra = (torch.cuda.max_memory_allocated() - before - results) / 2**20
    print(f"{extra:.1f} MiB")
    assert extra < 100


SECOND = """
import time, torch, triton, attn_dsl
from triton import knobs
start = time.perf_counter()
import attn_dsl.api, attn_dsl.backend.gpu
if torch.cuda.get_device_capability() == (9, 0):
    import attn_dsl.backend.hopper.launch
loaded = time.perf_counter() - start
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
start = time.perf_counter()
attention = attn_dsl.compile("sliding_window", window=100)
made = time.perf_counter() - start
query = torch.randn(1, 4, 500, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
torch.cuda.synchronize()
start = time.perf_counter()
out = attention(query, query, query)
torch.cuda.synchronize()
first = time.perf_counter() - start
out.sum().backward()
torch.cuda.synchronize()
print(first, len(hits), sum(hits), made, loaded)
"""


def test_what_was_built_ahead_is_loaded_and_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    major, minor = torch.cuda.get_device_capability()
    attn_dsl.compile("sliding_window").build(f"sm_{major}{minor}")
    entries = {entry.path.name for entry in cache.entries() if entry.kind == cache.KERNELS}
    for _ in range(2):  # the first process compiles what Triton itself has in C
        answer = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=200)
        assert answer.returncode == 0, answer.stderr
        first, asked, hits, made, loaded = map(float, answer.stdout.split())
        print(f"import {loaded:.3f} s, compile {made:.3f} s, first call {first:.3f} s")
        assert asked == hits >= 4, "every kernel was loaded, none compiled"
    assert {entry.path.name for entry in cache.entries() if entry.kind == cache.KERNELS} == entries
    assert first < 0.3 or not ALONE


def test_a_call_of_a_kind_that_was_seen_is_the_same_call(bias: attn_dsl.Attention) -> None:
    for turn in range(3):
        query, key, value, table, sinks = (torch.randn_like(x) for x in inputs(grad=False))
        for cap in (5.0, 2.0, 5):
            for offset in (0, 7, torch.tensor([3, 90], device="cuda", dtype=torch.int32)):
                given = {"table": table, "sinks": sinks, "cap": cap, "q_offset": offset, "return_lse": True}
                found = bias(query, key, value, **given)  # type: ignore[call-overload]
                expected = bias(query.clone().requires_grad_(), key, value, **given)  # type: ignore[call-overload]
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(a, b.detach()), (turn, cap, offset)
    with pytest.raises(attn_dsl.BindingError):
        bias(query, key, value, table=table[:, 1:], sinks=sinks)


def test_calls_with_gradients_of_a_kind_that_was_seen_have_those_gradients(bias: attn_dsl.Attention) -> None:
    """The first goes the long way, the second is planned, the others are played from a tape."""
    causal, alibi = attn_dsl.compile("causal"), attn_dsl.compile("alibi")
    for turn in range(4):
        leaves = [torch.randn_like(x).requires_grad_() for x in inputs()]
        slope, offset = torch.rand(4, device="cuda"), torch.tensor([3, 90], device="cuda")
        calls: dict[str, tuple[attn_dsl.Attention, dict[str, Tensor]]] = {
            "causal": (causal, {}),
            "alibi": (alibi, {"slope": slope}),
            "by batch": (causal, {"q_offset": offset}),
            "captured": (bias, {"table": leaves[3], "sinks": leaves[4]}),
        }
        for name, (attention, given) in calls.items():
            wanted = leaves if name == "captured" else leaves[:3]
            results = []
            for long in (False, True):  # a call that is validated goes the long way
                out, lse = attention(*leaves[:3], return_lse=True, validate=long, **given)  # type: ignore[call-overload]
                upstream = torch.ones_like(out)
                alone = torch.autograd.grad(out, leaves[0], upstream, retain_graph=True)
                grads = torch.autograd.grad((out, lse), wanted, (upstream, torch.ones_like(lse)))
                results.append((out, lse, grads[1], grads[2], *alone, *grads))
            for i, (a, b) in enumerate(zip(*results, strict=True)):
                assert torch.equal(a, b) if i < 4 else (a - b).abs().max() < 2e-2 * (1 + b.abs().max()), (name, turn, i)


def test_a_number_in_a_tensor_is_read_in_every_call() -> None:
    attention = attn_dsl.compile("sliding_window")
    query, key, value, *_ = inputs(grad=False)
    for window in (3, 40, 3, 7):
        found = attention(query, key, value, window=torch.tensor(window))
        assert torch.equal(found, attention(query, key, value, window=window))


def test_the_host_is_quick() -> None:
    """Host time of one forward call without gradients on every route: 30 microseconds on an idle host."""
    query, key, value, *_ = inputs(128, grad=False)
    narrow, slope = (query, key, value), torch.rand(4, device="cuda")
    wide = [x.float() for x in narrow]
    causal, alibi = attn_dsl.compile("causal"), attn_dsl.compile("alibi")
    calls: dict[str, Callable[[], object]] = {
        "causal": lambda: causal(*narrow),
        "alibi": lambda: alibi(*narrow, slope=slope),
        "portable": lambda: causal(*wide),
        "decode": lambda: causal(query[:, :, :1], key, value, q_offset=127),
        "scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(
            *narrow, is_causal=True, enable_gqa=True
        ),
        "two empty tensors": lambda: (torch.empty_like(query), torch.empty_like(query)),
    }
    best = {}
    for name, call in calls.items():
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                call()
            times.append((time.perf_counter() - start) / 50)
        best[name] = min(times)
        print(f"{name} {best[name] * 1e6:.1f} us")
    assert max(best[name] for name in ("causal", "alibi", "portable", "decode")) < 30e-6 * SLACK or not ALONE


def test_the_host_is_quick_with_gradients() -> None:
    """Host time of a forward call that keeps what its gradient needs, and of the gradient."""
    attention = attn_dsl.compile("causal")
    query, key, value, *_ = inputs(128)
    upstream = torch.randn_like(query)
    torch.autograd.grad(attention(query, key, value), (query, key, value), upstream)
    forward, both = [], []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            out = attention(query, key, value)
        forward.append((time.perf_counter() - start) / 20)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            torch.autograd.grad(attention(query, key, value), (query, key, value), upstream)
        both.append((time.perf_counter() - start) / 20)
        assert out.requires_grad
    print(f"forward {min(forward) * 1e6:.1f} us, both {min(both) * 1e6:.1f} us")
    assert (min(forward) < 50e-6 * SLACK and min(both) < 250e-6 * SLACK) or not ALONE
