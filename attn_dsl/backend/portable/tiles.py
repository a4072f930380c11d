"""Tile shapes by architecture, element type, head dimensions and cost of the variant's functions.

`rows` are query rows of a tile, `keys` its keys. A row of the table was chosen for few or no register spills (checked
by compiling ahead of time) and, where such a GPU was at hand, by measurement.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels: forward, dK and dV, dQ."""

    forward: Tile
    keys: Tile
    queries: Tile


INTERPRETED = Tiles(Tile(16, 32), Tile(32, 16), Tile(16, 32))
"""Small enough that short test lengths make several tiles, large enough for NumPy."""


def choose(capability: tuple[int, int] | None, itemsize: int, dim: int, value_dim: int, gathers: bool = False) -> Tiles:
    """Tiles for padded head dimensions `dim` and `value_dim`; `capability` is None in Triton's interpreter.

    gathers: whether pairs look up elements of their own, which take registers and, copied ahead, shared memory.
    """
    if capability is None:
        return INTERPRETED
    widest = max(dim, value_dim)
    if itemsize == 4 or capability < (8, 0):
        return _ordinary(widest)
    if capability[0] == 9:
        return _hopper(widest, gathers)
    return _ampere(widest) if capability[0] == 10 or capability in ((8, 0), (8, 7)) else _narrow(widest)


def _ordinary(widest: int) -> Tiles:
    """Where products run on the ordinary units, as those of float32 in IEEE arithmetic: registers are what is short."""
    if widest <= 64:
        return Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if widest <= 128:
        return Tiles(Tile(32, 32, 4, 2), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
    return Tiles(Tile(16, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))


def _hopper(widest: int, gathers: bool) -> Tiles:
    """Those for head dimensions of 65 to 128 are the fastest of a sweep on one H200, causal and a learned bias."""
    if widest <= 64:
        return Tiles(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))
    if widest <= 128 and gathers:
        return Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 3), Tile(128, 64, 8, 2))
    if widest <= 128:
        return Tiles(Tile(64, 64, 4, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3))
    return Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1))


def _ampere(widest: int) -> Tiles:
    """For GPUs of 160 KiB of shared memory and more."""
    if widest <= 64:
        return Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    if widest <= 128:
        return Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2))
    return Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def _narrow(widest: int) -> Tiles:
    """For GPUs of 100 KiB of shared memory (sm_86, sm_89, sm_120)."""
    if widest <= 64:
        return Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))
    if widest <= 128:
        return Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1))
    return Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
