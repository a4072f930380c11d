"""Sparse and data-dependent masks on one GPU beside flex_attention, what it takes to make the schedule included.

    python benchmarks/sparse.py                                   all rows at B=2 H=16 S=8192 D=128, bf16
    python benchmarks/sparse.py --rows documents,bigbird --passes forward
    python benchmarks/sparse.py --compile                         run each pass once, so that caches hold its kernels
    python benchmarks/sparse.py --long 1048576                    the schedule of a document mask, B=1 H=1

Times are milliseconds: medians over rounds in which all take turns, of the medians of `triton.testing.do_bench`.
`new` is a forward pass whose tensors have changed, so that its schedule is made anew: by the clock, which counts the
host, and replayed as a CUDA graph (`new_graph`). `set-up` is what that takes the GPU alone, in a graph, too, and `KiB`
the memory that stays. For flex_attention the times leave out the block mask, whose making is `set-up`. TFLOP/s count
pairs that the mask keeps, 4 D a pair forward, 10 D backward. `error` is the largest deviation from float64 on some
rows. A line of a table for each pass as soon as it is measured, and one JSON object a row.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

import attn_dsl
from attn_dsl.backend import sorting
from attn_dsl.backend.execute import Options, portable_call, reordered
from attn_dsl.backend.kept import Holder
from attn_dsl.backend.portable.listing import Ends, Shape, Source, TileList

Mod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """A mask for this compiler (`text`, `parameters`, `tensors`, on the CPU) and for flex_attention (`mask`).

    `varies` says whether flex's block mask needs the batch and the heads. `length` overrides the common one.
    """

    text: str
    mask: Callable[[dict[str, Tensor]], Mod]
    parameters: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[int, int, int], dict[str, Tensor]] = lambda batch, heads, length: {}
    varies: tuple[bool, bool] = (False, False)
    length: int | None = None


WORD = 2**32


def drawn(seed: int, count: int) -> Tensor:
    """The numbers below 2 ** 32 that a GPU draws in torch for up to some 200,000 elements, one a thread: Philox
    4 x 32 with 10 rounds (Salmon et al. 2011), of which each thread has a stream of its own. Made on the CPU, so that
    masks are known without a GPU, too."""
    thread = torch.arange(count)
    words, keys = [thread * 0, thread * 0, thread % WORD, thread // WORD], [seed % WORD, seed // WORD]
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(0xD2511F53, words[0]), _product(0xCD9E8D57, words[2])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) % WORD, (keys[1] + 0xBB67AE85) % WORD]
    return words[0]


def _product(x: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) words of a product of numbers below 2 ** 32."""
    low, high = x * (y % 2**16), x * (y // 2**16)  # below 2 ** 48
    carried = high % 2**16 * 2**16 + low
    return high // 2**16 + carried // WORD, carried % WORD


def documents(batch: int, heads: int, length: int, count: int = 12) -> dict[str, Tensor]:
    cuts = (drawn(5, batch * (count - 1)) % length).reshape(batch, count - 1).sort(-1).values
    places = torch.arange(length).expand(batch, -1).contiguous()
    return {"doc": torch.searchsorted(cuts, places, right=True).to(torch.int32)}


def random_blocks(batch: int, heads: int, length: int, block: int = 64, random: int = 3) -> dict[str, Tensor]:
    blocks = length // block
    order = drawn(6, heads * blocks * blocks).reshape(heads, blocks, blocks).argsort(-1)
    return {"table": order[..., :random].to(torch.int32).contiguous()}


def buckets(batch: int, heads: int, length: int, count: int = 64) -> dict[str, Tensor]:
    return {"bucket": (drawn(7, batch * heads * length) % count).reshape(batch, heads, length).to(torch.int32)}


def big_bird(t: dict[str, Tensor]) -> Mod:
    table = t["table"]

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        i, j = q // 64, k // 64
        near = ((i - j).abs() <= 1) | (i < 2) | (j < 2)
        return near | (table[h, i, 0] == j) | (table[h, i, 1] == j) | (table[h, i, 2] == j)

    return mask


def neighborhood(width: int, height: int, radius: int = 6) -> Row:
    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        y, x = (q // width).clamp(radius, height - 1 - radius), (q % width).clamp(radius, width - 1 - radius)
        return ((y - k // width).abs() <= radius) & ((x - k % width).abs() <= radius)

    parameters = {"width": width, "height": height, "r": radius}
    return Row("natten2d", lambda t: mask, parameters, length=width * height)


ROWS = {
    "documents": Row(
        "packed_causal",
        lambda t: lambda b, h, q, k: (q >= k) & (t["doc"][b, q] == t["doc"][b, k]),
        tensors=documents, varies=(True, False),
    ),
    "window_global": Row(
        "longformer",
        lambda t: lambda b, h, q, k: ((q - k).abs() <= 256) | (k < 64) | (q < 64),
        {"reach": 256, "globals": 64},
    ),
    "bigbird": Row(
        "bigbird", big_bird, {"block": 64, "reach": 1, "globals": 2}, {"random": 3}, random_blocks, (False, True)
    ),
    "hash_buckets": Row(
        "hash_buckets",
        lambda t: lambda b, h, q, k: (q >= k) & (t["bucket"][b, h, q] == t["bucket"][b, h, k]),
        tensors=buckets, varies=(True, True),
    ),
    "dilated": Row(
        "dilated_window",
        lambda t: lambda b, h, q, k: (q >= k) & (q - k < 4096) & ((q - k) % 4 == 0),
        {"window": 4096, "dilation": 4},
    ),
    "natten2d_90": neighborhood(90, 90),
    "natten2d_128": neighborhood(128, 128),
}  # fmt: skip


@dataclass
class Case:
    """A row at a shape, with its inputs on the GPU."""

    row: Row
    batch: int
    heads: int
    length: int
    dim: int

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (self.batch, self.heads, self.length, self.dim)
        made = (torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16) for _ in range(4))
        self.query, self.key, self.value, self.upstream = made
        self.inputs = [x.requires_grad_() for x in (self.query, self.key, self.value)]
        on_cpu = self.row.tensors(self.batch, self.heads, self.length)
        self.tensors = {name: x.cuda() for name, x in on_cpu.items()}
        self.attention = attn_dsl.compile(self.row.text, **self.row.constants)
        self.bindings = {**self.row.parameters, **self.tensors}

    @functools.cached_property
    def pairs(self) -> int:
        """Kept pairs over the whole call."""
        mask, k = self.row.mask(self.tensors), torch.arange(self.length, device="cuda")[None, :]
        batches, heads = (
            n if varies else 1 for n, varies in zip((self.batch, self.heads), self.row.varies, strict=True)
        )
        total = 0
        for b in range(batches):
            for h in range(heads):
                at = torch.tensor(b, device="cuda"), torch.tensor(h, device="cuda")
                for rows in torch.arange(self.length, device="cuda").split(4096):
                    total += int(mask(*at, rows[:, None], k).sum())
        return total * (self.batch // batches) * (self.heads // heads)

    def error(self, out: Tensor) -> float:
        """On some rows of the last batch entry and head."""
        b, h = self.batch - 1, self.heads - 1
        rows = torch.randint(0, self.length, (64,), device="cuda")
        query, key, value = (x[b, h].detach().double() for x in self.inputs)
        at = torch.tensor(b, device="cuda"), torch.tensor(h, device="cuda")
        keep = self.row.mask(self.tensors)(*at, rows[:, None], torch.arange(self.length, device="cuda")[None, :])
        score = (query[rows] @ key.T / math.sqrt(self.dim)).masked_fill(~keep, -math.inf)
        return float((out[b, h, rows].double() - torch.softmax(score, -1) @ value).abs().max())

    def forward(self) -> Tensor:
        return self.attention(*self.inputs, **self.bindings)

    def forward_anew(self) -> Tensor:
        """After a change of the tensors that the mask reads."""
        for tensor in self.tensors.values():
            tensor.add_(0)
        return self.forward()

    def graph_anew(self) -> Callable[[], None]:
        """`forward_anew` as a CUDA graph."""
        return graph_of(self.forward_anew, 1).replay

    def flex(self, eager: bool = False) -> tuple[Callable[[], Tensor], float, float]:
        """(forward, milliseconds and KiB of the block mask: not a number where it is made by eager PyTorch)."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        batch, heads = (n if v else None for n, v in zip((self.batch, self.heads), self.row.varies, strict=True))
        torch._dynamo.reset()  # else the masks of some rows are too many for it, and the next ones run uncompiled
        of = self.row.mask(self.tensors), batch, heads, self.length, self.length, "cuda"
        run = torch.compile(flex_attention, dynamic=False)
        if eager:
            mask = create_block_mask(*of)
            return (lambda: run(*self.inputs, block_mask=mask)), math.nan, math.nan
        build = functools.partial(torch.compile(create_block_mask, dynamic=False), *of)
        mask, kibibytes = measured(build)
        setup = triton.testing.do_bench(build, warmup=5, rep=20, return_mode="median")
        return (lambda: run(*self.inputs, block_mask=mask)), setup, kibibytes

    def set_up(self) -> tuple[float, float]:
        """(milliseconds that the GPU takes to make the schedule of a forward pass, KiB that it keeps); with the sort,
        where positions are sorted."""
        program, options = self.attention._executable, Options("gpu")
        call = self.attention._binder.bind(*self.inputs, None, 0, self.bindings)
        found, holder = reordered(program, call, options), Holder()
        makes: list[Callable[[], Any]] = []
        with torch.no_grad(), holder.active():
            self.forward()
        if found is not None:
            if found.by is not None:
                tensor, names = call.tensors[found.by.tensor.name], found.program.tensor_names
                makes.append(functools.partial(sorting.made, found.by, tensor, names))
            program, call = found.program, found.call
        lists = program.kernels.lists
        if lists is not None:
            shape = next(made.shape for made in holder.held.values() if isinstance(made, TileList))
            source = Source.of(portable_call(program, call, options))
            makes.append(lambda: (lists.make_ends(source), lists.make(source, shape, False)))
        return (replayed(lambda: [make() for make in makes]) if makes else 0.0), holder.bytes / 1024


def replayed(run: Callable[[], Any], times: int = 20) -> float:
    """Milliseconds of a run in a CUDA graph."""
    graph = graph_of(run, times)
    return float(triton.testing.do_bench(graph.replay, warmup=10, rep=30, return_mode="median")) / times


def graph_of(run: Callable[[], Any], times: int) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    return graph


def measured(run: Callable[[], Any]) -> tuple[Any, float]:
    """(what it gives, KiB that it took at most)."""
    found = run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run()
    torch.cuda.synchronize()
    return found, (torch.cuda.max_memory_allocated() - before) / 1024


def times(runs: dict[str, Callable[[], Any]], rounds: int, rep: int) -> dict[str, float]:
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(triton.testing.do_bench(run, warmup=rep // 4, rep=rep, return_mode="median"))
    return {name: statistics.median(values) for name, values in found.items()}


def backwards_of(case: Case, forwards: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Any]]:
    """Backward passes of outputs that are made here: a later change of what the mask reads would make them useless."""

    def backward_of(out: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(out, case.inputs, case.upstream, retain_graph=True)

    return {name: backward_of(run()) for name, run in forwards.items() if not name.startswith("new")}


def run_row(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    forwards: dict[str, Callable[[], Tensor]] = {"attn_dsl": case.forward}
    found: dict[str, Any] = {"row": name, "length": case.length}
    if not options.alone:
        forwards["flex"], found["flex_setup_ms"], found["flex_setup_kib"] = case.flex(options.eager)
    if case.tensors:
        forwards["new"] = case.forward_anew
    passes = {
        "forward": (4, lambda: forwards),
        "backward": (10, lambda: backwards_of(case, forwards)),
    }
    for which in options.passes.split(","):  # no process compiles while it holds its turn
        with torch.set_grad_enabled(which == "backward"):
            for run in passes[which][1]().values():
                run()
    if options.compile:
        return found
    found |= {"pairs": case.pairs, "error": case.error(case.forward().detach())}
    found["setup_ms"], found["setup_kib"] = case.set_up()
    with turn(options.turn):
        for which in options.passes.split(","):
            flops, make = passes[which]
            with torch.set_grad_enabled(which == "backward"):
                runs = make()
                if which == "forward" and case.tensors:
                    runs["new_graph"] = case.graph_anew()
                found[f"{which}_ms"] = taken = times(runs, options.rounds, options.rep)
            work = flops * case.pairs * case.dim / 1e9
            found[f"{which}_tflops"] = {n: work / ms for n, ms in taken.items()}
            print(line(found, which), flush=True)
    return found


@contextlib.contextmanager
def turn(path: str | None) -> Iterator[None]:
    """Alone among the processes that name the same file; among all where none is named."""
    if path is None:
        yield
        return
    with open(path, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def run_long(length: int) -> dict[str, Any]:
    """The schedule of a document mask of one long row: milliseconds until it is there, the host included, and MiB."""
    doc = {name: x.cuda() for name, x in documents(1, 1, length, 100).items()}
    query = torch.empty(1, 1, length, 128, device="cuda", dtype=torch.bfloat16)
    attention = attn_dsl.compile("packed_causal")
    program = attention._executable
    source = Source.of(
        portable_call(program, attention._binder.bind(query, query, query, None, 0, doc), Options("gpu"))
    )
    lists = program.kernels.lists
    assert lists is not None

    def make() -> tuple[Ends, TileList]:
        return lists.make_ends(source), lists.make(source, Shape(128, 128), False)

    (ends, made), peak = measured(make)
    waits = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        make()
        torch.cuda.synchronize()
        waits.append(1e3 * (time.perf_counter() - start))
    masked, full = made.counts
    return {
        "row": "set-up", "length": length, "ms": statistics.median(waits), "peak_mib": peak / 1024,
        "kept_mib": (made.bytes + ends.bytes) / 2**20, "tiles": masked + full,
    }  # fmt: skip


HEAD = (
    "| mask | pass | attn_dsl | flex | times flex | new tensors, in a graph, times flex | set-up ms, KiB | flex's |\n"
    "|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any], which: str) -> str:
    """Of a table with `HEAD`."""
    speed, ms = row[f"{which}_tflops"], row[f"{which}_ms"]
    ratio = f"{ms['flex'] / ms['attn_dsl']:.2f}" if "flex" in ms else "-"
    anew = (
        ", ".join(f"{ms['flex'] / ms[name]:.2f}" for name in ("new", "new_graph") if {"flex", name} <= ms.keys()) or "-"
    )
    flex = f"{speed['flex']:.0f}" if "flex" in speed else "-"
    own = f"{row['setup_ms']:.4f}, {row['setup_kib']:.0f}"
    other = f"{row.get('flex_setup_ms', 0):.1f}, {row.get('flex_setup_kib', 0):.0f}"
    cells = (f"{row['row']} {row['length']}", which, f"{speed['attn_dsl']:.0f}", flex, ratio, anew, own, other)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--shape", default="2x16x8192x128", help="BxHxSxD")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=40, help="milliseconds of a measurement")
    parser.add_argument("--alone", action="store_true", help="without flex_attention")
    parser.add_argument(
        "--eager", action="store_true", help="flex's block masks by eager PyTorch: to compile some takes minutes"
    )
    parser.add_argument("--compile", action="store_true", help="measure nothing")
    parser.add_argument("--turn", help="a file to hold while measuring, for processes that compile side by side")
    parser.add_argument("--long", type=int, help="the length of a document mask whose schedule alone is made")
    options = parser.parse_args()
    if options.long:
        print(json.dumps(run_long(options.long)), flush=True)
        return
    batch, heads, length, dim = map(int, options.shape.split("x"))
    print(HEAD, flush=True)
    for name in options.rows.split(","):
        row = ROWS[name]
        print(json.dumps(run_row(name, Case(row, batch, heads, row.length or length, dim), options)), flush=True)


if __name__ == "__main__":
    main()
