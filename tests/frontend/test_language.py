"""What each construct means, as IR."""

from __future__ import annotations

import pytest

from attn_dsl.errors import CompileError
from attn_dsl.frontend import load, shipped
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Node, ReduceOp, UnaryOp
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import InRange, Nondecreasing, Parameter, Tensor, Variant

TWO = ir.Const(2)


def variant(*lines: str, header: str = "attention example") -> Variant:
    return load("\n".join([header, *lines]))


def value(expression: str, *lines: str, header: str = "attention example") -> Node:
    """The node of an expression, through a mask that compares it with itself."""
    mask = variant(*lines, f"mask = ({expression}) == ({expression})", header=header).mask
    assert isinstance(mask, ir.Compare)
    return mask.x


def same(first: str, second: str, *lines: str) -> bool:
    return value(first, *lines) is value(second, *lines)


def codes(*lines: str, header: str = "attention example") -> list[str]:
    with pytest.raises(CompileError) as caught:
        variant(*lines, header=header)
    return [d.code for d in caught.value.diagnostics]


def test_defaults_keep_every_pair_and_the_score() -> None:
    v = variant()
    assert (v.name, v.score, v.mask, v.sink, v.tensors, v.parameters) == ("example", ir.SCORE, ir.TRUE, None, (), ())


def test_operators_bind_as_in_python() -> None:
    assert same("q + k * 2", "q + (k * 2)")
    assert same("q - k - 2", "(q - k) - 2")
    assert same("-q ** 2", "-(q ** 2)")
    assert same("2.0 ** q ** 2", "2.0 ** (q ** 2)")
    assert same("2.0 ** -q", "2.0 ** (-q)")
    assert same("q // 2 % 3", "(q // 2) % 3")
    assert same("1 if q > k else 2 if q < k else 3", "1 if q > k else (2 if q < k else 3)")
    assert same("not q > k and q < 3 or k > 4", "((not (q > k)) and (q < 3)) or (k > 4)")


def test_comparisons_chain() -> None:
    assert same("0 <= q - k < 3", "0 <= q - k and q - k < 3")
    assert same("q < k <= 3 != 4", "q < k and k <= 3 and 3 != 4")


def test_ints_become_floats_where_floats_are() -> None:
    assert value("q + 2.5") is ir.Binary(BinaryOp.ADD, ir.Cast(ir.Q, Type.FLOAT), ir.Const(2.5))
    assert value("q / 2").type is Type.FLOAT
    assert value("q // 2").type is Type.INT
    assert value("tanh(q)") is ir.Unary(UnaryOp.TANH, ir.Cast(ir.Q, Type.FLOAT))
    assert variant("score = q").score is ir.Cast(ir.Q, Type.FLOAT)


def test_negative_literals_are_constants() -> None:
    assert value("-3") is ir.Const(-3)
    assert value("-3.5") is ir.Const(-3.5)


def test_clamp_min_and_max_are_binary() -> None:
    assert same("clamp(q, 1, 8)", "min(max(q, 1), 8)")
    assert same("min(q, k, 3)", "min(min(q, k), 3)")


def test_floor_of_an_int_is_itself() -> None:
    assert value("floor(q)") is ir.Q
    assert value("floor(q / 2)").type is Type.INT


def test_casts_are_explicit_functions() -> None:
    assert value("int(q > k)") is ir.Cast(ir.Compare(CompareOp.GT, ir.Q, ir.K), Type.INT)
    assert value("float(q)") is ir.Cast(ir.Q, Type.FLOAT)


def test_powers_of_ints_stay_ints() -> None:
    assert value("q ** 2") is ir.Binary(BinaryOp.POW, ir.Q, TWO)
    assert same("pow(q, 2)", "q ** 2")
    assert value("2.0 ** q").type is Type.FLOAT


def test_a_let_and_a_def_are_inlined() -> None:
    assert same("f(q, 2)", "q + 2 * k", "let shift = k", "def f(x, y) = x + y * shift")
    assert same("f(y=q, x=2)", "2 - q", "def f(x, y) = x - y")
    assert same("twice(twice(q))", "(q + q) + (q + q)", "def twice(x) = x + x")


def test_a_def_is_typed_at_each_call() -> None:
    lines = ["def bigger(x, y) = x if x > y else y"]
    assert value("bigger(q, k)", *lines).type is Type.INT
    assert value("bigger(q, 0.5)", *lines).type is Type.FLOAT


def test_reductions_bind_their_variable() -> None:
    node = value("sum(d in 0..3: q * d)")
    assert isinstance(node, ir.Reduce)
    assert (node.op, node.low, node.high) == (ReduceOp.SUM, ir.Const(0), ir.Const(3))
    assert node.body is ir.Binary(BinaryOp.MUL, ir.Q, node.var)
    assert node.depends == {"q"}


def test_equal_reductions_are_one_node_whatever_their_variable_is_called() -> None:
    node = value("sum(d in 0..3: q * d) - sum(e in 0..3: q * e)")
    assert isinstance(node, ir.Binary)
    assert node.x is node.y


def test_variables_of_nested_and_of_different_reductions_differ() -> None:
    node = value("sum(d in 0..3: f(d)) + sum(d in 0..4: d)", "def f(x) = sum(e in 0..3: x * e)")
    ranges = {}
    for reduce in ir.post_order(node):
        if isinstance(reduce, ir.Reduce):
            inner = {n.var for n in ir.post_order(reduce.body) if isinstance(n, ir.Reduce)}
            assert reduce.var not in inner
            assert ranges.setdefault(reduce.var, reduce.high) is reduce.high
    assert len(ranges) == 3


