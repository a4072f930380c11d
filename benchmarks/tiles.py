"""How tile shapes divide a call's work, without a GPU: tiles visited, pairs computed, and when the last tile is done.

    python benchmarks/tiles.py                                           the masks of benchmarks/sparse.py
    python benchmarks/tiles.py --rows documents --passes backward
    python benchmarks/tiles.py --variant sliding_window --set window=64 --shape 1x8x4096x64
    python benchmarks/tiles.py --time --rows documents,bigbird           on a GPU: each choice against what calls take

Tiles are counted by the compiler's own schedule, in the order of positions that it takes: ranges in closed form, claims
about what tensors hold. Tensors have the numbers that benchmarks/sparse.py draws on a GPU. A line for each tile shape,
rows x keys, of the Hopper kernels and others. Numbers of tiles are of one head on average:

masked, full   tiles visited
over useful    pairs of the visited tiles over those that the mask keeps
longest        the tiles that the longest tile visits, over the mean
time           the model (`attn_dsl.backend.work`): all work spread evenly over --machine multiprocessors, at --clock;
               then what comes to it since tiles are whole, in the order in which kernels start them, with other
               sections (so many heads side by side), and with the longest first

With --time the kernels run with each tile shape and each section that may be forced, all of a mask in turns: one JSON
object a choice, with its milliseconds and their share of what calls take. Strips of a grid are left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from sparse import ROWS, Row
from torch import Tensor

import attn_dsl
from attn_dsl.backend import order, work
from attn_dsl.backend.execute import Options, Program, portable_call
from attn_dsl.backend.hopper import configs, launch, launch_backward
from attn_dsl.backend.hopper.configs import Config
from attn_dsl.backend.hopper.launch import padded
from attn_dsl.backend.portable.launch import Call as PortableCall
from attn_dsl.backend.tile_kinds import Axis
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.passes.order import number
from attn_dsl.passes.order_grid import KEY_COLUMNS, QUERY_COLUMNS, Strips

MORE = {
    "causal": Row("causal", lambda t: lambda b, h, q, k: q >= k),
    "sliding_window": Row("sliding_window", lambda t: lambda b, h, q, k: (q >= k) & (q - k < 1024), {"window": 1024}),
    "band": Row("natten1d", lambda t: lambda b, h, q, k: (q - k).abs() <= 64, {"r": 64}),
}
"""Masks beside those of benchmarks/sparse.py; the bands of the last shift inside at the ends."""


@dataclass(frozen=True)
class Case:
    """A call in the order of positions that its kernels take, and what stands for it: sizes with batch entries and
    heads that differ, parameters. boxes: columns of a box of queries and of one of keys, in strips of a grid."""

    program: Program
    call: PortableCall
    sizes: dict[str, int]
    parameters: dict[str, Any]
    tensors: dict[str, Tensor]
    boxes: tuple[int, int] | None = None

    @property
    def env(self) -> Environment:
        depends = self.program.variant.mask.depends
        batches = self.sizes["B"] if "b" in depends else 1
        heads = self.sizes["H"] if depends & {"h", "hk"} else 1
        h = torch.arange(heads).view(1, -1, 1, 1)
        indices = {
            "b": torch.arange(batches).view(-1, 1, 1, 1),
            "h": h,
            "hk": h // (self.sizes["H"] // self.sizes["HK"]),
        }
        offset = {"q_offset": torch.tensor(0)}
        return Environment(indices, offset, self.parameters, self.sizes, self.tensors)

    def visits(self, tile: tuple[int, int], *, transposed: bool) -> work.Visits:
        """Of the Hopper kernels, which ask of a tile in the backward pass whether it is full."""
        rows, columns = Axis(0, self.sizes["Q"], tile[0]), Axis(0, self.sizes["KV"], tile[1])
        program = self.program
        if program.kernels.lists is not None:
            claims = program.kernels.lists.claims
            return work.in_lists(claims, program.variant.mask, self.env, rows, columns, transposed=transposed)
        kernels = program.hopper_backward if transposed else program.hopper
        ranges = kernels.schedule.q if transposed else kernels.schedule.kv
        return work.in_ranges(ranges, self.env, rows, columns, transposed=transposed)

    def spread(self, x: Tensor) -> Tensor:
        """What is known of those that differ, for all batch entries and heads; heads of a strip stand together."""
        batch, heads = self.call.sizes[:2]
        return x.repeat_interleave(heads // x.shape[1], 1).expand(batch, -1, -1)

    def kept(self) -> float:
        """Pairs that the mask keeps, a head on average."""
        env, mask = self.env, self.program.variant.mask
        k, total = torch.arange(self.sizes["KV"]), 0
        batches, heads = env.indices["b"].shape[0], env.indices["h"].shape[1]
        for b in range(batches):
            for h in range(heads):
                at = {"b": torch.tensor(b), "h": torch.tensor(h), "hk": env.indices["hk"].flatten()[h]}
                for first in range(0, self.sizes["Q"], 512):
                    q = torch.arange(first, min(first + 512, self.sizes["Q"]))
                    bound = replace(env, indices={**at, "q": q[:, None], "k": k})
                    total += int(evaluate(mask, bound, torch.tensor(False)).expand(len(q), len(k)).sum())
        return total / (batches * heads)


def case_of(row: Row, batch: int, heads: int, length: int, dim: int, backward: bool, device: str | None = None) -> Case:
    """In the order that calls take; a neighborhood in the strips that visit the fewest pairs. On a device, or without
    data but that of the mask."""
    attention = attn_dsl.compile(row.text, **row.constants)
    program, options = attention._executable, Options("gpu")
    made = row.tensors(batch, heads, length)
    device = device or ("cpu" if made else "meta")
    tensors = {name: x.to(device) for name, x in made.items()}
    shape = batch, heads, length, dim
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(3))
    call = attention._binder.bind(query, key, value, None, 0, {**row.parameters, **tensors})
    grids = [x.exchanged() if backward else x for x in program.orders if isinstance(x, Strips)]
    for strips in grids:
        if strips is not None:
            return min(_strips(strips, program, call, options), key=lambda one: one[0])[1]
    found = order.ordered(program, call, options)
    bound = portable_call(program, call, options) if found is None else found.bound
    if found is not None:
        program, call = found.program, found.call
        if backward:
            bound = portable_call(program, found.in_order(call), options)
    return Case(program, bound, dict(call.sizes), dict(call.parameters), dict(call.tensors))


def _strips(strips: Strips, program: Program, call: Any, options: Options) -> Iterator[tuple[float, Case]]:
    """(pairs visited, the call) for each row before the first that boxes may begin with."""
    width = number(strips.width, call.parameters)
    assert width is not None
    columns = next(n for n in KEY_COLUMNS if strips.starts(width, n, call.parameters) is not None)
    tile = (order.QUERIES, order.BLOCK[1]) if strips.of_keys else order.BLOCK
    for lead in order.LEADS[: tile[0 if strips.of_keys else 1] // columns]:
        laid = order.in_strips(strips, program, call, options, columns, lead)
        count = -(-width // QUERY_COLUMNS)
        sizes = {**laid.call.sizes, "B": 1, "H": count, "HK": count}
        known = {**laid.call.parameters, strips.name("H"): 1}
        if strips.of_keys:
            known[strips.name("HK")] = 1
        bound, boxes = portable_call(laid.program, laid.call, options), (QUERY_COLUMNS, columns)
        case = Case(laid.program, bound, sizes, known, {}, boxes[::-1] if strips.of_keys else boxes)
        yield float(case.visits(tile, transposed=strips.of_keys).total.sum()), case


# ---------------------------------------------------------------- tables


FORWARD = ((128, 128), (128, 64), (192, 64), (192, 128), (64, 128), (64, 64), (128, 256), (256, 128))
BACKWARD = ((64, 128), (128, 128), (64, 64), (128, 64), (32, 128))
"""Queries x keys."""


def started(case: Case, tile: tuple[int, int], machine: int, backward: bool, section: int | None = None) -> list[int]:
    """Places in [pairs, tiles] in the order in which kernels start them; `section` overrides how many pairs run side by
    side."""
    call, program, pairs = case.call, case.program, case.call.sizes[0] * case.call.sizes[1]
    tiles = -(-call.sizes[4] // tile[1]) if backward else -(-call.sizes[3] // tile[0])
    if section is None and backward:
        section = program.hopper_backward.section(pairs, tiles, machine)
    elif section is None:
        section = program.hopper.section(call)
    lead = 0
    if not (backward and case.boxes):
        lead = program.kernels.lead(call, "k" if backward else "q", tile[1 if backward else 0])
    return list(work.in_sections(tiles, pairs, min(section, pairs), lead, last_first=not backward))


def lines(name: str, case: Case, dim: int, machine: int, clock: float, backward: bool) -> Iterator[str]:
    kept = case.kept()
    rates = (work.BACKWARD if backward else work.FORWARD).get(padded(dim), {})
    for tile in BACKWARD if backward else FORWARD:
        if case.boxes and (tile[0] % case.boxes[0] or tile[1] % case.boxes[1]):
            continue
        visits = case.visits(tile, transposed=backward)
        count = visits.masked.shape[0] * visits.masked.shape[1]
        masked, full = float(visits.masked.sum()) / count, float(visits.full.sum()) / count
        over = (masked + full) * tile[0] * tile[1] / kept
        longest = float(visits.total.max()) / float(visits.total.double().mean())
        cells = [name, "backward" if backward else "forward", f"{tile[0]} x {tile[1]}", f"{masked:.1f}", f"{full:.1f}",
                 f"{over:.3f}", f"{longest:.1f}"]  # fmt: skip
        if tile in rates:
            times = case.spread(rates[tile].times(visits)).flatten()
            even = float(times.sum()) / machine
            orders = [started(case, tile, machine, backward, section) for section in (None, *SECTIONS)]
            spans = [work.makespan(times[torch.tensor(places)].tolist(), machine) for places in orders]
            spans.append(work.longest_first(times.tolist(), machine))
            cells += [f"{even / clock / 1e3:.0f}", *(f"+{100 * (span / even - 1):.1f}%" for span in spans)]
        else:
            cells += ["-"] * (3 + len(SECTIONS))
        yield f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------- on a GPU


def configs_to_try(dim: int) -> dict[str, Config]:
    """Forward configurations beside those that a call would take, by what tells them apart."""
    frozen, plain = configs.FROZEN[dim], configs.TABLE[dim][0]
    found = {"frozen": frozen, "plain": plain, "plain 64": replace(plain, keys=64, stages=4)}
    found["plain 64, rings of 2"] = replace(plain, keys=64)
    if dim == 128:
        three = replace(frozen, groups=3, keys=64, stages=3, registers=160)
        found |= {"frozen 64": replace(frozen, keys=64, stages=4), "frozen 192 x 64": three}
        found["plain 192 x 64"] = replace(three, frozen=False)
    if dim == 64:
        found["frozen 128 x 128"] = replace(frozen, groups=2, registers=240)
    return found


def choices(case: Case, backward: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """What may be forced of a call, by its name; the first is what calls take."""
    call, program = case.call, case.program
    dims = (padded(call.query.shape[3]), padded(call.value.shape[3]))
    pairs = call.sizes[0] * call.sizes[2]
    sections = [n for n in (1, 2, 4, 5, 8, 16, 32) if n <= pairs]
    out, _, shifted = launch.forward(program.hopper, call)
    if not backward:
        yield "as calls", lambda: launch.forward(program.hopper, call)
        group = call.sizes[1] // call.sizes[2]
        for n in sections:
            yield f"section {n}", functools.partial(launch.forward, program.hopper, call, section=n * group)
        for name, config in configs_to_try(max(dims)).items():
            if program.hopper.may_freeze(call) or not config.frozen:
                yield name, functools.partial(launch.forward, program.hopper, call, config=config)
        return
    grad = torch.randn_like(out)
    given = call, out, shifted, grad, None
    taken = program.hopper_backward.choice(call).config
    assert taken is not None
    yield "as calls", functools.partial(launch_backward.backward, program.hopper_backward, *given, taken)
    for n in sections:
        kernels = Sectioned(program.kernels)
        kernels.heads = n
        yield f"section {n}", functools.partial(launch_backward.backward, kernels, *given, taken)
    for other in program.hopper_backward.candidates(call):
        yield str(other), functools.partial(launch_backward.backward, program.hopper_backward, *given, other)
    ordered = program.hopper_backward.choice(call, True).config
    if ordered is not None:
        arguments = program.hopper_backward, *given, ordered
        yield "deterministic", functools.partial(launch_backward.backward, *arguments, ordered=True)


class Sectioned(launch_backward.Kernels):
    """With so many heads side by side."""

    heads = 1

    def section(self, pairs: int, tiles: int, machine: int, ordered: bool = False) -> int:
        return min(self.heads, pairs)


def timed(case: Case, backward: bool, rounds: int, rep: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of each choice, medians of rounds; what does not run says why."""
    if case.boxes:
        return
    runs: dict[str, Callable[[], object]] = {}
    for name, run in choices(case, backward):
        try:
            run()
            runs[name] = run
        except Exception as failure:
            yield {"choice": name, "failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(triton.testing.do_bench(run, warmup=3, rep=rep, return_mode="median"))
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, ms in medians.items():
        yield {"choice": name, "ms": round(ms, 4), "of what calls take": round(ms / medians["as calls"], 3)}


# ---------------------------------------------------------------- command line


SECTIONS = (1, 4, 16, 64)
HEAD = (
    "| mask | pass | rows x keys | masked | full | over useful | longest | time, us | as started | "
    + " | ".join(f"sections of {n}" for n in SECTIONS) + " | longest first |\n" + "|---" * (10 + len(SECTIONS)) + "|"
)  # fmt: skip


def parsed(text: str) -> tuple[str, Any]:
    name, value = text.split("=")
    return name, float(value) if "." in value else int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join((*ROWS, *MORE)))
    parser.add_argument("--variant", help="a shipped variant or a file, whose mask reads no tensors, instead of rows")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the variant")
    parser.add_argument("--shape", default="2x16x8192x128", help="BxHxSxD")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--machine", type=int, default=132, help="multiprocessors")
    parser.add_argument("--clock", type=float, default=1.755, help="GHz")
    parser.add_argument("--time", action="store_true", help="measure on a GPU what may be forced")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=15, help="milliseconds of a measurement")
    options = parser.parse_args()
    batch, heads, length, dim = map(int, options.shape.split("x"))
    rows = {**ROWS, **MORE}
    chosen = {name: rows[name] for name in options.rows.split(",")}
    if options.variant:
        chosen = {options.variant: Row(options.variant, lambda t: NotImplemented, dict(map(parsed, options.set)))}
    if not options.time:
        print(HEAD, flush=True)
    for name, row in chosen.items():
        for which in options.passes.split(","):
            shape = batch, heads, row.length or length, dim
            case = case_of(row, *shape, which == "backward", "cuda" if options.time else None)
            if options.time:
                for found in timed(case, which == "backward", options.rounds, options.rep):
                    print(json.dumps({"row": name, "pass": which, **found}), flush=True)
                continue
            for line in lines(name, case, dim, options.machine, options.clock, which == "backward"):
                print(line, flush=True)


if __name__ == "__main__":
    main()
