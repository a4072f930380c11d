"""Whether the integers of a call fit 32 bits: interval arithmetic over the actual sizes and parameters.

Elements of captured integer tensors are taken to lie less than 2 ** 30 from zero, unless their type is narrower, and
positions that a tensor of offsets gives below 2 ** 30.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Const,
    Index,
    Load,
    Node,
    Param,
    Select,
    Size,
    Unary,
    UnaryOp,
    post_order,
)
from attn_dsl.ir.types import Type

LIMIT = 2**31 - 1
LOADED = 2**30


def fits(roots: Iterable[Node], values: Mapping[Node, int], highest: int) -> bool:
    """Whether no integer under `roots` can leave 32 bits. `values` gives parameters and sizes; positions go up to
    `highest`. Unknown values (reductions, float roundings) are taken to be small, as positions are."""
    return _fits(roots, {node: (value, value) for node, value in values.items()}, highest)


def position_bits(q_offset: object, q_len: int, kv_len: int) -> int:
    """Positions are below 2 ** this; `q_offset` is an int, or a tensor whose values are not looked at."""
    last = q_offset + q_len if isinstance(q_offset, int) else LOADED - 1
    return max(last, kv_len).bit_length()


def reach(roots: Iterable[Node]) -> int:
    """The largest power of two such that no integer under `roots` leaves 32 bits while positions, sizes and the
    magnitudes of integer parameters stay below it; at least 1."""
    roots = tuple(roots)
    for bits in range(30, 0, -1):
        ranges: dict[Node, tuple[int, int]] = {}
        for node in post_order(*roots):
            if isinstance(node, Param | Size) and node.type is Type.INT:
                ranges[node] = (1 if isinstance(node, Size) else -(2**bits), 2**bits)
        if _fits(roots, ranges, 2**bits):
            return 1 << bits
    return 1


def _fits(roots: Iterable[Node], values: Mapping[Node, tuple[int, int]], highest: int) -> bool:
    found: dict[Node, tuple[int, int]] = {}
    for node in post_order(*roots):
        if node.type is not Type.INT:
            continue
        low, high = found[node] = _interval(node, values, highest, found)
        if low < -LIMIT or high > LIMIT:
            return False
    return True


def _interval(
    node: Node, values: Mapping[Node, tuple[int, int]], highest: int, found: Mapping[Node, tuple[int, int]]
) -> tuple[int, int]:
    match node:
        case Const(value):
            return int(value), int(value)
        case Param() | Size():
            return values.get(node, (0, 0))
        case Index():
            return 0, highest
        case Load():
            return 1 - LOADED, LOADED - 1
        case Cast():
            return 0, 1
        case Unary(UnaryOp.NEG, x):
            return -found[x][1], -found[x][0]
        case Unary(UnaryOp.ABS, x):
            return 0, max(abs(found[x][0]), abs(found[x][1]))
        case Select(_, x, y):
            return min(found[x][0], found[y][0]), max(found[x][1], found[y][1])
        case Binary(op, x, y):
            return _binary(op, found[x], found[y])
        case _:
            return -highest, highest


def _binary(op: BinaryOp, x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int]:
    match op:
        case BinaryOp.ADD:
            return x[0] + y[0], x[1] + y[1]
        case BinaryOp.SUB:
            return x[0] - y[1], x[1] - y[0]
        case BinaryOp.MUL:
            corners = [a * b for a in x for b in y]
            return min(corners), max(corners)
        case BinaryOp.MIN:
            return min(x[0], y[0]), min(x[1], y[1])
        case BinaryOp.MAX:
            return max(x[0], y[0]), max(x[1], y[1])
        case BinaryOp.MOD:
            return 0, max(y[1] - 1, 0)
        case BinaryOp.POW:
            bound = max(abs(x[0]), abs(x[1])) ** min(max(y[1], 0), 64)
            return -bound, bound
        case _:  # floor division: no farther from zero than the dividend
            return min(x[0], 0), max(x[1], 0)
