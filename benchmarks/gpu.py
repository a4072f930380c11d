"""Attention variants on one GPU beside their rivals, interleaved in one run.

    python benchmarks/gpu.py                                           the shipped set at B=2 H=16 S=8192 D=128, bf16
    python benchmarks/gpu.py --variants noop,causal --shapes 2x16x8192x128,8x16x512x64 --passes forward
    python benchmarks/gpu.py --rivals flex,cudnn --limit 300 --json results.jsonl
    python benchmarks/gpu.py --sweep --variants noop,causal,softcap    tile shapes of the portable kernels, one by one
    python benchmarks/gpu.py --memory --variants causal,sliding_window --shapes 2x16x131072x128
    python benchmarks/gpu.py --graph --passes forward,both --shapes 8x16x128x128,8x16x512x128
    python benchmarks/gpu.py --loop --passes forward,both --shapes 8x16x128x128 --rivals attn_dsl,flex,sdpa

A shape is BxHxSxD, or BxHxHKxSxD with grouped heads. --memory says what a forward and a backward pass take beyond
inputs, outputs and gradients. --graph replays CUDA graphs, so that times of the host do not count; `both` is forward
and backward together, which a graph needs. --loop makes calls one after the other and divides the time on the clock:
that of the host, where it is longer than that of the GPU. Times are milliseconds: the median over rounds, in which all
implementations take turns, of the median that `triton.testing.do_bench` finds. TFLOP/s count pairs that the mask keeps,
4 D a pair forward, 10 D backward. `error` is the largest deviation of the output from float64 on some rows, `eager`
that of plain PyTorch in the same dtype. One JSON object a line on standard output (or in --json), then a table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import attn_dsl
from attn_dsl.backend import operators
from attn_dsl.backend.execute import Options, portable_call
from attn_dsl.backend.portable import launch
from attn_dsl.backend.portable.run import Compiler
from attn_dsl.backend.portable.tiles import Tile, Tiles

Mod = Callable[..., Tensor]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    B: int
    H: int
    HK: int
    S: int
    D: int

    @staticmethod
    def parse(text: str) -> Shape:
        numbers = [int(part) for part in text.split("x")]
        batch, heads, *rest = numbers
        return Shape(batch, heads, *rest) if len(rest) == 3 else Shape(batch, heads, heads, *rest)

    def __str__(self) -> str:
        return f"{self.B}x{self.H}x{self.HK}x{self.S}x{self.D}"


@dataclass(frozen=True)
class Variant:
    """A variant for this compiler (`text`, `parameters`, `tensors`) and for flex_attention (`score`, `mask`)."""

    text: str
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Callable[[Shape], Tensors] = lambda shape: {}
    score: Callable[[Tensors], Mod] | None = None
    mask: Callable[[Tensors], Mod] | None = None
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    learned: bool = False
    """Whether the tensors take a gradient."""


def slopes(shape: Shape) -> Tensors:
    return {"slope": 2.0 ** (-8.0 * torch.arange(1, shape.H + 1, device="cuda") / shape.H)}


def documents(shape: Shape, count: int = 12) -> Tensors:
    cuts = torch.randint(
        0, shape.S, (shape.B, count - 1), device="cuda", generator=torch.Generator("cuda").manual_seed(5)
    )
    position = torch.arange(shape.S, device="cuda")
    return {"doc": (position[None, :, None] >= cuts[:, None, :]).sum(-1).to(torch.int32)}


def table(shape: Shape, reach: int = 128) -> Tensors:
    generator = torch.Generator("cuda").manual_seed(6)
    return {"table": torch.randn(shape.H, 2 * reach + 1, device="cuda", generator=generator)}


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def softcap(cap: float) -> Mod:
    return lambda score, b, h, q, k: cap * torch.tanh(score / cap)


CAPPED_CAUSAL = "attention softcap_causal(cap: float = 20.0)\nscore = cap * tanh(score / cap)\nmask = q >= k\n"
T5_CAUSAL = """attention t5_causal(reach: int = 128)
tensor table: float32[H, 2 * reach + 1]
score = score + table[h, clamp(k - q, -reach, reach) + reach]
mask = q >= k
"""

VARIANTS = {
    "noop": Variant("noop"),
    "causal": Variant("causal", mask=lambda t: causal, causal=True),
    "alibi": Variant(
        "alibi", tensors=slopes, mask=lambda t: causal,
        score=lambda t: lambda score, b, h, q, k: score + t["slope"][h] * (k - q),
    ),
    "sliding_window": Variant(
        "sliding_window", {"window": 1024}, mask=lambda t: lambda b, h, q, k: (q >= k) & (q - k < 1024), causal=True,
        window=1024,
    ),
    "prefix_lm": Variant("prefix_lm", {"prefix": 2048}, mask=lambda t: lambda b, h, q, k: (q >= k) | (k < 2048)),
    "softcap": Variant("softcap", {"cap": 20.0}, score=lambda t: softcap(20.0), softcap=20.0),
    "softcap_causal": Variant(
        CAPPED_CAUSAL, {"cap": 20.0}, score=lambda t: softcap(20.0), mask=lambda t: causal, causal=True, softcap=20.0
    ),
    "documents": Variant(
        "packed_causal", tensors=documents,
        mask=lambda t: lambda b, h, q, k: (q >= k) & (t["doc"][b, q] == t["doc"][b, k]),
    ),
    "relative_bias": Variant(
        T5_CAUSAL, {"reach": 128}, tensors=table, mask=lambda t: causal,
        score=lambda t: lambda score, b, h, q, k: score + t["table"][h, torch.clamp(k - q, -128, 128) + 128],
    ),
    "learned_bias": Variant(
        T5_CAUSAL, {"reach": 128}, tensors=table, mask=lambda t: causal, learned=True,
        score=lambda t: lambda score, b, h, q, k: score + t["table"][h, torch.clamp(k - q, -128, 128) + 128],
    ),
    "longformer": Variant(
        "longformer", {"reach": 256, "globals": 64},
        mask=lambda t: lambda b, h, q, k: ((q - k).abs() <= 256) | (k < 64) | (q < 64),
    ),
    "dilated_window": Variant(
        "dilated_window", {"window": 4096, "dilation": 4},
        mask=lambda t: lambda b, h, q, k: (q >= k) & (q - k < 4096) & ((q - k) % 4 == 0),
    ),
}  # fmt: skip


@dataclass
class Case:
    """One variant at one shape, with its inputs on the GPU."""

    name: str
    shape: Shape
    dtype: torch.dtype

    def __post_init__(self) -> None:
        s, generator = self.shape, torch.Generator("cuda").manual_seed(0)
        self.variant = VARIANTS[self.name]
        self.tensors = self.variant.tensors(s)
        sizes = ((s.B, s.H), (s.B, s.HK), (s.B, s.HK), (s.B, s.H))
        made = (torch.randn(*x, s.S, s.D, device="cuda", generator=generator).to(self.dtype) for x in sizes)
        self.query, self.key, self.value, self.upstream = made
        self.inputs = [x.requires_grad_() for x in (self.query, self.key, self.value)]
        self.leaves = [*self.inputs, *(x.requires_grad_() for x in self.tensors.values() if self.variant.learned)]

    def keep(self, rows: Tensor, b: int = 0, h: int = 0) -> Tensor:
        """Which pairs of some rows the mask keeps, [rows, S]."""
        k = torch.arange(self.shape.S, device="cuda")[None, :]
        if self.variant.mask is None:
            return torch.ones(rows.shape[0], self.shape.S, dtype=torch.bool, device="cuda")
        at_b, at_h = (torch.tensor(x, device="cuda") for x in (b, h))
        return self.variant.mask(self.tensors)(at_b, at_h, rows[:, None], k)

    @functools.cached_property
    def pairs(self) -> int:
        """Kept pairs over the whole call."""
        total = 0
        for b in range(self.shape.B if self.name == "documents" else 1):
            for first in range(0, self.shape.S, 4096):
                rows = torch.arange(first, min(first + 4096, self.shape.S), device="cuda")
                total += int(self.keep(rows, b).sum())
        return total * self.shape.H * (1 if self.name == "documents" else self.shape.B)

    def reference(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The output of some rows of batch 0, head 0, every operation in `dtype`."""
        query, key, value = (x[0, 0].detach().to(dtype) for x in (self.query, self.key, self.value))
        score = (query[rows] @ key.T) / math.sqrt(self.shape.D)
        if self.variant.score is not None:
            k, zero = (
                torch.arange(self.shape.S, device="cuda")[None, :],
                torch.zeros((), dtype=torch.int64, device="cuda"),
            )
            tensors = {n: t.detach().to(dtype) if t.is_floating_point() else t for n, t in self.tensors.items()}
            score = self.variant.score(tensors)(score, zero, zero, rows[:, None], k)
        score = score.masked_fill(~self.keep(rows), -math.inf)
        return torch.softmax(score, -1).to(dtype) @ value


