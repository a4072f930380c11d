"""Tile shapes and code shapes of the Hopper kernels, by head dimensions: a table of configurations, the best first.

A configuration is taken only if the compiled kernel of the user's variant passes `check.py` (hardly a spill, no
serialized tensor-core products); else the next one of the table is tried. The order was measured on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    """The shape of a forward kernel.

    groups        consumer warpgroups, of 64 query rows each
    keys          keys of a tile, a power of two
    stages        tiles in the ring of keys, and in that of values
    registers     of a consumer's thread; a producer's has what is left, at least 24
    pin           keep the wait for the second product below the exponentials (ptxas moves it above otherwise)
    carry_wide    probabilities cross the loop's back edge in float32: fewer instructions, more registers
    ping_pong     order the warpgroups, so that the softmax of one runs under the products of another
    own_output    stage the output in a buffer of its own, so that the next query tile can be loaded meanwhile
    ahead         queries have two places, filled by turns, so that those of the next tile are there when this one ends;
                  needs own_output
    rescale_late  rescale the output under the product of the next logits instead of before it
    frozen        full tiles keep the maximum that the tiles before them gave, where that is likely to do
    hold          with frozen, masked tiles but the first keep it, too
    """

    groups: int
    keys: int
    stages: int = 2
    registers: int = 240
    pin: bool = True
    carry_wide: bool = True
    ping_pong: bool = False
    own_output: bool = True
    ahead: bool = False
    rescale_late: bool = False
    frozen: bool = False
    hold: bool = False

    @property
    def rows(self) -> int:
        """Query rows of a program's tile."""
        return 64 * self.groups

    @property
    def copying(self) -> tuple[int, int]:
        """Registers of a consumer's thread, and of a producer's that is a warpgroup and copies rows."""
        warpgroups, registers = self.groups + 1, min(self.registers, 232)
        each = 65536 // (128 * warpgroups) // 8 * 8  # before they are dealt out anew
        return registers, warpgroups * each - self.groups * registers

    def shared_bytes(self, dim: int, value_dim: int, itemsize: int = 2) -> int:
        """Shared memory of the tiles; barriers and the compiler's own need some 2 KiB more."""
        output = self.rows * value_dim if self.own_output else 0
        queries = self.rows * dim * (2 if self.ahead else 1)
        return itemsize * (queries + output + self.stages * self.keys * (dim + value_dim))

    def __str__(self) -> str:
        shape = f"{self.rows} rows x {self.keys} keys, {self.groups} warpgroups, rings of {self.stages}"
        return ", ".join([shape, *(way.replace("_", "-") for way in WAYS if getattr(self, way))])


WAYS = ("pin", "carry_wide", "ping_pong", "own_output", "ahead", "rescale_late", "frozen", "hold")
"""The fields that are on or off."""
SHARED_LIMIT = 227 * 1024 - 2048
_D64 = Config(groups=3, keys=128, registers=160, pin=False, carry_wide=False, ping_pong=True, ahead=True)
_D128 = Config(groups=2, keys=128, ahead=True)
_D256 = Config(groups=2, keys=64, pin=False, ping_pong=True, own_output=False, rescale_late=True)
TABLE: dict[int, tuple[Config, ...]] = {
    64: (_D64, replace(_D64, keys=64), replace(_D128, pin=False), replace(_D128, keys=64)),
    128: (_D128, replace(_D128, keys=64, stages=4), replace(_D128, pin=False), replace(_D128, carry_wide=False)),
    256: (_D256, replace(_D256, rescale_late=False, carry_wide=False), replace(_D256, keys=32)),
}
"""By head dimension. Where registers spill, which a look-up for each pair can bring about, smaller tiles do better."""
FROZEN = {
    64: replace(_D64, frozen=True),
    128: replace(_D128, carry_wide=False, ping_pong=True, frozen=True, hold=True),
    256: replace(_D256, rescale_late=False, frozen=True),
}
"""The first choice where a maximum may be kept: 1.05 to 1.16 times as fast as the first of the table."""


def candidates(
    dim: int,
    value_dim: int,
    *,
    ramped: bool = False,
    frozen: bool = False,
    copied: bool = False,
    listed: bool = False,
) -> tuple[Config, ...]:
    """Configurations for padded head dimensions (powers of two from 64 to 256), the preferred one first.

    ramped: the product of the logits begins with a ramp along the keys instead of zeros. Its multiplications stand
    between the waits, and ptxas then does better without a pin: 655 TFLOP/s where it had 637.
    frozen: the maximum of some tiles will nearly always do for the others, and weights may be far from 1.
    copied: rows are copied one by one from where they are, in the order of a sort, whose runs are short. At head
    dimension 128 tiles of 64 keys in rings of 4 then take 0.78 of the time of what is first for others.
    listed: lists say which key tiles are visited. Two places for queries do not pay there, nor for copied rows; they do
    elsewhere, the more the fewer query tiles a program takes: 1.05 for causal at 2048 positions, 1.02 for noop at 8192.
    """
    table = TABLE[max(dim, value_dim)]
    if ramped and max(dim, value_dim) == 128:
        table = tuple(dict.fromkeys((replace(table[0], pin=False), *table)))
    if copied and max(dim, value_dim) == 128:
        table = tuple(sorted(table, key=lambda config: config.keys))
    elif frozen:
        table = (FROZEN[max(dim, value_dim)], *table)
    if listed or copied:
        table = tuple(replace(config, ahead=False) for config in table)
    if dim != value_dim:  # the output has not the shape of the queries, in whose place it would be staged
        table = tuple(replace(config, own_output=True) for config in table)
    return tuple(config for config in table if config.shared_bytes(dim, value_dim) <= SHARED_LIMIT)
