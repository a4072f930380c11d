"""Small valid calls of every shipped variant: sizes, parameters and makers of the captured tensors.

Tests of the evaluator and of each backend draw from `cases()`; benchmarks use `tensors_for` with sizes of their own.
The shapes are odd on purpose: no length is a multiple of a tile, most cases have grouped heads, and value heads are
narrower than query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

Value = bool | int | float
Parameters = Mapping[str, Value]

SHIPPED = tuple(sorted(path.stem for path in (Path(__file__).parent.parent / "attn_dsl" / "variants").glob("*.attn")))


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call: `query [B, H, Q, D]`, `key [B, HK, KV, D]`, `value [B, HK, KV, DV]`, and where q starts."""

    B: int = 2
    H: int = 4
    HK: int = 2
    Q: int = 37
    KV: int = 37
    D: int = 8
    DV: int = 5
    q_offset: int = 0


@dataclass(frozen=True)
class Case:
    """One call of a shipped variant. `const` names the parameters to give to `compile`, the others go to the call."""

    name: str
    parameters: Parameters
    sizes: Sizes
    const: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        s = self.sizes
        return f"{self.name}-{s.Q}x{s.KV}+{s.q_offset}-h{s.H}/{s.HK}"

    @property
    def constants(self) -> dict[str, Value]:
        return {name: value for name, value in self.parameters.items() if name in self.const}

    @property
    def arguments(self) -> dict[str, Value]:
        """The run-time parameters."""
        return {name: value for name, value in self.parameters.items() if name not in self.const}

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """The captured tensors by name, on the CPU, in the declared dtypes."""
        return tensors_for(self.name, self.sizes, self.parameters, seed)

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value."""
        s, generator = self.sizes, Generator().manual_seed(seed + 1)
        shapes = (s.B, s.H, s.Q, s.D), (s.B, s.HK, s.KV, s.D), (s.B, s.HK, s.KV, s.DV)
        query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
        return query, key, value


def cases() -> list[Case]:
    """At least two calls of each shipped variant: a square one, and one with other lengths or an offset."""
    square, tail = Sizes(), Sizes(H=6, HK=2, Q=13, KV=53, q_offset=40)
    middle, cross = replace(tail, HK=6, q_offset=17), Sizes(B=1, H=3, HK=1, Q=41, KV=29)
    image, volume = replace(square, Q=63, KV=63), replace(square, B=1, Q=105, KV=105)
    twice = replace(square, Q=74, KV=74)
    small = {"block": 5, "reach": 1, "globals": 1, "random": 2}
    table: list[tuple[str, Parameters, tuple[Sizes, ...]]] = [
        ("noop", {}, (square, tail, cross)),
        ("causal", {}, (square, tail, middle, cross)),
        ("alibi", {}, (square, tail, cross)),
        ("sliding_window", {"window": 7}, (square, tail, cross)),
        ("sliding_window", {"window": 100}, (square,)),
        ("prefix_lm", {"prefix": 11}, (square, middle, cross)),
        ("softcap", {"cap": 1.5}, (square, tail)),
        ("document", {}, (square, middle)),
        ("packed_causal", {}, (square, tail)),
        ("t5_bias", {"reach": 5}, (square, tail, cross)),
        ("relative_bias", {}, (square, tail)),
        ("longformer", {"reach": 4, "globals": 3}, (square, middle, cross)),
        ("bigbird", small, (square, middle)),
        ("sparse_strided", {"stride": 6}, (square, tail)),
        ("sparse_fixed", {"stride": 9, "summary": 2}, (square, tail)),
        ("dilated_window", {"window": 17, "dilation": 3}, (square, tail)),
        ("hash_buckets", {}, (square, middle)),
        ("natten1d", {"r": 4}, (square, tail)),
        ("natten2d", {"width": 9, "height": 7, "r": 2}, (image, replace(image, Q=20, q_offset=30))),
        ("natten3d", {"width": 7, "height": 5, "depth": 3, "r": 1}, (volume, replace(volume, Q=31, q_offset=60))),
        ("shared_prefix", {"prefix": 9}, (square, tail)),
        ("block_diffusion", {"length": 37, "block": 5}, (twice, replace(twice, Q=29, q_offset=33))),
        ("tree", {}, (square, tail)),
        ("padded", {}, (square, cross)),
        ("gated_score", {}, (square, cross)),
        ("gemma2_local", {"window": 9, "cap": 2.0}, (square, tail)),
        ("gpt_oss", {"window": 6}, (square, tail, cross)),
    ]
    const = {"bigbird": frozenset({"random"})}
    return [Case(name, p, s, const.get(name, frozenset())) for name, p, sizes in table for s in sizes]


def tensors_for(name: str, sizes: Sizes, parameters: Parameters, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors that a call of the variant may capture; they keep the promises of the declaration."""
    maker = _MAKERS.get(name)
    return maker(sizes, parameters, Generator().manual_seed(seed)) if maker else {}