Run = Callable[[], Any]


@dataclass
class Rival:
    """`forward` computes the output from `case.inputs`; `setup_ms` and `setup_mib` are what its mask costs to build."""

    forward: Callable[[], Tensor]
    setup_ms: float = 0.0
    setup_mib: float = 0.0


def ours(case: Case) -> Rival:
    attention = attn_dsl.compile(case.variant.text)
    bindings = {**case.variant.parameters, **case.tensors}
    return Rival(lambda: attention(*case.inputs, **bindings))


def portable(case: Case) -> Rival:
    """The `triton.language` kernels, where `attn_dsl` would choose others."""
    attention = attn_dsl.compile(case.variant.text)
    bindings = {**case.variant.parameters, **case.tensors}

    def run() -> Tensor:
        call = attention._binder.bind(*case.inputs, None, 0, bindings)
        return operators.attention(attention._executable, call, Options("portable"))[0]

    return Rival(run)


def flex(case: Case) -> Rival:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    score = None if case.variant.score is None else case.variant.score(case.tensors)
    mask, milliseconds, mebibytes = None, 0.0, 0.0
    if case.variant.mask is not None:
        build = torch.compile(create_block_mask, dynamic=False)
        mod, s = case.variant.mask(case.tensors), case.shape
        batch = s.B if case.name == "documents" else None
        make = functools.partial(build, mod, batch, None, s.S, s.S, device="cuda")
        mask = make()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mask = make()
        torch.cuda.synchronize()
        mebibytes = (torch.cuda.max_memory_allocated() - before) / 2**20
        milliseconds = triton.testing.do_bench(make, warmup=5, rep=20, return_mode="median")
    gqa = case.shape.H != case.shape.HK
    return Rival(
        lambda: compiled(*case.inputs, score_mod=score, block_mask=mask, enable_gqa=gqa), milliseconds, mebibytes
    )


