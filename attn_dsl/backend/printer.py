"""IR to the source text of straight-line Python functions; a dialect says how a target spells each operation.

One line for each shared node, everything else inlined, each line with the `.attn` line that it came from:

    def mask(b, h, q, k, scalars, tensors):
        p_window = scalars[0]
        rel0 = q - k  # sliding_window.attn:4
        return (0 <= rel0) & (rel0 < p_window)  # sliding_window.attn:4

Nothing of a `.attn` text reaches the output but numbers (by `repr`), operations (from the tables of a dialect) and
names, reduced to ASCII letters, digits and underscores behind a prefix: `p_` parameters, `n_` sizes, `x_` tensors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple, cast

from attn_dsl.errors import Span
from attn_dsl.ir.nodes import (
    HK,
    Binary,
    BinaryOp,
    Cast,
    Compare,
    CompareOp,
    Const,
    Expr,
    H,
    Index,
    Load,
    Node,
    Param,
    Reduce,
    ReduceOp,
    Score,
    Select,
    Size,
    Unary,
    Var,
    post_order,
    substitute,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Tensor, Variant
from attn_dsl.passes.unroll import unroll_node

SIZES = tuple(Size(name) for name in ("B", "H", "HK", "Q", "KV", "D"))
GROUP = Binary(BinaryOp.FLOORDIV, Size("H"), Size("HK"))
"""Query heads for each key/value head."""
UNROLL = 16
"""Reductions of at most so many terms are unrolled, longer ones become a loop."""
INLINE = 72
"""An expression of more characters than this gets a line, and a name, of its own."""


class Level(IntEnum):
    """Binding strength of Python's operators, weakest first."""

    CONDITIONAL = 0
    OR = 1
    AND = 2
    NOT = 3
    COMPARE = 4
    BIT_OR = 5
    BIT_AND = 6
    SUM = 7
    PRODUCT = 8
    SIGN = 9
    POWER = 10
    ATOM = 11


class Text(NamedTuple):
    """An expression and the strength of its outermost operator."""

    code: str
    level: Level = Level.ATOM

    def at(self, level: Level) -> str:
        """The expression as an operand that must bind at least as strongly as `level`."""
        return self.code if self.level >= level else f"({self.code})"


@dataclass(frozen=True)
class Operand:
    """What a dialect is told of an operand: its node, its text, and whether its storage may be overwritten."""

    node: Node
    text: Text
    dead: bool = False

    def at(self, level: Level = Level.CONDITIONAL) -> str:
        return self.text.at(level)


def infix(symbol: str, level: Level, x: Operand, y: Operand) -> Text:
    """`x symbol y` for a left-associative operator."""
    return Text(f"{x.at(level)} {symbol} {y.at(Level(level + 1))}", level)


def call(function: str, *operands: Operand) -> Text:
    return Text(f"{function}({', '.join(operand.at() for operand in operands)})")


COMPARISONS = {
    CompareOp.EQ: "==",
    CompareOp.NE: "!=",
    CompareOp.LT: "<",
    CompareOp.LE: "<=",
    CompareOp.GT: ">",
    CompareOp.GE: ">=",
}
OPERATORS = {
    BinaryOp.ADD: ("+", Level.SUM),
    BinaryOp.SUB: ("-", Level.SUM),
    BinaryOp.MUL: ("*", Level.PRODUCT),
    BinaryOp.DIV: ("/", Level.PRODUCT),
    BinaryOp.FLOORDIV: ("//", Level.PRODUCT),
    BinaryOp.MOD: ("%", Level.PRODUCT),
}


