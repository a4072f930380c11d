"""Shared memory: pieces of bytes, views of them with a layout, and barriers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon.language import NVMMASharedLayout, SwizzledSharedLayout

from gluon_interpreter import machine
from gluon_interpreter.faults import Fault
from gluon_interpreter.order import Clock, Region, Remembered
from gluon_interpreter.values import RAW, Array, Value, decoded, encoded, size_of

POISON = 0xFF
"""Bytes of memory that nobody has written: not a number, as floats."""


class Piece:
    """What one call of `allocate_shared_memory` gives."""

    def __init__(self, bytes: int, name: str) -> None:
        self.bytes = np.full(-(-bytes // 8) * 8, POISON, np.uint8)
        self.remembered = Remembered(name)
        self.barriers: dict[int, Barrier] = {}


def places(shape: list[int], dtype: tl.dtype, layout: Any) -> Array:
    """The address of each element. Of tiles for tensor cores, so many columns as fit the swizzle stand together, all
    rows of them; the swizzle itself, the same for everybody, is left out."""
    size = size_of(dtype)
    if isinstance(layout, NVMMASharedLayout):
        assert not layout.transposed and len(shape) >= layout.rank, layout
        block = shape[len(shape) - layout.rank :]
        inner, outer = block[-1], math.prod(block[:-1])
        chunk = min(inner, layout.swizzle_byte_width // size or inner)
        row, column = np.arange(outer)[:, None], np.arange(inner)[None, :]
        within = (column // chunk * outer + row) * chunk + column % chunk
        count = math.prod(shape) // (outer * inner)
        found = within[None] + (np.arange(count) * (outer * inner))[:, None, None]
    else:
        assert isinstance(layout, SwizzledSharedLayout) and layout.max_phase == 1, layout
        found = np.arange(math.prod(shape))
    return (found * size).reshape(shape)


class Memory:
    """A view of a piece of shared memory, the `shared_memory_descriptor` of Gluon."""

    def __init__(self, piece: Piece, where: Array, dtype: tl.dtype, layout: Any) -> None:
        self.piece, self.where, self.dtype, self.layout = piece, where, dtype, layout
        self._views: dict[tuple[Any, ...], Memory] = {}
        self._region: Region | None = None

    shape = property(lambda self: list(self.where.shape))

    @property
    def region(self) -> Region:
        if self._region is None:
            self._region = Region(self.where, size_of(self.dtype), self.piece.bytes.size)
        return self._region

    def _view(self, *key: Any) -> Memory:
        """Views are made once, so that their regions are known again."""
        found = self._views.get(key)
        if found is None:
            kind, *rest = key
            layout = self.layout
            if kind == "index":
                if not 0 <= rest[0] < self.where.shape[0]:
                    raise Fault(f"{self.piece.remembered.name}: index {rest[0]} of {self.where.shape[0]}")
                where = self.where[rest[0]]
            elif kind == "slice":
                start, length, dim = rest
                if start < 0 or start + length > self.where.shape[dim]:
                    raise Fault(f"{self.piece.remembered.name}: slice {start} + {length} of {self.where.shape[dim]}")
                where = self.where[(slice(None),) * dim + (slice(start, start + length),)]
            elif kind == "permute":
                where = self.where.transpose(rest[0])
            elif kind == "reshape":
                where = self.where.reshape(rest[0])
            else:
                dtype, shape, layout = rest
                where = places(list(shape), dtype, layout) + int(self.where.min())
                found = Memory(self.piece, where, dtype, layout)
                if found.region.high > self.region.high:
                    raise Fault(f"{self.piece.remembered.name}: reinterpreted as more than there is")
            found = found or Memory(self.piece, where, self.dtype, layout)
            self._views[key] = found
        return found

    def index(self, i: Any) -> Memory:
        return self._view("index", int(i))

    def slice(self, start: Any, length: Any, dim: int = 0) -> Memory:
        return self._view("slice", int(start), int(length), dim)

    def permute(self, order: Any) -> Memory:
        return self._view("permute", tuple(order))

    def reshape(self, shape: Any) -> Memory:
        return self._view("reshape", tuple(shape))

    def reinterpret(self, dtype: tl.dtype, shape: Any, layout: Any) -> Memory:
        return self._view("reinterpret", dtype, tuple(shape), layout)

    def words(self) -> Array:
        """As they are in memory now, whoever looks."""
        size = size_of(self.dtype)
        return self.piece.bytes.view(RAW[size])[self.where // size]

    def put(self, words: Array) -> None:
        size = size_of(self.dtype)
        self.piece.bytes.view(RAW[size])[self.where // size] = words

    def numbers(self) -> Array:
        return decoded(self.words(), self.dtype)

    def load(self, layout: Any = None) -> Value:
        own = machine.running()
        own.spreads(layout)
        own.reads(self)
        return Value(self.numbers(), self.dtype)

    def store(self, value: Value) -> None:
        machine.running().writes(self)
        if value.dtype != self.dtype or value.shape != self.where.shape:
            raise Fault(f"a store of {value.dtype} {value.shape} to {self.dtype} {self.where.shape}")
        self.put(encoded(value.data, self.dtype))

    @property
    def barrier(self) -> Barrier:
        place = int(self.where.min())
        if place not in self.piece.barriers:
            raise Fault(f"{self.piece.remembered.name}: a barrier that was not initialized")
        return self.piece.barriers[place]


@dataclass
class Phase:
    """What those know who have arrived."""

    clock: Clock
    arrivals: int
    bytes: int = 0


class Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes that were expected have come."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.phases = [Phase(Clock(), count)]

    @property
    def over(self) -> int:
        """How many phases are."""
        return len(self.phases) - 1

    def passes(self, parity: int) -> bool:
        """Whether a wait for the phase of a parity is over: so it is as long as the current one has the other."""
        return self.over % 2 != parity

    def arrive(self, clock: Clock, count: int = 1, bytes: int = 0) -> None:
        phase = self.phases[-1]
        phase.clock.join(clock)
        phase.arrivals -= count
        phase.bytes += bytes
        if phase.arrivals < 0:
            raise Fault(f"{self.name}: more arrivals than the {self.count} of its initialization")
        if phase.arrivals == 0 and phase.bytes == 0:
            self.phases.append(Phase(Clock(), self.count))

    def await_more(self, count: int) -> None:
        """Let the phase have so many arrivals more."""
        self.phases[-1].arrivals += count

    def known(self) -> Clock:
        """What a wait that passes has heard."""
        return self.phases[-2].clock if self.over else Clock()


@dataclass
class Named:
    """One of the 16 barriers of a program that are known by a number and count threads."""

    threads: int = 0
    expected: int = 0
    generation: int = 0

    def __post_init__(self) -> None:
        self.clocks = [Clock()]

    def arrive(self, clock: Clock, threads: int, expected: int, number: int) -> int:
        """The generation that this arrival is part of."""
        if self.threads and self.expected != expected:
            raise Fault(f"barrier {number}: {expected} threads where others came for {self.expected}")
        mine = self.generation
        self.expected = expected
        self.threads += threads
        self.clocks[-1].join(clock)
        if self.threads > expected:
            raise Fault(f"barrier {number}: {self.threads} threads for {expected}")
        if self.threads == expected:
            self.threads, self.generation = 0, self.generation + 1
            self.clocks.append(Clock())
        return mine