def test_parameters_have_types_defaults_and_constness() -> None:
    v = variant(header="attention example(a: int, c: float = 2, const n: int = 4 * 8, flag: bool = true)")
    assert v.parameters == (
        Parameter("a", Type.INT),
        Parameter("c", Type.FLOAT, 2.0),
        Parameter("n", Type.INT, 32, const=True),
        Parameter("flag", Type.BOOL, True),
    )
    assert isinstance(v.parameter("c").default, float)


def test_tensors_have_extents_dtypes_and_promises() -> None:
    v = variant(
        "tensor doc: int32[B, N, 2 * reach + 1] nondecreasing over N in [0, KV)", header="attention example(reach: int)"
    )
    reach = ir.Param("reach", Type.INT)
    width = ir.Binary(BinaryOp.ADD, ir.Binary(BinaryOp.MUL, TWO, reach), ir.Const(1))
    promises = (Nondecreasing(1), InRange(ir.Const(0), ir.Size("KV")))
    assert v.tensors == (Tensor("doc", DType.INT32, (ir.Size("B"), ir.Size("N"), width), promises),)


def test_look_ups_nest() -> None:
    lines = ["tensor which: int32[B]", "tensor bias: float32[N, H, KV]"]
    node = value("bias[which[b], h, q // 2]", *lines)
    assert isinstance(node, ir.Load)
    assert node.depends == {"b", "h", "q"}
    assert node.indices[0] is ir.Load("which", (ir.B,), Type.INT)


def test_statements_end_with_their_line_or_a_semicolon_and_go_on_in_brackets() -> None:
    assert same("near", "q < k", "let a = q; let c = k;", "let near = (a", "  <  # why not", "", "c)")


def test_the_comments_on_top_are_the_documentation() -> None:
    assert load("# one\n#   two\n#\n# three\nattention example\n# four\n").doc == "one\ntwo\n\nthree"


def test_every_node_has_the_place_where_it_was_written_first() -> None:
    v = variant("let near = q - k", "mask = near < 8 and near > 2")
    assert set(ir.post_order(*v.roots)) - {ir.SCORE} <= set(v.locations)
    assert v.locations[ir.Binary(BinaryOp.SUB, ir.Q, ir.K)].text == "q - k"
    assert v.locations[v.mask].text == "near < 8 and near > 2"


@pytest.mark.parametrize("name", shipped())
def test_every_node_of_a_shipped_variant_has_a_place(name: str) -> None:
    v = load(name)
    written = set(ir.post_order(*v.roots)) - {ir.SCORE, ir.TRUE}
    assert written <= set(v.locations)


def test_a_part_of_an_import_is_that_variant_with_its_parameters_replaced() -> None:
    v = variant("import sliding_window", "mask = sliding_window.mask(w)", header="attention example(w: int)")
    own = load("sliding_window")
    (parameter,) = own.parameters
    assert v.mask is ir.substitute(own.mask, {ir.Param(parameter.name, Type.INT): ir.Param("w", Type.INT)})


def test_defaults_of_an_import_apply() -> None:
    text = "import sliding_window\nmask = sliding_window.mask({})"
    default = load("sliding_window").parameters[0].default
    if default is None:
        assert codes(text.format("")) == ["E014"]
    else:
        assert variant(text.format("")).mask is variant(text.format(default)).mask


def test_a_parameter_of_an_import_may_vary_by_head() -> None:
    v = variant("import sliding_window", "tensor w: int32[H]", "mask = sliding_window.mask(w[h])")
    assert v.mask.depends == {"q", "k", "h"}


def test_tensors_of_an_import_become_tensors_where_they_are_used() -> None:
    assert variant("import gpt_oss", "sink = gpt_oss.sink()").tensors == load("gpt_oss").tensors
    assert variant("import gpt_oss", "mask = gpt_oss.mask(128)").tensors == ()


def test_extents_of_imported_tensors_follow_the_parameters() -> None:
    v = variant("import t5_bias", "score = t5_bias.score(reach=8)")
    assert [n.value for e in v.tensors[0].extents for n in ir.post_order(e) if isinstance(n, ir.Const)] != []
    assert not any(isinstance(n, ir.Param) for e in v.tensors[0].extents for n in ir.post_order(e))


def test_the_same_tensor_may_be_declared_by_both() -> None:
    v = variant("import gpt_oss", "tensor sinks: float32[H]", "sink = gpt_oss.sink()", "score = score + sinks[h]")
    assert len(v.tensors) == 1


def test_scores_of_imports_compose() -> None:
    v = variant("import softcap, alibi", "score = softcap.score(30.0, score=alibi.score())")
    alibi, cap = load("alibi"), load("softcap")
    (parameter,) = cap.parameters
    values = {ir.Param(parameter.name, Type.FLOAT): ir.Const(30.0), ir.SCORE: alibi.score}
    assert v.score is ir.substitute(cap.score, values)


def test_names_of_reduction_variables_do_not_clash_with_declared_names() -> None:
    v = variant(
        "let a = sum(d in 0..3: d) + sum(d in 0..4: d)", "score = a + d_2", header="attention example(d_2: int = 1)"
    )
    names = {n.name for n in ir.post_order(v.score) if isinstance(n, ir.Var)}
    assert len(names) == 2
    assert "d_2" not in names