def sdpa(backend: str, case: Case) -> Rival | None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = case.variant.score is None and (
        case.variant.mask is None or (case.variant.causal and not case.variant.window)
    )
    chosen = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "dense": SDPBackend.EFFICIENT_ATTENTION,
    }
    options: dict[str, Any] = {"enable_gqa": case.shape.H != case.shape.HK}
    if backend == "sdpa":
        attend = torch.nn.functional.scaled_dot_product_attention
        options["is_causal"] = case.variant.causal
        return Rival(lambda: attend(*case.inputs, **options)) if plain else None
    if backend == "dense":
        if case.variant.score is not None or case.variant.mask is None or case.shape.S > 16384:
            return None
        rows = torch.arange(case.shape.S, device="cuda")
        options["attn_mask"] = torch.stack([case.keep(rows, b) for b in range(case.shape.B)])[:, None]
        options["attn_mask"] = options["attn_mask"].expand(-1, case.shape.H, -1, -1)
    elif not plain:
        return None
    else:
        options["is_causal"] = case.variant.causal

    def run() -> Tensor:
        with sdpa_kernel(chosen[backend]):
            return torch.nn.functional.scaled_dot_product_attention(*case.inputs, **options)

    return Rival(run)


def flash3(case: Case) -> Rival | None:
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return None
    variant = case.variant
    known = variant.score is None or variant.softcap is not None
    if not known or (variant.mask is not None and not variant.causal):
        return None
    window = (variant.window - 1, 0) if variant.window else (-1, -1)

    def run() -> Tensor:
        inputs = (x.transpose(1, 2) for x in case.inputs)
        found = flash_attn_func(*inputs, causal=variant.causal, window_size=window, softcap=variant.softcap or 0.0)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return Rival(run)


