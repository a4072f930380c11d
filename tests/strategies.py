"""Hypothesis strategies for random well-typed expressions, masks, scores and variants.

All of them speak one small vocabulary, so that `bindings()` and `environment()` serve whatever they draw:

    parameters  window: int (>= 1), shift: int, cap: float, gain: float, causal: bool
    tensors     lengths: int32[B], doc: int32[B, KV], slope: float32[H], table: float32[H, N] (N = TABLE)

Indices of look-ups are in range by construction, divisors of `//` and `%` positive, float functions applied inside
their domain: every expression is total, and differentiable wherever it is smooth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from attn_dsl.ir import nodes as ir
from attn_dsl.ir.evaluate import Environment
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Const, Node, ReduceOp, UnaryOp
from attn_dsl.ir.types import DType, Type
from attn_dsl.ir.variant import InRange, Nondecreasing, Parameter, Tensor, Variant

TABLE = 5
SIZES = {"B": 2, "H": 4, "HK": 2, "Q": 5, "KV": 6, "D": 4, "N": TABLE}

PARAMETERS = (
    Parameter("window", Type.INT, 3),
    Parameter("shift", Type.INT),
    Parameter("cap", Type.FLOAT, 2.5),
    Parameter("gain", Type.FLOAT),
    Parameter("causal", Type.BOOL, True),
)
TENSORS = (
    Tensor("lengths", DType.INT32, (ir.Size("B"),), (InRange(Const(0), ir.Size("KV")),)),
    Tensor("doc", DType.INT32, (ir.Size("B"), ir.Size("KV")), (Nondecreasing(1),)),
    Tensor("slope", DType.FLOAT32, (ir.Size("H"),)),
    Tensor("table", DType.FLOAT32, (ir.Size("H"), ir.Size("N"))),
)
WINDOW, SHIFT = ir.Param("window", Type.INT), ir.Param("shift", Type.INT)
CAP, GAIN = ir.Param("cap", Type.FLOAT), ir.Param("gain", Type.FLOAT)
CAUSAL = ir.Param("causal", Type.BOOL)

Draw = Callable[[st.SearchStrategy[Any]], Any]
small = st.integers(-4, 8).map(Const)
positive = st.integers(1, 6).map(Const)
literals = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, -0.0, 1e-3, 3.25]).map(Const)


def _binary(op: str, x: Node, y: Node) -> Node:
    return ir.Binary(BinaryOp(op), x, y)


def _clamped(index: Node, size: int) -> Node:
    return _binary("min", _binary("max", index, Const(0)), Const(size - 1))


@st.composite
def integers(draw: Draw, depth: int = 3) -> Node:
    """INT expressions over `b h hk q k`, sizes, int parameters and int tensors."""
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        leaves = [ir.Q, ir.K, ir.Q, ir.K, ir.B, ir.H, ir.HK, ir.Size("KV"), ir.Size("H"), WINDOW, SHIFT]
        leaves += [ir.Load("lengths", (ir.B,), Type.INT), ir.Load("doc", (ir.B, ir.K), Type.INT)]
        return draw(st.sampled_from(leaves) | small)
    below = integers(depth - 1)
    match draw(
        st.sampled_from(["add", "sub", "mul", "floordiv", "mod", "min", "max", "unary", "select", "cast", "sum"])
    ):
        case "mul":
            return _binary("mul", draw(below), draw(small))
        case "floordiv" | "mod" as op:
            return _binary(op, draw(below), draw(positive | st.just(WINDOW)))
        case "unary":
            return ir.Unary(draw(st.sampled_from([UnaryOp.NEG, UnaryOp.ABS, UnaryOp.SIGN])), draw(below))
        case "select":
            return ir.Select(draw(booleans(depth - 1)), draw(below), draw(below))
        case "cast":
            return ir.Cast(draw(booleans(depth - 1)), Type.INT)
        case "sum":
            return draw(_reductions(depth, below, (ReduceOp.SUM, ReduceOp.MIN, ReduceOp.MAX)))
        case op:
            return _binary(op, draw(below), draw(below))


@st.composite
def booleans(draw: Draw, depth: int = 3) -> Node:
    """BOOL expressions without the incoming score."""
    if depth == 0:
        return draw(st.sampled_from([ir.TRUE, ir.FALSE, CAUSAL, ir.Compare(CompareOp.GE, ir.Q, ir.K)]))
    match draw(st.sampled_from(["compare", "compare", "compare", "float", "and", "or", "not", "select", "any"])):
        case "compare":
            below = integers(depth - 1)
            return ir.Compare(draw(st.sampled_from(CompareOp)), draw(below), draw(below))
        case "float":
            slope = ir.Load("slope", (ir.H,), Type.FLOAT)
            return ir.Compare(draw(st.sampled_from(CompareOp)), slope, draw(literals | st.just(CAP)))
        case "not":
            return ir.Unary(UnaryOp.NOT, draw(booleans(depth - 1)))
        case "select":
            return ir.Select(*(draw(booleans(depth - 1)) for _ in range(3)))
        case "any":
            return draw(_reductions(depth, booleans(depth - 1), (ReduceOp.ANY, ReduceOp.ALL)))
        case op:
            return _binary(op, draw(booleans(depth - 1)), draw(booleans(depth - 1)))


@st.composite
def floats(draw: Draw, depth: int = 3, score: bool = True) -> Node:
    """FLOAT expressions, over the incoming score unless `score` is false; every function stays inside its domain."""
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        leaves = [ir.Load("slope", (ir.H,), Type.FLOAT), CAP, GAIN, *([ir.SCORE] * 3 if score else [])]
        return draw(st.sampled_from(leaves) | literals)
    below = floats(depth - 1, score)
    match draw(
        st.sampled_from(
            ["add", "sub", "mul", "div", "min", "max", "mod", "pow", "unary", "unary", "select", "cast", "load", "sum"]
        )
    ):
        case "div":
            return _binary("div", draw(below), _binary("add", Const(1.0), ir.Unary(UnaryOp.ABS, draw(below))))
        case "mod":
            return _binary(draw(st.sampled_from(["mod", "floordiv"])), draw(below), Const(1.75))
        case "pow":
            base = _binary("add", Const(0.5), ir.Unary(UnaryOp.ABS, draw(below)))
            return _binary("pow", base, draw(literals | st.just(ir.Unary(UnaryOp.TANH, GAIN))))
        case "unary":
            return _function(draw(st.sampled_from(UnaryOp)), draw(below))
        case "select":
            return ir.Select(draw(booleans(depth - 1)), draw(below), draw(below))
        case "cast":
            return ir.Cast(draw(integers(depth - 1)), Type.FLOAT)
        case "load":
            return ir.Load("table", (ir.H, _clamped(draw(integers(depth - 1)), TABLE)), Type.FLOAT)
        case "sum":
            return draw(_reductions(depth, below, (ReduceOp.SUM, ReduceOp.MIN, ReduceOp.MAX)))
        case op:
            return _binary(op, draw(below), draw(below))


def _function(op: UnaryOp, x: Node) -> Node:
    """A float function of `x`, or of what brings `x` into its domain."""
    magnitude = ir.Unary(UnaryOp.ABS, x)
    match op:
        case UnaryOp.SQRT | UnaryOp.RSQRT | UnaryOp.LOG | UnaryOp.LOG2:
            return ir.Unary(op, _binary("add", magnitude, Const(0.5)))
        case UnaryOp.LOG1P:
            return ir.Unary(op, magnitude)
        case UnaryOp.EXP | UnaryOp.EXP2 | UnaryOp.TAN:
            return ir.Unary(op, ir.Unary(UnaryOp.TANH, x))
        case UnaryOp.FLOOR | UnaryOp.CEIL:
            return ir.Cast(ir.Unary(op, _clamp_float(x)), Type.FLOAT)
        case UnaryOp.NOT:
            return ir.Unary(UnaryOp.NEG, x)
        case _:
            return ir.Unary(op, x)


def _clamp_float(x: Node) -> Node:
    return _binary("min", _binary("max", x, Const(-1000.0)), Const(1000.0))


@st.composite
def _reductions(draw: Draw, depth: int, body: st.SearchStrategy[Node], ops: tuple[ReduceOp, ...]) -> Node:
    """A reduction; its variable is named by nesting depth and range, so that a name never stands for two ranges."""
    low = draw(st.integers(-1, 2))
    high = low + draw(st.integers(1, 3))
    var = ir.Var(f"d{depth}_{low + 1}_{high}")
    inner = draw(body)
    if _free(inner):
        inner = ir.substitute(inner, {draw(st.sampled_from([ir.B, ir.K, SHIFT])): var})
    return ir.Reduce(draw(st.sampled_from(ops)), var, Const(low), Const(high), inner)


def _free(node: Node) -> bool:
    """Whether an index may be replaced by a variable: not under a look-up, where it could leave the range."""
    return not any(isinstance(n, ir.Load) and {"b", "k"} & n.depends for n in ir.post_order(node))


@st.composite
def affine(draw: Draw, parameters: bool = True) -> Node:
    """`a q + c k + constant`, with int coefficients and perhaps a parameter, a size or a per-batch length."""
    total: Node = draw(small)
    for leaf in (ir.Q, ir.K):
        factor = draw(st.sampled_from([1, -1, 1, -1, 2, -3, 0]))
        if factor:
            term = leaf if factor == 1 else _binary("mul", leaf, Const(factor))
            total = _binary("add", total, term)
    if parameters and draw(st.booleans()):
        symbol = st.sampled_from([WINDOW, SHIFT, ir.Size("KV"), ir.Load("lengths", (ir.B,), Type.INT), ir.H])
        total = _binary(draw(st.sampled_from(["add", "sub"])), total, draw(symbol))
    return total


@st.composite
def affine_masks(draw: Draw, parameters: bool = True, clauses: int = 3) -> Node:
    """A conjunction of up to `clauses` comparisons of affine expressions."""
    atoms = [
        ir.Compare(draw(st.sampled_from(CompareOp)), draw(affine(parameters)), draw(affine(parameters) | small))
        for _ in range(draw(st.integers(1, clauses)))
    ]
    mask = atoms[0]
    for atom in atoms[1:]:
        mask = _binary("and", mask, atom)
    return mask


masks = booleans
scores = floats


def sinks(depth: int = 2) -> st.SearchStrategy[Node]:
    """FLOAT expressions over `b` and `h` only."""
    return floats(depth, score=False).filter(lambda node: node.depends <= {"b", "h"})


@st.composite
def variants(
    draw: Draw, mask: st.SearchStrategy[Node] | None = None, score: st.SearchStrategy[Node] | None = None
) -> Variant:
    """A variant over the whole vocabulary; `mask` and `score` may be given as strategies."""
    return Variant(
        "random",
        PARAMETERS,
        TENSORS,
        draw(scores() if score is None else score),
        draw(masks() if mask is None else mask),
        draw(st.none() | sinks()),
    )


def bindings(seed: int = 0, sizes: dict[str, int] = SIZES) -> dict[str, Any]:
    """Values for every parameter and tensor of the vocabulary; floats are float64 leaves that require gradients."""
    make = torch.Generator().manual_seed(seed)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_()

    steps = torch.randint(0, 2, (sizes["B"], sizes["KV"]), generator=make)
    return {
        "window": int(torch.randint(1, 5, (), generator=make)),
        "shift": int(torch.randint(-3, 4, (), generator=make)),
        "cap": real(),
        "gain": real(),
        "causal": bool(torch.randint(0, 2, (), generator=make)),
        "lengths": torch.randint(0, sizes["KV"], (sizes["B"],), generator=make),
        "doc": steps.cumsum(1).to(torch.int32),
        "slope": real(sizes["H"]),
        "table": real(sizes["H"], TABLE),
    }


def environment(seed: int = 0, sizes: dict[str, int] = SIZES, q_offset: int = 0) -> Environment:
    """An environment over `[B, H, Q, KV]` for whatever these strategies draw; `score` requires gradients."""
    bound = bindings(seed, sizes)
    make = torch.Generator().manual_seed(seed + 1)
    head = torch.arange(sizes["H"]).view(1, -1, 1, 1)
    shape = (sizes["B"], sizes["H"], sizes["Q"], sizes["KV"])
    return Environment(
        indices={
            "b": torch.arange(sizes["B"]).view(-1, 1, 1, 1),
            "h": head,
            "hk": head // (sizes["H"] // sizes["HK"]),
            "q": torch.arange(sizes["Q"]).view(1, 1, -1, 1) + q_offset,
            "k": torch.arange(sizes["KV"]).view(1, 1, 1, -1),
        },
        parameters={p.name: bound[p.name] for p in PARAMETERS},
        tensors={t.name: bound[t.name] for t in TENSORS},
        sizes=sizes,
        score=(2 * torch.randn(shape, generator=make, dtype=torch.float64)).requires_grad_(),
    )
