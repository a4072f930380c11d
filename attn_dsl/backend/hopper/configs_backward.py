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
    """

    queries: int
    query_stages: int = 3
    grad_stages: int = 2
    registers: int = 240

    def shared_bytes(self, dim: int, value_dim: int, itemsize: int = 2) -> int:
        """Shared memory of the tiles; barriers and the compiler's own need some 2 KiB more."""
        rows = self.queries * (self.query_stages * dim + self.grad_stages * value_dim)
        exchanged = 2 * KEYS * self.queries
        sums = 4 * self.queries * dim
        numbers = 4 * self.queries * (self.query_stages + self.grad_stages)
        return itemsize * (KEYS * (dim + value_dim) + rows + exchanged) + sums + numbers

    def __str__(self) -> str:
        rings = f"rings of {self.query_stages} and {self.grad_stages}"
        return f"{KEYS} keys x {self.queries} rows, 2 warpgroups, {rings}"


_SMALL = (Config(128), Config(64))
_LARGE = (Config(64), Config(64, query_stages=2))


def candidates(dim: int, value_dim: int) -> tuple[Config, ...]:
    """Configurations for padded head dimensions (powers of two from 64 on), the preferred one first.

    None above 128: dK and dV would not fit the registers.
    """
    if max(dim, value_dim) > 128:
        return ()
    table = _SMALL if dim == value_dim == 64 else _LARGE
    return tuple(config for config in table if config.shared_bytes(dim, value_dim) <= SHARED_LIMIT)