RIVALS: dict[str, Callable[[Case], Rival | None]] = {
    "attn_dsl": ours,
    "portable": portable,
    "flex": flex,
    "cudnn": functools.partial(sdpa, "cudnn"),
    "flash2": functools.partial(sdpa, "flash"),
    "sdpa": functools.partial(sdpa, "sdpa"),
    "dense": functools.partial(sdpa, "dense"),
    "flash3": flash3,
}


def backward_of(case: Case, rival: Rival) -> Run:
    out = rival.forward()
    return lambda: torch.autograd.grad(out, case.leaves, case.upstream, retain_graph=True)


def both_of(case: Case, rival: Rival) -> Run:
    return lambda: torch.autograd.grad(rival.forward(), case.leaves, case.upstream)


def without_gradients(rival: Rival) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return rival.forward()

    return run


WORK = {"forward": 4, "backward": 10, "both": 14}
"""Useful operations of a kept pair, by D."""


def timed(run: Run, rep: int, how: str | None = None) -> float:
    """The median of some runs in milliseconds."""
    if how == "graph":
        return triton.testing.do_bench_cudagraph(run, rep=rep, return_mode="median")
    if how == "loop":
        return looped(run, rep)
    return triton.testing.do_bench(run, warmup=10, rep=rep, return_mode="median")


def looped(run: Run, rep: int, calls: int = 50) -> float:
    """The median of loops of so many calls, in milliseconds a call."""
    times, end = [], time.perf_counter() + rep / 1000
    while time.perf_counter() < end or len(times) < 3:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1000


def measure(
    case: Case, passes: list[str], names: list[str], rounds: int, rep: int, how: str | None = None
) -> Iterator[dict[str, Any]]:
    """One result for each implementation and pass; an implementation that fails gives a result that says why."""
    rows = torch.unique(
        torch.cat([torch.arange(64, device="cuda"), torch.arange(case.shape.S - 64, case.shape.S, device="cuda")])
    )
    rows = rows[(rows >= 0) & (rows < case.shape.S)]
    truth = case.reference(rows, torch.float64)
    eager = (case.reference(rows, case.dtype).double() - truth).abs().max().item()
    runs: dict[tuple[str, str], Run] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            start = time.perf_counter()
            rival = RIVALS[name](case)
            if rival is None:
                continue
            out = rival.forward()
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            error = (out[0, 0, rows].double() - truth).abs().max().item()
            facts[name] = {"compile_s": round(first, 2), "error": error, "eager": eager,
                           "mask_ms": rival.setup_ms, "mask_mib": rival.setup_mib}  # fmt: skip
            del out
            if "forward" in passes:
                runs["forward", name] = without_gradients(rival)
            for which, make in (("backward", backward_of), ("both", both_of)):
                if which in passes:
                    runs[which, name] = make(case, rival)
                    runs[which, name]()
        except Exception as failure:
            for which in ("backward", "both"):
                runs.pop((which, name), None)
            yield {"name": name, "failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(timed(run, rep, how))
    for (which, name), found in times.items():
        milliseconds = statistics.median(found)
        work = WORK[which] * case.shape.D * case.pairs
        yield {"name": name, "pass": which, "ms": milliseconds, "tflops": work / milliseconds / 1e9, **facts[name]}


def memory(case: Case, names: list[str]) -> Iterator[dict[str, Any]]:
    """Mebibytes beyond inputs, output and gradients at the peak of a forward and backward pass."""
    for name in names:
        rival = RIVALS[name](case)
        if rival is None:
            continue
        torch.autograd.grad(rival.forward(), case.leaves, case.upstream)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = rival.forward()
        grads = torch.autograd.grad(out, case.leaves, case.upstream)
        torch.cuda.synchronize()
        results = sum(x.numel() * x.element_size() for x in (out, *grads))
        extra = (torch.cuda.max_memory_allocated() - before - results) / 2**20
        yield {"name": name, "extra_mib": round(extra, 1)}
        del out, grads


SWEEP = {
    "forward": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2),
                (128, 128, 8, 3), (128, 64, 8, 4)],
    "keys": [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2),
             (64, 128, 8, 1), (32, 64, 4, 2), (32, 64, 4, 3), (128, 64, 8, 2)],
    "queries": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (128, 32, 8, 3),
                (128, 128, 8, 1), (64, 32, 4, 3)],
}  # fmt: skip
"""Tiles (rows, keys, warps, stages) that are tried for each kernel, the others being as the table has them."""


