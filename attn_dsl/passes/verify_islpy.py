"""Ask isl, with exact sets of integers, whether a claim holds, in both directions.

A condition that is affine once the divisors are numbers is a set of integer points (`//`, `%`, `min`, `max`, `abs` and
choices included). Eliminating q and k from the pairs of a clause gives exactly the tiles that have such a pair; what
is not among them must be what the claim says, and the other way round. Refused: products and divisions of what has no
number yet, and tensors read at q or k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import islpy as isl

from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    K,
    Node,
    Q,
    Select,
    Unary,
    UnaryOp,
    post_order,
)
from attn_dsl.ir.types import Type
from attn_dsl.passes.monotone import varies

MAX_OPERATIONS = 2_000_000
"""Of isl's own count; some seconds."""

_BINARY: dict[BinaryOp, str] = {
    BinaryOp.ADD: "add",
    BinaryOp.SUB: "sub",
    BinaryOp.MIN: "min",
    BinaryOp.MAX: "max",
    BinaryOp.AND: "intersect",
    BinaryOp.OR: "union",
}
_COMPARE: dict[CompareOp, str] = {
    CompareOp.EQ: "eq_set",
    CompareOp.NE: "ne_set",
    CompareOp.LT: "lt_set",
    CompareOp.LE: "le_set",
    CompareOp.GT: "gt_set",
    CompareOp.GE: "ge_set",
}


class NoAnswer(Exception):
    """A condition is no set of integer points, or one of too many pieces; carries the reason."""


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except isl.Error as error:
        raise NoAnswer(f"gave up: {str(error).splitlines()[0]}") from None


class Islpy:
    """Questions to isl about points whose coordinates are `leaves`: nodes that are not looked into."""

    def __init__(self, leaves: Iterable[Node]) -> None:
        self.leaves = sorted(leaves, key=lambda node: node in (Q, K))
        self.pair = len(self.leaves) - sum(node in (Q, K) for node in self.leaves)
        self.context = isl.Context()
        self.context.set_max_operations(MAX_OPERATIONS)
        self.space = isl.Space.set_alloc(self.context, 0, len(self.leaves))
        self.terms: dict[Node, Any] = {}

    def find(self, conditions: Sequence[Node]) -> dict[Node, int] | None:
        """Values of the leaves at which the conditions hold; None where there are none."""
        with _answering():
            return self._point(self._all(conditions))

    def find_tile(self, tile: Sequence[Node], pair: Sequence[Node]) -> dict[Node, int] | None:
        """Where `tile` holds, and `pair` for no q and k; None where there is no such place."""
        if wrong := [node for node in self.leaves if varies(node) and node not in (Q, K)]:
            raise NoAnswer(f"`{infix(wrong[0])}` is not affine in q and k")
        with _answering():
            return self._point(self._tiles(self._all(tile)).subtract(self._tiles(self._all(pair))))

    def _all(self, conditions: Sequence[Node]) -> Any:
        total = isl.Set.universe(self.space)
        for at, node in enumerate(self.leaves):
            if node.type is Type.BOOL:
                total = total.lower_bound_val(isl.dim_type.set, at, 0).upper_bound_val(isl.dim_type.set, at, 1)
        for condition in conditions:
            total = total.intersect(self.term(condition))
        return total

    def _tiles(self, points: Any) -> Any:
        return points.project_out(isl.dim_type.set, self.pair, len(self.leaves) - self.pair)

    def _point(self, points: Any) -> dict[Node, int] | None:
        if points.is_empty():
            return None
        point = points.sample_point()
        count = points.dim(isl.dim_type.set)
        values = (point.get_coordinate_val(isl.dim_type.set, i).to_python() for i in range(count))
        return {node: bool(v) if node.type is Type.BOOL else v for node, v in zip(self.leaves, values, strict=False)}

    # -- translation --------------------------------------------------------------------------------------------------

    def term(self, root: Node) -> Any:
        """A BOOL node as the set of points at which it is true, an INT node as a piecewise affine function of them."""
        for node in post_order(root):
            if node not in self.terms and all(child in self.terms for child in self._operands(node)):
                self.terms[node] = self._term(node)
        return self.terms[root]

    def _operands(self, node: Node) -> tuple[Node, ...]:
        return () if node in self.leaves else node.children

    def _term(self, node: Node) -> Any:
        if node in self.leaves:
            here = isl.LocalSpace.from_space(self.space)
            value = isl.PwAff.var_on_domain(here, isl.dim_type.set, self.leaves.index(node))
            return value.eq_set(self._number(1)) if node.type is Type.BOOL else value
        match node:
            case Const(value) if node.type is Type.BOOL:
                return isl.Set.universe(self.space) if value else isl.Set.empty(self.space)
            case Const(value):
                return self._number(int(value))
            case Unary(op, x):
                return self._unary(op, self.terms[x])
            case Binary(BinaryOp.FLOORDIV | BinaryOp.MOD | BinaryOp.MUL | BinaryOp.POW as op, x, y):
                return self._nonlinear(node, op, x, y)
            case Binary(op, x, y):
                return getattr(self.terms[x], _BINARY[op])(self.terms[y])
            case Compare(op, x, y) if x.type is Type.BOOL:
                return self._choice(self.terms[x], self.terms[y], self.terms[y].complement(), op is CompareOp.EQ)
            case Compare(op, x, y):
                return getattr(self.terms[x], _COMPARE[op])(self.terms[y])
            case Select(condition, x, y) if node.type is Type.BOOL:
                return self._choice(*(self.terms[n] for n in (condition, x, y)))
            case Select(condition, x, y):
                return self.terms[condition].indicator_function().cond(self.terms[x], self.terms[y])
            case Cast(x):
                return self.terms[x].indicator_function()
            case _:
                raise NoAnswer(f"`{infix(node)}` is not affine")

    def _number(self, value: int) -> Any:
        return isl.PwAff(isl.Aff.zero_on_domain(isl.LocalSpace.from_space(self.space)).add_constant_val(value))

    @staticmethod
    def _choice(condition: Any, x: Any, y: Any, wanted: bool = True) -> Any:
        chosen = condition.intersect(x).union(condition.complement().intersect(y))
        return chosen if wanted else chosen.complement()

    def _unary(self, op: UnaryOp, x: Any) -> Any:
        match op:
            case UnaryOp.NEG:
                return x.neg()
            case UnaryOp.NOT:
                return x.complement()
            case UnaryOp.ABS:
                return x.max(x.neg())
            case _:
                assert op is UnaryOp.SIGN, op
                return x.min(self._number(1)).max(self._number(-1))

    def _nonlinear(self, node: Node, op: BinaryOp, x: Node, y: Node) -> Any:
        """A product with a number, or a division by one."""
        number = self._value(y)
        match op:
            case BinaryOp.MUL if number is not None:
                return self.terms[x].scale_val(number)
            case BinaryOp.MUL if (factor := self._value(x)) is not None:
                return self.terms[y].scale_val(factor)
            case BinaryOp.FLOORDIV if number is not None and number > 0:
                return self.terms[x].scale_down_val(number).floor()
            case BinaryOp.MOD if number is not None and number > 0:
                return self.terms[x].mod_val(number)
            case _:
                raise NoAnswer(f"`{infix(node)}` is not affine")

    def _value(self, node: Node) -> int | None:
        """The value of a node that is a number."""
        term = self.terms[node]
        is_number = term.n_piece() == 1 and term.is_cst()
        return term.get_pieces()[0][1].get_constant_val().to_python() if is_number else None
