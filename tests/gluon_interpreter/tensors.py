"""Global memory: the tensors that a kernel was given, found by address and never left."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from gluon_interpreter.faults import OutOfBounds
from gluon_interpreter.values import RAW, Array, Value, decoded, encoded, size_of

TYPES: dict[torch.dtype, tl.dtype] = {
    torch.bool: tl.int1, torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64,
    torch.uint8: tl.uint8, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32,
    torch.float64: tl.float64,
}  # fmt: skip


def words_of(tensor: torch.Tensor) -> Array:
    """The memory from a tensor's first element to its last."""
    count = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    buffer = (ctypes.c_char * (count * size)).from_address(tensor.data_ptr())
    return np.frombuffer(buffer, RAW[size])


class Tensors:
    """Memory by address, as the kernel's pointers name it."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._words: dict[int, Array] = {}

    def pointer(self, tensor: torch.Tensor) -> Value:
        if tensor.numel():
            words, start = words_of(tensor), tensor.data_ptr()
            known = self._words.get(start)
            if known is None or known.nbytes < words.nbytes:
                self._words[start] = words
                self._starts = sorted(self._words)
        return Value(tensor.data_ptr(), tl.pointer_type(TYPES[tensor.dtype]))

    def _find(self, addresses: Array, size: int, what: str) -> tuple[Array, Array]:
        """(words of the tensor, indices) of addresses, at least one."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        at = bisect_right(self._starts, low) - 1
        while at >= 0:  # views of one storage may lie in each other
            start = self._starts[at]
            words = self._words[start]
            if high <= start + words.nbytes:
                return words.view(RAW[size]), (addresses - start) // size
            at -= 1
        raise OutOfBounds(f"{what} of addresses {low:#x} to {high:#x}, which no argument has all of")

    def load(self, pointer: Value, mask: Any = None, other: Any = None) -> Value:
        dtype = pointer.dtype.element_ty
        size = size_of(dtype)
        addresses = pointer.data
        keep = np.True_ if mask is None else np.asarray(getattr(mask, "data", mask))
        if other is None:
            fill = np.uint64(0xFFFF_FFFF_FFFF_FFFF).astype(RAW[size])  # what a masked lane then has, nobody may use
        else:
            fill = encoded(np.asarray(getattr(other, "data", other), np.float64), dtype)
        addresses, keep, fill = np.broadcast_arrays(addresses, keep, fill)
        result = fill.copy()
        if keep.any():
            words, indices = self._find(addresses[keep], size, "a load")
            result[keep] = words[indices]
        return Value(decoded(result, dtype), dtype)

    def store(self, pointer: Value, value: Any, mask: Any = None) -> None:
        dtype = pointer.dtype.element_ty
        keep = np.True_ if mask is None else np.asarray(getattr(mask, "data", mask))
        given = encoded(np.asarray(getattr(value, "data", value)), dtype)
        addresses, keep, given = np.broadcast_arrays(pointer.data, keep, given)
        if keep.any():
            words, indices = self._find(addresses[keep], size_of(dtype), "a store")
            words[indices] = given[keep]

    def change(self, function: Any, pointer: Value, value: Any, mask: Any = None) -> Value:
        """An atomic operation; its result is what was there before, for numbers."""
        dtype = pointer.dtype.element_ty
        before = self.load(pointer, mask) if pointer.data.size == 1 else Value(0, tl.int32)
        keep = np.True_ if mask is None else np.asarray(getattr(mask, "data", mask))
        amounts = np.asarray(getattr(value, "data", value))
        addresses, keep, amounts = np.broadcast_arrays(pointer.data, keep, amounts)
        if keep.any():
            words, indices = self._find(addresses[keep], size_of(dtype), "an atomic operation")
            numbers = decoded(words, dtype)  # a view: atomics are of 32 and 64 bits
            with np.errstate(all="ignore"):
                function.at(numbers, indices, amounts[keep].astype(numbers.dtype))
        return before


class Descriptor:
    """A tensor that the copy engine moves blocks of; what a block has beyond it is 0, and is not written."""

    def __init__(self, given: Any) -> None:
        base = given.base
        self.dtype, self.layout = TYPES[base.dtype], given.layout
        sizes, strides, block = list(given.shape), list(given.strides), list(given.block_shape)
        nbytes = size_of(self.dtype) * int(np.prod(block))
        self.shape = [Value(n, tl.int32) for n in sizes]
        self.strides = [Value(n, tl.int64) for n in strides]
        self.block_type = SimpleNamespace(shape=block, nbytes=nbytes)
        if base.data_ptr() % 16 or any(s * base.element_size() % 16 for s in strides[:-1]) or strides[-1] != 1:
            raise OutOfBounds(f"the copy engine takes no strides {strides} of {base.dtype} from {base.data_ptr():#x}")
        end = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        held = 1 + sum((n - 1) * stride for n, stride in zip(base.shape, base.stride(), strict=True))
        if end > held:
            raise OutOfBounds(f"a descriptor of {sizes}, strides {strides}, ends {end - held} elements past its tensor")
        words = words_of(base)
        self._words = np.lib.stride_tricks.as_strided(words, sizes, [s * words.itemsize for s in strides])
        self._sizes, self._block = sizes, block

    def _ranges(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(where in the tensor, where in the block) what both have is."""
        low = [max(c, 0) for c in corner]
        high = [max(min(c + n, size), a) for c, n, size, a in zip(corner, self._block, self._sizes, low, strict=True)]
        inside = tuple(slice(min(a, b), b) for a, b in zip(low, high, strict=True))
        return inside, tuple(slice(a.start - c, a.stop - c) for a, c in zip(inside, corner, strict=True))

    def read(self, corner: list[int]) -> Array:
        """The words of a block."""
        here, there = self._ranges(corner)
        block = np.zeros(self._block, self._words.dtype)
        if all(a.stop > a.start for a in here):
            block[there] = self._words[here]
        return block

    def write(self, corner: list[int], block: Array, add: bool = False) -> None:
        here, there = self._ranges(corner)
        if all(a.stop > a.start for a in here):
            if add:
                target = self._words.view(np.float32)
                target[here] += block.view(np.float32)[there]
            else:
                self._words[here] = block[there]