class Dialect:
    """How a target spells operations. This one spells what all targets share; a target overrides the rest.

    `unary`, `minimum_maximum`, `power`, `logical`, `select`, `cast` and `load` are what a target must say.
    """

    def constant(self, value: bool | int | float) -> Text:
        if isinstance(value, float) and not math.isfinite(value):
            return Text(f'float("{value}")')
        return Text(repr(value), Level.SIGN if repr(value).startswith("-") else Level.ATOM)

    def unary(self, node: Unary, x: Operand) -> Text:
        raise NotImplementedError

    def binary(self, node: Binary, x: Operand, y: Operand) -> Text:
        match node.op:
            case BinaryOp.MIN | BinaryOp.MAX:
                return self.minimum_maximum(node, x, y)
            case BinaryOp.POW:
                return self.power(node, x, y)
            case BinaryOp.AND | BinaryOp.OR:
                return self.logical(node, x, y)
            case _:
                return infix(*OPERATORS[node.op], x, y)

    def minimum_maximum(self, node: Binary, x: Operand, y: Operand) -> Text:
        raise NotImplementedError

    def power(self, node: Binary, x: Operand, y: Operand) -> Text:
        return Text(f"{x.at(Level.ATOM)} ** {y.at(Level.SIGN)}", Level.POWER)

    def logical(self, node: Binary, x: Operand, y: Operand) -> Text:
        """Bitwise, as on arrays of Booleans."""
        if node.op is BinaryOp.AND:
            return infix("&", Level.BIT_AND, x, y)
        return infix("|", Level.BIT_OR, x, y)

    def compare(self, node: Compare, x: Operand, y: Operand) -> Text:
        beyond = Level(Level.COMPARE + 1)
        return Text(f"{x.at(beyond)} {COMPARISONS[node.op]} {y.at(beyond)}", Level.COMPARE)

    def select(self, node: Select, condition: Operand, x: Operand, y: Operand) -> Text:
        raise NotImplementedError

    def cast(self, node: Cast, x: Operand) -> Text:
        raise NotImplementedError

    def load(self, node: Load, tensor: str, declared: Tensor, indices: Sequence[Operand]) -> Text:
        """An element of the tensor that the identifier `tensor` names."""
        raise NotImplementedError

    def loop(self, variable: str, low: Operand, high: Operand) -> str:
        """Header of a loop over `[low, high)`."""
        return f"for {variable} in range({low.at()}, {high.at()}):"

    def fresh(self, node: Node) -> bool:
        """Whether the value of the node is storage of its own, that its only user may overwrite."""
        return False


@dataclass(frozen=True)
class Signature:
    """The order of what an emitted function finds in its arguments `scalars` and `tensors`.

    scalars: the parameters as declared, the six sizes B H HK Q KV D, then the extents that tensors bind (`N`).
    tensors: the captured tensors as declared.
    """

    scalars: tuple[Node, ...]
    tensors: tuple[Tensor, ...]

    @staticmethod
    def of(variant: Variant) -> Signature:
        extents = [extent for tensor in variant.tensors for extent in tensor.extents]
        sizes = [node for node in post_order(*variant.roots, *extents) if isinstance(node, Size)]
        parameters = tuple(Param(p.name, p.type) for p in variant.parameters)
        return Signature(tuple(dict.fromkeys((*parameters, *SIZES, *sizes))), variant.tensors)


Results = Node | Sequence["Results"]
"""What a function returns: one expression, or a nested tuple of expressions."""


def emit(
    name: str,
    arguments: Sequence[str],
    results: Results,
    signature: Signature,
    dialect: Dialect,
    *,
    locations: Mapping[Node, Span] = MappingProxyType({}),
    bindings: Mapping[Node, str] = MappingProxyType({}),
    decorator: str = "",
    owned: frozenset[Node] = frozenset(),
) -> str:
    """The source of a function that computes `results`.

    `arguments` are written as they are; those called `scalars` and `tensors` are unpacked as `signature` says.
    `bindings` names further nodes by arguments (`Var`s, and values computed outside); `s b h q k` need none. `owned`
    are the arguments, `SCORE` or bound nodes, whose storage the function may overwrite.
    """
    writer = _Writer(signature, dialect, locations, bindings, owned)
    body = writer.function_body(results)
    head = f"{decorator}\n" if decorator else ""
    return f"{head}def {name}({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in body)


def lower(root: Node) -> Node:
    """The expression without `hk` and without short reductions: the form that is printed."""
    return substitute(unroll_node(root, UNROLL), {HK: Binary(BinaryOp.FLOORDIV, H, GROUP)})


STEPS = {
    ReduceOp.SUM: BinaryOp.ADD,
    ReduceOp.MIN: BinaryOp.MIN,
    ReduceOp.MAX: BinaryOp.MAX,
    ReduceOp.ANY: BinaryOp.OR,
    ReduceOp.ALL: BinaryOp.AND,
}


