"""Separate the additive terms of the score by what they depend on, so that each is computed at its own level.

    score  =  coefficient * s  +  head(b, h)  +  row(b, h, q)  +  column(b, h, k)  +  affine terms  +  residual

Softmax does not change when a row is shifted: whatever depends on `(b, h, q)` alone leaves the inner loop, and comes
back only where the log-sum-exp is returned or a sink joins the denominator. ALiBi, `s + slope[h] * (k - q)`, is left
with the column term `slope[h] * k`.

A column term like that grows with the position and would cost digits, so a kernel counts k from a position of its tile
(see `Terms.loop`): `slope[h] * (k - q0)` is small near the diagonal and its vector over the tile is the same for every
tile up to a scalar.

The identity holds for the reals; in floats the regrouped sum differs by rounding. Nothing is taken out of a `Select`, a
non-linear function of the score, or a sum of more than `LIMIT` terms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import SCORE, Binary, BinaryOp, Const, K, Node, Q, Unary, UnaryOp
from attn_dsl.ir.types import Type
from attn_dsl.passes.simplify import Simplifier

LIMIT = 64
ZERO, ONE = Const(0.0), Const(1.0)
_HEAD, _ROW, _COLUMN = frozenset("bh"), frozenset("bhq"), frozenset("bhk")


@dataclass(frozen=True)
class Affine:
    """`factor * (q_step * q + k_step * k)`; `factor` is FLOAT over b and h, the steps are integers."""

    factor: Node
    q_step: int
    k_step: int

    def row(self, origin: Node) -> Node:
        """What is left for the row when k counts from `origin`: `factor * (q_step * q + k_step * origin)`."""
        return _mul(self.factor, ir.Cast(_steps((self.q_step, Q), (self.k_step, origin)), Type.FLOAT))

    def column(self, origin: Node) -> Node:
        """`factor * k_step * (k - origin)`."""
        return _mul(self.factor, ir.Cast(_steps((self.k_step, Binary(BinaryOp.SUB, K, origin))), Type.FLOAT))


@dataclass(frozen=True)
class Terms:
    """The separated score; every field is FLOAT, and 0.0 where there is no such term.

    coefficient  of the incoming score; without the score itself, of any dependence
    head         over b, h
    row          over b, h, q; the affine part of it stands in `affine`
    column       over b, h, k; likewise
    affine       terms linear in the positions, one for each factor
    residual     the rest, of any dependence; reads the incoming score where the score is not linear in it
    """

    coefficient: Node
    head: Node
    row: Node
    column: Node
    affine: tuple[Affine, ...]
    residual: Node

    @property
    def linear(self) -> bool:
        """Whether the score is linear in the incoming score, so that `scale * log2(e)` folds into its coefficient."""
        return "score" not in self.residual.depends

    def loop(self, origin: Node) -> Node:
        """What a kernel computes for each pair: `score == loop(origin) + dropped(origin)` over the reals.

        `origin` is an INT that does not vary with k, such as `Var("q0")` (the first query of the tile): k is counted
        from there, which keeps the affine terms small.
        """
        columns = [term.column(origin) for term in self.affine if term.k_step]
        return _simple(_sum([_mul(self.coefficient, SCORE), self.column, *columns, self.residual]))

    def dropped(self, origin: Node) -> Node:
        """What depends on the row alone and cancels in softmax.

        With `L` the log-sum-exp over `loop(origin)`, the true one is `L + dropped(origin)`; a sink joins the loop's
        denominator as `sink - dropped(origin)`. Where `dropped` is minus infinity the row sees nothing: output 0.
        Counted from the row itself, a term of q - k leaves nothing.
        """
        affine = [term for term in self.affine if not (origin is Q and term.q_step + term.k_step == 0)]
        return _simple(_sum([self.head, self.row, *(term.row(origin) for term in affine)]))

    def text(self) -> str:
        """One line a term, for people."""
        return "\n".join(f"{name:12} {infix(node)}" for name, node in self._named() if node is not ZERO) + "\n"

    def _named(self) -> list[tuple[str, Node]]:
        affine = (_mul(t.factor, ir.Cast(_steps((t.k_step, K), (t.q_step, Q)), Type.FLOAT)) for t in self.affine)
        return [
            ("coefficient", self.coefficient),
            ("head", self.head),
            ("row", self.row),
            ("column", self.column),
            *(("affine", _simple(term)) for term in affine),
            ("residual", self.residual),
        ]


def separate(score: Node) -> Terms:
    """The terms of a FLOAT expression over the incoming score."""
    groups: dict[str, list[Node]] = defaultdict(list)
    steps: dict[Node, dict[Node, int]] = defaultdict(lambda: defaultdict(int))
    for term in _terms(score):
        position = term.position()
        if position is not None:
            steps[_simple(term.without(position).product(stepped=False))][position.x] += term.step
        elif term.factors.count(SCORE) == 1 and "score" not in term.without(SCORE).depends:
            groups["coefficient"].append(term.without(SCORE).product())
        else:
            groups[_level(term.depends)].append(term.product())
    affine = (Affine(factor, at[Q], at[K]) for factor, at in steps.items())
    return Terms(
        **{name: _simple(_sum(groups[name])) for name in ("coefficient", "head", "row", "column", "residual")},
        affine=tuple(term for term in affine if term.q_step or term.k_step),
    )


def _level(depends: frozenset[str]) -> str:
    if depends <= _HEAD:
        return "head"
    if depends <= _ROW:
        return "row"
    return "column" if depends <= _COLUMN else "residual"


@dataclass(frozen=True)
class _Term:
    """`step` times the product of FLOAT `factors`."""

    step: int
    factors: tuple[Node, ...] = ()

    @property
    def depends(self) -> frozenset[str]:
        return frozenset[str]().union(*(factor.depends for factor in self.factors))

    def times(self, other: _Term) -> _Term:
        return _Term(self.step * other.step, self.factors + other.factors)

    def without(self, factor: Node) -> _Term:
        at = self.factors.index(factor)
        return _Term(self.step, self.factors[:at] + self.factors[at + 1 :])

    def position(self) -> ir.Cast | None:
        """`float(q)` or `float(k)`, where the term is that times what depends on b and h."""
        for factor in self.factors:
            if isinstance(factor, ir.Cast) and factor.x in (Q, K) and self.without(factor).depends <= _HEAD:
                return factor
        return None

    def product(self, stepped: bool = True) -> Node:
        product: Node = Const(float(self.step)) if stepped else ONE
        return reduce(_mul, self.factors, product)


def _terms(root: Node) -> list[_Term]:
    """The sum that an expression is, written out; what is no sum is one term."""
    known: dict[Node, list[_Term]] = {}
    for node in ir.post_order(root):
        terms = _expanded(node, known)
        known[node] = [_Term(1, (node,))] if terms is None or len(terms) > LIMIT else terms
    return known[root]


def _expanded(node: Node, known: dict[Node, list[_Term]]) -> list[_Term] | None:
    match node:
        case Const(value) if value == 0:
            return []
        case Const(value) if node.type is Type.INT:
            return [_Term(int(value))]
        case Binary(BinaryOp.ADD, x, y):
            return known[x] + known[y]
        case Binary(BinaryOp.SUB, x, y):
            return known[x] + [_negated(term) for term in known[y]]
        case Unary(UnaryOp.NEG, x):
            return [_negated(term) for term in known[x]]
        case Binary(BinaryOp.MUL, x, y) if 1 in (len(known[x]), len(known[y])):
            return [a.times(b) for a in known[x] for b in known[y]] or None
        case Binary(BinaryOp.DIV, x, y) if y.depends <= _HEAD:
            inverse = _Term(1, (Binary(BinaryOp.DIV, ONE, y),))
            return [term.times(inverse) for term in known[x]] or None
        case ir.Cast(x) if x.type is Type.INT:
            return [_Term(t.step, tuple(ir.Cast(f, Type.FLOAT) for f in t.factors)) for t in known[x]]
        case _:
            return None


def _negated(term: _Term) -> _Term:
    return _Term(-term.step, term.factors)


def _mul(x: Node, y: Node) -> Node:
    if ZERO in (x, y):
        return ZERO
    if isinstance(y, Binary) and y.op is BinaryOp.DIV and y.x is ONE:
        return Binary(BinaryOp.DIV, x, y.y)
    return y if x is ONE else x if y is ONE else Binary(BinaryOp.MUL, x, y)


def _sum(terms: Iterable[Node]) -> Node:
    present = [term for term in terms if term is not ZERO]
    return reduce(lambda x, y: Binary(BinaryOp.ADD, x, y), present) if present else ZERO


def _steps(*terms: tuple[int, Node]) -> Node:
    total: Node = Const(0)
    for step, node in terms:
        total = Binary(BinaryOp.ADD, total, Binary(BinaryOp.MUL, node, Const(step)))
    return total


def _simple(node: Node) -> Node:
    return Simplifier()(node)
