"""Claims over summaries against brute force: never unsound, and tile counts beside the exhaustive ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attn_dsl.backend.tile_kinds import Axis, Kinds, tile_kinds
from attn_dsl.ir.evaluate import Environment
from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    K,
    Load,
    Node,
    Q,
    Score,
    Select,
    Size,
    Unary,
    UnaryOp,
)
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import InRange, Nondecreasing, Variant
from attn_dsl.ir.variant import Tensor as Declared
from attn_dsl.passes.summaries import derive_claims
from tests.passes.random_masks import PARAMETERS, RandomMask
from tests.passes.tiles import Grid

MASKS = 200
CHUNK = 25
EXTENT = 40
N = Size("N")
TENSORS = (
    Declared("ids", DType.INT32, (N,)),
    Declared("sorted", DType.INT32, (N,), (Nondecreasing(0),)),
    Declared("bounded", DType.INT32, (N,), (InRange(Const(0), Const(9)),)),
    Declared("table", DType.INT32, (N, N)),
    Declared("rising", DType.INT64, (N, N), (Nondecreasing(0), Nondecreasing(1))),
    Declared("seen", DType.BOOL, (N, N)),
    Declared("marked", DType.BOOL, (N,)),
    Declared("weight", DType.FLOAT32, (N,)),
)
KINDS = {tensor.name: tensor.dtype.type for tensor in TENSORS}


@dataclass
class RandomReads(RandomMask):
    """Masks that read tensors at positions, at quotients of positions, at what other tensors say, and at pairs."""

    def variant(self, kind: str = "") -> Variant:
        return Variant("random_reads", PARAMETERS, TENSORS, Score(), self.formula(3, True))

    def formula(self, depth: int, general: bool) -> Node:
        if (depth == 0 and self.rng.random() < 0.8) or self.rng.random() < 0.25:
            return self.read()
        return super().formula(depth, general)

    def read(self) -> Node:
        match self.rng.randrange(8):
            case 0:
                return Load("seen", (self.place(), self.place()), Type.BOOL)
            case 1:
                return Load("marked", (self.place(),), Type.BOOL)
            case 2:
                ends = [Load("weight", (self.place(),), Type.FLOAT), self.rng.choice([Const(0.25), self.weight()])]
                return Compare(self.rng.choice(list(CompareOp)), *ends)
            case 3 | 4:
                return Compare(self.rng.choice([CompareOp.EQ, CompareOp.NE]), self.number(), self.number())
            case _:
                other = self.rng.choice([self.number(), self.constant(), self.affine()])
                return Compare(self.rng.choice(list(CompareOp)), self.number(), other)

    def weight(self) -> Node:
        return Load("weight", (self.place(),), Type.FLOAT)

    def number(self) -> Node:
        name = self.rng.choice(["ids", "sorted", "bounded", "table", "rising", "sorted"])
        places = tuple(self.place() for _ in range(2 if name in ("table", "rising") else 1))
        found: Node = Load(name, places, Type.INT)
        match self.rng.randrange(6):
            case 0:
                return Binary(BinaryOp.MOD, found, self.divisor())
            case 1:
                return Binary(self.rng.choice([BinaryOp.MUL, BinaryOp.SUB, BinaryOp.MAX]), found, self.term(1))
            case 2:
                flag = Cast(Load("marked", (self.rng.choice([Q, K]),), Type.BOOL), Type.INT)
                return Select(self.comparison(self.affine()), found, Binary(BinaryOp.ADD, flag, self.constant()))
            case 3:
                return Unary(self.rng.choice([UnaryOp.NEG, UnaryOp.ABS, UnaryOp.SIGN]), found)
            case _:
                return found

    def place(self) -> Node:
        position = self.rng.choice([Q, K])
        match self.rng.randrange(8):
            case 0:
                return Binary(BinaryOp.FLOORDIV, position, self.divisor())
            case 1:
                return Load("bounded", (position,), Type.INT)
            case 2:
                return Binary(BinaryOp.MAX, Binary(BinaryOp.SUB, Q, K), Const(0))
            case 3:
                return Const(self.rng.randrange(4))
            case _:
                return position


def tensors(rng: random.Random) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def ints(*shape: int, high: int = 9) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    runs = rng.random() < 0.5
    ids = ints(EXTENT, high=3).repeat_interleave(5)[:EXTENT] if runs else ints(EXTENT)
    weight = torch.randn(EXTENT, generator=generator)
    weight[ints(2, high=EXTENT)] = float("nan")
    return {
        "ids": ids,
        "sorted": ints(EXTENT, high=5).sort().values,
        "bounded": ints(EXTENT),
        "table": ints(EXTENT, EXTENT),
        "rising": ints(EXTENT, EXTENT).cumsum(0).cumsum(1),
        "seen": ints(EXTENT, EXTENT, high=4) > 0,
        "marked": ints(EXTENT, high=4) > 0,
        "weight": weight,
    }


def draw(seed: int) -> Grid:
    rng = random.Random(seed)
    return Grid(
        RandomReads(rng).variant(),
        q_len=rng.randint(1, 20),
        kv_len=rng.randint(1, 20),
        block_m=rng.choice((1, 2, 4, 8)),
        block_n=rng.choice((1, 2, 4, 8)),
        q_offset=rng.choice((0, 0, 4, 11)),
        parameters={"a": rng.randint(-5, 15), "w": rng.randint(1, 9), "flag": rng.random() < 0.5},
        tensors=tensors(rng),
        sizes={"N": EXTENT},
    )


def kinds(grid: Grid) -> Kinds:
    claims = derive_claims(grid.variant)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    env = Environment(
        indices={"b": zero, "h": zero, "hk": zero},
        parameters=grid.parameters,
        sizes={"B": 1, "H": 1, "HK": 1, "Q": grid.q_len, "KV": grid.kv_len, "D": 1, **grid.sizes},
        tensors=grid.tensors,
        variables={"q_offset": torch.tensor(grid.q_offset)},
    )
    rows, columns = Axis(grid.q_offset, grid.q_len, grid.block_m), Axis(0, grid.kv_len, grid.block_n)
    return tile_kinds(claims, grid.variant.mask, env, rows, columns)


@pytest.mark.parametrize("first", range(0, MASKS, CHUNK))
def test_random_masks_over_random_tensors_are_classified_soundly(first: int) -> None:
    for seed in range(first, first + CHUNK):
        check(seed)


def check(seed: int) -> tuple[int, int]:
    """Reproduce one failure with `python -c "from tests.passes.test_summaries import check; check(SEED)"`."""
    grid = draw(seed)
    found, (empty, full) = kinds(grid), grid.exhaustive()
    visited, whole = found.visited[0, 0], found.full[0, 0]
    assert not (~visited & ~empty).any(), f"seed {seed}: a tile with a kept pair is not visited"
    assert not (whole & ~full).any(), f"seed {seed}: a tile without mask is not full"
    return int((visited == empty).sum() + (whole != full).sum()), empty.numel()
