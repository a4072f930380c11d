"""Decoding on one GPU: bytes of keys and values read a second, beside the copy of a large tensor and rivals.

    python benchmarks/decode.py                                        all cases: 32 heads on 8, D=128, bf16
    python benchmarks/decode.py --caches 8x16384 --tokens 1 --rivals flex,flash3 --json results.jsonl
    python benchmarks/decode.py --caches 8x16384 --sweep               layouts of the decode kernel, one by one

A cache is BATCHxLENGTH, the same memory for all variants: where tensors lie in it changes times by some percent. The
last query token sees the whole cache. Times are medians of the GPU alone, over rounds in which all implementations take
turns; its cache is cold. `share` is relative to the bytes a second that a copy reads and writes. `pages of N` is the
same cache in pages of N keys, which lie in an order of chance. One JSON object a line on standard output, or in --json.

`--windows` are caches under a window of 1024, in memory head by head ([B, HK, KV, D]) and token by token ([B, KV, HK,
D], `tokens first`); beside them a copy of what the window sees (`copy`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

import attn_dsl
from attn_dsl.backend.execute import Options, portable_call
from attn_dsl.backend.portable import launch_decode

HEADS, KV_HEADS, DIM = 32, 8, 128
CAP, WINDOW = 50.0, 1024
Run = Callable[[], Any]
compiled = functools.cache(attn_dsl.compile)


@dataclass
class Case:
    """Tensors of one cache, `key` and `value` [B, HK, KV, D] however they lie in memory."""

    variant: str
    batch: int
    length: int
    tokens: int
    tokens_first: bool = False

    def __post_init__(self) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

        self.query = normal(self.batch, HEADS, self.tokens, DIM)
        shape = (self.batch, KV_HEADS, self.length, DIM)
        if self.tokens_first:
            self.key, self.value = (normal(self.batch, self.length, KV_HEADS, DIM).transpose(1, 2) for _ in range(2))
        else:
            self.key, self.value = (normal(*shape) for _ in range(2))
        self.slope = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, device="cuda") / HEADS)

    def of(self, variant: str) -> Case:
        """The same tensors for another variant."""
        found = copy.copy(self)
        found.variant = variant
        return found

    @property
    def bindings(self) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {
            "alibi": {"slope": self.slope}, "softcap": {"cap": CAP}, "sliding_window": {"window": WINDOW},
        }  # fmt: skip
        return found.get(self.variant, {})

    @property
    def q_offset(self) -> int:
        return self.length - self.tokens

    @property
    def bytes(self) -> int:
        return 2 * self.key.numel() * self.key.element_size()


def ours(case: Case) -> Run:
    attention = compiled(case.variant)
    arguments = (case.query, case.key, case.value)
    return functools.partial(attention, *arguments, q_offset=case.q_offset, **case.bindings)


def paged(case: Case, page: int) -> Run | None:
    """The cache in pages of an order of chance; of one variant, which tells what pages cost."""
    if case.variant != "noop" or case.length % page:
        return None
    count = case.batch * case.length // page
    order = torch.randperm(count, device="cuda")
    pools = []
    for x in (case.key, case.value):
        pool = torch.empty(count, KV_HEADS, page, DIM, dtype=x.dtype, device="cuda")
        pool[order] = x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
        pools.append(pool)
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device="cuda")
    table = order.view(case.batch, -1).int()
    options = {"page_table": table, "kv_len": lengths, "q_offset": lengths.long() - case.tokens}
    return functools.partial(compiled("noop"), case.query, *pools, **options)


def eight_bits(case: Case) -> Run | None:
    if case.variant != "noop":
        return None
    key, value = (x.to(torch.float8_e4m3fn) for x in (case.key, case.value))
    scale = torch.ones(KV_HEADS, device="cuda")
    options = {"q_offset": case.q_offset, "key_scale": scale, "value_scale": scale}
    return functools.partial(compiled("noop"), case.query, key, value, **options)


def window_copy(case: Case) -> Run | None:
    """A copy of the keys and values that the window sees."""
    if case.variant != "sliding_window":
        return None
    seen = [x[:, :, -WINDOW:] for x in (case.key, case.value)]
    seen = [x.transpose(1, 2) if case.tokens_first else x for x in seen]
    targets = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in seen]
    return lambda: [target.copy_(x) for target, x in zip(targets, seen, strict=True)]


def flex(case: Case) -> Run | None:
    from torch.nn.attention.flex_attention import flex_attention

    def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + case.slope[h] * (k - q - case.q_offset)

    def softcap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return CAP * torch.tanh(score / CAP)

    scores = {"noop": None, "alibi": alibi, "softcap": softcap}
    if case.variant not in scores or case.tokens > 1:
        return None
    arguments = (case.query, case.key, case.value)
    return functools.partial(
        torch.compile(flex_attention, dynamic=False), *arguments, score_mod=scores[case.variant], enable_gqa=True
    )


def flash3(case: Case) -> Run | None:
    name = next((n for n in ("flash_attn_interface", "fa3_fwd_interface") if importlib.util.find_spec(n)), None)
    if name is None or case.variant == "alibi":
        return None
    attend = importlib.import_module(name).flash_attn_with_kvcache
    query, key, value = (x.transpose(1, 2) for x in (case.query, case.key, case.value))
    if case.variant != "sliding_window":
        key, value = key.contiguous(), value.contiguous()
    cap = CAP if case.variant == "softcap" else 0.0
    window = (WINDOW - 1, 0) if case.variant == "sliding_window" else (-1, -1)
    causal = case.variant == "sliding_window"
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device="cuda")
    options = {"cache_seqlens": lengths, "causal": causal, "window_size": window, "softcap": cap}
    return functools.partial(attend, query, key, value, **options)


RIVALS: dict[str, Callable[[Case], Run | None]] = {
    "attn_dsl": ours, "flash3": flash3, "flex": flex, "8 bits": eight_bits, "copy": window_copy,
}  # fmt: skip
RIVALS |= {f"pages of {page}": functools.partial(paged, page=page) for page in (16, 32, 64, 128, 256)}


ASLEEP = 1_000_000
"""Cycles that the GPU sleeps before each run: the host is ahead of it then, and what it does is not measured."""


def bench(run: Run, rep: int) -> float:
    """Median milliseconds of some runs that take `rep` together, with a cold cache."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    estimate = triton.testing.do_bench(run, warmup=2, rep=4, return_mode="median")
    pairs = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for _ in range(min(max(10, round(rep / estimate)), 100))
    ]
    for begin, end in pairs:
        torch.cuda._sleep(ASLEEP)
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def copied() -> Run:
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return functools.partial(target.copy_, source)


