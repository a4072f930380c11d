"""The separated score against the score, and the laws of softmax that let terms go."""

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.evaluate import Environment, evaluate
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import SCORE, Binary, BinaryOp, Cast, Const, H, K, Load, Node, Param, Q, Unary, UnaryOp, Var
from attn_dsl.ir.types import Type
from attn_dsl.passes.separate import Affine, separate

ZERO, ONE = Const(0.0), Const(1.0)
SLOPE, Q0 = Load("slope", (H,), Type.FLOAT), Var("q0")


def add(x: Node, y: Node) -> Node:
    return Binary(BinaryOp.ADD, x, y)


def sub(x: Node, y: Node) -> Node:
    return Binary(BinaryOp.SUB, x, y)


def mul(x: Node, y: Node) -> Node:
    return Binary(BinaryOp.MUL, x, y)


def real(x: Node) -> Node:
    return Cast(x, Type.FLOAT)


ALIBI = add(SCORE, mul(SLOPE, real(sub(K, Q))))


def with_origin(env: Environment, q0: int) -> Environment:
    return Environment(**{**vars(env), "variables": {"q0": torch.tensor(q0)}})


@settings(max_examples=200, deadline=None)
@given(strategies.scores(depth=4), st.integers(0, 3), st.integers(0, 9))
def test_the_terms_add_up_to_the_score(score, seed, q0):
    terms = separate(score)
    env = with_origin(strategies.environment(seed), q0)
    whole, loop, dropped = (evaluate(n, env).detach() for n in (score, terms.loop(Q0), terms.dropped(Q0)))
    size = max(float(whole.abs().max()), float(loop.abs().max()), 1.0)
    torch.testing.assert_close(*torch.broadcast_tensors(loop + dropped, whole), rtol=1e-9, atol=1e-9 * size)
    assert terms.dropped(Q0).depends <= {"b", "h", "q", "q0"}
    assert terms.column.depends <= {"b", "h", "k"} and terms.head.depends <= {"b", "h"}
    assert "score" not in terms.coefficient.depends


def test_alibi_leaves_a_column_and_drops_a_row():
    terms = separate(ALIBI)
    assert terms.coefficient is ONE and terms.linear and terms.residual is ZERO
    assert terms.affine == (Affine(SLOPE, -1, 1),)
    assert infix(terms.loop(Q0)) == "score + slope[h] * (k - q0)"
    assert infix(terms.dropped(Q0)) == "slope[h] * (q0 - q)"


def test_a_gate_is_a_coefficient():
    gate = Unary(UnaryOp.SIGMOID, SLOPE)
    assert separate(mul(SCORE, gate)).coefficient is gate


def test_a_factor_of_a_sum_reaches_its_terms():
    terms = separate(mul(add(SCORE, real(Q)), SLOPE))
    assert terms.coefficient is SLOPE and terms.affine == (Affine(SLOPE, 1, 0),)


def test_a_soft_cap_is_not_linear():
    cap = Param("cap", Type.FLOAT)
    capped = mul(cap, Unary(UnaryOp.TANH, Binary(BinaryOp.DIV, SCORE, cap)))
    terms = separate(add(capped, Load("bias", (H, Q), Type.FLOAT)))
    assert not terms.linear and terms.coefficient is ZERO and terms.residual is capped
    assert infix(terms.row) == "bias[h, q]"


def test_opposite_terms_meet():
    terms = separate(sub(add(SCORE, real(K)), real(add(K, Const(3)))))
    assert terms.affine == () and terms.head is Const(-3.0)


def test_what_doubles_at_each_step_stays_small():
    node: Node = add(SCORE, real(K))
    for _ in range(60):
        node = add(node, node)
    terms = separate(node)
    assert len(list(ir.post_order(terms.loop(Q0)))) < 500


@pytest.mark.parametrize("with_sink", [False, True])
def test_softmax_without_the_dropped_terms_is_the_same_with_lse_and_sink_restored(with_sink):
    env = with_origin(strategies.environment(1), 2)
    terms = separate(ALIBI)
    score, loop, dropped = (evaluate(n, env).detach() for n in (ALIBI, terms.loop(Q0), terms.dropped(Q0)))
    sink = torch.full_like(score[..., :1], 0.3 if with_sink else -torch.inf)
    whole, part = (torch.cat([s, t], -1) for s, t in ((score, sink), (loop, sink - dropped)))
    torch.testing.assert_close(part.softmax(-1), whole.softmax(-1))
    torch.testing.assert_close(part.logsumexp(-1) + dropped[..., 0], whole.logsumexp(-1))


def test_the_text_names_each_term():
    assert separate(ALIBI).text().splitlines() == [
        "coefficient  1.0",
        "affine       slope[h] * (k - q)",
    ]
