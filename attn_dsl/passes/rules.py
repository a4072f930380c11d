"""Simplification rules as data: a pattern, what it is equal to, and the condition under which it is.

A letter stands for any expression of its type, a capital for a literal:

    i j n  int      x y z  float      u v w  bool      s t r  any one type
    A B C  int literal                X Y    float literal

The rules are exact. For integers and booleans that is the identity itself; for floats both sides give the same bits
for every input, infinities, nan and signed zeros included, at any precision. Identities of the reals that are not so
stand apart in `FAST`, and are applied only where they are asked for.

Divisors are positive by the law of the language, positions are >= 0 and sizes >= 1: see `ranges`.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Const, Node, Param, UnaryOp
from attn_dsl.ir.types import Type


@dataclass(frozen=True)
class Rule:
    """`pattern` is `result` where `condition` holds; texts in Python's spelling, see `Rule.nodes` for their IR."""

    pattern: str
    result: str
    condition: str = "True"

    def nodes(self) -> Iterator[tuple[Node, Node, Node]]:
        """(pattern, result, condition) as IR over parameters named by the letters, for each type of `s t r`."""
        kinds = tuple(Type) if set("str") & _names(self.pattern) else (Type.INT,)
        for kind in kinds:
            pattern, result, condition = (_read(text, kind) for text in (self.pattern, self.result, self.condition))
            yield pattern, result, condition


INT = (
    # Literals stand on the right; sums and products of literals meet.
    Rule("A + i", "i + A"),
    Rule("A * i", "i * A"),
    Rule("i + 0", "i"),
    Rule("i - 0", "i"),
    Rule("0 - i", "-i"),
    Rule("i * 0", "0"),
    Rule("i * 1", "i"),
    Rule("i * -1", "-i"),
    Rule("i + A", "i - (-A)", "A < 0"),
    Rule("i - A", "i + (-A)", "A < 0"),
    Rule("(i + A) + B", "i + (A + B)"),
    Rule("(i + A) - B", "i + (A - B)"),
    Rule("(i - A) + B", "i + (B - A)"),
    Rule("(i - A) - B", "i - (A + B)"),
    Rule("(A - i) + B", "(A + B) - i"),
    Rule("(A - i) - B", "(A - B) - i"),
    Rule("A - (i + B)", "(A - B) - i"),
    Rule("A - (i - B)", "(A + B) - i"),
    Rule("A - (B - i)", "i + (A - B)"),
    Rule("(i * A) * B", "i * (A * B)"),
    # What cancels.
    Rule("i - i", "0"),
    Rule("(i + j) - j", "i"),
    Rule("(i + j) - i", "j"),
    Rule("(i - j) + j", "i"),
    Rule("j + (i - j)", "i"),
    Rule("i - (i - j)", "j"),
    Rule("(i - j) - i", "-j"),
    Rule("-(-i)", "i"),
    Rule("-(i - j)", "j - i"),
    Rule("i + (-j)", "i - j"),
    Rule("(-i) + j", "j - i"),
    Rule("i - (-j)", "i + j"),
    Rule("(-i) * A", "i * (-A)"),
    # Floor division and modulo: x = (x // a) a + x % a with 0 <= x % a < a.
    Rule("i // 1", "i"),
    Rule("i % 1", "0"),
    Rule("i // A", "0", "A > 0 and i >= 0 and i < A"),
    Rule("i % A", "i", "A > 0 and i >= 0 and i < A"),
    Rule("(i // A) // B", "i // (A * B)", "A > 0 and B > 0"),
    Rule("(i % A) % B", "i % B", "A > 0 and B > 0 and A % B == 0"),
    Rule("(i * A) // B", "i * (A // B)", "B > 0 and A % B == 0"),
    Rule("(i * A) % B", "0", "B > 0 and A % B == 0"),
    Rule("(i * A + j) // B", "i * (A // B) + j // B", "B > 0 and A % B == 0"),
    Rule("(i * A + j) % B", "j % B", "B > 0 and A % B == 0"),
    Rule("(j + i * A) // B", "i * (A // B) + j // B", "B > 0 and A % B == 0"),
    Rule("(j + i * A) % B", "j % B", "B > 0 and A % B == 0"),
    Rule("(i + A) % B", "i % B", "B > 0 and A % B == 0"),
    Rule("(i - A) % B", "i % B", "B > 0 and A % B == 0"),
    Rule("(i + A) // B", "i // B + A // B", "B > 0 and A % B == 0"),
    Rule("(i - A) // B", "i // B - A // B", "B > 0 and A % B == 0"),
    # Powers, magnitudes, bounds.
    Rule("i ** 0", "1"),
    Rule("i ** 1", "i"),
    Rule("i ** 2", "i * i"),
    Rule("abs(i)", "i", "i >= 0"),
    Rule("abs(i)", "-i", "i <= 0"),
    Rule("abs(-i)", "abs(i)"),
    Rule("sign(i)", "1", "i > 0"),
    Rule("sign(i)", "-1", "i < 0"),
    Rule("min(A, i)", "min(i, A)"),
    Rule("max(A, i)", "max(i, A)"),
    Rule("min(i, j)", "i", "i <= j"),
    Rule("min(i, j)", "j", "j <= i"),
    Rule("max(i, j)", "j", "i <= j"),
    Rule("max(i, j)", "i", "j <= i"),
    Rule("min(min(i, A), B)", "min(i, min(A, B))"),
    Rule("max(max(i, A), B)", "max(i, max(A, B))"),
    Rule("min(min(i, j), j)", "min(i, j)"),
    Rule("min(min(i, j), i)", "min(i, j)"),
    Rule("max(max(i, j), j)", "max(i, j)"),
    Rule("max(max(i, j), i)", "max(i, j)"),
    Rule("min(i, max(i, j))", "i"),
    Rule("min(i, max(j, i))", "i"),
    Rule("min(max(i, j), i)", "i"),
    Rule("min(max(j, i), i)", "i"),
    Rule("max(i, min(i, j))", "i"),
    Rule("max(i, min(j, i))", "i"),
    Rule("max(min(i, j), i)", "i"),
    Rule("max(min(j, i), i)", "i"),
)

