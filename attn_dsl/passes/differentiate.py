"""Symbolic reverse-mode differentiation of the score and the sink.

With `dS` the gradient of the loss at the modified logit, a kernel's backward pass needs

    d incoming score   = dS * gradient.d_score
    d tensor[indices] += dS * partial          for each LoadGradient(load = tensor[indices], partial)
    d parameter       += dS * partial          for each ParameterGradient

where the partials are expressions of the same leaves as the score. They share nodes with it, so a kernel that computes
both computes the common part once. What is under the mask must be dropped by a select, not by `dS = 0`: a partial may
be nan there.

Conventions are those of the evaluator, hence of torch: a tie of `min` or `max` gives half to each side; `abs`, `sign`
and `relu` have derivative 0 at 0; `x ** 0` has derivative 0; floor division is constant. A branch not taken has no
effect, even where its own derivative is infinite. What stands in an index or in a condition gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import cast

from typing_extensions import assert_never

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Const, Load, Node, Param, UnaryOp
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Variant
from attn_dsl.passes.unroll import unroll_node

ZERO, ONE, HALF = Const(0.0), Const(1.0), Const(0.5)


@dataclass(frozen=True)
class LoadGradient:
    """`partial` is the derivative with respect to the element that `load` reads; one for each distinct load."""

    load: Load
    partial: Node


@dataclass(frozen=True)
class ParameterGradient:
    """`partial` is the derivative with respect to a float parameter."""

    parameter: Param
    partial: Node


@dataclass(frozen=True)
class Gradient:
    """Partial derivatives of one FLOAT expression; those that are zero everywhere are left out."""

    d_score: Node
    loads: tuple[LoadGradient, ...]
    parameters: tuple[ParameterGradient, ...]

    @property
    def roots(self) -> Iterator[Node]:
        yield self.d_score
        yield from (item.partial for item in self.loads)
        yield from (item.partial for item in self.parameters)


@dataclass(frozen=True)
class Gradients:
    """The derivatives that a backward kernel needs; `sink` is None where the variant has none."""

    score: Gradient
    sink: Gradient | None


def differentiate(variant: Variant) -> Gradients:
    """Differentiate score and sink with respect to the incoming score, float look-ups and float parameters."""
    return Gradients(gradient(variant.score), None if variant.sink is None else gradient(variant.sink))


def gradient(root: Node) -> Gradient:
    """The partial derivatives of a FLOAT expression. Reductions in it are written out first."""
    assert root.type is Type.FLOAT
    adjoints = _adjoints(unroll_node(root))
    wanted = {node: adjoint.guarded() for node, adjoint in adjoints.items()}
    return Gradient(
        d_score=wanted.get(ir.SCORE, ZERO),
        loads=tuple(LoadGradient(n, d) for n, d in wanted.items() if isinstance(n, Load) and d is not ZERO),
        parameters=tuple(ParameterGradient(n, d) for n, d in wanted.items() if isinstance(n, Param) and d is not ZERO),
    )


@dataclass(frozen=True)
class _Adjoint:
    """A derivative that is `value` where all conditions of `guard` (outermost first) hold and zero elsewhere.

    The guard stays apart until the end, since `select(c, 1, 0) * inf` is not zero, but in `select(c, 1 * inf, 0)` the
    branch that is not taken is never asked.
    """

    guard: tuple[Node, ...]
    value: Node

    def guarded(self) -> Node:
        if not self.guard or self.value is ZERO:
            return self.value
        return ir.Select(reduce(lambda x, y: ir.Binary(BinaryOp.AND, x, y), self.guard), self.value, ZERO)

    def times(self, factor: Node, *conditions: Node) -> _Adjoint:
        return _Adjoint(tuple(dict.fromkeys(self.guard + conditions)), _mul(self.value, factor))

    def over(self, divisor: Node) -> _Adjoint:
        return _Adjoint(self.guard, _div(self.value, divisor))


def _adjoints(root: Node) -> dict[Node, _Adjoint]:
    """The adjoint of every leaf that wants one, in the order of first use."""
    order = list(ir.post_order(root))
    active = _active(order)
    incoming: dict[Node, list[_Adjoint]] = {root: [_Adjoint((), ONE)]}
    leaves: dict[Node, _Adjoint] = {}
    for node in reversed(order):
        if node not in active or node not in incoming:
            continue
        adjoint = reduce(_plus, incoming.pop(node))
        if isinstance(node, ir.Score | Load | Param):
            leaves[node] = adjoint
            continue
        for child, contribution in _pull_back(node, adjoint):
            if child in active and contribution.value is not ZERO:
                incoming.setdefault(child, []).append(contribution)
    return {leaf: leaves[leaf] for leaf in order if leaf in leaves}


def _active(order: list[Node]) -> set[Node]:
    """The FLOAT nodes over the score, a float look-up or a float parameter: where a derivative can flow."""
    active: set[Node] = set()
    for node in order:
        leaf = isinstance(node, ir.Score | Load | Param)
        if node.type is Type.FLOAT and (leaf or any(child in active for child in node.children)):
            active.add(node)
    return active


def _plus(x: _Adjoint, y: _Adjoint) -> _Adjoint:
    common = tuple(condition for condition in x.guard if condition in y.guard)
    only_x = tuple(condition for condition in x.guard if condition not in common)
    only_y = tuple(condition for condition in y.guard if condition not in common)
    if len(only_x) == len(only_y) == 1 and only_y[0] is _not(only_x[0]):  # the two branches of one select
        if isinstance(only_x[0], ir.Unary):
            only_x, x, y = only_y, y, x
        return _Adjoint(common, ir.Select(only_x[0], x.value, y.value))
    return _Adjoint(common, _add(_Adjoint(only_x, x.value).guarded(), _Adjoint(only_y, y.value).guarded()))


def _pull_back(node: Node, d: _Adjoint) -> Iterator[tuple[Node, _Adjoint]]:
    """What each operand of a node receives when the node receives `d`."""
    match cast(ir.Expr, node):
        case ir.Unary(op, x):
            yield from ((x, c) for c in _unary(op, x, node, d))
        case ir.Binary(op, x, y):
            yield from _binary(op, x, y, node, d)
        case ir.Select(condition, x, y):
            yield x, d.times(ONE, condition)
            yield y, d.times(ONE, _not(condition))
        case ir.Cast() | ir.Compare() | ir.Const() | ir.Index() | ir.Size() | ir.Var():
            return
        case ir.Score() | ir.Load() | ir.Param():
            raise AssertionError("leaves are collected, not differentiated")
        case ir.Reduce():
            raise AssertionError("reductions are written out before")
        case unreachable:
            assert_never(unreachable)


def _unary(op: UnaryOp, x: Node, y: Node, d: _Adjoint) -> Iterator[_Adjoint]:
    """The law of each function, `x` the operand and `y = op(x)` the result."""
    match op:
        case UnaryOp.NEG:
            yield d.times(Const(-1.0))
        case UnaryOp.ABS:
            yield d.times(_call(UnaryOp.SIGN, x))
        case UnaryOp.SIGN | UnaryOp.FLOOR | UnaryOp.CEIL | UnaryOp.NOT:
            return
        case UnaryOp.SQRT:  # 1 / (2 sqrt x)
            yield d.times(HALF).over(y)
        case UnaryOp.RSQRT:  # -x^(-3/2) / 2
            yield d.times(_mul(Const(-0.5), _mul(y, _mul(y, y))))
        case UnaryOp.EXP:
            yield d.times(y)
        case UnaryOp.EXP2:
            yield d.times(_mul(y, Const(math.log(2))))
        case UnaryOp.LOG:
            yield d.over(x)
        case UnaryOp.LOG2:
            yield d.times(Const(1 / math.log(2))).over(x)
        case UnaryOp.LOG1P:
            yield d.over(_add(ONE, x))
        case UnaryOp.SIN:
            yield d.times(_call(UnaryOp.COS, x))
        case UnaryOp.COS:
            yield d.times(_call(UnaryOp.NEG, _call(UnaryOp.SIN, x)))
        case UnaryOp.TAN:
            yield d.times(_add(ONE, _mul(y, y)))
        case UnaryOp.TANH:
            yield d.times(_sub(ONE, _mul(y, y)))
        case UnaryOp.ERF:  # 2 / sqrt(pi) exp(-x^2)
            yield d.times(_mul(Const(2 / math.sqrt(math.pi)), _call(UnaryOp.EXP, _call(UnaryOp.NEG, _mul(x, x)))))
        case UnaryOp.SIGMOID:
            yield d.times(_mul(y, _sub(ONE, y)))
        case UnaryOp.SILU:  # sigma (1 + x (1 - sigma))
            sigma = _call(UnaryOp.SIGMOID, x)
            yield d.times(_mul(sigma, _add(ONE, _mul(x, _sub(ONE, sigma)))))
        case UnaryOp.RELU:
            yield d.times(ONE, ir.Compare(CompareOp.GT, x, ZERO))
        case UnaryOp.GELU:  # Phi(x) + x phi(x)
            yield d.times(_add(_normal_cdf(x), _mul(x, _normal_density(x))))
        case unreachable:
            assert_never(unreachable)


def _binary(op: BinaryOp, x: Node, y: Node, z: Node, d: _Adjoint) -> Iterator[tuple[Node, _Adjoint]]:
    """The law of each operator, `z = op(x, y)`."""
    match op:
        case BinaryOp.ADD:
            yield x, d
            yield y, d
        case BinaryOp.SUB:
            yield x, d
            yield y, d.times(Const(-1.0))
        case BinaryOp.MUL:
            yield x, d.times(y)
            yield y, d.times(x)
        case BinaryOp.DIV:
            yield x, d.over(y)
            yield y, d.times(_call(UnaryOp.NEG, z)).over(y)
        case BinaryOp.MOD:  # x - y floor(x / y)
            yield x, d
            yield y, d.times(_call(UnaryOp.NEG, ir.Binary(BinaryOp.FLOORDIV, x, y)))
        case BinaryOp.POW:
            yield from _power(x, y, z, d)
        case BinaryOp.MIN | BinaryOp.MAX:
            wins = CompareOp.LE if op is BinaryOp.MIN else CompareOp.GE
            share = ir.Select(ir.Compare(CompareOp.EQ, x, y), HALF, ONE)
            yield x, d.times(share, ir.Compare(wins, x, y))
            yield y, d.times(share, ir.Compare(wins, y, x))
        case BinaryOp.FLOORDIV | BinaryOp.AND | BinaryOp.OR:
            return
        case unreachable:
            assert_never(unreachable)


def _power(x: Node, y: Node, z: Node, d: _Adjoint) -> Iterator[tuple[Node, _Adjoint]]:
    """`y x^(y-1)`, zero where y = 0; `x^y log x`, zero where x = 0 and y >= 0."""
    if isinstance(y, Const):
        if y.value:
            yield x, d.times(_mul(y, ir.Binary(BinaryOp.POW, x, Const(y.value - 1))))
        return
    lowered = ir.Binary(BinaryOp.POW, x, _sub(y, ONE))
    yield x, d.times(_mul(y, lowered), ir.Compare(CompareOp.NE, y, ZERO))
    vanishes = ir.Binary(BinaryOp.AND, ir.Compare(CompareOp.EQ, x, ZERO), ir.Compare(CompareOp.GE, y, ZERO))
    yield y, d.times(_mul(z, _call(UnaryOp.LOG, x)), _not(vanishes))


def _normal_cdf(x: Node) -> Node:
    return _mul(HALF, _add(ONE, _call(UnaryOp.ERF, _mul(x, Const(1 / math.sqrt(2))))))


def _normal_density(x: Node) -> Node:
    return _mul(Const(1 / math.sqrt(2 * math.pi)), _call(UnaryOp.EXP, _mul(Const(-0.5), _mul(x, x))))


def _call(op: UnaryOp, x: Node) -> Node:
    return ir.Unary(op, x)


def _add(x: Node, y: Node) -> Node:
    return y if x is ZERO else x if y is ZERO else ir.Binary(BinaryOp.ADD, x, y)


def _sub(x: Node, y: Node) -> Node:
    return ir.Binary(BinaryOp.SUB, x, y)


def _mul(x: Node, y: Node) -> Node:
    return y if x is ONE else x if y is ONE else ir.Binary(BinaryOp.MUL, x, y)


def _div(x: Node, y: Node) -> Node:
    """`x / y`; a factor that the chain rule multiplies and then divides by cancels, as in `c * tanh(s / c)`."""
    if isinstance(x, ir.Binary) and x.op is BinaryOp.MUL and y in (x.x, x.y):
        return x.y if x.x is y else x.x
    return ONE if x is y else ir.Binary(BinaryOp.DIV, x, y)


def _not(condition: Node) -> Node:
    """The negation; a Unary of type BOOL is itself a negation."""
    return condition.x if isinstance(condition, ir.Unary) else _call(UnaryOp.NOT, condition)
