"""Tensors in registers, with the types and the promotion of Triton: numpy arrays and a Triton dtype.

16-bit floats are kept as float32 numbers that the type can represent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic

from gluon_interpreter.faults import Fault

STORED: dict[tl.dtype, type] = {
    tl.int1: np.bool_, tl.int8: np.int8, tl.int16: np.int16, tl.int32: np.int32, tl.int64: np.int64,
    tl.uint8: np.uint8, tl.uint16: np.uint16, tl.uint32: np.uint32, tl.uint64: np.uint64,
    tl.bfloat16: np.float32, tl.float16: np.float32, tl.float32: np.float32, tl.float64: np.float64,
}  # fmt: skip
RAW: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Words of so many bytes."""

Array = np.ndarray[Any, Any]
Number = bool | int | float
_ROUND = np.uint32(0x7FFF)


def size_of(dtype: tl.dtype) -> int:
    """Bytes of an element in memory."""
    return max(1, int(dtype.primitive_bitwidth) // 8)


def encoded(x: Array, dtype: tl.dtype) -> Array:
    """The words that numbers of a type are in memory; numbers are rounded to the nearest, ties to even."""
    if dtype == tl.bfloat16:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = ((bits + (_ROUND + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
    if dtype == tl.float16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    stored = np.uint8 if dtype == tl.int1 else STORED[dtype]
    return np.ascontiguousarray(x).astype(stored).view(RAW[size_of(dtype)])


def decoded(words: Array, dtype: tl.dtype) -> Array:
    """The converse of `encoded`."""
    if dtype == tl.bfloat16:
        return (words.astype(np.uint32) << 16).view(np.float32)
    if dtype == tl.float16:
        return words.view(np.float16).astype(np.float32)
    if dtype == tl.int1:
        return words != 0
    return words.view(STORED[dtype])


def rounded(x: Array, dtype: tl.dtype) -> Array:
    """Numbers as a value of the type holds them."""
    if dtype in (tl.bfloat16, tl.float16):
        return decoded(encoded(np.asarray(x, np.float32), dtype), dtype)
    return np.asarray(x).astype(STORED[dtype], copy=False)


class Value:
    """A tensor or, without axes, a number of the device. The data of a pointer are addresses in bytes."""

    __slots__ = ("data", "dtype")
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: Any, dtype: tl.dtype) -> None:
        self.dtype = dtype
        self.data: Array = np.asarray(data, np.int64) if dtype.is_ptr() else rounded(data, dtype)

    shape = property(lambda self: self.data.shape)
    type = property(lambda self: SimpleNamespace(layout=None, shape=self.shape, is_block=lambda: self.data.ndim > 0))
    T = property(lambda self: Value(self.data.T, self.dtype))

    def __repr__(self) -> str:
        return f"Value({self.data!r}, {self.dtype})"

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data.item())

    def __getitem__(self, at: Any) -> Value:
        return Value(self.data[at], self.dtype)

    def to(self, dtype: tl.dtype, bitcast: bool = False) -> Value:
        if bitcast:
            return Value(decoded(encoded(self.data, self.dtype), dtype), dtype)
        if dtype.is_ptr() or self.dtype.is_ptr():
            return Value(self.data, dtype)
        return Value(self.data if dtype != tl.int1 else self.data != 0, dtype)

    def __add__(self, other: Any) -> Value:
        if self.dtype.is_ptr():
            return Value(self.data + np.asarray(_data(other), np.int64) * size_of(self.dtype.element_ty), self.dtype)
        return _binary(np.add, self, other)

    def __radd__(self, other: Any) -> Value:
        return self + other

    def __sub__(self, other: Any) -> Value:
        return _binary(np.subtract, self, other)

    def __rsub__(self, other: Any) -> Value:
        return _binary(np.subtract, other, self)

    def __mul__(self, other: Any) -> Value:
        return _binary(np.multiply, self, other)

    def __rmul__(self, other: Any) -> Value:
        return _binary(np.multiply, other, self)

    def __truediv__(self, other: Any) -> Value:
        return _binary(_quotient, self, other, quotient=True)

    def __rtruediv__(self, other: Any) -> Value:
        return _binary(_quotient, other, self, quotient=True)

    def __floordiv__(self, other: Any) -> Value:
        return _binary(_truncated, self, other)

    def __rfloordiv__(self, other: Any) -> Value:
        return _binary(_truncated, other, self)

    def __mod__(self, other: Any) -> Value:
        return _binary(np.fmod, self, other)

    def __rmod__(self, other: Any) -> Value:
        return _binary(np.fmod, other, self)

    def __and__(self, other: Any) -> Value:
        return _binary(np.bitwise_and, self, other)

    def __rand__(self, other: Any) -> Value:
        return _binary(np.bitwise_and, other, self)

    def __or__(self, other: Any) -> Value:
        return _binary(np.bitwise_or, self, other)

    def __ror__(self, other: Any) -> Value:
        return _binary(np.bitwise_or, other, self)

    def __xor__(self, other: Any) -> Value:
        return _binary(np.bitwise_xor, self, other)

    def __rxor__(self, other: Any) -> Value:
        return _binary(np.bitwise_xor, other, self)

    def __lshift__(self, other: Any) -> Value:
        return _binary(_shifted_left, self, other)

    def __rlshift__(self, other: Any) -> Value:
        return _binary(_shifted_left, other, self)

    def __rshift__(self, other: Any) -> Value:
        return _binary(np.right_shift, self, other)

    def __lt__(self, other: Any) -> Value:
        return _compared(np.less, self, other)

    def __le__(self, other: Any) -> Value:
        return _compared(np.less_equal, self, other)

    def __gt__(self, other: Any) -> Value:
        return _compared(np.greater, self, other)

    def __ge__(self, other: Any) -> Value:
        return _compared(np.greater_equal, self, other)

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return _compared(np.equal, self, other)

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return _compared(np.not_equal, self, other)

    def __neg__(self) -> Value:
        return Value(-self.data, self.dtype)

    def __invert__(self) -> Value:
        return Value(~self.data, self.dtype)


def _data(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x


def valued(x: Value | Number) -> Value:
    """A number of the program's text as one of the device."""
    return x if isinstance(x, Value) else Value(x, _of_literal(x))


def _of_literal(x: Number) -> tl.dtype:
    if isinstance(x, bool):
        return tl.int1
    if isinstance(x, int):
        return next(t for t in (tl.int32, tl.uint32, tl.int64, tl.uint64) if _holds(t, x))
    return tl.float32


_semantic = object.__new__(TritonSemantic)
"""Triton's own rules; those for types ask for no builder."""


@functools.cache
def _common(x: tl.dtype, x_literal: bool, y: tl.dtype, y_literal: bool, quotient: bool) -> tl.dtype:
    return _semantic.computation_type_impl(x, x_literal, y, y_literal, quotient)


def common(x: Value | Number, y: Value | Number, quotient: bool = False) -> tl.dtype:
    """The type in which an operation of two is done: a literal takes the type of a tensor whose kind is not less."""
    return _common(valued(x).dtype, not isinstance(x, Value), valued(y).dtype, not isinstance(y, Value), quotient)


def _operands(x: Value | Number, y: Value | Number, dtype: tl.dtype) -> tuple[Array, Array]:
    for literal in (x, y):
        if isinstance(literal, int) and not dtype.is_floating() and not _fits(literal, dtype):
            raise Fault(f"{literal} is no {dtype}")
    stored = STORED[dtype]
    return np.asarray(_data(x)).astype(stored), np.asarray(_data(y)).astype(stored)


def _fits(literal: int, dtype: tl.dtype) -> bool:
    """A negative one fits an unsigned type of its width, as its bits."""
    return dtype == tl.int1 or _holds(dtype, literal) or -(2 ** (int(dtype.primitive_bitwidth) - 1)) <= literal < 0


def _holds(dtype: tl.dtype, x: int) -> bool:
    limits = np.iinfo(STORED[dtype])
    return int(limits.min) <= x <= int(limits.max)


def _binary(function: Callable[..., Array], x: Any, y: Any, quotient: bool = False) -> Value:
    if quotient and not any(valued(z).dtype.is_floating() for z in (x, y)):
        x, y = (valued(z).to(tl.float32) for z in (x, y))
    dtype = common(x, y, quotient)
    with np.errstate(all="ignore"):
        return Value(function(*_operands(x, y, dtype)), dtype)


def _compared(function: Callable[..., Array], x: Any, y: Any) -> Value:
    if isinstance(y, tl.dtype):
        return NotImplemented
    return Value(function(*_operands(x, y, common(x, y))), tl.int1)


def _quotient(x: Array, y: Array) -> Array:
    return x / y


def _truncated(x: Array, y: Array) -> Array:
    """Integer division as the hardware has it, toward zero."""
    if x.dtype.kind == "f":
        return np.floor(x / y)
    return (x - np.fmod(x, y)) // np.where(y == 0, 1, y)


def _shifted_left(x: Array, y: Array) -> Array:
    return np.where(y < 8 * x.dtype.itemsize, np.left_shift(x, y), 0)


def elementwise(function: Callable[..., Array], *operands: Value | Number, dtype: tl.dtype) -> Value:
    """A function of operands that are taken, and a result that is given, as `dtype`."""
    with np.errstate(all="ignore"):
        return Value(function(*(np.asarray(_data(x)).astype(STORED[dtype]) for x in operands)), dtype)


erf = np.vectorize(math.erf, otypes=[np.float32])