COMPARE = (
    # Only < and <= remain of the orders.
    Rule("i > j", "j < i"),
    Rule("i >= j", "j <= i"),
    Rule("x > y", "y < x"),
    Rule("x >= y", "y <= x"),
    Rule("A == i", "i == A"),
    Rule("A != i", "i != A"),
    Rule("i == i", "True"),
    Rule("i != i", "False"),
    Rule("i <= i", "True"),
    Rule("i < i", "False"),
    Rule("not (i < j)", "j <= i"),
    Rule("not (i <= j)", "j < i"),
    Rule("not (i == j)", "i != j"),
    Rule("not (i != j)", "i == j"),
    Rule("not (x == y)", "x != y"),
    Rule("not (x != y)", "x == y"),
    # A difference compared with 0 compares its terms; literals move to the literal.
    Rule("0 <= i - j", "j <= i"),
    Rule("0 < i - j", "j < i"),
    Rule("i - j <= 0", "i <= j"),
    Rule("i - j < 0", "i < j"),
    Rule("i - j == 0", "i == j"),
    Rule("i - j != 0", "i != j"),
    Rule("i + A <= B", "i <= B - A"),
    Rule("i - A <= B", "i <= A + B"),
    Rule("A - i <= B", "A - B <= i"),
    Rule("-i <= A", "-A <= i"),
    Rule("A <= i + B", "A - B <= i"),
    Rule("A <= i - B", "A + B <= i"),
    Rule("A <= B - i", "i <= B - A"),
    Rule("A <= -i", "i <= -A"),
    Rule("i + A < B", "i < B - A"),
    Rule("i - A < B", "i < A + B"),
    Rule("A - i < B", "A - B < i"),
    Rule("-i < A", "-A < i"),
    Rule("A < i + B", "A - B < i"),
    Rule("A < i - B", "A + B < i"),
    Rule("A < B - i", "i < B - A"),
    Rule("A < -i", "i < -A"),
    Rule("i + A == B", "i == B - A"),
    Rule("i - A == B", "i == A + B"),
    Rule("A - i == B", "i == A - B"),
    Rule("i + A != B", "i != B - A"),
    Rule("i - A != B", "i != A + B"),
    Rule("A - i != B", "i != A - B"),
    Rule("i * A <= B", "i <= B // A", "A > 0"),
    Rule("A <= i * B", "-((-A) // B) <= i", "B > 0"),
    Rule("i * A < B", "i < -((-B) // A)", "A > 0"),
    Rule("A < i * B", "A // B < i", "B > 0"),
    Rule("i <= A and i <= B", "i <= min(A, B)"),
    Rule("A <= i and B <= i", "max(A, B) <= i"),
    Rule("i < A and i < B", "i < min(A, B)"),
    Rule("A < i and B < i", "max(A, B) < i"),
)