def _per_head(tensor: str) -> Callable[[Sizes, Parameters, Generator], dict[str, Tensor]]:
    return lambda s, p, g: {tensor: torch.randn(s.H, generator=g)}


def _slopes(s: Sizes, p: Parameters, g: Generator) -> dict[str, Tensor]:
    return {"slope": 2.0 ** (-8.0 * torch.arange(1, s.H + 1) / s.H)}


def _ascending(tensor: str, values: int = 4) -> Callable[[Sizes, Parameters, Generator], dict[str, Tensor]]:
    def make(s: Sizes, p: Parameters, g: Generator) -> dict[str, Tensor]:
        drawn = torch.randint(0, values, (s.B, s.KV), generator=g, dtype=torch.int32)
        return {tensor: drawn.sort(dim=-1).values}

    return make


def _clamped_table(s: Sizes, p: Parameters, g: Generator) -> dict[str, Tensor]:
    return {"table": torch.randn(s.H, 2 * int(p["reach"]) + 1, generator=g)}


def _distance_table(s: Sizes, p: Parameters, g: Generator) -> dict[str, Tensor]:
    return {"table": torch.randn(s.H, 2 * s.KV - 1, generator=g)}


def _random_blocks(s: Sizes, p: Parameters, g: Generator) -> dict[str, Tensor]:
    block, random = int(p["block"]), int(p["random"])
    rows, columns = -(-(s.q_offset + s.Q) // block), -(-s.KV // block)
    return {"table": torch.randint(0, columns, (s.H, rows, random), generator=g, dtype=torch.int32)}


def _buckets(s: Sizes, p: Parameters, g: Generator) -> dict[str, Tensor]:
    return {"bucket": torch.randint(0, 4, (s.B, s.H, s.KV), generator=g, dtype=torch.int32)}


def _tree(s: Sizes, p: Parameters, g: Generator) -> dict[str, Tensor]:
    """A chain of a third of the positions, then branches: a token's parent is on the path to the token before."""
    last = torch.full((s.B, s.KV), s.KV - 1, dtype=torch.int32)
    for b in range(s.B):
        path: list[int] = []
        for position in range(s.KV):
            keep = len(path)
            if position > s.KV // 3:
                keep = int(torch.randint(s.KV // 3, len(path) + 1, (), generator=g))
            last[b, path[keep:]] = position - 1
            path[keep:] = [position]
    return {"last": last}


def _lengths(s: Sizes, p: Parameters, g: Generator) -> dict[str, Tensor]:
    """One row is full; where there are more, another is empty."""
    length = torch.randint(0, s.KV + 1, (s.B,), generator=g, dtype=torch.int32)
    length[0], length[1:2] = s.KV, 0
    return {"length": length}


_MAKERS: dict[str, Callable[[Sizes, Parameters, Generator], dict[str, Tensor]]] = {
    "alibi": _slopes,
    "document": _ascending("doc"),
    "packed_causal": _ascending("doc"),
    "t5_bias": _clamped_table,
    "relative_bias": _distance_table,
    "bigbird": _random_blocks,
    "hash_buckets": _buckets,
    "shared_prefix": _ascending("sample"),
    "tree": _tree,
    "padded": _lengths,
    "gated_score": _per_head("gate"),
    "gpt_oss": _per_head("sinks"),
}
