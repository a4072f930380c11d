"""What the inline assembly of the kernels does, instruction text by instruction text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from gluon_interpreter import machine
from gluon_interpreter.faults import Fault
from gluon_interpreter.shared import Named
from gluon_interpreter.values import Array, Value, encoded, rounded

_NOTHING = Value(0, tl.int32)
_INFINITE = np.float32("-inf")


def assembly(text: str, operands: list[Any], dtype: Any) -> Any:
    """The result of `inline_asm_elementwise`."""
    plain = " ".join(text.split())
    barrier = re.fullmatch(r"bar\.(sync|arrive) (\d+|\$1), (\d+); mov\.u32 \$0, 0;", plain)
    if barrier:
        kind, number, threads = barrier.groups()
        _named_barrier(kind, int(operands[0]) if number == "$1" else int(number), int(threads))
        return _NOTHING
    if plain not in _TEXTS:
        raise NotImplementedError(f"the interpreter does not know the assembly {text!r}")
    return _TEXTS[plain](operands, dtype)


def _named_barrier(kind: str, number: int, expected: int) -> None:
    own = machine.running()
    if not 0 <= number < 16:
        raise Fault(f"there is no barrier {number}")
    own.hand_over()
    barrier = own.program.named.setdefault(number, Named())
    mine = barrier.arrive(own.tell(), own.threads, expected, number)
    if kind == "sync":
        own.hand_over(lambda: barrier.generation > mine, f"barrier {number}")
        own.clock.join(barrier.clocks[mine])


def _elementwise(function: Callable[..., Array]) -> Callable[[list[Any], Any], Value]:
    def apply(operands: list[Any], dtype: Any) -> Value:
        with np.errstate(all="ignore"):
            return Value(function(*(np.asarray(getattr(x, "data", x)) for x in operands)), dtype)

    return apply


def _packed(kind: tl.dtype) -> Callable[[list[Any], Any], Value]:
    """Two numbers as the 16-bit halves of a word, the first one low."""

    def apply(operands: list[Any], dtype: Any) -> Value:
        if len(operands) == 1:  # two elements at a time: the type itself
            return Value(rounded(operands[0].data, kind), dtype)
        low, high = (encoded(x.data, kind).astype(np.uint32) for x in operands)
        return Value((low | high << 16).view(np.int32), dtype)

    return apply


def _halves(operands: list[Any], dtypes: Any) -> tuple[Value, Value]:
    word = operands[0].data.view(np.uint32)
    low, high = ((word >> s).astype(np.uint16).view(np.int16) for s in (0, 16))
    return Value(low, dtypes[0]), Value(high, dtypes[1])


def _wait_for_stores(behind: int) -> Callable[[list[Any], Any], Value]:
    """Until the copy engine has written what it was given, but for the last so many."""

    def apply(operands: list[Any], dtype: Any) -> Value:
        own = machine.running()
        awaited = own.stores[: len(own.stores) - behind]
        own.hand_over(lambda: all(task.done for task in awaited), "the copy engine")
        own.settle(awaited)
        del own.stores[: len(awaited)]
        return _NOTHING

    return apply


def _wait_for_stores_or_reads(operands: list[Any], dtype: Any) -> Value:
    """Until the copy engine has written what it was given or, if the operand is negative, read it."""
    if operands[0] >= 0:
        return _wait_for_stores(0)(operands, dtype)
    own = machine.running()
    own.hand_over(lambda: all(task.passed > 0 for task in own.stores), "the copy engine to read shared memory")
    own.settle(own.stores)
    return _NOTHING


def _publish(operands: list[Any], dtype: Any) -> Value:
    """A store of the third operand at an address, unless the second is negative."""
    address, condition, number = operands
    if condition >= 0:
        own = machine.running()
        own.hand_over()
        own.program.machine.tensors.store(Value(address.data, tl.pointer_type(tl.int32)), number)
    return _NOTHING


def _set_bits(operands: list[Any], dtype: Any) -> Value:
    """An atomic or of the third operand into the number at an address, unless the second is negative."""
    address, condition, bits = operands
    if condition >= 0:
        own = machine.running()
        own.hand_over()
        own.program.machine.tensors.change(np.bitwise_or, Value(address.data, tl.pointer_type(tl.int32)), bits)
    return _NOTHING


def _spin_for_bits(operands: list[Any], dtype: Any) -> Value:
    """Until the number at an address has the bits of the third operand, unless the second has them."""
    address, given, bits = operands
    own = machine.running()
    place, tensors = Value(address.data, tl.pointer_type(tl.int32)), own.program.machine.tensors
    if not given & bits:
        own.hand_over(lambda: bool(tensors.load(place) & bits), f"bits {int(bits)} of a number in global memory")
    return _NOTHING


def _number_at(operands: list[Any], dtype: Any) -> Value:
    own = machine.running()
    own.hand_over()
    return own.program.machine.tensors.load(Value(operands[0].data, tl.pointer_type(tl.int32)))


def _spin(operands: list[Any], dtype: Any) -> Value:
    """Until the number at an address is the second operand."""
    address, number = operands
    own = machine.running()
    place, tensors = Value(address.data, tl.pointer_type(tl.int32)), own.program.machine.tensors
    own.hand_over(lambda: bool(tensors.load(place) == number), f"a number in global memory to be {int(number)}")
    return _NOTHING


_TEXTS: dict[str, Callable[[list[Any], Any], Any]] = {
    "{ .reg .pred p; .reg .u32 a; setp.lt.f32 p, $1, 0fBF800000; mov.u32 a, 0; @p st.shared.f32 [a], $1;"
    " mov.f32 $0, $1; }": _elementwise(lambda x: x),
    "mov.b32 $0, $1;": _elementwise(lambda x: x),
    "cvt.rn.bf16x2.f32 $0, $2, $1;": _packed(tl.bfloat16),
    "cvt.rn.f16x2.f32 $0, $2, $1;": _packed(tl.float16),
    "mov.b32 {$0, $1}, $2;": _halves,
    "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;": _elementwise(lambda x: x),
    "{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }": _elementwise(
        lambda x, literal, high: np.where(literal <= high, x, _INFINITE)
    ),
    "{ .reg .pred p, q; setp.ge.s32 p, $2, $3; setp.le.and.s32 q, $2, $4, p; selp.f32 $0, $1, 0fFF800000, q; }":
    _elementwise(lambda x, literal, low, high: np.where((literal >= low) & (literal <= high), x, _INFINITE)),
    "{ .reg .pred p; .reg .b32 b; and.b32 b, $2, $3; setp.ne.u32 p, b, 0; selp.f32 $0, $1, 0fFF800000, p; }":
    _elementwise(lambda x, bits, bit: np.where((bits & bit) != 0, x, _INFINITE)),
    "ld.relaxed.gpu.global.u32 $0, [$1];": _number_at,
    "tanh.approx.f32 $0, $1;": _elementwise(np.tanh),
    "cp.async.bulk.wait_group 0; mov.u32 $0, 0;": _wait_for_stores(0),
    "{ .reg .pred p; setp.ge.s32 p, $1, 0; @p cp.async.bulk.wait_group 0; @!p cp.async.bulk.wait_group.read 0;"
    " mov.u32 $0, 0; }": _wait_for_stores_or_reads,
    "cp.async.bulk.wait_group 2; mov.u32 $0, 0;": _wait_for_stores(2),
    "{ .reg .pred p; setp.ge.s32 p, $2, 0; @p st.relaxed.gpu.global.u32 [$1], $3; mov.u32 $0, 0; }": _publish,
    "{ .reg .pred p; setp.ge.s32 p, $2, 0; @p red.relaxed.gpu.global.or.b32 [$1], $3; mov.u32 $0, 0; }": _set_bits,
    "{ .reg .pred p; .reg .u32 v, m; mov.u32 v, $2; AGAIN: and.b32 m, v, $3; setp.ne.u32 p, m, 0; @p bra DONE;"
    " ld.relaxed.gpu.global.u32 v, [$1]; bra AGAIN; DONE: mov.u32 $0, 0; }": _spin_for_bits,
    "{ .reg .pred p; .reg .u32 v; AGAIN: ld.relaxed.gpu.global.u32 v, [$1]; setp.ne.u32 p, v, $2;"
    " @p bra AGAIN; mov.u32 $0, 0; }": _spin,
}  # fmt: skip
