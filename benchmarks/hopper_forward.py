"""How fast the Hopper forward kernels are on one GPU, beside their rivals; `tests/gpu` says whether they are right.

    python benchmarks/hopper_forward.py                      all parts
    python benchmarks/hopper_forward.py time --limit 300     variants, with FlashAttention-3, cuDNN and flex_attention
    python benchmarks/hopper_forward.py configs              ways of the kernel against each other

One JSON object a line. Each part runs in a process of its own, under an alarm for each case: a kernel that hangs costs
its case and no more. Times are medians in milliseconds of interleaved rounds; `tflops` counts unmasked pairs only.
Before anything runs, the kernels are compiled in parallel processes (`--jobs`), into the cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_dsl.backend.hopper import launch as hopper
from attn_dsl.backend.hopper.configs import SHARED_LIMIT, WAYS, Config
from attn_dsl.backend.portable import launch as portable
from attn_dsl.frontend import load
from attn_dsl.passes import pipeline
from attn_dsl.passes.schedule import derive_schedule

TEXTS = {
    "softcap_causal": "attention softcap_causal(cap: float = 20.0)\nscore = cap * tanh(score / cap)\nmask = q >= k\n",
    "relative_causal": (
        "attention relative_causal(reach: int = 128)\ntensor table: float32[H, 2 * reach + 1]\n"
        "score = score + table[h, clamp(k - q, -reach, reach) + reach]\nmask = q >= k\n"
    ),
}
DOCUMENTS = 12
"""Of equal length, in a batch entry of the variants that have them."""


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A variant with the shape of a call."""

    variant: str
    dim: int = 128
    batch: int = 2
    heads: int = 16
    kv_heads: int = 0
    q_len: int = 8192
    growing: bool = False
    parameters: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        shape = f"B{self.batch} H{self.heads}/{self.kv_heads or self.heads} Q{self.q_len} KV{self.q_len} D{self.dim}"
        return f"{self.variant} {shape}{' growing' * self.growing} bfloat16"


@functools.cache
def kernels(variant: str) -> hopper.Kernels:
    program = pipeline.run(load(TEXTS.get(variant, variant)), stop_after="simplify")
    return hopper.Kernels(portable.Kernels(program.variant, derive_schedule(program.variant, padded=True)))


