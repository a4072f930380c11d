"""What is asked about a proof: conditions of the IR that must never hold, and the tiles and pairs to ask it of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import permutations

from attn_dsl.ir.nodes import (
    FALSE,
    TRUE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    Index,
    K,
    Load,
    Node,
    Param,
    Q,
    Reduce,
    Size,
    Unary,
    UnaryOp,
    Var,
    post_order,
    rewrite,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import InRange, Nondecreasing, Tensor
from attn_dsl.passes.fold import folded
from attn_dsl.passes.logic import divisors
from attn_dsl.passes.monotone import K0, K1, Q0, Q1, varies
from attn_dsl.passes.prove import Claim, Proof
from attn_dsl.passes.unroll import unroll_node

UNROLL = 64
"""Reductions of at most so many terms are written out; longer ones are taken as they are."""
ZERO, ONE = Const(0), Const(1)


@dataclass(frozen=True)
class Question:
    """Of "sound" and "cover": does `goal` hold on no pair? Of "exact": has each tile with `goal` a pair of `clause`?"""

    name: str
    kind: str
    claim: Claim | None
    goal: Node
    clause: Node
    positive: frozenset[Node]
    """Nodes that the call has checked to be at least 1."""
    tensors: Mapping[str, Tensor]

    def given(self, values: Mapping[Param, Const]) -> Question:
        """The same question with numbers for parameters."""

        def bind(node: Node) -> Node:
            node = values.get(node, node) if isinstance(node, Param) else node
            return folded(node)

        goal, clause = rewrite(self.goal, bind), rewrite(self.clause, bind)
        return replace(self, goal=goal, clause=clause, positive=frozenset(rewrite(n, bind) for n in self.positive))

    @property
    def parameters(self) -> list[Param]:
        return [node for node in post_order(self.goal, self.clause, *self.positive) if isinstance(node, Param)]

    @cached_property
    def tile(self) -> list[Node]:
        """What holds of every tile: its first and last positions, indices, sizes, divisors, promises of tensors."""
        return self._domain([load for load in self._loads if not varies(load)])

    @cached_property
    def pair(self) -> list[Node]:
        """The same, and that q and k are within the tile."""
        bounds = (Q0, Q), (Q, Q1), (K0, K), (K, K1)
        return [*self._domain(self._loads), *(_at_most(low, high) for low, high in bounds)]

    @property
    def _loads(self) -> list[Load]:
        return [node for node in _leaves(self.goal, self.clause) if isinstance(node, Load)]

    def _domain(self, loads: Sequence[Load]) -> list[Node]:
        promises = list(_promises(loads, self.tensors))
        leaves = _leaves(self.goal, self.clause, *self.positive, *promises)
        bounds: list[tuple[Node, Node]] = [(ZERO, Q0), (Q0, Q1), (ZERO, K0), (K0, K1)]
        bounds += [(ZERO, n) for n in leaves if isinstance(n, Index | Var) and n not in (Q, K)]
        bounds += [(ONE, n) for n in leaves if isinstance(n, Size)] + [(ONE, n) for n in self.positive]
        return [*(_at_most(low, high) for low, high in dict.fromkeys(bounds)), *promises]

    @cached_property
    def leaves(self) -> list[Node]:
        return _leaves(self.goal, self.clause, *self.pair)


def questions(proof: Proof) -> Iterator[Question]:
    """All that a proof claims."""
    mask = unroll_node(proof.variant.mask, UNROLL)
    known = frozenset(divisors(mask)), {tensor.name: tensor for tensor in proof.variant.tensors}
    for claim in proof.claims:
        condition, clause = (unroll_node(node, UNROLL) for node in (claim.condition, claim.clause_node))
        if condition is not FALSE:
            yield Question("sound", claim.kind, claim, _and(condition, clause), TRUE, *known)
        if claim.exact:
            yield Question("exact", claim.kind, claim, _not(condition), clause, *known)
    for sides, kept, kind in ((proof.visit, mask, "empty"), (proof.masked, _not(mask), "full")):
        all_of_them = [unroll_node(side.claim.clause_node, UNROLL) for side in sides]
        exact = [clause for side, clause in zip(sides, all_of_them, strict=True) if side.claim.exact]
        goal = _or(_and(kept, _not(_any(all_of_them))), _and(_any(exact), _not(kept)))
        yield Question("cover", kind, None, goal, TRUE, *known)


def smaller(size: int) -> list[Node]:
    """That a tile has fewer than `size` rows and columns."""
    return [_at_most(end, Binary(BinaryOp.ADD, first, Const(size - 1))) for first, end in ((Q0, Q1), (K0, K1))]


def _promises(loads: Sequence[Load], tensors: Mapping[str, Tensor]) -> Iterator[Node]:
    """What the declarations of tensors say of some of their elements."""
    for load in loads:
        for promise in tensors[load.tensor].promises:
            if isinstance(promise, InRange):
                yield _at_most(promise.low, load)
                yield Compare(CompareOp.LT, load, promise.high)
    for x, y in permutations(loads, 2):
        for promise in tensors[x.tensor].promises if x.tensor == y.tensor else ():
            if isinstance(promise, Nondecreasing):
                ascending = [
                    (_at_most if axis == promise.axis else _same)(i, j)
                    for axis, (i, j) in enumerate(zip(x.indices, y.indices, strict=True))
                ]
                yield _or(_not(reduce(_and, ascending)), _at_most(x, y))


def _leaves(*roots: Node) -> list[Node]:
    """What the solvers take as it is: what has no operands, an element of a tensor, what is made of floats."""
    found: dict[Node, None] = {}
    for node in _visible(*roots):
        if _is_leaf(node):
            found[node] = None
    return list(found)


def _visible(*roots: Node) -> Iterator[Node]:
    """The nodes above and at the leaves, and the indices of tensor elements."""
    seen: set[Node] = set()
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if not _is_leaf(node) or isinstance(node, Load):
                stack += reversed(node.children)


def _is_leaf(node: Node) -> bool:
    if isinstance(node, Const):
        return False
    return not node.children or isinstance(node, Load | Reduce) or any(c.type is Type.FLOAT for c in node.children)


def _at_most(x: Node, y: Node) -> Node:
    return Compare(CompareOp.LE, x, y)


def _same(x: Node, y: Node) -> Node:
    return Compare(CompareOp.EQ, x, y)


def _and(x: Node, y: Node) -> Node:
    return Binary(BinaryOp.AND, x, y)


def _or(x: Node, y: Node) -> Node:
    return Binary(BinaryOp.OR, x, y)


def _not(x: Node) -> Node:
    return Unary(UnaryOp.NOT, x)


def _any(nodes: Sequence[Node]) -> Node:
    return reduce(_or, nodes) if nodes else FALSE
