"""The Hopper backward pass on one GPU beside its rivals, all in one run.

    python benchmarks/hopper_backward.py                          every case
    python benchmarks/hopper_backward.py --only causal,learned_bias --rounds 5 --json results.jsonl

Each case is a process. All compile at once; then one after the other measures, its implementations in turns of an order
of chance, for some rounds: milliseconds are medians over rounds of what `triton.testing.do_bench` finds. The whole
backward pass counts, with what comes before and after its kernel. TFLOP/s are of pairs that the mask keeps, 10 D each.
With --rest each measurement begins on a board that has cooled, which is then not at its limit of power.

    attn_dsl        what a call takes; `deterministic` and `portable`: the same with that option, or those kernels
    frozen          with tensors that take no gradient, where `attn_dsl` has them take one
    cudnn, flex     through PyTorch; `flex_frozen` as `frozen`
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu
import torch
import triton.testing
from torch import Tensor

import attn_dsl
from attn_dsl.backend import operators
from attn_dsl.backend.execute import Options

Run = Callable[[], Any]


@dataclass(frozen=True)
class Entry:
    """A case: a variant of `gpu.VARIANTS`, BxHxSxD or BxHxHKxSxD, and what runs beside `attn_dsl`."""

    variant: str
    shape: str = "2x16x8192x128"
    rivals: tuple[str, ...] = ("flex",)

    def __str__(self) -> str:
        return f"{self.variant} {self.shape}"


PLAIN = ("cudnn", "flex")
LEARNED = ("frozen", "flex", "flex_frozen")
ENTRIES = (
    Entry("noop", rivals=PLAIN),
    Entry("causal", rivals=(*PLAIN, "deterministic")),
    Entry("noop", "2x32x8192x64", PLAIN),
    Entry("causal", "2x32x8192x64", PLAIN),
    Entry("causal", "4x32x8x4096x128", PLAIN),
    Entry("alibi"),
    Entry("sliding_window"),
    Entry("softcap"),
    Entry("learned_bias", rivals=(*LEARNED, "portable")),
    Entry("learned_bias", "2x32x8192x64", LEARNED),
)


def forward_of(case: gpu.Case, name: str) -> Callable[[], Tensor]:
    """The forward pass of an implementation."""
    if name.startswith("flex"):
        return gpu.flex(case).forward
    if name == "cudnn":
        rival = gpu.sdpa("cudnn", case)
        assert rival is not None
        return rival.forward
    attention = attn_dsl.compile(case.variant.text)
    bindings = {**case.variant.parameters, **case.tensors}
    options = Options("portable" if name == "portable" else "gpu", deterministic=name == "deterministic")

    def run() -> Tensor:
        bound = attention._binder.bind(*case.inputs, None, 0, bindings)
        return operators.attention(attention._executable, bound, options)[0]

    return run


def backward_of(case: gpu.Case, name: str) -> Run:
    leaves = case.leaves
    if name.endswith("frozen"):
        fixed = {key: tensor.detach() for key, tensor in case.tensors.items()}
        case, leaves = dataclasses.replace(case), case.inputs
        case.tensors, case.inputs = fixed, leaves
    out = forward_of(case, name)()
    return lambda: torch.autograd.grad(out, leaves, case.upstream, retain_graph=True)


def prepared(entry: Entry) -> tuple[gpu.Case, dict[str, Run], dict[str, str]]:
    """The case, the implementations that run on it, each run once, and why others do not."""
    case = gpu.Case(entry.variant, gpu.Shape.parse(entry.shape), torch.bfloat16)
    runs, failed = dict[str, Run](), dict[str, str]()
    for name in ("attn_dsl", *entry.rivals):
        try:
            run = backward_of(case, name)
            run()
            torch.cuda.synchronize()
            runs[name] = run
        except Exception as failure:  # a rival that does not run is left out, and named
            failed[name] = f"{type(failure).__name__}: {failure}"[:200]
    return case, runs, failed


def measured(
    entry: Entry, rounds: int, rep: int, rest: float, patience: float, ready: Any, turn: Any, results: Any
) -> None:
    """In a process of its own: compile, wait for the others, and measure while no one else does."""
    case, runs, failed = prepared(entry)
    with contextlib.suppress(threading.BrokenBarrierError):
        ready.wait(patience)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with turn:
        for _ in range(rounds):
            for name, run in random.sample(list(runs.items()), len(runs)):
                time.sleep(rest)
                times[name].append(triton.testing.do_bench(run, rep // 4, rep, return_mode="median"))
    medians = {name: statistics.median(found) for name, found in times.items()}
    work = 10 * case.shape.D * case.pairs
    results.put({
        "case": str(entry), "rest": rest, "failed": failed,
        "ms": {name: round(ms, 4) for name, ms in medians.items()},
        "tflops": {name: round(work / ms / 1e9, 1) for name, ms in medians.items()},
        "ratio": {name: round(ms / medians["attn_dsl"], 3) for name, ms in medians.items() if name != "attn_dsl"},
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="variants, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=100, help="milliseconds that each measurement repeats for")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds without work before each measurement")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which nothing more is waited for")
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for those that still compile")
    parser.add_argument("--json", type=argparse.FileType("w"), default=sys.stdout)
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else None
    entries = [entry for entry in ENTRIES if wanted is None or entry.variant in wanted]
    context, deadline = multiprocessing.get_context("spawn"), time.monotonic() + options.limit
    ready, turn, results = context.Barrier(len(entries)), context.Lock(), context.Queue()
    shared = (options.rounds, options.rep, options.rest, options.patience, ready, turn, results)
    workers = [context.Process(target=measured, args=(entry, *shared), daemon=True) for entry in entries]
    for worker in workers:
        worker.start()
    for _ in entries:
        found = results.get(timeout=max(0.1, deadline - time.monotonic()))
        print(json.dumps(found), file=options.json, flush=True)


if __name__ == "__main__":
    main()
