"""Levels of a kernel: where in the loop nest each value is computed once.

    launch   parameters and sizes              once a call
    head     + b, h, hk, and look-ups at them  once a (batch, head)
    row      + q                               once a row of the q tile
    column   + k                               once a column of the kv tile
    element  + q and k, or the score           for each pair

A value is worth a name where a deeper level uses it; in the innermost level, where it is used more than once. Equal
expressions are one node, hence one value. A hoisted look-up is done whether or not the element wants it: clamp its
index. What depends on the variable of a reduction stays inside the reduction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import Node


class Level(IntEnum):
    """A place in the loop nest; ROW and COLUMN are beside each other, both inside HEAD and around ELEMENT."""

    LAUNCH = 0
    HEAD = 1
    ROW = 2
    COLUMN = 3
    ELEMENT = 4


@dataclass(frozen=True)
class Value:
    """A node that is computed once at its level, under a name such as `row2`."""

    name: str
    node: Node
    level: Level


@dataclass(frozen=True)
class Levels:
    """Named values, operands before users, and the expressions that they serve, by name."""

    values: tuple[Value, ...]
    roots: tuple[tuple[str, Node], ...]

    def at(self, level: Level) -> tuple[Value, ...]:
        """The values of one level, in the order in which to compute them."""
        return tuple(value for value in self.values if value.level is level)

    def text(self) -> str:
        """One line a value, level by level, then the roots."""
        names = {value.node: value.name for value in self.values}
        lines = []
        for level in Level:
            values = self.at(level)
            lines += [f"{level.name.lower():8} {v.name} = {infix(v.node, names)}" for v in values]
        lines += [f"{level_of(root).name.lower():8} {name} = {_use(root, names)}" for name, root in self.roots]
        return "\n".join(lines) + "\n"


def hoist(expressions: Mapping[str, Node]) -> Levels:
    """Place what the named expressions compute at the outermost level where it is known."""
    order = [node for node in ir.post_order(*expressions.values()) if _placeable(node)]
    users = Counter(child for node in order for child in node.children)
    deeper = {child for node in order for child in node.children if level_of(child) < level_of(node)}
    deeper |= {root for root in expressions.values() if level_of(root) < Level.ELEMENT}
    counts: Counter[Level] = Counter()
    values = []
    for node in order:
        level = level_of(node)
        worth = users[node] > 1 if level is Level.ELEMENT else node in deeper
        if worth and (node.children or isinstance(node, ir.Load)):
            values.append(Value(f"{level.name.lower()}{counts[level]}", node, level))
            counts[level] += 1
    return Levels(tuple(values), tuple(expressions.items()))


def level_of(node: Node) -> Level:
    """The outermost level at which a node is known."""
    if "score" in node.depends or {"q", "k"} <= node.depends:
        return Level.ELEMENT
    if "q" in node.depends:
        return Level.ROW
    if "k" in node.depends:
        return Level.COLUMN
    return Level.HEAD if node.depends & {"b", "h"} else Level.LAUNCH


def _placeable(node: Node) -> bool:
    """Whether a node stands outside of every reduction."""
    return node.depends <= {*ir.INDEX_NAMES, "score"}


def _use(node: Node, names: Mapping[Node, str]) -> str:
    return names.get(node) or infix(node, names)
