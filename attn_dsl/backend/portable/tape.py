"""Launches that were made before, with other tensors of the same kinds: nothing is worked out, only addresses change.

A function that launches kernels is run once more on tensors without data, by a runner that takes down what it is given.
What of that is an address is the tape's to fill in; all else stays. Functions that ask PyTorch for more than memory
and views of it are not recorded, nor those whose kernels are not started beneath Triton's wrappers (`start.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attn_dsl.backend.portable.run import Options, Repeated
from attn_dsl.backend.portable.start import Ready, taken, watched

Launching = Callable[..., Sequence[Tensor]]
"""From a runner and tensors, which it launches kernels for, to results: those tensors, or new ones."""
TAPES = 64
"""So many of one function are kept."""
KINDS = 64
"""Of so many kinds of tensors launches are kept."""
ALIGNED = 512
"""Bytes that memory begins at a multiple of."""


class Launches:
    """What repeats a function for tensors of the kinds of the first: by its tape, or by calling it.

    Tensors that are `varying` come behind the others, and there is a tape for each of their shapes.
    """

    def __init__(self, function: Launching) -> None:
        self.function, self.runner = function, Repeated()
        self.tapes: dict[tuple[Any, ...], Tape | None] = {}

    def __call__(self, inputs: Sequence[Tensor], varying: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        index, kind = self.runner.index, tuple([(x.shape, x.stride()) for x in varying])
        inputs = (*inputs, *varying)
        tape = self.tapes.get(kind)
        if tape is not None and index == torch._C._cuda_getDevice() and not watched():
            return tape(inputs, index)
        results = self.function(self.runner, *inputs)
        if kind not in self.tapes and self.runner.found:
            if len(self.tapes) >= TAPES:
                self.tapes.clear()
            self.tapes[kind] = recorded(self.function, inputs, self.runner.found)
        return results


class LaunchesByKind:
    """`Launches` of functions that are given tensors of many kinds: shapes, strides, dtypes, devices and alignments."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Launches] = {}

    def __call__(self, place: tuple[Any, ...], function: Launching, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What `function` gives; `place` tells apart functions that launch other things, and the first one is kept."""
        key = (*place, *[(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in inputs])
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= KINDS:
                self.known.clear()
            found = self.known[key] = Launches(function)
        return found(inputs)


@dataclass(frozen=True)
class Address:
    """So many bytes behind the beginning of a tensor, by its number on the tape."""

    tensor: int
    offset: int = 0


@dataclass(frozen=True)
class Nested:
    """A tuple, and at which places it holds addresses, or tuples with some."""

    items: list[Any]
    held: tuple[tuple[int, Address | Nested], ...]

    @staticmethod
    def of(item: tuple[Any, ...]) -> Nested:
        inner = [Nested.of(x) if isinstance(x, tuple) else x for x in item]
        held = [(i, x) for i, x in enumerate(inner) if isinstance(x, Address) or (isinstance(x, Nested) and x.held)]
        return Nested(list(item), tuple(held))

    def filled(self, addresses: Sequence[int]) -> tuple[Any, ...]:
        given = self.items.copy()
        for place, x in self.held:
            given[place] = addresses[x.tensor] + x.offset if type(x) is Address else x.filled(addresses)  # type: ignore[union-attr]
        return tuple(given)


@dataclass(frozen=True)
class Line:
    """One launch: what the launcher is given, and at which places what else goes.

    plain: addresses. nested: tuples that hold some. described: descriptors, each with what makes its map.
    """

    launcher: Any
    arguments: list[Any]
    plain: tuple[tuple[int, int, int], ...]
    nested: tuple[tuple[int, Nested], ...]
    described: tuple[tuple[int, Address, Any, Any], ...]

    @staticmethod
    def of(ready: Ready, programs: int, arguments: tuple[Any, ...]) -> Line:
        """`arguments`: those of a launch, with an `Address` for each tensor."""
        given: list[Any] = [programs, 1, 1, 0, *ready.front]
        plain, nested, described = [], [], []
        for x, make in itertools.zip_longest(arguments, ready.maps):
            place = len(given)
            if make is not None:
                described.append((place, x.base, x, make))
                given += [None, *x.shape, *x.strides]
                continue
            if isinstance(x, Address):
                plain.append((place, x.tensor, x.offset))
            elif isinstance(x, tuple) and (item := Nested.of(x)).held:
                nested.append((place, item))
            given.append(x)
        return Line(ready.launcher, [*given, *ready.constants], tuple(plain), tuple(nested), tuple(described))

    def start(self, addresses: Sequence[int], stream: int) -> None:
        given = self.arguments.copy()
        given[3] = stream
        for place, tensor, offset in self.plain:
            given[place] = addresses[tensor] + offset
        for place, item in self.nested:
            given[place] = item.filled(addresses)
        for place, at, described, make in self.described:
            address = addresses[at.tensor] + at.offset
            found = described.known.get(address)
            given[place] = (taken(described, make, address) if found is None else found)[0]
        self.launcher(*given)


@dataclass(frozen=True)
class Tape:
    """The launches of a function. Tensors are numbered: its inputs, results that are new, memory for all else.

    made: shape, strides and dtype of new results. scratch: bytes. results: their numbers.
    """

    lines: tuple[Line, ...]
    made: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    scratch: int
    results: tuple[int, ...]

    def __call__(self, inputs: Sequence[Tensor], index: int) -> Sequence[Tensor]:
        """On the current stream of the device `index`, the current one."""
        device = inputs[0].device
        tensors = [*inputs]
        for shape, strides, dtype in self.made:
            tensors.append(torch.empty_strided(shape, strides, dtype=dtype, device=device))
        if self.scratch:
            tensors.append(torch.empty_strided((self.scratch,), (1,), dtype=torch.int8, device=device))
        addresses = [x.data_ptr() for x in tensors]
        stream = torch._C._cuda_getCurrentRawStream(index)
        for line in self.lines:
            line.start(addresses, stream)
        return [tensors[i] for i in self.results]


# ---------------------------------------------------------------- recording


def recorded(function: Launching, inputs: Sequence[Tensor], found: Mapping[Options, Ready]) -> Tape | None:
    """The tape of a function that was run with such inputs, by kernels that were `found`; None where it has none."""
    twins = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in inputs]
    launched: list[tuple[int, tuple[Any, ...], Options]] = []

    def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Any) -> None:
        launched.append((programs, arguments, options))

    with torch.no_grad(), _Memory({_storage(x) for x in twins}) as memory:
        results = function(run, *twins)
    ready = [found[options] for _, _, options in launched if type(options) is Options and options in found]
    if memory.refused or len(ready) < len(launched) or any(one.launcher is None for one in ready):
        return None
    new = list({_storage(x): x for x in results if _storage(x) in memory.made}.values())
    places = {_storage(x): Address(i) for i, x in enumerate([*twins, *new])}
    behind, scratch = 0, len(places)
    for storage, size in memory.made.items():
        if storage not in places:
            places[storage] = Address(scratch, behind)
            behind += -(-size // ALIGNED) * ALIGNED
    lines = [
        Line.of(one, programs, tuple([_addressed(x, places) for x in arguments]))
        for (programs, arguments, _), one in zip(launched, ready, strict=True)
    ]
    made = tuple((tuple(x.shape), x.stride(), x.dtype) for x in new)
    return Tape(tuple(lines), made, behind, tuple(places[_storage(x)].tensor for x in results))


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _addressed(x: Any, places: Mapping[int, Address]) -> Any:
    if isinstance(x, Tensor):
        at = places[_storage(x)]
        return Address(at.tensor, at.offset + int(x.storage_offset()) * x.element_size())
    if isinstance(x, tuple):
        return tuple([_addressed(item, places) for item in x])
    return Described(_addressed(x.base, places), x.shape, x.strides, x.known) if hasattr(x, "known") else x


@dataclass(frozen=True)
class Described:
    """A descriptor on a tape."""

    base: Address
    shape: list[int]
    strides: list[int]
    known: dict[int, tuple[Any, ...]]


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what memory is asked for, in bytes by storage; whoever asks for more than that and views is `refused`."""

    def __init__(self, given: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given, self.refused = given, False
        self.made: dict[int, int] = {}
        self.kept: list[Tensor] = []
        """Lest a storage that is gone and another be the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _MAKES:
            self.made[_storage(result)] = result.untyped_storage().nbytes()
            self.kept.append(result)
        elif func._schema.is_mutable or not isinstance(result, Tensor) or not self._known(result):
            self.refused = True
        return result

    def _known(self, x: Tensor) -> bool:
        return _storage(x) in self.given or _storage(x) in self.made


_MAKES = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided}