def sweep(case: Case, rep: int, stop: float) -> Iterator[dict[str, Any]]:
    """Each kernel with each tile, alone: the times are of whole passes, the differences belong to the kernel."""
    attention = attn_dsl.compile(case.variant.text)
    program = attention._executable
    bound = attention._binder.bind(
        case.query.detach(), case.key.detach(), case.value.detach(), None, 0,
        {**case.variant.parameters, **case.tensors},
    )  # fmt: skip
    call = portable_call(program, bound, Options("portable"))
    out, _, shifted = launch.forward(program.kernels, call)
    default = program.kernels.tiles(call, torch.cuda.get_device_capability())
    wanted = frozenset(case.tensors if case.variant.learned else ())
    trials = [
        (kernel, tile, dataclasses.replace(default, **{kernel: Tile(*tile)}))
        for kernel in SWEEP
        for tile in SWEEP[kernel]
    ]
    compiled_ahead(case, call, [(kernel, chosen) for kernel, _, chosen in trials], wanted)
    for kernel, tile, chosen in trials:
        if time.perf_counter() > stop:
            return
        tried = dataclasses.replace(call, tiles=chosen)
        record = {"name": "portable", "pass": kernel, "tile": tile}
        try:
            if kernel == "forward":
                run: Run = functools.partial(launch.forward, program.kernels, tried)
            else:
                given = (program.kernels, tried, out, shifted, case.upstream, None, wanted)
                run = functools.partial(launch.backward, *given)
            run()
            yield {**record, "ms": triton.testing.do_bench(run, warmup=5, rep=rep, return_mode="median")}
        except Exception as failure:
            yield {**record, "failed": f"{type(failure).__name__}: {str(failure)[:200]}"}