BOOL = (
    Rule("not not u", "u"),
    Rule("u and True", "u"),
    Rule("True and u", "u"),
    Rule("u and False", "False"),
    Rule("False and u", "False"),
    Rule("u or False", "u"),
    Rule("False or u", "u"),
    Rule("u or True", "True"),
    Rule("True or u", "True"),
    Rule("u and u", "u"),
    Rule("u or u", "u"),
    Rule("u and not u", "False"),
    Rule("not u and u", "False"),
    Rule("u or not u", "True"),
    Rule("not u or u", "True"),
    Rule("u and (u and v)", "u and v"),
    Rule("u and (v and u)", "u and v"),
    Rule("(u and v) and u", "u and v"),
    Rule("(u and v) and v", "u and v"),
    Rule("u or (u or v)", "u or v"),
    Rule("u or (v or u)", "u or v"),
    Rule("(u or v) or u", "u or v"),
    Rule("(u or v) or v", "u or v"),
    Rule("u and (u or v)", "u"),
    Rule("u and (v or u)", "u"),
    Rule("(u or v) and u", "u"),
    Rule("(u or v) and v", "v"),
    Rule("u or (u and v)", "u"),
    Rule("u or (v and u)", "u"),
    Rule("(u and v) or u", "u"),
    Rule("(u and v) or v", "v"),
    Rule("u == True", "u"),
    Rule("True == u", "u"),
    Rule("u == False", "not u"),
    Rule("False == u", "not u"),
    Rule("u != True", "not u"),
    Rule("True != u", "not u"),
    Rule("u != False", "u"),
    Rule("False != u", "u"),
    Rule("u == u", "True"),
    Rule("u != u", "False"),
    Rule("not (u == v)", "u != v"),
    Rule("not (u != v)", "u == v"),
)

SELECT = (
    Rule("s if True else t", "s"),
    Rule("s if False else t", "t"),
    Rule("s if u else s", "s"),
    Rule("s if not u else t", "t if u else s"),
    Rule("(s if u else t) if u else r", "s if u else r"),
    Rule("s if u else (t if u else r)", "s if u else r"),
    Rule("(s if v else t) if u else t", "s if u and v else t"),
    Rule("s if u else (s if v else t)", "s if u or v else t"),
    Rule("True if u else v", "u or v"),
    Rule("False if u else v", "not u and v"),
    Rule("v if u else True", "not u or v"),
    Rule("v if u else False", "u and v"),
)

FLOAT = (
    # Addition and multiplication commute bit for bit; they do not associate.
    Rule("X + x", "x + X"),
    Rule("X * x", "x * X"),
    Rule("x + -0.0", "x"),
    Rule("x - 0.0", "x"),
    Rule("x * 1.0", "x"),
    Rule("x / 1.0", "x"),
    Rule("x * -1.0", "-x"),
    Rule("x / -1.0", "-x"),
    Rule("-(-x)", "x"),
    Rule("x + (-y)", "x - y"),
    Rule("(-x) + y", "y - x"),
    Rule("x - (-y)", "x + y"),
    Rule("(-x) * (-y)", "x * y"),
    Rule("(-x) / (-y)", "x / y"),
    Rule("(-x) * X", "x * (-X)"),
    Rule("(-x) * y", "-(x * y)"),
    Rule("x * (-y)", "-(x * y)"),
    Rule("(-x) / y", "-(x / y)"),
    Rule("x / (-y)", "-(x / y)"),
    Rule("x / X", "x * (1.0 / X)", "abs(X) > 1e-4 and abs(X) < 1e4 and exp2(float(floor(log2(abs(X))))) == abs(X)"),
    Rule("x ** 0.0", "1.0"),
    Rule("x ** 1.0", "x"),
    Rule("x ** 2.0", "x * x"),
    Rule("abs(abs(x))", "abs(x)"),
    Rule("abs(-x)", "abs(x)"),
    Rule("relu(relu(x))", "relu(x)"),
    Rule("min(x, x)", "x"),
    Rule("max(x, x)", "x"),
)

