"""Exhaustive classification of tiles, and what a proof and a schedule say of them, as `[q tiles, kv tiles]`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import FALSE, Node
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.prove import Proof
from attn_dsl.passes.schedule import Schedule, TileRanges


@dataclass
class Grid:
    """The tiles of one call: lengths, tile shape, offset of the first query, bindings of one batch entry and head."""

    variant: Variant
    q_len: int
    kv_len: int
    block_m: int
    block_n: int
    q_offset: int = 0
    parameters: dict[str, int | float | bool] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    batch: int = 0
    head: int = 0

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.block_m)

    @property
    def columns(self) -> int:
        return -(-self.kv_len // self.block_n)

    def value(self, node: Node, **variables: Tensor) -> Tensor:
        """A node over tile positions (or over `q`, `k`), broadcast to the shape of the variables."""
        indices = {name: variables.pop(name) for name in ("q", "k") if name in variables}
        batch, head = torch.tensor(self.batch), torch.tensor(self.head)
        shape = torch.broadcast_shapes(*(v.shape for v in (*indices.values(), *variables.values())))
        env = Environment(
            indices={"b": batch, "h": head, "hk": head, **indices},
            variables={"q_offset": torch.tensor(self.q_offset), **variables},
            parameters=self.parameters,
            sizes={"B": 1, "H": 1, "HK": 1, "Q": self.q_len, "KV": self.kv_len, "D": 1, **self.sizes},
            tensors=self.tensors,
        )
        return evaluate(node, env).expand(shape)

    def corners(self, padded: bool = False) -> dict[str, Tensor]:
        q0 = self.q_offset + torch.arange(self.rows)[:, None] * self.block_m
        k0 = torch.arange(self.columns)[None, :] * self.block_n
        q1, k1 = q0 + self.block_m - 1, k0 + self.block_n - 1
        if not padded:
            q1, k1 = q1.clamp(max=self.q_offset + self.q_len - 1), k1.clamp(max=self.kv_len - 1)
        return {"q0": q0, "q1": q1, "k0": k0, "k1": k1}

    def dense(self) -> Tensor:
        """The mask, bool [Q, KV]."""
        q = self.q_offset + torch.arange(self.q_len)[:, None]
        return self.value(self.variant.mask, q=q, k=torch.arange(self.kv_len)[None, :])

    def exhaustive(self) -> tuple[Tensor, Tensor]:
        """Which tiles are empty, and which are full, by looking at every pair."""
        seen = torch.zeros(self.rows * self.block_m, self.columns * self.block_n, dtype=torch.int64)
        there = torch.zeros_like(seen)
        seen[: self.q_len, : self.kv_len] = self.dense()
        there[: self.q_len, : self.kv_len] = 1
        kept, pairs = (x.view(self.rows, self.block_m, self.columns, self.block_n).sum((1, 3)) for x in (seen, there))
        return kept == 0, kept == pairs

    def claimed(self, proof: Proof) -> tuple[Tensor, Tensor]:
        """Which tiles are proved EMPTY, and which FULL."""
        corners = self.corners()
        return self.value(proof.empty, **corners), self.value(proof.full, **corners)

    def scheduled(self, schedule: Schedule, axis: str, padded: bool = False) -> tuple[Tensor, Tensor]:
        """How often each tile is visited, and whether with the mask, by the `kv` or the `q` ranges."""
        ranges: TileRanges = getattr(schedule, axis)
        corners = self.corners(padded)
        mine = {"kv": ("q0", "q1"), "q": ("k0", "k1")}[axis]
        bounds = {name: corners[name] for name in mine}
        bounds["block"] = torch.tensor(self.block_n if axis == "kv" else self.block_m)
        tile = torch.arange(self.columns)[None, :] if axis == "kv" else torch.arange(self.rows)[:, None]
        visits = torch.zeros(self.rows, self.columns, dtype=torch.int64)
        masked = torch.zeros(self.rows, self.columns, dtype=torch.bool)
        for segment in ranges.segments:
            begin, end = self.value(segment.begin, **bounds), self.value(segment.end, **bounds)
            inside = (begin <= tile) & (tile < end)
            visits += inside
            masked |= inside & segment.masked
            # A range never leaves the axis: what lies outside would be read out of bounds.
            nonempty = begin < end
            limit = self.columns if axis == "kv" else self.rows
            assert bool((begin[nonempty] >= 0).all()) and bool((end[nonempty] <= limit).all()), (
                infix(segment.begin),
                begin.flatten(),
                infix(segment.end),
                end.flatten(),
                limit,
            )
        if ranges.skip is not FALSE:
            visits = torch.where(self.value(ranges.skip, **corners), 0, visits)
        if ranges.full is not FALSE:
            masked = masked & ~self.value(ranges.full, **corners)
        return visits, masked & (visits > 0)
