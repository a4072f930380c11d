"""How tile shapes divide a call's work, without a GPU: tiles visited, pairs computed, and when the last tile is done.

    python benchmarks/tiles.py                                           the masks of benchmarks/sparse.py
    python benchmarks/tiles.py --rows documents --passes backward
    python benchmarks/tiles.py --variant sliding_window --set window=64 --shape 1x8x4096x64

Tiles are counted by the compiler's own schedule, in the order of positions that it takes: ranges in closed form, claims
about what tensors hold. Tensors have the numbers that benchmarks/sparse.py draws on a GPU. A line for each tile shape,
rows x keys, of the Hopper kernels and others. Numbers of tiles are of one head on average:

masked, full   tiles visited
over useful    pairs of the visited tiles over those that the mask keeps
longest        the tiles that the longest tile visits, over the mean
time           the model (`attn_dsl.backend.work`): all work spread evenly over --machine multiprocessors, at --clock;
               then what comes to it since tiles are whole, in the order in which kernels start them, with other
               sections (so many heads side by side), and with the longest first
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attn_dsl
from attn_dsl.backend import order, work
from attn_dsl.backend.execute import Options, Program, portable_call
from attn_dsl.backend.hopper.launch import padded
from attn_dsl.backend.portable.launch import Call as PortableCall
from attn_dsl.backend.tile_kinds import Axis
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.passes.order import number
from attn_dsl.passes.order_grid import KEY_COLUMNS, QUERY_COLUMNS, Strips

WORD = 2**32


def drawn(seed: int, count: int) -> Tensor:
    """The numbers below 2 ** 32 that torch draws on a GPU for `count` elements, one a thread: Philox 4 x 32, 10 rounds
    (Salmon et al. 2011), of which each thread has a stream of its own."""
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


@dataclass(frozen=True)
class Row:
    """A mask, and the numbers that benchmarks/sparse.py draws for it where they are one a thread of the GPU."""

    text: str
    parameters: dict[str, Any]
    constants: dict[str, Any]
    tensors: Callable[[int, int, int], dict[str, Tensor]] = lambda batch, heads, length: {}
    length: int | None = None


ROWS = {
    "documents": Row("packed_causal", {}, {}, documents),
    "window_global": Row("longformer", {"reach": 256, "globals": 64}, {}),
    "bigbird": Row("bigbird", {"block": 64, "reach": 1, "globals": 2}, {"random": 3}, random_blocks),
    "hash_buckets": Row("hash_buckets", {}, {}, buckets),
    "dilated": Row("dilated_window", {"window": 4096, "dilation": 4}, {}),
    "natten2d_90": Row("natten2d", {"width": 90, "height": 90, "r": 6}, {}, length=8100),
    "natten2d_128": Row("natten2d", {"width": 128, "height": 128, "r": 6}, {}, length=16384),
    "causal": Row("causal", {}, {}),
    "sliding_window": Row("sliding_window", {"window": 1024}, {}),
}


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


def case_of(row: Row, batch: int, heads: int, length: int, dim: int, backward: bool) -> Case:
    """In the order that calls take; a neighborhood in the strips that visit the fewest pairs."""
    attention = attn_dsl.compile(row.text, **row.constants)
    program, options = attention._executable, Options("gpu")
    tensors = row.tensors(batch, heads, length)
    device = "cpu" if tensors else "meta"
    like = torch.empty(batch, heads, length, dim, dtype=torch.bfloat16, device=device)
    call = attention._binder.bind(like, like, like, None, 0, {**row.parameters, **tensors})
    grids = [x.exchanged() if backward else x for x in program.orders if isinstance(x, Strips)]
    for strips in grids:
        if strips is not None:
            return min(_strips(strips, program, call, options), key=lambda one: one[0])[1]
    found = order.ordered(program, call, options)
    if found is not None:
        program, call = found.program, found.call
    bound = portable_call(program, call, options)
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
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--variant", help="a shipped variant or a file, whose mask reads no tensors, instead of rows")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the variant")
    parser.add_argument("--shape", default="2x16x8192x128", help="BxHxSxD")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--machine", type=int, default=132, help="multiprocessors")
    parser.add_argument("--clock", type=float, default=1.755, help="GHz")
    options = parser.parse_args()
    batch, heads, length, dim = map(int, options.shape.split("x"))
    chosen = {name: ROWS[name] for name in options.rows.split(",")}
    if options.variant:
        chosen = {options.variant: Row(options.variant, dict(map(parsed, options.set)), {})}
    print(HEAD, flush=True)
    for name, row in chosen.items():
        for which in options.passes.split(","):
            case = case_of(row, batch, heads, row.length or length, dim, which == "backward")
            for line in lines(name, case, dim, options.machine, options.clock, which == "backward"):
                print(line, flush=True)


if __name__ == "__main__":
    main()