def identity(node: Reduce) -> Const:
    """The value of the reduction over nothing; for integers the extremes of 32 bits stand for the infinities."""
    match node.op:
        case ReduceOp.ANY | ReduceOp.ALL:
            return Const(node.op is ReduceOp.ALL)
        case ReduceOp.SUM:
            return Const(0.0 if node.type is Type.FLOAT else 0)
        case ReduceOp.MIN:
            return Const(math.inf if node.type is Type.FLOAT else 2**31 - 1)
        case ReduceOp.MAX:
            return Const(-math.inf if node.type is Type.FLOAT else -(2**31))


def identifier(prefix: str, name: str, taken: set[str] | None = None) -> str:
    """`prefix_name` of harmless characters, made unlike what is `taken`, and then taken."""
    base = f"{prefix}_{re.sub(r'[^A-Za-z0-9_]', '_', name)[:40]}"
    taken = set() if taken is None else taken
    result, count = base, 1
    while result in taken:
        count += 1
        result = f"{base}_{count}"
    taken.add(result)
    return result


@dataclass
class _Writer:
    signature: Signature
    dialect: Dialect
    locations: Mapping[Node, Span]
    bindings: Mapping[Node, str]
    owned: frozenset[Node]
    lines: list[tuple[int, str]] = field(default_factory=list)
    texts: dict[Node, Text] = field(default_factory=dict)
    uses: Counter[Node] = field(default_factory=Counter)
    names: dict[Node | str, str] = field(default_factory=dict)
    spans: dict[Node, list[Span]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    taken: set[str] = field(default_factory=set)

    def function_body(self, results: Results) -> list[str]:
        self._name_arguments()
        results = self._lowered(results)
        roots = list(_flatten(results))
        order = list(self._order(roots))
        inner = (node for node in order if node not in self.bindings)
        self.uses = Counter(child for node in inner for child in node.children) + Counter(roots)
        self._write(roots, indent=0, loops=frozenset())
        spans = [span for root in dict.fromkeys(roots) for span in self.spans.get(root, [])]
        body = [("    " * indent) + line for indent, line in self.lines]
        return self._unpack(order) + body + [f"return {self._result(results).code}{self._comment(spans)}"]

    def _lowered(self, results: Results) -> Results:
        if isinstance(results, Node):
            return lower(results)
        return tuple(self._lowered(part) for part in results)

    def _order(self, roots: Sequence[Node]) -> Iterator[Node]:
        """Operands first; what is bound to an argument hides what is below it."""
        seen: set[Node] = set()
        stack = [(root, False) for root in reversed(roots)]
        while stack:
            node, ready = stack.pop()
            if node in seen:
                continue
            children = () if node in self.bindings else node.children
            if ready or not children:
                seen.add(node)
                yield node
            else:
                stack.append((node, True))
                stack.extend((child, False) for child in reversed(children))

    def _name_arguments(self) -> None:
        for node in self.signature.scalars:
            prefix, name = ("p", node.name) if isinstance(node, Param) else ("n", cast(Size, node).name)
            self.names[node] = identifier(prefix, name, self.taken)
        for tensor in self.signature.tensors:
            self.names[tensor.name] = identifier("x", tensor.name, self.taken)

    def _unpack(self, order: Sequence[Node]) -> list[str]:
        """One line for each scalar and tensor that the function uses."""
        used = {node for node in order if node not in self.bindings}
        loaded = {node.tensor for node in used if isinstance(node, Load)}
        scalars = [(i, node) for i, node in enumerate(self.signature.scalars) if node in used]
        tensors = [(i, tensor) for i, tensor in enumerate(self.signature.tensors) if tensor.name in loaded]
        return [f"{self.names[node]} = scalars[{i}]" for i, node in scalars] + [
            f"{self.names[tensor.name]} = tensors[{i}]" for i, tensor in tensors
        ]

    def _write(self, roots: Sequence[Node], indent: int, loops: frozenset[str]) -> None:
        order = list(self._order(roots))
        variables = {node.var.name for node in order if isinstance(node, Reduce)} - loops
        for node in order:
            if node not in self.texts and not node.depends & variables:
                self._define(node, indent, loops)

    def _define(self, node: Node, indent: int, loops: frozenset[str]) -> None:
        children = () if node in self.bindings else node.children
        if children and isinstance(node, Reduce):
            self.texts[node], self.spans[node] = self._loop(node, indent, loops), []
            return
        text = self._spell(node, loops)
        here = (self.locations[node],) if node in self.locations else ()
        spans = [*here, *(span for child in dict.fromkeys(children) for span in self.spans.get(child, ()))]
        if children and (self.uses[node] > 1 or len(text.code) > INLINE):
            name = self._temporary(node)
            self.lines.append((indent, f"{name} = {text.code}{self._comment(spans)}"))
            text, spans = Text(name), []
        self.texts[node], self.spans[node] = text, spans

    def _loop(self, node: Reduce, indent: int, loops: frozenset[str]) -> Text:
        total = self._temporary(node)
        variable = f"i{self.counts['i']}"
        self.counts["i"] += 1
        self.texts[node.var] = Text(variable)
        self.lines.append((indent, f"{total} = {self.dialect.constant(identity(node).value).code}"))
        low, high = (Operand(bound, self.texts[bound]) for bound in (node.low, node.high))
        self.lines.append((indent, self.dialect.loop(variable, low, high)))
        self._write([node.body], indent + 1, loops | {node.var.name})
        step = Binary(STEPS[node.op], node.body, node.body)  # only its operation and type are looked at
        body = Operand(node.body, self.texts[node.body])
        spelled = self.dialect.binary(step, Operand(node, Text(total)), body)
        self.lines.append((indent + 1, f"{total} = {spelled.code}{self._comment(self.spans.get(node.body, []))}"))
        return Text(total)

    def _spell(self, node: Node, loops: frozenset[str]) -> Text:
        if node in self.bindings:
            return Text(self.bindings[node])
        operands = [Operand(child, self.texts[child], self._dead(child, loops)) for child in node.children]
        match cast(Expr, node):
            case Const(value):
                return self.dialect.constant(value)
            case Param() | Size():
                return Text(self.names[node])
            case Index(name):
                return Text(name)
            case Score():
                return Text("s")
            case Unary() as unary:
                return self.dialect.unary(unary, *operands)
            case Binary() as binary:
                return self.dialect.binary(binary, *operands)
            case Compare() as compare:
                return self.dialect.compare(compare, *operands)
            case Select() as select:
                return self.dialect.select(select, *operands)
            case Cast() as cast_node:
                return self.dialect.cast(cast_node, *operands)
            case Load(tensor) as load:
                declared = next(t for t in self.signature.tensors if t.name == tensor)
                return self.dialect.load(load, self.names[tensor], declared, operands)
            case Var() | Reduce():
                raise AssertionError(f"{node} is bound by nothing")

    def _dead(self, node: Node, loops: frozenset[str]) -> bool:
        """Whether the only use is the next one; a loop uses what was made outside of it again and again."""
        if self.uses[node] > 1 or not loops <= node.depends:
            return False
        if node in self.bindings or not node.children:
            return node in self.owned
        return self.dialect.fresh(node)

    def _temporary(self, node: Node) -> str:
        match node:
            case Binary(BinaryOp.SUB, Index("q" | "k"), Index("q" | "k")):
                stem = "rel"
            case Load(tensor):
                return identifier("at", self.names[tensor][2:], self.taken)
            case _ if node.type is Type.BOOL:
                stem = "keep"
            case _:
                stem = "i" if node.type is Type.INT else "t"
        self.counts[stem] += 1
        return f"{stem}{self.counts[stem] - 1}"

    def _result(self, results: Results) -> Text:
        if isinstance(results, Node):
            return self.texts[results]
        parts = [self._result(part).code for part in results]
        return Text(f"({', '.join(parts)}{',' if len(parts) == 1 else ''})")

    def _comment(self, spans: Sequence[Span]) -> str:
        """Where a line came from; a file's name is cut to its last part and to harmless characters."""
        places: dict[str, None] = {}
        for span in sorted(set(spans)):
            name = re.sub(r"[^A-Za-z0-9_.\-]", "_", span.source.name.rsplit("/", 1)[-1])[:60]
            places[f"{name}:{span.line}"] = None
        return f"  # {', '.join(places)}" if places else ""


def _flatten(results: Results) -> Iterator[Node]:
    if isinstance(results, Node):
        yield results
    else:
        for part in results:
            yield from _flatten(part)
