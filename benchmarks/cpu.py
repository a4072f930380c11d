"""Attention on the CPU: this compiler beside torch.compile(flex_attention) and scaled_dot_product_attention.

    python benchmarks/cpu.py                              # every variant, forward, one run
    python benchmarks/cpu.py --variants noop softcap --passes forward backward --json cpu.jsonl

The rivals are timed in turn with this compiler, so that whatever else the machine does meets all of them; in its turn
each runs twice and the second call counts, since threads of the one before still spin during the first. Figures are
medians. flex_attention gets the same expressions, printed from the compiler's IR, and its block mask is
built beforehand; it has no backward pass on the CPU. SDPA computes plain and causal attention only, whatever the
variant: it is the yardstick, not a rival.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attn_dsl
from attn_dsl.backend.cpu.elementary import clip, nonzero
from attn_dsl.backend.printer import Signature, emit
from attn_dsl.backend.torch_dialect import TorchDialect
from attn_dsl.ir.nodes import SCORE, TRUE, Node

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from variant_cases import Sizes, tensors_for

PARAMETERS: dict[str, dict[str, int]] = {
    "sliding_window": {"window": 512},
    "prefix_lm": {"prefix": 512},
    "t5_bias": {"reach": 128},
    "longformer": {"reach": 256, "globals": 64},
    "bigbird": {"block": 64, "reach": 1, "globals": 2, "random": 3},
    "sparse_strided": {"stride": 128},
    "sparse_fixed": {"stride": 128, "summary": 8},
    "dilated_window": {"window": 1024, "dilation": 4},
    "natten1d": {"r": 128},
    "natten2d": {"width": 64, "height": 64, "r": 6},
    "natten3d": {"width": 16, "height": 16, "depth": 16, "r": 2},
    "shared_prefix": {"prefix": 1024},
    "block_diffusion": {"length": 2048, "block": 64},
    "gemma2_local": {"window": 1024},
}
"""Parameters at 4096 positions; the others keep their defaults."""
VARIANTS = [
    *("noop", "causal", "softcap", "sliding_window", "alibi", "t5_bias", "prefix_lm", "gemma2_local", "gpt_oss"),
    *("document", "packed_causal", "padded", "longformer", "dilated_window", "sparse_strided", "sparse_fixed"),
    *("natten1d", "natten2d", "natten3d", "bigbird", "shared_prefix", "block_diffusion", "relative_bias"),
    *("gated_score", "hash_buckets", "tree"),
]


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds; None where a rival has no such pass or fails."""

    variant: str
    passes: str
    attn_dsl: float
    flex: float | None
    sdpa: float
    sdpa_causal: float
    flex_compile_s: float | None = None
    note: str = ""


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_machine())
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(arguments.variants) * len(arguments.passes))
        for name in arguments.variants:
            for direction in arguments.passes:
                progress.update(task, description=f"{name} {direction}")
                rows.append(measure(name, direction, arguments))
                progress.advance(task)
                console.print(_line(rows[-1]))
    console.print(_table(rows, arguments))
    if arguments.json:
        with arguments.json.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({**asdict(row), **_shape(arguments), "machine": _machine()}) + "\n")
    return 0


def measure(name: str, direction: str, arguments: argparse.Namespace) -> Row:
    """One variant and pass: every contestant once for warming up, then in turn."""
    s = arguments
    make = torch.Generator().manual_seed(0)
    backward = direction == "backward"
    shapes = ((s.batch, s.heads, s.seq, s.dim), *[(s.batch, s.kv_heads or s.heads, s.seq, s.dim)] * 2)
    query, key, value = (torch.randn(shape, generator=make).requires_grad_(backward) for shape in shapes)
    parameters = PARAMETERS.get(name, {})
    sizes = Sizes(s.batch, s.heads, s.kv_heads or s.heads, s.seq, s.seq, s.dim, s.dim)
    tensors = tensors_for(name, sizes, parameters)
    attn = attn_dsl.compile(name, **parameters)
    runtime = {p.name: parameters.get(p.name, p.default) for p in attn.variant.parameters}

    def ours() -> Tensor:
        return attn(query, key, value, **tensors)

    def sdpa(causal: bool) -> Callable[[], Tensor]:
        return lambda: scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=bool(s.kv_heads))

    contestants = {"attn_dsl": ours, "sdpa": sdpa(False), "sdpa_causal": sdpa(True)}
    compile_s, note = None, ""
    if not backward and not s.no_flex:
        try:
            contestants["flex"], compile_s = _flex(attn, query, key, value, runtime, tensors)
        except Exception as error:
            note = f"flex fails: {type(error).__name__}"
    timed = {who: _timed(run, query, backward) for who, run in contestants.items()}
    times: dict[str, list[float]] = {who: [] for who in timed}
    for _ in range(s.repeats):
        for who, run in timed.items():
            run()
            times[who].append(run())
    medians = {who: statistics.median(found) for who, found in times.items()}
    return Row(name, direction, medians["attn_dsl"], medians.get("flex"), medians["sdpa"], medians["sdpa_causal"],
               compile_s, note)  # fmt: skip