def bindings(case: Case, device: str) -> dict[str, Any]:
    """Parameters and captured tensors of a call, by name."""
    variant = kernels(case.variant).portable.variant
    chosen = dict(case.parameters)
    found: dict[str, Any] = {p.name: chosen.get(p.name, p.default) for p in variant.parameters}
    for tensor in variant.tensors:
        match tensor.name:
            case "slope":
                value = 2.0 ** (-8.0 * torch.arange(1, case.heads + 1) / case.heads)
            case "doc":
                value = (torch.arange(case.q_len) * DOCUMENTS // case.q_len).int().repeat(case.batch, 1)
            case "table":
                value = torch.randn(case.heads, 2 * int(found["reach"]) + 1)
            case _:
                raise ValueError(f"no values for the tensor {tensor.name} of {case.variant}")
        found[tensor.name] = value.to(device)
    return found


def call(case: Case, device: str) -> tuple[portable.Call, dict[str, Any]]:
    def tensor(heads: int) -> torch.Tensor:
        return torch.randn(case.batch, heads, case.q_len, case.dim, device=device, dtype=torch.bfloat16)

    bound = bindings(case, device)
    variant = kernels(case.variant).portable.variant
    kv_heads = case.kv_heads or case.heads
    key = tensor(kv_heads)
    if case.growing:  # logits pass any maximum of early keys, so that every tile is done twice
        key *= torch.arange(1, case.q_len + 1, device=device, dtype=key.dtype).view(-1, 1) / 16
    return portable.Call(
        tensor(case.heads), key, tensor(kv_heads), tuple(bound[p.name] for p in variant.parameters),
        tuple(bound[t.name] for t in variant.tensors), (), 1 / math.sqrt(case.dim), 0,
    ), bound  # fmt: skip


def default_config(case: Case) -> Config:
    return kernels(case.variant).candidates(call(case, "meta")[0])[0]


# ---------------------------------------------------------------- what is timed


def timings() -> Iterator[Case]:
    for length in (4096, 8192, 16384):
        yield Case("noop", q_len=length)
    for length in (2048, 4096, 8192, 16384):
        yield Case("causal", q_len=length)
    for variant in ("alibi", "softcap", "softcap_causal"):
        yield Case(variant, parameters=(("cap", 20.0),))
    yield Case("sliding_window", parameters=(("window", 1024),))
    yield Case("prefix_lm", parameters=(("prefix", 2048),))
    yield Case("relative_causal")
    yield Case("causal", batch=4, heads=32, kv_heads=8, q_len=4096)
    for variant in ("noop", "causal"):
        yield Case(variant, dim=64, heads=32)
        yield Case(variant, dim=256, batch=4)
    for dim in (80, 96, 192):  # of no tile shape of their own
        yield Case("causal", dim=dim)
    yield Case("noop", growing=True)


def configurations() -> Iterator[tuple[Case, Config, int | None]]:
    """Ways of the kernel, and the number of heads that run side by side (None: the launcher's choice)."""
    for dim, batch, heads in ((128, 2, 16), (64, 2, 32), (256, 4, 16)):
        for variant in ("noop", "causal"):
            case = Case(variant, dim=dim, batch=batch, heads=heads)
            base = default_config(case)
            for section in (None, 1, 8, batch * heads):
                yield case, base, section
            for way in WAYS:
                yield from changed(case, base, **{way: not getattr(base, way)})
            yield from changed(case, base, stages=3)
            if dim == 64:
                for more in ({}, {"stages": 3, "ping_pong": True, "pin": True}):
                    yield from changed(case, base, groups=2, registers=240, **more)
    for variant in ("alibi", "softcap", "softcap_causal", "sliding_window", "relative_causal", "packed_causal"):
        case = Case(variant, parameters=(("cap", 20.0), ("window", 1024)))
        base = default_config(case)
        yield case, base, None
        yield from changed(case, base, keys=64)
        for way in ("pin", "carry_wide", "ping_pong"):
            yield from changed(case, base, **{way: not getattr(base, way)})


def changed(case: Case, base: Config, **fields: Any) -> Iterator[tuple[Case, Config, int | None]]:
    config = replace(base, **fields)
    if config.shared_bytes(case.dim, case.dim) <= SHARED_LIMIT:
        yield case, config, None


def pairs(case: Case) -> float:
    """Unmasked pairs of a head, of the cases that are timed."""
    q_len = case.q_len
    window, prefix = dict(case.parameters).get("window", 0), dict(case.parameters).get("prefix", 0)
    match case.variant:
        case "sliding_window":
            return window * q_len - window * (window - 1) / 2
        case "prefix_lm":
            return q_len * (q_len + 1) / 2 + prefix * (prefix - 1) / 2
        case "packed_causal":
            return q_len * (q_len / DOCUMENTS + 1) / 2
        case "noop" | "softcap":
            return q_len * q_len
        case _:
            return q_len * (q_len + 1) / 2


def operations(case: Case) -> float:
    return 4.0 * case.batch * case.heads * pairs(case) * case.dim


def rivals(case: Case, bound_call: portable.Call, bound: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    query, key, value = bound_call.query, bound_call.key, bound_call.value
    causal = case.variant in ("causal", "softcap_causal")
    if case.variant in ("noop", "causal", "softcap", "softcap_causal"):
        yield from flash3(case, bound_call, causal)
    if case.variant in ("noop", "causal"):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def cudnn() -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=causal, enable_gqa=key.shape[1] != query.shape[1]
                )

        yield "cudnn", cudnn
    yield "flex", flex(case, bound_call, bound)


def flash3(case: Case, bound_call: portable.Call, causal: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return
    operands = [x.transpose(1, 2).contiguous() for x in (bound_call.query, bound_call.key, bound_call.value)]
    softcap = dict(case.parameters)["cap"] if case.variant.startswith("softcap") else 0.0
    yield "fa3", lambda: flash_attn_func(*operands, causal=causal, softcap=softcap)


def flex(case: Case, bound_call: portable.Call, bound: dict[str, Any]) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def window(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k < bound["window"])

    def prefix(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) | (k < bound["prefix"])

    def alibi(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score + bound["slope"][h] * (k - q)

    def softcap(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return 20.0 * torch.tanh(score / 20.0)

    def relative_bias(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score + bound["table"][h, torch.clamp(k - q, -128, 128) + 128]

    scores = {"alibi": alibi, "softcap": softcap, "softcap_causal": softcap, "relative_causal": relative_bias}
    masks = {"noop": None, "softcap": None, "sliding_window": window, "prefix_lm": prefix}
    mask = masks.get(case.variant, causal)
    block = None if mask is None else create_block_mask(mask, None, None, case.q_len, case.q_len, device="cuda")
    compiled = torch.compile(flex_attention)
    operands = (bound_call.query, bound_call.key, bound_call.value)
    return lambda: compiled(
        *operands, score_mod=scores.get(case.variant), block_mask=block, enable_gqa=bool(case.kv_heads)
    )


def measure(runs: dict[str, Callable[[], Any]], rounds: int, milliseconds: int) -> dict[str, float]:
    """Medians over rounds, in each of which all take their turn in an order of chance: a GPU that works gets slower."""
    import triton.testing

    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in random.sample(list(runs.items()), len(runs)):
            found[name].append(triton.testing.do_bench(run, milliseconds // 4, milliseconds, return_mode="median"))
    return {name: statistics.median(times) for name, times in found.items()}


def timing(case: Case, rounds: int, milliseconds: int, with_flex: bool) -> dict[str, Any]:
    bound_call, bound = call(case, "cuda")
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: hopper.forward(kernels(case.variant), bound_call)}
    failed = {}
    for name, run in rivals(case, bound_call, bound):
        if name == "flex" and not with_flex:
            continue
        try:
            run()
            torch.cuda.synchronize()
            runs[name] = run
        except Exception as error:  # a rival that does not run here is left out, and named
            failed[name] = repr(error)[:160]
    times = measure(runs, rounds, milliseconds)
    work = operations(case)
    return {
        "ms": {name: round(ms, 4) for name, ms in times.items()},
        "tflops": {name: round(work / ms / 1e9, 1) for name, ms in times.items()},
        "ratio": {name: round(ms / times["ours"], 3) for name, ms in times.items() if name != "ours"},
        **({"failed": failed} if failed else {}),
    }


def comparison(case: Case, config: Config, section: int | None) -> dict[str, Any]:
    bound_call, _ = call(case, "cuda")

    def run() -> Any:
        return hopper.forward(kernels(case.variant), bound_call, config=config, section=section)

    run()
    torch.cuda.synchronize()
    times = measure({"ours": run}, 1, 60)
    return {"tflops": round(operations(case) / times["ours"] / 1e9, 1), "ms": round(times["ours"], 4)}


# ---------------------------------------------------------------- driver


@dataclass
class Task:
    name: str
    run: Callable[[], dict[str, Any]]
    ahead: tuple[Case, Config | None]
    seconds: int = 30


def tasks(part: str, options: argparse.Namespace) -> list[Task]:
    wanted = options.only.split(",") if options.only else None

    def keep(case: Case) -> bool:
        return wanted is None or case.variant in wanted or f"{case.variant}:{case.dim}" in wanted

    if part == "time":
        return [
            Task(str(c), functools.partial(timing, c, options.rounds, options.rep, not options.no_flex), (c, None), 120)
            for c in timings()
            if keep(c)
        ]
    return [
        Task(f"{c} | {w} section={s}", functools.partial(comparison, c, w, s), (c, w))
        for c, w, s in configurations()
        if keep(c)
    ]


def compile_one(ahead: tuple[Case, Config | None]) -> str:
    case, config = ahead
    try:
        hopper.build(kernels(case.variant), call(replace(case, batch=min(case.batch, 2)), "meta")[0], config)
        return ""
    except Exception as error:
        return f"{case}: {error!r}"[:400]


def child(part: str, options: argparse.Namespace) -> None:
    """Run the tasks from `--first` on, one line each; an alarm ends the process when one takes too long."""
    torch.manual_seed(0)
    for number, task in enumerate(tasks(part, options)):
        if number < options.first:
            continue
        signal.alarm(task.seconds)
        try:
            result = task.run()
        except Exception as error:
            result = {"failed": repr(error)[:600]}
            if "CUDA" in repr(error):  # the context is lost
                print(json.dumps({"part": part, "n": number, "case": task.name, **result}), flush=True)
                os._exit(3)
        signal.alarm(0)
        print(json.dumps({"part": part, "n": number, "case": task.name, **result}), flush=True)


def parent(part: str, options: argparse.Namespace, deadline: float) -> None:
    names = [task.name for task in tasks(part, options)]
    first = 0
    while first < len(names) and time.time() < deadline:
        command = [sys.executable, __file__, part, "--child", "--first", str(first)]
        command += ["--rounds", str(options.rounds), "--rep", str(options.rep)]
        command += ["--no-flex"] * options.no_flex + (["--only", options.only] if options.only else [])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                first = json.loads(line)["n"] + 1
            if time.time() > deadline:
                process.kill()
                break
        if process.wait() in (0, 3) or time.time() > deadline:
            if process.returncode == 0:
                return
            continue
        print(json.dumps({"part": part, "n": first, "case": names[first], "failed": f"died {process.returncode}"}))
        first += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["time", "configs"])
    parser.add_argument("--limit", type=float, default=460, help="seconds for everything")
    parser.add_argument("--only", default="", help="variants, or as causal:96, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=100, help="milliseconds that each takes in a round")
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.parts[0], options)
        return
    deadline = time.time() + options.limit
    ahead = list(dict.fromkeys(task.ahead for part in options.parts for task in tasks(part, options)))
    with ProcessPoolExecutor(options.jobs) as pool:
        for failure in pool.map(compile_one, ahead):
            if failure:
                print(json.dumps({"part": "compile", "failed": failure}), flush=True)
    print(
        json.dumps({"part": "compile", "kernels": len(ahead), "seconds": round(time.time() - deadline + options.limit)})
    )
    for part in options.parts:
        parent(part, options, deadline)


if __name__ == "__main__":
    main()
