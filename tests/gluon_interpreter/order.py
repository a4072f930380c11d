"""Which accesses of shared memory come before which: vector clocks of partitions, and what a piece of memory remembers.

A partition of warps executes the kernel's text in order. What the copy engine or the tensor cores do for it, a task, is
ordered after what the partition did before it was issued; it comes before what a partition does that has waited for it,
or has heard of it from one that has.

What warps write, themselves or by their asynchronous copies, goes through the generic proxy. The copy engine and the
tensor cores see it where a fence lies between: one whose partition knew of the write, and of which the reader knows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gluon_interpreter.faults import Race, Site, site, text


@dataclass
class Clock:
    """What is known to be over: of each partition all up to a number of its own, and a set of tasks, as bits."""

    partitions: dict[int, int] = field(default_factory=dict)
    tasks: int = 0

    def copy(self) -> Clock:
        return Clock(dict(self.partitions), self.tasks)

    def join(self, other: Clock) -> None:
        for partition, time in other.partitions.items():
            if time > self.partitions.get(partition, -1):
                self.partitions[partition] = time
        self.tasks |= other.tasks


class Region:
    """Elements of one piece of shared memory: the addresses of their first bytes within it."""

    _numbers = itertools.count()

    def __init__(self, places: np.ndarray[Any, Any], size: int, bytes: int) -> None:
        self.number = next(Region._numbers)
        self.low, self.high = int(places.min()), int(places.max()) + size
        self.whole = self.high - self.low == places.size * size
        self._places, self._size, self._bytes = places, size, bytes
        self._mask: np.ndarray[Any, Any] | None = None

    @property
    def mask(self) -> np.ndarray[Any, Any]:
        """Which pairs of bytes of the piece are in the region."""
        if self._mask is None:
            self._mask = np.zeros(-(-self._bytes // 2), np.bool_)
            for i in range(0, self._size, 2):
                self._mask[(self._places + i) // 2] = True
        return self._mask


_overlaps: dict[tuple[int, int], tuple[bool, bool]] = {}


def overlap(a: Region, b: Region) -> tuple[bool, bool]:
    """(whether two regions of one piece meet, whether a lies in b)."""
    if a is b:
        return True, True
    if a.low >= b.high or b.low >= a.high:
        return False, False
    if b.whole and a.low >= b.low and a.high <= b.high:
        return True, True
    found = _overlaps.get((a.number, b.number))
    if found is None:
        meet = bool((a.mask & b.mask).any())
        found = _overlaps[a.number, b.number] = meet, meet and not bool((a.mask & ~b.mask).any())
    return found


@dataclass
class Access:
    """A read or a write of a region. `task` is negative for what a partition does itself. `fences`: when each partition
    first fenced with knowledge of a write through the generic proxy."""

    what: str
    region: Region
    partition: int
    time: int
    task: int
    at: Site
    generic: bool
    fences: dict[int, int] = field(default_factory=dict)

    def before(self, clock: Clock) -> bool:
        if self.task >= 0:
            return bool(clock.tasks >> self.task & 1)
        return clock.partitions.get(self.partition, -1) >= self.time

    def fenced(self, clock: Clock) -> bool:
        return any(clock.partitions.get(partition, -1) >= time for partition, time in self.fences.items())


class Remembered:
    """The last writes of a piece of shared memory, and the reads since."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.writes: list[Access] = []
        self.reads: dict[tuple[int, int, int], Access] = {}

    def read(self, access: Access, clock: Clock, asynchronous: bool) -> None:
        for write in self.writes:
            if overlap(write.region, access.region)[0]:
                self._check(write, access, clock)
                if asynchronous and write.generic and not write.fenced(clock):
                    raise Race(
                        f"{self.name}: {access.what} at {text(access.at)} reads what was written at {text(write.at)},"
                        " and knows of nobody that has called fence_async_shared since"
                    )
        self.reads[access.region.number, access.partition, access.task] = access

    def write(self, access: Access, clock: Clock) -> None:
        for other in [*self.writes, *self.reads.values()]:
            if overlap(other.region, access.region)[0]:
                self._check(other, access, clock)
        self.writes = [x for x in self.writes if not overlap(x.region, access.region)[1]]
        self.reads = {key: x for key, x in self.reads.items() if not overlap(x.region, access.region)[1]}
        self.writes.append(access)

    def fence(self, partition: int, clock: Clock) -> None:
        for write in self.writes:
            if write.generic and write.before(clock):
                write.fences.setdefault(partition, clock.partitions[partition])

    def settle(self, task: int, partition: int, time: int) -> None:
        """The reads of a task that its partition has waited for count as the partition's own."""
        for key in [key for key in self.reads if key[2] == task]:
            access = self.reads.pop(key)
            own = self.reads.get((key[0], partition, -1))
            if own is None or own.time < time:
                access.partition, access.time, access.task = partition, time, -1
                self.reads[key[0], partition, -1] = access

    def _check(self, first: Access, second: Access, clock: Clock) -> None:
        if not first.before(clock):
            raise Race(
                f"{self.name}: {second.what} at {text(second.at)} is not ordered after {first.what} at {text(first.at)}"
            )


def access(what: str, region: Region, partition: int, time: int) -> Access:
    """Of a partition itself, now."""
    return Access(what, region, partition, time, -1, site(), generic=True)
