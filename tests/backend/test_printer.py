"""The printer: readable lines, and nothing of a `.attn` text in them but numbers and sanitized names."""

from __future__ import annotations

import ast
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dsl.backend.cpu.elementary import nonzero
from attn_dsl.backend.printer import Level, Signature, Text, emit, identifier
from attn_dsl.backend.python_dialect import PythonDialect
from attn_dsl.backend.torch_dialect import TorchDialect
from attn_dsl.errors import Source, Span
from attn_dsl.frontend import load
from attn_dsl.ir.nodes import (
    HK,
    SCORE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    H,
    Index,
    K,
    Load,
    Node,
    Param,
    Q,
    Reduce,
    ReduceOp,
    Select,
    Size,
    Unary,
    UnaryOp,
    Var,
)
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Parameter, Tensor, Variant

PLACE = ("b", "h", "q", "k", "scalars", "tensors")
HOSTILE = ["x\n    import os", "a'); evil(", '"""', "λ", "__class__", "if", "p; q", "a" * 200, "", "#", "\\", "\u2028x"]


def variant(score: Node = SCORE, mask: Node | None = None, **named: object) -> Variant:
    parameters = (Parameter("window", Type.INT), Parameter("cap", Type.FLOAT))
    tensors = (Tensor("table", DType.FLOAT32, (Size("H"), Size("N"))),)
    return Variant("v", parameters, tensors, score, mask or Const(True), **named)  # type: ignore[arg-type]


def text(root: Node, dialect: PythonDialect | TorchDialect, **named: object) -> str:
    return emit("f", PLACE, root, Signature.of(variant(root)), dialect, **named)  # type: ignore[arg-type]


def test_a_shared_node_gets_one_line_and_the_rest_is_inlined() -> None:
    rel = Binary(BinaryOp.SUB, Q, K)
    window = Param("window", Type.INT)
    mask = Binary(BinaryOp.AND, Compare(CompareOp.LE, Const(0), rel), Compare(CompareOp.LT, rel, window))
    assert text(mask, TorchDialect()) == (
        "def f(b, h, q, k, scalars, tensors):\n"
        "    p_window = scalars[0]\n"
        "    rel0 = q - k\n"
        "    return (0 <= rel0) & (rel0 < p_window)\n"
    )
    assert "return 0 <= rel0 and rel0 < p_window" in text(mask, PythonDialect())


def test_lines_carry_the_place_that_they_came_from() -> None:
    source = Source("/home/me/x.attn", "attention x\nmask = q >= k")
    mask = Compare(CompareOp.GE, Q, K)
    assert "  # x.attn:2\n" in text(mask, PythonDialect(), locations={mask: Span(source, 19, 25)})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_inside_identifiers_and_comments(name: str) -> None:
    param, load_ = Param(name, Type.FLOAT), Load(name, (H, Size(name)), Type.FLOAT)
    root = Binary(BinaryOp.ADD, Binary(BinaryOp.MUL, SCORE, param), load_)
    tensors = (Tensor(name, DType.FLOAT32, (Size("H"), Size(name))),)
    hostile = Variant(name, (Parameter(name, Type.FLOAT),), tensors, root, Const(True))
    locations = {root: Span(Source(name, name), 0, 0)}
    for dialect in (TorchDialect(), PythonDialect()):
        written = emit("f", ("s", *PLACE), root, Signature.of(hostile), dialect, locations=locations)
        assert written.isascii()
        (function,) = ast.parse(written).body
        assert isinstance(function, ast.FunctionDef)
        assert all(isinstance(line, ast.Assign | ast.Return) for line in function.body)
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        known = {"s", *PLACE, "torch", "FLOAT", "clip"}
        assert all(n in known or n.startswith(("p_", "n_", "x_", "at_", "t")) for n in names)


def test_names_that_sanitize_alike_stay_apart() -> None:
    taken: set[str] = set()
    assert [identifier("p", name, taken) for name in ("a b", "a_b", "a-b")] == ["p_a_b", "p_a_b_2", "p_a_b_3"]


@pytest.mark.parametrize("value", [0, -3, 2**70, True, 0.1, -0.0, 1e-300, math.inf, -math.inf, math.nan])
def test_a_literal_is_read_back_as_itself(value: bool | int | float) -> None:
    read = eval(text(Const(value), PythonDialect()).split("return ")[1])
    assert repr(read) == repr(value)


def test_parentheses_follow_the_strength_of_operators() -> None:
    assert Text("a + b", Level.SUM).at(Level.PRODUCT) == "(a + b)"
    assert Text("a * b", Level.PRODUCT).at(Level.SUM) == "a * b"
    difference = Binary(BinaryOp.SUB, Q, Binary(BinaryOp.SUB, K, Const(1)))
    assert "q - (k - 1)" in text(difference, PythonDialect())
    power = Binary(BinaryOp.POW, Unary(UnaryOp.NEG, Q), Const(2))
    assert "(-q) ** 2" in text(power, PythonDialect())


