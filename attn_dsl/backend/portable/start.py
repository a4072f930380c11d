"""What starts a compiled kernel: Triton's own call, or beneath its wrappers where these are the ones known here.

Between a launch and the driver, Triton 3.6 takes descriptors apart one field at a time and asks for memory that these
kernels do not need, in Python, which costs a short call a third of its host time. What is passed in the end is the
same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton import knobs

Map = Callable[[int, Sequence[int], Sequence[int]], Any]
"""From address, shape and strides of a tensor to what the copy engine is told of it."""
ADDRESSES = 64
"""Of so many tensors that differ in nothing else a descriptor is kept; what is allocated is mostly what was freed, so
that few addresses come again and again."""


class Ready:
    """A compiled kernel, and its constexpr arguments, which come behind those of a launch."""

    def __init__(self, compiled: Any, constants: tuple[Any, ...]) -> None:
        self.compiled, self.constants = compiled, constants
        run = compiled.run
        known = _beneath(run) if not (_scratch(run) or getattr(compiled.metadata, "gsan", False)) else None
        self.launcher: Any = None if known is None else known[0]
        self.maps: tuple[Map, ...] = () if known is None else known[1]
        if known is not None:
            modes = run.launch_cooperative_grid, run.launch_pdl
            self.front = (compiled.function, *modes, None, None, compiled.packed_metadata, None, None, None)

    def start(self, programs: int, arguments: tuple[Any, ...], index: int) -> None:
        """On the current stream of the device `index`, the current one; descriptors come first among the arguments.

        A descriptor has a `base`, `shape` and `strides`, and as `known` what was passed for others with that shape,
        those strides, of the same blocks of elements, by address.
        """
        stream = torch._C._cuda_getCurrentRawStream(index)
        if self.launcher is None or watched():
            self.compiled[(programs, 1, 1)](*arguments, *self.constants, stream=stream)
            return
        if not self.maps:
            self.launcher(programs, 1, 1, stream, *self.front, *arguments, *self.constants)
            return
        front: list[Any] = []
        for described, make in zip(arguments, self.maps, strict=False):
            address = described.base.data_ptr()
            found = described.known.get(address)
            front += taken(described, make, address) if found is None else found
        rest = arguments[len(self.maps) :]
        self.launcher(programs, 1, 1, stream, *self.front, *front, *rest, *self.constants)


def watched() -> bool:
    """Whether somebody wants to know of launches."""
    hooks = knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


def taken(described: Any, make: Map, address: int) -> tuple[Any, ...]:
    """A descriptor as the launcher takes it, which is `known` to all that differ in nothing but their address."""
    if len(described.known) >= ADDRESSES:
        described.known.clear()
    shape, strides = described.shape, described.strides
    found = described.known[address] = (make(address, shape, strides), *shape, *strides)
    return found


def _scratch(run: Any) -> bool:
    """Whether a launch needs memory of its own, or says nothing of it."""
    return bool(getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1))


def _beneath(run: Any) -> tuple[Any, tuple[Map, ...]] | None:
    """What Triton calls in the end, and what makes each descriptor; None where it is not as in Triton 3.6."""
    launch = getattr(run, "launch", None)
    if inspect.isbuiltin(launch) and hasattr(run, "launch_pdl") and not hasattr(run, "kernel_signature"):
        return launch, ()
    if not inspect.isfunction(launch):
        return None
    inside = inspect.getclosurevars(launch).nonlocals
    if inside.keys() != {"launcher", "tensordesc_indices", "tensordesc_meta"}:
        return None
    described = inside["tensordesc_meta"]
    first = set(range(len(described))) == set(inside["tensordesc_indices"])
    if not first or any(about is None or about["fp4_padded"] for about in described):
        return None
    return inside["launcher"], tuple(_map(about) for about in described)


def _map(about: dict[str, Any]) -> Map:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime import driver

    fill = driver.active.utils.fill_tma_descriptor
    fixed = about["swizzle"], about["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[about["elem_type"]], about["block_size"]
    return lambda address, shape, strides: fill(address, *fixed, shape, strides, 0)
