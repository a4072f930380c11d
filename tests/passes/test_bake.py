import pytest

from attn_dsl.errors import BindingError
from attn_dsl.ir.nodes import (
    SCORE,
    TRUE,
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    K,
    Param,
    Q,
    Reduce,
    ReduceOp,
    Var,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter, Variant
from attn_dsl.passes.bake import bake

STRIDE = Param("stride", Type.INT)
STRIDED = Variant(
    "strided",
    (Parameter("stride", Type.INT, const=True), Parameter("reach", Type.INT, default=4)),
    (),
    SCORE,
    Compare(CompareOp.EQ, Binary(BinaryOp.MOD, K, Binary(BinaryOp.MUL, STRIDE, Const(2))), Const(0)),
)


def test_const_parameters_become_literals_and_fold():
    baked = bake(STRIDED, {"stride": 3})
    assert baked.mask is Compare(CompareOp.EQ, Binary(BinaryOp.MOD, K, Const(6)), Const(0))
    assert [p.name for p in baked.parameters] == ["reach"]


def test_run_time_parameters_only_get_a_new_default():
    assert bake(STRIDED, {"stride": 3, "reach": 7}).parameter("reach").default == 7


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({}, "needs a value for const `stride`"),
        ({"stride": 1.0}, r"`stride` is declared int but got 1.0 \(float\)"),
        ({"stride": True}, "`stride` is declared int but got True"),
        ({"strid": 1}, "no parameter `strid`: did you mean `stride`"),
        ({"stride": 0}, r"divides by 0: .* must be positive \(with stride=0\)"),
    ],
)
def test_what_does_not_fit_is_named(constants, message):
    with pytest.raises(BindingError, match=message):
        bake(STRIDED, constants)


def test_an_int_does_for_a_float():
    variant = Variant("v", (Parameter("cap", Type.FLOAT),), (), SCORE, TRUE)
    default = bake(variant, {"cap": 3}).parameter("cap").default
    assert isinstance(default, float) and default == 3.0


@pytest.mark.parametrize(("bound", "message"), [(Q, "must be constant"), (STRIDE, "empty range 0..0")])
def test_reductions_need_constant_bounds_that_hold_something(bound, message):
    reduction = Reduce(ReduceOp.MIN, Var("d"), Const(0), bound, Var("d"))
    mask = Compare(CompareOp.GT, K, reduction)
    variant = Variant("v", (Parameter("stride", Type.INT, default=0, const=True),), (), SCORE, mask)
    with pytest.raises(BindingError, match=message):
        bake(variant)
