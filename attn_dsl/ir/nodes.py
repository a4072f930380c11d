"""Expression nodes: frozen, typed, hash-consed, so that equality is identity.

Building a node that exists returns the one that exists; a common subexpression is therefore one object, and a
`dict` keyed by nodes memoizes any walk. Each node knows its `type` and the set `depends` of what it varies with:
the indices `b h q k`, the incoming `score`, and the variables of enclosing reductions.

Nodes carry no source location, since one node may stand at many places of a text; see `Variant.locations`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar, cast

from typing_extensions import dataclass_transform

from attn_dsl.ir.types import Type

_table: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()
_lock = threading.Lock()

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def _interned(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass of which equal instances are one object."""
    frozen = dataclass(frozen=True, eq=False, repr=False)(cls)
    build = frozen.__init__
    names = tuple(f.name for f in fields(cast(Any, frozen)) if f.init)

    def __new__(kind: type[T], *args: Any, **named: Any) -> T:
        values = args + tuple(named[name] for name in names[len(args) :])
        # 0, 0.0 and False are equal to Python but are different constants; so are 0.0 and -0.0, and nan equals nothing.
        key = (kind, *(_key(value) for value in values))
        with _lock:
            node = _table.get(key)
            if node is None:
                node = object.__new__(kind)
                build(node, *values)
                _table[key] = node
            return cast(T, node)

    setattr(frozen, "__new__", __new__)
    setattr(frozen, "__init__", lambda self, *args, **named: None)
    setattr(frozen, "__reduce__", lambda self: (type(self), tuple(getattr(self, name) for name in names)))
    return frozen


def _key(value: Any) -> Any:
    return (type(value), repr(value)) if isinstance(value, (bool, int, float)) else value


class UnaryOp(Enum):
    NEG = "neg"
    NOT = "not"
    ABS = "abs"
    SIGN = "sign"
    FLOOR = "floor"  # float -> int
    CEIL = "ceil"  # float -> int
    SQRT = "sqrt"
    RSQRT = "rsqrt"
    EXP = "exp"
    EXP2 = "exp2"
    LOG = "log"
    LOG2 = "log2"
    LOG1P = "log1p"
    SIN = "sin"
    COS = "cos"
    TAN = "tan"
    TANH = "tanh"
    ERF = "erf"
    SIGMOID = "sigmoid"
    SILU = "silu"
    RELU = "relu"
    GELU = "gelu"  # exact, x * Phi(x)


class BinaryOp(Enum):
    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"  # always a float
    FLOORDIV = "floordiv"  # rounds toward minus infinity
    MOD = "mod"  # has the sign of the divisor
    POW = "pow"
    MIN = "min"
    MAX = "max"
    AND = "and"
    OR = "or"


class CompareOp(Enum):
    EQ = "eq"
    NE = "ne"
    LT = "lt"
    LE = "le"
    GT = "gt"
    GE = "ge"


class ReduceOp(Enum):
    SUM = "sum"
    MIN = "min"
    MAX = "max"
    ANY = "any"
    ALL = "all"


class Node:
    """Base of all expressions."""

    type: Type
    depends: frozenset[str]

    @property
    def children(self) -> tuple[Node, ...]:
        return ()

    def __repr__(self) -> str:
        """The node without what is below it, since a printed tree may be exponentially larger than its graph."""
        own = (f.name for f in fields(cast(Any, self)) if f.name not in ("x", "y", "condition", "indices", "body"))
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in own)})"


NONE: frozenset[str] = frozenset()
INDEX_NAMES = ("b", "h", "hk", "q", "k")
SIZE_NAMES = ("B", "H", "HK", "Q", "KV", "D")


@_interned
class Const(Node):
    """A literal. `float` values may be infinite or nan."""

    value: bool | int | float
    type: Type = field(init=False)
    depends: frozenset[str] = field(init=False, default=NONE)

    def __post_init__(self) -> None:
        kind = Type.BOOL if isinstance(self.value, bool) else Type.INT if isinstance(self.value, int) else Type.FLOAT
        object.__setattr__(self, "type", kind)


@_interned
class Param(Node):
    """A parameter of the variant, run-time or (until `bake`) `const`."""

    name: str
    type: Type
    depends: frozenset[str] = field(init=False, default=NONE)


@_interned
class Index(Node):
    """Batch `b`, query head `h`, key/value head `hk`, absolute query position `q` or absolute key position `k`."""

    name: str
    type: Type = field(init=False, default=Type.INT)
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        assert self.name in INDEX_NAMES, self.name
        object.__setattr__(self, "depends", frozenset({"h" if self.name == "hk" else self.name}))


@_interned
class Size(Node):
    """A size of the call: `B H HK Q KV D`, or the name of a tensor extent that the call binds (such as `N`)."""

    name: str
    type: Type = field(init=False, default=Type.INT)
    depends: frozenset[str] = field(init=False, default=NONE)


@_interned
class Var(Node):
    """The variable of an enclosing `Reduce`. Names are unique within a variant."""

    name: str
    type: Type = field(init=False, default=Type.INT)
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "depends", frozenset({self.name}))


@_interned
class Score(Node):
    """The incoming logit, `scale * <query, key>`."""

    type: Type = field(init=False, default=Type.FLOAT)
    depends: frozenset[str] = field(init=False, default=frozenset({"score"}))