def _timed(run: Callable[[], Tensor], query: Tensor, backward: bool) -> Callable[[], float]:
    """Milliseconds of one pass; the forward that a backward needs is not counted."""

    def forward_pass() -> float:
        with torch.no_grad():
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)

    def backward_pass() -> float:
        out = run()
        grad = torch.ones_like(out)
        start = time.perf_counter()
        out.backward(grad)
        elapsed = 1e3 * (time.perf_counter() - start)
        query.grad = None
        return elapsed

    return backward_pass if backward else forward_pass


class _FlexDialect(TorchDialect):
    """The same operations without writing in place."""

    def fresh(self, node: Node) -> bool:
        return False


def _flex(
    attn: attn_dsl.Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: dict[str, Any],
    tensors: dict[str, Tensor],
) -> tuple[Callable[[], Tensor], float]:
    """flex_attention with the variant's score and mask, compiled; and how many seconds that and the block mask took."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    variant = attn.variant
    if variant.sink is not None:
        raise NotImplementedError("flex_attention has no sinks")
    signature = Signature.of(variant)
    (batch, heads, q_len, dim), (_, kv_heads, kv_len, _) = query.shape, key.shape
    known = {"B": batch, "H": heads, "HK": kv_heads, "Q": q_len, "KV": kv_len, "D": dim, **parameters}
    for declared in variant.tensors:
        for extent, size in zip(declared.extents, tensors[declared.name].shape, strict=True):
            known.setdefault(getattr(extent, "name", ""), size)
    scalars = tuple(known[node.name] for node in signature.scalars)  # type: ignore[attr-defined]
    captured = tuple(tensors.values())
    names: dict[str, Any] = {
        "torch": torch,
        "FLOAT": torch.float32,
        "clip": clip,
        "nonzero": nonzero,
        "tanh": torch.tanh,
    }
    place = ("b", "h", "q", "k", "scalars", "tensors")
    exec(emit("score", ("s", *place), variant.score, signature, _FlexDialect()), names)
    exec(emit("mask", place, variant.mask, signature, _FlexDialect()), names)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return names["score"](s, b, h, q, k, scalars, captured)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return names["mask"](b, h, q, k, scalars, captured)

    start = time.perf_counter()
    per = {"B": batch if "b" in variant.mask.depends else None, "H": heads if "h" in variant.mask.depends else None}
    block_mask = None
    if variant.mask is not TRUE:
        block_mask = create_block_mask(mask_mod, per["B"], per["H"], q_len, kv_len, device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention)

    def run() -> Tensor:
        options = {"score_mod": None if variant.score is SCORE else score_mod, "block_mask": block_mask}
        return compiled(query, key, value, enable_gqa=heads != kv_heads, **options)

    with torch.no_grad():
        found = run()
        seconds = time.perf_counter() - start
        error = (found - attn(query, key, value, **tensors)).abs().max().item()
    if not error < 1e-3:
        raise AssertionError(f"the results differ by {error}")
    return run, seconds


def _table(rows: list[Row], arguments: argparse.Namespace) -> Table:
    shape = " ".join(f"{name}={value}" for name, value in _shape(arguments).items())
    table = Table(title=f"{shape}, fp32, {arguments.threads} threads; medians of {arguments.repeats}, ms")
    for heading in ("variant", "pass"):
        table.add_column(heading)
    for heading in ("attn_dsl", "flex", "flex / attn_dsl", "SDPA", "SDPA causal", "attn_dsl / SDPA", "note"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.variant, row.passes, *_cells(row))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    flex = "-" if row.flex is None else f"{row.flex:.1f}"
    ratio = "-" if row.flex is None else f"{row.flex / row.attn_dsl:.2f}"
    return (f"{row.attn_dsl:.1f}", flex, ratio, f"{row.sdpa:.1f}", f"{row.sdpa_causal:.1f}",
            f"{row.attn_dsl / row.sdpa:.2f}", row.note)  # fmt: skip


def _line(row: Row) -> str:
    ours, flex, ratio, sdpa, causal, *_ = _cells(row)
    return (
        f"{row.variant:16}{row.passes:9} attn_dsl {ours:>8}  flex {flex:>8} ({ratio:>5})  SDPA {sdpa:>8} / {causal:>8}"
    )


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model
        )
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {model}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )


def _shape(arguments: argparse.Namespace) -> dict[str, int]:
    return {"B": arguments.batch, "H": arguments.heads, "S": arguments.seq, "D": arguments.dim}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME", help="(default: all)"
    )
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward"])
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=0, help="(default: as many as heads)")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--no-flex", action="store_true", help="leave flex_attention out: it compiles for some seconds each"
    )
    parser.add_argument("--json", type=Path, help="append one line of JSON for each row")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
