"""The score as a function of the bare product of query and key, in base 2, with what is uniform gathered in front.

    log2(e) * cap * tanh(scale * product / cap)   becomes   (log2(e) * cap) * tanh((scale / cap) * product)

Factors that are the same for a whole program (over `b`, `h`, parameters and sizes) are multiplied once; each element
pays one multiplication. Identities of the reals: they move the last bits of a float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from attn_dsl.ir.nodes import SCORE, Binary, BinaryOp, Const, Node, Param, Select, Unary, UnaryOp, with_children
from attn_dsl.ir.types import Type

SCALE = Param("score scale", Type.FLOAT)
"""The softmax scale, which kernels append to the scalars; the space keeps it apart from every name of a text."""
LOG2E = Const(math.log2(math.e))
ONE = Const(1.0)


def uniform(node: Node) -> bool:
    return node.depends <= {"b", "h"}


@dataclass
class Gatherer:
    """Rewrites any number of expressions over the incoming score into such over the bare product."""

    done: dict[Node, tuple[Node, Node]] = field(default_factory=dict)

    def __call__(self, node: Node) -> Node:
        """An equal of `node`, in which SCORE is the bare product."""
        return times(*self.factors(node))

    def scaled(self, node: Node, factor: Node) -> Node:
        """factor * node, the factor pushed through sums and choices to where it meets others."""
        match node:
            case Binary(BinaryOp.ADD | BinaryOp.SUB as op, x, y):
                return Binary(op, self.scaled(x, factor), self.scaled(y, factor))
            case Unary(UnaryOp.NEG, x):
                return Unary(UnaryOp.NEG, self.scaled(x, factor))
            case Select(condition, x, y):
                return Select(condition, self.scaled(x, factor), self.scaled(y, factor))
            case _:
                front, rest = self.factors(node)
                return times(times(factor, front), rest)

    def factors(self, node: Node) -> tuple[Node, Node]:
        """(u, r) with u uniform and u * r = node."""
        known = self.done.get(node)
        if known is None:
            known = self.done[node] = self._factors(node)
        return known

    def _factors(self, node: Node) -> tuple[Node, Node]:
        if node is SCORE:
            return SCALE, SCORE
        if node.type is not Type.FLOAT:
            return ONE, with_children(node, tuple(self(child) for child in node.children))
        if uniform(node):
            return node, ONE
        match node:
            case Binary(BinaryOp.MUL, x, y):
                (a, s), (b, t) = self.factors(x), self.factors(y)
                return times(a, b), times(s, t)
            case Binary(BinaryOp.DIV, x, y) if uniform(y):
                front, rest = self.factors(x)
                return Binary(BinaryOp.DIV, front, y), rest
            case Unary(UnaryOp.NEG, x):
                front, rest = self.factors(x)
                return Unary(UnaryOp.NEG, front), rest
            case _:
                return ONE, with_children(node, tuple(self(child) for child in node.children))


def times(x: Node, y: Node) -> Node:
    if x is ONE or y is ONE:
        return y if x is ONE else x
    if isinstance(x, Const) and isinstance(y, Const):
        return Const(float(x.value) * float(y.value))
    return Binary(BinaryOp.MUL, x, y)
