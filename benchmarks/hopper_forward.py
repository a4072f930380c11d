"""The Hopper forward kernels on one GPU: first whether they are right, then how fast, beside their rivals.

    python benchmarks/hopper_forward.py                      all parts
    python benchmarks/hopper_forward.py check                against the dense evaluator in float64, small shapes first
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
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from attn_dsl.backend.hopper import launch as hopper
from attn_dsl.backend.hopper.configs import SHARED_LIMIT, WAYS, Config
from attn_dsl.backend.portable import launch as portable
from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import attention
from attn_dsl.passes import pipeline
from attn_dsl.passes.schedule import derive_schedule

TEXTS = {
    "softcap_causal": "attention softcap_causal(cap: float = 20.0)\nscore = cap * tanh(score / cap)\nmask = q >= k\n",
    "relative_causal": (
        "attention relative_causal(reach: int = 128)\ntensor table: float32[H, 2 * reach + 1]\n"
        "score = score + table[h, clamp(k - q, -reach, reach) + reach]\nmask = q >= k\n"
    ),
    "alibi_full": "attention alibi_full\ntensor slope: float32[H]\nscore = score - slope[h] * abs(q - k)\n",
    "softcap_alibi": (
        "attention softcap_alibi(cap: float = 20.0)\ntensor slope: float32[H]\n"
        "score = cap * tanh(score / cap) + slope[h] * (k - q)\nmask = q >= k\n"
    ),
    "late": "attention late(start: int = 300)\nmask = k >= start and q >= k\n",
    "sink_causal": "attention sink_causal\ntensor sinks: float32[H]\nsink = sinks[h]\nmask = q >= k\n",
    "row_bias": "attention row_bias\ntensor bias: float32[H, Q]\nscore = score + bias[h, q]\nmask = q >= k\n",
}
DOCUMENTS = 12
"""Of equal length, in a batch entry of the variants that have them."""


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A variant with the shape of a call."""

    variant: str
    dim: int = 128
    value_dim: int = 0
    batch: int = 2
    heads: int = 16
    kv_heads: int = 0
    q_len: int = 8192
    kv_len: int = 0
    q_offset: int = 0
    dtype: str = "bfloat16"
    strided: bool = False
    growing: bool = False
    parameters: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        shape = f"B{self.batch} H{self.heads}/{self.kv_heads or self.heads} Q{self.q_len} KV{self.kv_len or self.q_len}"
        dims = f"D{self.dim}" + (f"/{self.value_dim}" if self.value_dim else "")
        extra = f" offset {self.q_offset}" if self.q_offset else ""
        ways = " strided" * self.strided + " growing" * self.growing
        return f"{self.variant} {shape} {dims}{extra}{ways} {self.dtype}"


@functools.cache
def kernels(variant: str) -> hopper.Kernels:
    program = pipeline.run(load(TEXTS.get(variant, variant)), stop_after="simplify")
    return hopper.Kernels(portable.Kernels(program.variant, derive_schedule(program.variant, padded=True)))


