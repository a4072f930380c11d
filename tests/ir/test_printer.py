"""The printed form of the IR and its inverse."""

import math

import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dsl.errors import Source, Span
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.check import MalformedIR, check_variant
from attn_dsl.ir.nodes import SCORE, TRUE, Binary, BinaryOp, Const, H, K, Load, Param, Q
from attn_dsl.ir.parser import IRError, parse_ir, parse_nodes
from attn_dsl.ir.printer import print_ir, print_nodes
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import Parameter, Tensor, Variant

ALIBI = Variant(
    "alibi",
    (Parameter("gain", Type.FLOAT, 0.5), Parameter("r", Type.INT, const=True)),
    (Tensor("slope", DType.FLOAT32, (ir.Size("H"),)),),
    Binary(
        BinaryOp.ADD,
        SCORE,
        Binary(BinaryOp.MUL, Load("slope", (H,), Type.FLOAT), ir.Cast(Binary(BinaryOp.SUB, K, Q), Type.FLOAT)),
    ),
    TRUE,
    doc='Say "no".\n\nOr not.',
)
TEXT = """\
variant alibi
doc "Say \\"no\\"."
doc ""
doc "Or not."
parameter gain: float = 0.5
const parameter r: int
%0 = size H : int
%1 = score : float                      # score
%2 = index h : int                      # h
%3 = load slope[%2] : float             # h
%4 = index k : int                      # k
%5 = index q : int                      # q
%6 = sub %4, %5 : int                   # q k
%7 = cast %6 : float                    # q k
%8 = mul %3, %7 : float                 # h q k
%9 = add %1, %8 : float                 # h q k score
%10 = const true : bool
tensor slope: float32[%0]
score = %9
mask = %10
"""


def test_the_printed_form_shows_types_dependences_and_sharing():
    assert print_ir(ALIBI) == TEXT


def test_locations_stand_in_the_comment():
    source = Source("alibi.attn", "attention alibi\nscore = score\n")
    located = Variant("alibi", (), (), SCORE, TRUE, source=source, locations={SCORE: Span(source, 24, 29)})
    assert "%0 = score : float                      # score       alibi.attn:2:9" in print_ir(located)
    assert "alibi.attn" not in print_ir(located, locations=False)


@settings(max_examples=150, deadline=None)
@given(strategies.variants())
def test_every_variant_reads_back_to_the_same_nodes(variant):
    check_variant(variant)
    again = parse_ir(print_ir(variant))
    assert again == variant
    assert all(x is y for x, y in zip(again.roots, variant.roots, strict=True))


@given(st.text())
def test_every_doc_reads_back(doc):
    variant = Variant("v", (), (), SCORE, TRUE, doc=doc)
    assert parse_ir(print_ir(variant)) == variant


@given(st.floats() | st.integers() | st.booleans())
def test_every_literal_reads_back_exactly(value):
    assert parse_nodes(print_nodes({"x": Const(value)}))["x"] is Const(value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, 5e-324, 1e22, 0.1])
def test_unusual_floats_read_back_exactly(value):
    assert parse_nodes(print_nodes({"x": Const(value)}))["x"] is Const(value)


def test_operators_named_like_nodes_of_other_kinds_read_back():
    d = ir.Var("d")
    low = ir.Reduce(ir.ReduceOp.MIN, d, Const(0), Const(3), Binary(BinaryOp.MIN, d, Param("score", Type.INT)))
    assert parse_nodes(print_nodes({"score": low, "in": d}))["score"] is low


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%0 = const 1 : bool\n", "line 1: 1 is not defined"),
        ("%0 = const 1 : int\n%1 = add %0, %2 : int\n", "line 2: %2 is not defined"),
        ("%0 = const 1 : int\n%1 = sqrt %0 : float\n", "line 2: ill-formed node"),
        ("%0 = const 1 : int\n%0 = const 2 : int\n", "%0 is defined twice"),
        ("%0 = frob %1 : int\n", "line 1"),
        ("%0 == 3", "line 1: not the printed form"),
        ("%0 = index z : int\n", "line 1: ill-formed node: z"),
    ],
)
def test_what_is_not_ir_is_refused_with_its_line(text, message):
    with pytest.raises(IRError, match=message):
        parse_nodes(text)


def test_a_whole_variant_needs_a_header_score_and_mask():
    with pytest.raises(IRError, match="expected `variant NAME`"):
        parse_ir("%0 = score : float\nscore = %0\n")
    with pytest.raises(IRError, match="found score"):
        parse_ir("variant v\n%0 = score : float\nscore = %0\n")


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Variant("v", (), (), Const(1), TRUE), "score is not a float"),
        (Variant("v", (), (), Param("p", Type.FLOAT), TRUE), "parameter `p`: float is not declared"),
        (Variant("v", (), (), ir.Cast(ir.Var("d"), Type.FLOAT), TRUE), "`d` is used outside of its reduction"),
        (Variant("v", (), (), Load("t", (H,), Type.FLOAT), TRUE), "look-up in `t`"),
        (Variant("v", (), (), SCORE, TRUE, sink=SCORE), "sink is not a float over b and h"),
        (Variant("v", (), (), ir.Cast(ir.Size("N"), Type.FLOAT), TRUE), "size `N` is bound by no tensor"),
    ],
)
def test_broken_laws_are_found(broken, law):
    with pytest.raises(MalformedIR, match=law):
        check_variant(broken)