def compiled_ahead(case: Case, call: launch.Call, trials: list[tuple[str, Tiles]], wanted: frozenset[str]) -> None:
    """Compile the kernels of trials into the disk cache, a process for each core."""
    capability = torch.cuda.get_device_capability()
    shape = (case.variant.text, str(case.query.dtype)[6:], case.shape.D, capability, call.parameters, call.extents)
    tensors = [(tuple(x.shape), str(x.dtype)[6:]) for x in call.tensors]
    workers = max(1, min(len(trials), (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(functools.partial(compile_trial, *shape, tensors, wanted), trials):
            pass


def compile_trial(
    text: str,
    dtype: str,
    dim: int,
    capability: tuple[int, int],
    parameters: tuple[Any, ...],
    extents: tuple[int, ...],
    tensors: list[tuple[tuple[int, ...], str]],
    wanted: frozenset[str],
    trial: tuple[str, Tiles],
) -> None:
    """Compile one kernel with its tiles; what does not compile is left for the sweep to say."""
    kernel, chosen = trial
    query = torch.empty(1, 1, 128, dim, dtype=getattr(torch, dtype), device="meta")
    captured = tuple(torch.empty(size, dtype=getattr(torch, kind), device="meta") for size, kind in tensors)
    call = launch.Call(query, query, query, parameters, captured, extents, 0.1, tiles=chosen, capability=capability)
    kernels = attn_dsl.compile(text)._executable.kernels
    run = Compiler(GPUTarget("cuda", capability[0] * 10 + capability[1], 32))
    names = {"forward": "attention_forward", "keys": "attention_keys_backward", "queries": "attention_queries_backward"}

    def only(function: Any, programs: int, arguments: tuple[Any, ...], options: Any) -> None:
        if function.__name__ == names[kernel]:
            run(function, programs, arguments, options)

    with contextlib.suppress(Exception):
        if kernel == "forward":
            launch.forward(kernels, call, only)
        else:
            lse = torch.empty(1, 1, 128, device="meta")
            launch.backward(kernels, call, query, lse, query, None, wanted, run=only)


def show(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table(title="milliseconds, TFLOP/s of kept pairs, and time relative to attn_dsl")
    for column in (
        "variant",
        "shape",
        "pass",
        "implementation",
        "ms",
        "TFLOP/s",
        "x ours",
        "error",
        "eager",
        "mask ms",
        "MiB",
    ):
        grid.add_column(column, justify="left" if column in ("variant", "shape", "pass", "implementation") else "right")
    base = {(r["variant"], r["shape"], r["pass"]): r["ms"] for r in results if r["name"] == "attn_dsl" and "ms" in r}
    for r in results:
        if "ms" not in r or "tflops" not in r:
            continue
        own = base.get((r["variant"], r["shape"], r["pass"]))
        grid.add_row(
            r["variant"], r["shape"], r["pass"], r["name"], f"{r['ms']:.3f}", f"{r['tflops']:.0f}",
            "" if own is None else f"{r['ms'] / own:.2f}", f"{r['error']:.2g}", f"{r['eager']:.2g}",
            f"{r['mask_ms']:.2f}", f"{r['mask_mib']:.0f}",
        )  # fmt: skip
    Console(width=150).print(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--shapes", default="2x16x8192x128")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=60, help="milliseconds that each measurement repeats for")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further case starts")
    parser.add_argument("--sweep", action="store_true", help="tile shapes of the portable kernels")
    parser.add_argument("--memory", action="store_true", help="memory of both passes instead of times")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--graph", action="store_const", dest="how", const="graph", help="replay CUDA graphs; passes: forward, both"
    )
    how.add_argument(
        "--loop", action="store_const", dest="how", const="loop", help="the clock's time of calls in a row"
    )
    parser.add_argument("--json", type=argparse.FileType("w"), default=sys.stdout)
    chosen = parser.parse_args()
    stop = time.perf_counter() + chosen.limit
    facts = {"date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
             "triton": triton.__version__}  # fmt: skip
    print(json.dumps(facts), file=chosen.json, flush=True)
    results = []
    for name in chosen.variants.split(","):
        for text in chosen.shapes.split(","):
            if time.perf_counter() > stop:
                continue
            torch.compiler.reset()
            case = Case(name, Shape.parse(text), getattr(torch, chosen.dtype))
            passes, rivals = chosen.passes.split(","), chosen.rivals.split(",")
            if chosen.sweep:
                found = sweep(case, chosen.rep, stop)
            elif chosen.memory:
                found = memory(case, rivals)
            else:
                found = measure(case, passes, rivals, chosen.rounds, chosen.rep, chosen.how)
            for result in found:
                result = {"variant": name, "shape": str(case.shape), "dtype": chosen.dtype, **result}
                results.append(result)
                print(json.dumps(result), file=chosen.json, flush=True)
            del case
            torch.cuda.empty_cache()
    if not (chosen.sweep or chosen.memory):
        show(results)


if __name__ == "__main__":
    main()
