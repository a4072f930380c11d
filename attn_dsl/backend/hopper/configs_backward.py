"""Tile shapes of the Hopper backward kernel by head dimensions: a table of configurations, the best first.

As in `configs.py`, one is taken only if the compiled kernel of the user's variant passes `check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_dsl.backend.hopper.configs import SHARED_LIMIT

KEYS = 128
"""Of a program, 64 for each of two warpgroups, which hold dK and dV of them in registers."""


@dataclass(frozen=True)
class Config:
    """The shape of a backward kernel.

    queries       of a tile, 64 or 128
    query_stages  tiles in the ring of queries
    grad_stages   tiles in that of output gradients
    registers     of a consumer's thread
    ask           of each tile whether it is full, and leave out the mask there
    late          begin dP only when P is done: more registers for the score and the mask, less overlap
    """

    queries: int
    query_stages: int = 3
    grad_stages: int = 2
    registers: int = 240
    ask: bool = True
    late: bool = False

    def shared_bytes(self, dim: int, value_dim: int, itemsize: int = 2) -> int:
        """Shared memory of the tiles; barriers and the compiler's own need some 2 KiB more."""
        rows = self.queries * (self.query_stages * dim + self.grad_stages * value_dim)
        exchanged = 2 * KEYS * self.queries
        sums = 4 * self.queries * dim
        numbers = 4 * self.queries * (self.query_stages + self.grad_stages)
        return itemsize * (KEYS * (dim + value_dim) + rows + exchanged) + sums + numbers

    def __str__(self) -> str:
        rings = f"rings of {self.query_stages} and {self.grad_stages}"
        ways = ["mask where it is wanted" if self.ask else "mask everywhere"] + ["late dP"] * self.late
        return ", ".join([f"{KEYS} keys x {self.queries} rows, 2 warpgroups", rings, *ways])


_WAYS: tuple[dict[str, bool], ...] = ({}, {"ask": False}, {"late": True}, {"late": True, "ask": False})
_TABLE = {
    64: tuple(Config(queries, **way) for queries in (128, 64) for way in _WAYS[: 256 // queries]),
    128: tuple(Config(64, **way) for way in _WAYS),
}


def candidates(dim: int, value_dim: int, cheap: bool = False, listed: bool = False) -> tuple[Config, ...]:
    """Configurations for padded head dimensions (powers of two from 64 on), the preferred one first.

    None above 128: dK and dV would not fit the registers. cheap: so is the mask. Tiles of 128 queries then do without
    the branch around it, across which ptxas moves nothing: on an H200 that gains 7 percent of causal, 8 of ALiBi.
    listed: hardly a tile is full. At head dimension 128 the mask on every tile, with room for it, then gains 4 percent
    of documents and 2 of BigBird.
    """
    if max(dim, value_dim) > 128:
        return ()
    fitting = [config for config in _TABLE[max(dim, value_dim)] if config.shared_bytes(dim, value_dim) <= SHARED_LIMIT]
    if cheap:
        fitting.sort(key=lambda config: (config.queries < 128, config.queries == 128 and config.ask))
    if listed:
        fitting.sort(key=lambda config: (config.queries < 128, config.queries < 128 and (config.ask, not config.late)))
    return tuple(fitting)