FAST = (
    # The reals only. Beside each, where floats differ.
    Rule("x + 0.0", "x"),  # -0
    Rule("x * 0.0", "0.0"),  # inf, nan, sign of zero
    Rule("x - x", "0.0"),  # inf, nan
    Rule("-(x - y)", "y - x"),  # sign of zero
    Rule("(x + y) - y", "x"),  # absorption
    Rule("(x + X) + Y", "x + (X + Y)"),  # rounding, overflow
    Rule("(x * X) * Y", "x * (X * Y)"),  # rounding, overflow
    Rule("x / X", "x * (1.0 / X)", "X != 0.0"),  # rounding
    Rule("x ** 0.5", "sqrt(x)"),  # -0, -inf
    Rule("log(exp(x))", "x"),  # overflow
)

EXACT = (*INT, *COMPARE, *BOOL, *SELECT, *FLOAT)

_KINDS = {**dict.fromkeys("ijnABC", Type.INT), **dict.fromkeys("xyzXY", Type.FLOAT), **dict.fromkeys("uvw", Type.BOOL)}
_BINARY = {
    ast.Add: BinaryOp.ADD,
    ast.Sub: BinaryOp.SUB,
    ast.Mult: BinaryOp.MUL,
    ast.Div: BinaryOp.DIV,
    ast.FloorDiv: BinaryOp.FLOORDIV,
    ast.Mod: BinaryOp.MOD,
    ast.Pow: BinaryOp.POW,
    ast.And: BinaryOp.AND,
    ast.Or: BinaryOp.OR,
}
_COMPARE = {
    ast.Eq: CompareOp.EQ,
    ast.NotEq: CompareOp.NE,
    ast.Lt: CompareOp.LT,
    ast.LtE: CompareOp.LE,
    ast.Gt: CompareOp.GT,
    ast.GtE: CompareOp.GE,
}


def _names(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}


def _read(text: str, kind: Type) -> Node:
    """The IR of a rule's text; `s t r` have the given type."""
    return _convert(ast.parse(text, mode="eval").body, kind)


def _convert(tree: ast.expr, kind: Type) -> Node:
    convert: Callable[[ast.expr], Node] = functools.partial(_convert, kind=kind)
    match tree:
        case ast.Constant(bool() | int() | float() as value):
            return Const(value)
        case ast.Name(name):
            return Param(name, _KINDS.get(name, kind))
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return Const(-value)
        case ast.UnaryOp(op, x):
            return ir.Unary(UnaryOp.NEG if isinstance(op, ast.USub) else UnaryOp.NOT, convert(x))
        case ast.BinOp(x, op, y):
            return ir.Binary(_BINARY[type(op)], convert(x), convert(y))
        case ast.BoolOp(op, values):
            return functools.reduce(lambda x, y: ir.Binary(_BINARY[type(op)], x, y), map(convert, values))
        case ast.Compare(x, [op], [y]):
            return ir.Compare(_COMPARE[type(op)], convert(x), convert(y))
        case ast.IfExp(condition, x, y):
            return ir.Select(*map(convert, (condition, x, y)))
        case ast.Call(ast.Name("float"), [x]):
            return ir.Cast(convert(x), Type.FLOAT)
        case ast.Call(ast.Name("min" | "max" as name), [x, y]):
            return ir.Binary(BinaryOp(name), convert(x), convert(y))
        case ast.Call(ast.Name(name), [x]):
            return ir.Unary(UnaryOp(name), convert(x))
        case _:
            raise AssertionError(f"not a rule: {ast.unparse(tree)}")