def bindings(case: Case, device: str) -> dict[str, Any]:
    """Parameters and captured tensors of a call, by name."""
    variant = kernels(case.variant).portable.variant
    chosen = dict(case.parameters)
    found: dict[str, Any] = {p.name: chosen.get(p.name, p.default) for p in variant.parameters}
    q_len, kv_len = case.q_len, case.kv_len or case.q_len
    shapes = {
        "slope": (case.heads,), "sinks": (case.heads,), "doc": (case.batch, kv_len), "bias": (case.heads, q_len),
        "table": (case.heads, 2 * int(found.get("reach") or 0) + 1),
    }  # fmt: skip
    for tensor in variant.tensors:
        shape = shapes[tensor.name]
        if tensor.name == "slope":
            value = 2.0 ** (-8.0 * torch.arange(1, case.heads + 1) / case.heads)
        elif tensor.name == "doc":
            value = (torch.arange(kv_len) * DOCUMENTS // kv_len).expand(shape).to(torch.int32).contiguous()
        else:
            value = torch.randn(shape)
        found[tensor.name] = value.to(device)
    return found


def call(case: Case, device: str) -> tuple[portable.Call, dict[str, Any]]:
    kv_len, kv_heads = case.kv_len or case.q_len, case.kv_heads or case.heads
    value_dim = case.value_dim or case.dim
    dtype = getattr(torch, case.dtype)

    def tensor(heads: int, length: int, dim: int) -> torch.Tensor:
        if case.strided:  # [B, S, H, D] in memory, with room between the rows
            return torch.randn(case.batch, length, heads, dim + 8, device=device, dtype=dtype)[..., :dim].transpose(
                1, 2
            )
        return torch.randn(case.batch, heads, length, dim, device=device, dtype=dtype)

    bound = bindings(case, device)
    variant = kernels(case.variant).portable.variant
    key = tensor(kv_heads, kv_len, case.dim)
    if case.growing:  # logits pass any maximum of early keys, so that every tile is done twice
        key *= torch.arange(1, kv_len + 1, device=device, dtype=dtype).view(-1, 1) / 16
    return portable.Call(
        tensor(case.heads, case.q_len, case.dim), key, tensor(kv_heads, kv_len, value_dim),
        tuple(bound[p.name] for p in variant.parameters), tuple(bound[t.name] for t in variant.tensors), (),
        1 / math.sqrt(case.dim), case.q_offset,
    ), bound  # fmt: skip


def default_config(case: Case) -> Config:
    return kernels(case.variant).candidates(call(case, "meta")[0])[0]


# ---------------------------------------------------------------- right


def checks() -> Iterator[Case]:
    small = {"batch": 2, "heads": 3}
    for dim in (128, 64, 256):
        for variant in ("noop", "causal"):
            for length in (64, 128, 200, 384, 1000):
                yield Case(variant, dim, q_len=length, **small)
    for variant in ("alibi", "alibi_full", "softcap", "softcap_causal", "softcap_alibi", "relative_causal", "t5_bias",
                    "sliding_window", "late", "sink_causal", "row_bias", "prefix_lm", "packed_causal"):  # fmt: skip
        window = (("window", 100),) if variant == "sliding_window" else ()
        for dim, length in ((128, 1), (128, 1000), (64, 777), (256, 520)):
            yield Case(variant, dim, q_len=length, parameters=window, **small)
    for variant in ("noop", "causal"):
        yield Case(variant, 128, heads=8, kv_heads=2, q_len=700)
        yield Case(variant, 128, q_len=100, kv_len=1000, q_offset=900, **small)
        yield Case(variant, 64, q_len=1000, kv_len=100, **small)
        yield Case(variant, 128, q_len=500, strided=True, **small)
        yield Case(variant, 128, dtype="float16", q_len=500, **small)
        yield Case(variant, 80, q_len=500, **small)
        yield Case(variant, 96, q_len=500, **small)
        yield Case(variant, 192, 128, q_len=500, **small)
        yield Case(variant, 128, 64, q_len=500, **small)
        yield Case(variant, 64, 256, q_len=500, **small)
        yield Case(variant, 128, batch=8, heads=16, q_len=1024)  # several tiles a program
        yield Case(variant, 64, batch=8, heads=24, q_len=1024)
        yield Case(variant, 256, batch=8, heads=16, q_len=1024)
        for dim in (64, 128, 192, 256):
            yield Case(variant, dim, q_len=1000, growing=True, **small)
    yield Case("causal", 128, batch=1, heads=2, q_len=4097)


def check(case: Case) -> dict[str, Any]:
    """Relative errors of the output against float64, of the kernel and of eager PyTorch in the same type."""
    bound_call, bound = call(case, "cuda")
    if reason := hopper.refusal(kernels(case.variant).portable, bound_call):
        return {"refused": reason}
    out, lse, _ = hopper.forward(kernels(case.variant), bound_call)
    torch.cuda.synchronize()
    arguments = (kernels(case.variant).portable.variant, bound_call.query, bound_call.key, bound_call.value)
    options = {"q_offset": case.q_offset, "bindings": bound}
    truth, truth_lse = attention(*arguments, **options)
    eager, _ = attention(*arguments, **options, dtype=bound_call.query.dtype)
    finite = truth_lse > -math.inf
    same = bool((lse.isneginf() == truth_lse.isneginf()).all())
    error, budget = relative(out, truth), relative(eager, truth)
    lse_error = (lse.double() - truth_lse)[finite].abs().max().item() if finite.any() else 0.0
    good = same and error <= max(1.1 * budget, 1e-3) and lse_error < 0.02
    again = hopper.forward(kernels(case.variant), bound_call)[0]
    equal = bool(torch.equal(out, again))
    return {"error": error, "eager": budget, "lse": lse_error, "repeats": equal, "ok": good and equal}


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    norm = truth.norm().item()
    error = (found.double() - truth).norm().item()
    return error / norm if norm else error


# ---------------------------------------------------------------- fast


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
        case "document":
            return q_len * q_len / DOCUMENTS
        case "noop" | "softcap" | "alibi_full":
            return q_len * q_len
        case _:
            return q_len * (q_len + 1) / 2


def operations(case: Case) -> float:
    return 2.0 * case.batch * case.heads * pairs(case) * (case.dim + (case.value_dim or case.dim))


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
    fields: dict[str, Any] = field(default_factory=dict)


def tasks(part: str, options: argparse.Namespace) -> list[Task]:
    wanted = options.only.split(",") if options.only else None

    def keep(case: Case) -> bool:
        return wanted is None or case.variant in wanted or f"{case.variant}:{case.dim}" in wanted

    if part == "check":
        return [Task(str(c), functools.partial(check, c), (c, None)) for c in checks() if keep(c)]
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
    parser.add_argument("parts", nargs="*", default=["check", "time", "configs"])
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
