"""Apply constant folding and the rules of `rules` until nothing applies.

Nodes are simplified operands first, and what a rule makes is built from simplified parts, so one walk reaches the fixed
point. Common subexpressions need no pass: equal nodes are one node.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import Compare, Const, Node, Param
from attn_dsl.ir.variant import Variant, rewrite_variant
from attn_dsl.passes.fold import fold
from attn_dsl.passes.ranges import Interval, decide
from attn_dsl.passes.rules import EXACT, FAST

Match = dict[str, Node]


def simplify(variant: Variant, *, fast: bool = False) -> Variant:
    """The simplified variant. `fast` also applies identities that hold for the reals but not for every float."""
    return rewrite_variant(variant, Simplifier(fast).build)


def simplify_node(root: Node, *, fast: bool = False) -> Node:
    """The simplified expression."""
    return Simplifier(fast)(root)


class Simplifier:
    """Simplifies any number of expressions, remembering what it has done."""

    def __init__(self, fast: bool = False) -> None:
        self.rules = _compiled(fast)
        self.done: dict[Node, Node] = {}
        self.intervals: dict[Node, Interval] = {}

    def __call__(self, root: Node) -> Node:
        return ir.rewrite(root, self.build)

    def build(self, node: Node) -> Node:
        """The simplest equal of a node whose operands are simplified."""
        if not node.children:
            return node
        known = self.done.get(node)
        if known is None:
            known = self.done[node] = self._simplified(node)
            self.done.setdefault(known, known)
        return known

    def _simplified(self, node: Node) -> Node:
        folded = fold(node)
        if folded is not None:
            return folded
        if isinstance(node, Compare):
            verdict = decide(node, self.intervals)
            if verdict is not None:
                return Const(verdict)
        for rule in self.rules.candidates(node):
            match: Match = {}
            if _matches(rule.pattern, node, match) and self._instance(rule.condition, match) is ir.TRUE:
                return self._instance(rule.result, match)
        return node

    def _instance(self, template: Node, match: Match) -> Node:
        """A template with its letters replaced, simplified on the way."""
        if isinstance(template, Param):
            return match[template.name]
        if not template.children:
            return template
        operands = tuple(self._instance(child, match) for child in template.children)
        return self.build(ir.with_children(template, operands))


@dataclass(frozen=True)
class _Compiled:
    pattern: Node
    result: Node
    condition: Node


class _Table:
    """The rules, found by the operation of a node and the operations of its operands."""

    def __init__(self, rules: Iterable[_Compiled]) -> None:
        self.by_root: dict[Any, list[_Compiled]] = defaultdict(list)
        for rule in rules:
            self.by_root[_kind(rule.pattern)].append(rule)
        self.by_shape: dict[Any, tuple[_Compiled, ...]] = {}

    def candidates(self, node: Node) -> tuple[_Compiled, ...]:
        """The rules that may match, in the order in which they are listed."""
        shape = (_kind(node), *map(_kind, node.children))
        found = self.by_shape.get(shape)
        if found is None:
            found = self.by_shape[shape] = tuple(rule for rule in self.by_root[shape[0]] if _may(rule, shape[1:]))
        return found


def _kind(node: Node) -> Any:
    return type(node), getattr(node, "op", None), node.type


def _may(rule: _Compiled, shapes: tuple[Any, ...]) -> bool:
    """Whether operands of these kinds can match; a letter stands for anything of its type, a capital for a literal."""
    for pattern, shape in zip(rule.pattern.children, shapes, strict=True):
        if isinstance(pattern, Param):
            if shape[2] is not pattern.type or (pattern.name.isupper() and shape[0] is not Const):
                return False
        elif _kind(pattern) != shape:
            return False
    return True


@functools.cache
def _compiled(fast: bool) -> _Table:
    return _Table(_Compiled(*nodes) for rule in (*EXACT, *(FAST if fast else ())) for nodes in rule.nodes())


def _matches(pattern: Node, node: Node, match: Match) -> bool:
    if isinstance(pattern, Param):
        if pattern.type is not node.type or (pattern.name.isupper() and not isinstance(node, Const)):
            return False
        return match.setdefault(pattern.name, node) is node
    if isinstance(pattern, Const):
        return pattern is node
    if _kind(pattern) != _kind(node):
        return False
    return all(_matches(p, n, match) for p, n in zip(pattern.children, node.children, strict=True))