def test_the_kv_head_is_spelled_by_the_query_head() -> None:
    assert "h // (n_H // n_HK)" in text(HK, PythonDialect())


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MIN, ReduceOp.MAX])
def test_reductions_are_unrolled_or_looped(op: ReduceOp, count: int) -> None:
    var = Var("d")
    body = Binary(BinaryOp.MUL, Binary(BinaryOp.SUB, var, Const(7)), Q)
    written = text(Reduce(op, var, Const(0), Const(count), body), PythonDialect())
    assert ("for " in written) == (count == 40)
    names: dict[str, object] = {}
    exec(written, names)
    fold = {ReduceOp.SUM: sum, ReduceOp.MIN: min, ReduceOp.MAX: max}[op]
    assert names["f"](0, 0, 5, 0, (1, 1.0, 1, 1, 1, 1, 1, 1, 1), ()) == fold((d - 7) * 5 for d in range(count))  # type: ignore[operator]


def test_a_loop_does_not_overwrite_what_it_uses_again() -> None:
    var = Var("d")
    kept = Binary(BinaryOp.ADD, Load("table", (H, Q), Type.FLOAT), Const(1.0))
    body = Binary(BinaryOp.MUL, kept, Load("table", (H, var), Type.FLOAT))
    root = Reduce(ReduceOp.SUM, var, Const(0), Const(20), body)
    written = text(root, TorchDialect())
    names: dict[str, object] = {"torch": torch, "FLOAT": torch.float64, "clip": lambda i, n: i}
    exec(written, names)
    table = torch.randn(1, 20, dtype=torch.float64)
    h, q = torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.arange(3).view(1, 1, 3, 1)
    found = names["f"](None, h, q, None, (), (table,))  # type: ignore[operator]
    assert torch.allclose(found.view(3), (table[0, :3] + 1) * table.sum())


def test_a_dead_tile_is_overwritten_and_a_shared_one_is_not() -> None:
    cap = Param("cap", Type.FLOAT)
    once = Unary(UnaryOp.TANH, Binary(BinaryOp.DIV, SCORE, cap))
    owned = frozenset[Node]({SCORE})
    assert "tanh_(s.div_(p_cap))" in emit(
        "f", ("s", *PLACE), once, Signature.of(variant(once)), TorchDialect(), owned=owned
    )
    twice = Binary(BinaryOp.MUL, once, SCORE)
    assert "s / p_cap" in emit("f", ("s", *PLACE), twice, Signature.of(variant(twice)), TorchDialect(), owned=owned)


def test_a_division_in_a_branch_not_taken_does_not_fail() -> None:
    window = Param("window", Type.INT)
    divisor = Binary(BinaryOp.SUB, window, Const(1))
    quotient = Binary(BinaryOp.FLOORDIV, Q, divisor)
    shared = Binary(BinaryOp.ADD, quotient, quotient)
    root = Select(Compare(CompareOp.GT, divisor, Const(0)), shared, Const(-1))
    scalars = (1, 1.0, 1, 1, 1, 1, 1, 1)
    for dialect, q in ((PythonDialect(), 5), (TorchDialect(), torch.tensor([5]))):
        names: dict[str, object] = {"torch": torch, "nonzero": nonzero}
        exec(text(root, dialect), names)
        assert int(names["f"](0, 0, q, 0, scalars, ())) == -1  # type: ignore[operator]
        assert int(names["f"](0, 0, q, 0, (3, *scalars[1:]), ())) == 4  # type: ignore[operator]


SHIPPED_INTEGERS = ["natten2d", "sparse_fixed", "dilated_window", "block_diffusion", "longformer"]


@pytest.mark.parametrize("name", SHIPPED_INTEGERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_both_dialects_agree_on_masks(name: str, data: st.DataObject) -> None:
    shipped = load(name)
    parameters = tuple(data.draw(st.integers(1, 9), label=p.name) for p in shipped.parameters)
    signature = Signature.of(shipped)
    scalars = (*parameters, *(64 for _ in signature.scalars[len(parameters) :]))
    names: dict[str, object] = {"torch": torch}
    exec(emit("py", PLACE, shipped.mask, signature, PythonDialect()), names)
    exec(emit("tile", PLACE, shipped.mask, signature, TorchDialect()), names)
    q, k = torch.arange(0, 40).view(-1, 1), torch.arange(3, 50).view(1, -1)
    tile = names["tile"](0, 0, q, k, scalars, ()).expand(40, 47)  # type: ignore[operator]
    for i, j in [(0, 0), (39, 46), (7, 3), (20, 30), (13, 12)]:
        assert bool(tile[i, j]) == bool(names["py"](0, 0, i, j + 3, scalars, ()))  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(x=st.floats(-50, 50), y=st.floats(0.1, 20))
def test_numbers_are_computed_as_ieee_754_says(x: float, y: float) -> None:
    cap = Param("cap", Type.FLOAT)
    quotient = Binary(BinaryOp.DIV, Const(x), Binary(BinaryOp.SUB, cap, cap))  # a division by zero is no exception
    root = Select(Compare(CompareOp.GT, cap, Const(0.0)), Binary(BinaryOp.MUL, SCORE, quotient), SCORE)
    names: dict[str, object] = {"torch": torch, "FLOAT": torch.float64}
    exec(emit("f", ("s", *PLACE), root, Signature.of(variant(root)), TorchDialect()), names)
    s = torch.ones(1, dtype=torch.float64)
    found = names["f"](s, 0, 0, 0, 0, (1, y, 1, 1, 1, 1, 1, 1), ())  # type: ignore[operator]
    expected = torch.tensor(x, dtype=torch.float64) / 0.0
    assert torch.equal(found.isnan(), expected.view(1).isnan()) and (x == 0 or found.item() == expected.item())


def test_indices_have_no_other_names() -> None:
    with pytest.raises(AssertionError):
        Index("import os")
