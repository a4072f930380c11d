"""What is made of the contents of tensors, once while these do not change: lists of tiles, and sorts of positions.

A tensor is known by its storage and version, so that what was made before an in-place change is made anew. While a
CUDA graph is captured, what is made becomes part of the graph, and is made again in each replay, unless somebody holds
it for as long as the graph lives.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

KEPT = 64
"""So many things of a kind are remembered."""
_weak: Any = StorageWeakRef  # untyped
Place = tuple[Any, ...]


class Made(Protocol):
    """Something made of tensors."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What it holds."""

    @property
    def bytes(self) -> int:
        """Memory of that."""

    def text(self) -> str:
        """What it is, for people."""


M = TypeVar("M", bound=Made)


@dataclass
class _Kept(Generic[M]):
    """Something made, and where: streams other than its own wait for `ready`."""

    made: M
    versions: tuple[int, ...]
    sources: tuple[Any, ...]
    stream: int
    ready: Any
    holders: weakref.WeakSet[Holder] = field(default_factory=weakref.WeakSet)

    @property
    def is_valid(self) -> bool:
        """Whether all that it was made of is still there; else its address may be that of something else."""
        return not any(source.expired() for source in self.sources)

    def use(self) -> None:
        """Let the current stream read it."""
        if self.ready is not None and self.stream != stream_of(self.made.tensors[0].device):
            self.ready.wait()
            for tensor in self.made.tensors:
                tensor.record_stream(torch.cuda.current_stream())


class Holder:
    """Keeps what is made or found while it is active, for as long as it lives."""

    def __init__(self) -> None:
        self.held: dict[Place, Made] = {}

    @property
    def bytes(self) -> int:
        return sum(made.bytes for made in self.held.values())

    def keep(self, place: Place, made: Made) -> None:
        self.held[place] = made

    @contextmanager
    def active(self) -> Iterator[None]:
        token = _holder.set(self)
        try:
            yield
        finally:
            _holder.reset(token)


_holder: ContextVar[Holder | None] = ContextVar("holder", default=None)


class Store(Generic[M]):
    """What was made, by what it was made of beside the contents of tensors."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Place, _Kept[M]] = OrderedDict()

    def find(self, place: Place, sources: Sequence[Tensor], device: torch.device, make: Callable[[], M]) -> M:
        """What `make` makes of the sources at a place, or made of them before."""
        if any(x.is_inference() for x in sources):  # which do not count their changes
            return make()
        place = (*place, *[(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in sources])
        versions = tuple([x._version for x in sources])
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        kept = self._kept.get(place)
        if kept is None or kept.versions != versions or not kept.is_valid or (capturing and not kept.holders):
            made = make()
            if capturing:
                return made
            kept = self._keep(place, versions, made, sources, device)
        holder = _holder.get()
        if holder is not None:
            kept.holders.add(holder)
            holder.keep((id(self), *place), kept.made)
        if not capturing:
            kept.use()
        return kept.made

    def _keep(
        self, place: Place, versions: tuple[int, ...], made: M, sources: Sequence[Tensor], device: torch.device
    ) -> _Kept[M]:
        ready = None
        if device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        storages = tuple([_weak(x.untyped_storage()) for x in sources])
        kept = _Kept(made, versions, storages, stream_of(device), ready)
        for expired in [at for at, other in self._kept.items() if not other.is_valid]:
            del self._kept[expired]
        self._kept.pop(place, None)
        self._kept[place] = kept
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return kept


def stream_of(device: torch.device) -> int:
    """The current stream of a device."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))