@_interned
class Load(Node):
    """An element of a captured tensor."""

    tensor: str
    indices: tuple[Node, ...]
    type: Type
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        _set_depends(self)

    @property
    def children(self) -> tuple[Node, ...]:
        return self.indices


@_interned
class Unary(Node):
    op: UnaryOp
    x: Node
    type: Type = field(init=False)
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        match self.op:
            case UnaryOp.NOT:
                assert self.x.type is Type.BOOL
                kind = Type.BOOL
            case UnaryOp.NEG | UnaryOp.ABS | UnaryOp.SIGN:
                assert self.x.type is not Type.BOOL
                kind = self.x.type
            case UnaryOp.FLOOR | UnaryOp.CEIL:
                assert self.x.type is Type.FLOAT
                kind = Type.INT
            case _:
                assert self.x.type is Type.FLOAT
                kind = Type.FLOAT
        object.__setattr__(self, "type", kind)
        _set_depends(self)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.x,)


@_interned
class Binary(Node):
    """Both operands have one type: INT or FLOAT (`div`: FLOAT; `and`, `or`: BOOL)."""

    op: BinaryOp
    x: Node
    y: Node
    type: Type = field(init=False)
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        assert self.x.type is self.y.type, (self.op, self.x, self.y)
        logical = self.op in (BinaryOp.AND, BinaryOp.OR)
        assert logical == (self.x.type is Type.BOOL)
        assert self.op is not BinaryOp.DIV or self.x.type is Type.FLOAT
        object.__setattr__(self, "type", self.x.type)
        _set_depends(self)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.x, self.y)


@_interned
class Compare(Node):
    """A comparison of two operands of one type (BOOL only with `eq`, `ne`)."""

    op: CompareOp
    x: Node
    y: Node
    type: Type = field(init=False, default=Type.BOOL)
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        assert self.x.type is self.y.type, (self.op, self.x, self.y)
        _set_depends(self)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.x, self.y)


@_interned
class Select(Node):
    """`x if condition else y`. The branch that is not taken has no effect, whatever its value (even nan)."""

    condition: Node
    x: Node
    y: Node
    type: Type = field(init=False)
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        assert self.condition.type is Type.BOOL and self.x.type is self.y.type
        object.__setattr__(self, "type", self.x.type)
        _set_depends(self)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.condition, self.x, self.y)


@_interned
class Cast(Node):
    """A change of type: bool -> int -> float."""

    x: Node
    type: Type
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        _set_depends(self)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.x,)


@_interned
class Reduce(Node):
    """`op` over `body` for `var` in `[low, high)`. The bounds are constants once `bake` has run."""

    op: ReduceOp
    var: Var
    low: Node
    high: Node
    body: Node
    type: Type = field(init=False)
    depends: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", self.body.type)
        inner = self.low.depends | self.high.depends | (self.body.depends - {self.var.name})
        object.__setattr__(self, "depends", inner)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.low, self.high, self.body)


Expr = Const | Param | Index | Size | Var | Score | Load | Unary | Binary | Compare | Select | Cast | Reduce
"""Every node kind, for `match` with `assert_never`."""


def _set_depends(node: Node) -> None:
    object.__setattr__(node, "depends", NONE.union(*(child.depends for child in node.children)))


def with_children(node: Node, children: tuple[Node, ...]) -> Node:
    """The node of the same kind over other children."""
    if children == node.children:
        return node
    match cast(Expr, node):
        case Load(tensor, _, kind):
            return Load(tensor, children, kind)
        case Reduce(op, var):
            return Reduce(op, var, *children)
        case Select():
            return Select(*children)
        case Unary(op):
            return Unary(op, *children)
        case Cast(_, kind):
            return Cast(children[0], kind)
        case Binary(op):
            return Binary(op, *children)
        case Compare(op):
            return Compare(op, *children)
        case Const() | Param() | Index() | Size() | Var() | Score():
            raise AssertionError(f"{node} has no children")


def post_order(*roots: Node) -> Iterator[Node]:
    """Every node under the roots once, operands before users, in a stable order; iterative, so depth is no limit."""
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if node in seen:
            continue
        if ready:
            seen.add(node)
            yield node
        else:
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(node.children))


def operands(op: BinaryOp, node: Node) -> Iterator[Node]:
    """What nested applications of an operation join, left to right: `a`, `b` and `c` of `a and (b and c)`."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Binary) and node.op is op:
            stack += (node.y, node.x)
        else:
            yield node


def conjuncts(condition: Node) -> Iterator[Node]:
    """The parts of which a condition is the conjunction."""
    return operands(BinaryOp.AND, condition)


def rewrite(root: Node, rule: Callable[[Node], Node]) -> Node:
    """Apply `rule` to every node, operands first; `rule` sees nodes whose operands are already rewritten."""
    done: dict[Node, Node] = {}
    for node in post_order(root):
        done[node] = rule(with_children(node, tuple(done[child] for child in node.children)))
    return done[root]


def substitute(root: Node, values: dict[Node, Node]) -> Node:
    """Replace nodes by others, everywhere under `root`."""
    return rewrite(root, lambda node: values.get(node, node))


TRUE, FALSE = Const(True), Const(False)
B, H, HK, Q, K = (Index(name) for name in INDEX_NAMES)
SCORE = Score()