def measure(case: Case, rivals: list[str], rounds: int, rep: int) -> Iterator[dict[str, Any]]:
    """The implementations that take a case, each beside ours; and the copy, bytes a second."""
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    truth = None
    for name in ["attn_dsl", *rivals]:
        try:
            run = RIVALS[name](case)
            if run is None:
                continue
            found = run()
            runs[name] = run
            if name == "copy":
                continue
            out = (found[0] if isinstance(found, tuple) else found).float()
            out = out if out.shape == case.query.shape else out.transpose(1, 2)
            truth = out if truth is None else truth
            errors[name] = (out - truth).abs().max().item()
        except Exception as failure:
            yield {"name": name, "failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    whole = copied()
    times: dict[str, list[float]] = {name: [] for name in (*runs, "all")}
    for _ in range(rounds):
        for name, run in {**runs, "all": whole}.items():
            times[name].append(bench(run, rep))
    best = 2 * 2**31 / statistics.median(times.pop("all"))
    for name, found_times in times.items():
        milliseconds = statistics.median(found_times)
        rate = case.bytes / milliseconds / (2 if name == "8 bits" else 1)
        result = {"name": name, "ms": milliseconds, "difference": errors.get(name), "copy_GBps": best / 1e6}
        if case.variant != "sliding_window":
            result |= {"GBps": rate / 1e6, "share": rate / best}
        yield result


SWEEP = [(64, 4, 3), (64, 4, 4), (64, 4, 5), (128, 4, 3), (128, 4, 4), (128, 8, 3), (32, 4, 4), (32, 2, 5), (64, 2, 4)]
"""Keys of a tile, warps, stages."""


def sweep(case: Case, rep: int) -> Iterator[dict[str, Any]]:
    """Layouts of the decode kernel."""
    attention = compiled(case.variant)
    program = attention._executable
    bound = attention._binder.bind(case.query, case.key, case.value, None, case.q_offset, case.bindings)
    call = portable_call(program, bound, Options("decode"))
    default = launch_decode.layout_of(program.kernels, call)
    for (keys, warps, stages), factor in itertools.product(SWEEP, (1, 2)):
        tried = dataclasses.replace(default, keys=keys, warps=warps, stages=stages, splits=default.splits * factor)
        record = {"name": "attn_dsl", "layout": str(tried)}
        try:
            replay = launch_decode.Replay.of(program.kernels, call, tried)
            run = functools.partial(replay.run, case.query, case.key, case.value, call.tensors, case.q_offset)
            run()
            milliseconds = bench(run, rep)
            yield {**record, "ms": milliseconds, "GBps": case.bytes / milliseconds / 1e6}
        except Exception as failure:
            yield {**record, "failed": f"{type(failure).__name__}: {str(failure)[:200]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="noop,alibi,softcap")
    parser.add_argument("--caches", default="8x16384,1x131072,64x4096,128x8192")
    parser.add_argument("--windows", default="1x2048,1x131072,8x2048,8x131072", help="caches under a window of 1024")
    parser.add_argument("--pages", default="16,64,128", help="keys of a page, where one token decodes without a score")
    parser.add_argument("--tokens", default="1,8", help="query tokens of a sequence")
    parser.add_argument("--rivals", default="flash3,flex")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=40, help="milliseconds that each measurement repeats for")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further case starts")
    parser.add_argument("--sweep", action="store_true", help="layouts of the decode kernel")
    parser.add_argument("--json", type=argparse.FileType("w"), default=sys.stdout)
    chosen = parser.parse_args()
    stop = time.perf_counter() + chosen.limit
    facts = {"date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
             "triton": triton.__version__}  # fmt: skip
    print(json.dumps(facts), file=chosen.json, flush=True)
    tokens = [int(number) for number in chosen.tokens.split(",")]
    plans = itertools.product(tokens, [c for c in chosen.caches.split(",") if c], chosen.variants.split(","))
    windows = itertools.product(
        tokens[:1], [c for c in chosen.windows.split(",") if c], ["sliding_window", "sliding_window, tokens first"]
    )
    own = ["8 bits", "copy", *(f"pages of {page}" for page in chosen.pages.split(",") if page)]
    case = None
    for number, cache, variant in (*plans, *windows):
        if time.perf_counter() > stop:
            break
        torch.compiler.reset()
        batch, length = map(int, cache.split("x"))
        name, _, first = variant.partition(", ")
        lies = (batch, length, number, bool(first))
        if case is None or (case.batch, case.length, case.tokens, case.tokens_first) != lies:
            case = None
            torch.cuda.empty_cache()
            case = Case(name, *lies)
        case = case.of(name)
        rivals = [name for name in chosen.rivals.split(",") if name] + (own if number == 1 else [])
        results = sweep(case, chosen.rep) if chosen.sweep else measure(case, rivals, chosen.rounds, chosen.rep)
        for result in results:
            record = {"variant": variant, "cache": cache, "tokens": number, **result}
            print(json.dumps(record), file=chosen.json, flush=True)


if __name__ == "__main__":
    main()
