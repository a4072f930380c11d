"""Tile shapes and code shapes of the Hopper kernels, by head dimensions: a table of configurations, the best first.

A configuration is taken only if the compiled kernel of the user's variant passes `check.py` (hardly a spill, no
serialized tensor-core products); else the next one of the table is tried. The order was measured on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    """The shape of a forward kernel.

    groups      consumer warpgroups, of 64 query rows each
    keys        keys of a tile, a power of two
    stages      tiles in the ring of keys, and in that of values
    registers   of a consumer's thread; a producer's has what is left, at least 24
    pin         keep the wait for the second product below the exponentials (ptxas moves it above otherwise)
    carry_wide  probabilities cross the loop's back edge in float32: fewer instructions, more registers
    ping_pong   order the warpgroups, so that the softmax of one runs under the products of another
    own_output  stage the output in a buffer of its own, so that the next query tile can be loaded meanwhile
    persistent  one program a multiprocessor, which takes tile after tile
    section     heads that run side by side; 0: all of them where tiles are uneven, else those that share keys
    """

    groups: int
    keys: int
    stages: int = 2
    registers: int = 240
    pin: bool = True
    carry_wide: bool = True
    ping_pong: bool = False
    own_output: bool = True
    persistent: bool = True
    section: int = 0

    @property
    def rows(self) -> int:
        """Query rows of a program's tile."""
        return 64 * self.groups

    def shared_bytes(self, dim: int, value_dim: int, itemsize: int = 2) -> int:
        """Shared memory of the tiles; barriers and the compiler's own need some 2 KiB more."""
        output = self.rows * value_dim if self.own_output else 0
        return itemsize * (self.rows * dim + output + self.stages * self.keys * (dim + value_dim))

    def __str__(self) -> str:
        ways = [name for name in ("pin", "carry_wide", "ping_pong", "own_output", "persistent") if getattr(self, name)]
        section = [f"sections of {self.section} heads"] if self.section else []
        shape = f"{self.rows} rows x {self.keys} keys, {self.groups} warpgroups, rings of {self.stages}"
        return ", ".join([shape, *(way.replace("_", "-") for way in ways), *section])


SHARED_LIMIT = 227 * 1024 - 2048
_D64 = Config(groups=3, keys=128, registers=160, pin=False, carry_wide=False)
_D128 = Config(groups=2, keys=128)
_D256 = Config(groups=2, keys=64, own_output=False)
EVEN: dict[int, tuple[Config, ...]] = {
    64: (replace(_D64, own_output=False), replace(_D128, pin=False), replace(_D128, carry_wide=False)),
    128: (_D128, replace(_D128, keys=64), replace(_D128, pin=False), replace(_D128, carry_wide=False)),
    256: (replace(_D256, pin=False), _D256, replace(_D256, carry_wide=False)),
}
"""By head dimension, where every query tile visits as many key tiles."""
UNEVEN: dict[int, tuple[Config, ...]] = {
    64: (_D64, replace(_D128, pin=False), replace(_D128, carry_wide=False)),
    128: EVEN[128],
    256: tuple(
        replace(config, persistent=False, section=8)
        for config in (_D256, replace(_D256, pin=False), replace(_D256, carry_wide=False))
    ),
}
"""Where the rows of a query tile decide how many it visits."""


def candidates(dim: int, value_dim: int, *, uneven: bool = False) -> tuple[Config, ...]:
    """Configurations for padded head dimensions (powers of two from 64 to 256), the preferred one first."""
    table = (UNEVEN if uneven else EVEN)[max(dim, value_dim)]
    if dim != value_dim:  # the output has not the shape of the queries, in whose place it would be staged
        table = tuple(replace(config, own_output=True) for config in table)
    return tuple(config for config in table if config.shared_bytes(dim, value_dim) <= SHARED_LIMIT)
