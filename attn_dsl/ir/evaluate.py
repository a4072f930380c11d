"""The meaning of a variant: a dense evaluator in torch, differentiable by autograd.

Everything else in this package is right when it agrees with `attention` here. It is written to be obviously right,
not fast: it holds whole `[B, H, Q, KV]` tensors and refuses nothing but wrong arguments.

Laws that it fixes:

- Integers are 64-bit; `//` and `%` round toward minus infinity, for integers and floats.
- What is not used has no effect, neither on a value nor on a gradient: a masked pair, the branch of a `Select` that is
  not taken, and what stands behind a decided `and` / `or` (left to right). An index out of range is an `IndexError`
  where it is used and harmless where it is not.
- At a tie `min` and `max` split the gradient evenly, as torch does (`clamp` is made of them); `abs`, `sign` and `relu`
  have derivative 0 at 0.
- A row that sees nothing gives 0; its log-sum-exp is minus infinity or, with a sink, the sink's logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import assert_never

from attn_dsl.errors import BindingError
from attn_dsl.ir import nodes as ir
from attn_dsl.ir.infix import infix
from attn_dsl.ir.nodes import BinaryOp, CompareOp, Node, ReduceOp, UnaryOp
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Variant

Scalar = bool | int | float
_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Environment:
    """What the leaves of an expression stand for. Tensors broadcast against each other.

    indices     int64, by index name: `b h hk q k`
    variables   int64, by name: free `Var` nodes, such as the tile bounds of a schedule
    parameters  scalars or tensors
    sizes       `B H HK Q KV D` and the extents bound by the call
    tensors     the captured tensors, whole
    score       the incoming logit
    dtype       of every float
    """

    indices: Mapping[str, Tensor] = field(default_factory=dict)
    variables: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Scalar | Tensor] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    score: Tensor | None = None
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"


def evaluate(node: Node, env: Environment, active: Tensor | None = None) -> Tensor:
    """The value of one expression, in the shape that its leaves broadcast to (float: `env.dtype`, int64, bool).

    `active` (bool, broadcastable) says where the value is used; elsewhere the result is unspecified and its gradient
    zero. Raises IndexError for a tensor index out of range and ZeroDivisionError for an integer division by zero, where
    the value is used.
    """
    return _Evaluation(node, env).run(active)


def attention(
    variant: Variant,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    q_offset: int | Tensor = 0,
    bindings: Mapping[str, Scalar | Tensor] = _EMPTY,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention by definition: `(out [B, H, Q, DV], lse [B, H, Q])`, both of `dtype`, `lse` a natural logarithm.

    query [B, H, Q, D], key [B, HK, KV, D], value [B, HK, KV, DV], of any float dtype; H is a multiple of HK and query
    head h reads key head `h // (H // HK)`. `scale` is `1 / sqrt(D)` unless given. `q_offset`, an int or an int tensor
    [B], is the absolute position of the first query. `bindings` gives parameters and captured tensors by name.

    Differentiable with respect to query, key, value, float tensors and float parameters. With a `dtype` below float64
    every operation rounds to it: what eager PyTorch would answer, the yardstick of error budgets.
    """
    env = environment(variant, query, key, value, q_offset=q_offset, bindings=bindings, dtype=dtype)
    group = query.shape[1] // key.shape[1]
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    mask = evaluate(variant.mask, env, active=torch.tensor(False, device=query.device))
    mask = evaluate(variant.mask, env, active=mask).expand(shape)  # its own look-ups count where it is true

    # What no pair sees is set to 0, lest an inf or nan in padding meet a zero weight and give nan.
    key = key.to(dtype).repeat_interleave(group, dim=1).masked_fill(~mask.any(dim=2).unsqueeze(-1), 0)
    value = value.to(dtype).repeat_interleave(group, dim=1).masked_fill(~mask.any(dim=2).unsqueeze(-1), 0)
    query = query.to(dtype).masked_fill(~mask.any(dim=3).unsqueeze(-1), 0)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    incoming = (query @ key.transpose(-1, -2)) * scale

    score = evaluate(variant.score, replace(env, score=incoming), active=mask).expand(shape)
    score = torch.where(mask, score, -torch.inf)
    sink = None if variant.sink is None else evaluate(variant.sink, env).expand(*shape[:3], 1).squeeze(-1)
    return _softmax(score, value, sink)


def environment(
    variant: Variant,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_offset: int | Tensor = 0,
    bindings: Mapping[str, Scalar | Tensor] = _EMPTY,
    dtype: torch.dtype = torch.float64,
) -> Environment:
    """The environment of a call over `[B, H, Q, KV]`, without the score; arguments as for `attention`.

    Raises BindingError where an argument is missing, unknown or of the wrong shape.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    if key.shape[0] != batch or value.shape[:3] != key.shape[:3] or key.shape[3] != dim:
        raise BindingError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit"
        )
    if heads % kv_heads:
        raise BindingError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    known = {p.name for p in variant.parameters} | {t.name for t in variant.tensors}
    if unknown := [name for name in bindings if name not in known]:
        raise BindingError(f"`{variant.name}` has no parameter or tensor `{unknown[0]}`")

    device = query.device
    offset = torch.as_tensor(q_offset, device=device).reshape(-1, 1, 1, 1)
    head = torch.arange(heads, device=device).view(1, -1, 1, 1)
    env = Environment(
        indices={
            "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
            "h": head,
            "hk": head // (heads // kv_heads),
            "q": torch.arange(q_len, device=device).view(1, 1, -1, 1) + offset,
            "k": torch.arange(kv_len, device=device).view(1, 1, 1, -1),
        },
        parameters={p.name: _required(bindings, p.name, p.default) for p in variant.parameters},
        sizes={"B": batch, "H": heads, "HK": kv_heads, "Q": q_len, "KV": kv_len, "D": dim},
        tensors={t.name: torch.as_tensor(_required(bindings, t.name, None), device=device) for t in variant.tensors},
        dtype=dtype,
        device=device,
    )
    return _bind_extents(variant, env)


def _required(bindings: Mapping[str, Scalar | Tensor], name: str, default: Scalar | None) -> Scalar | Tensor:
    bound = bindings.get(name, default)
    if bound is None:
        raise BindingError(f"`{name}` is not bound and has no default")
    return bound


def _bind_extents(variant: Variant, env: Environment) -> Environment:
    """Check the shape of each captured tensor; an extent that names no size yet is bound to what it meets first."""
    sizes = dict(env.sizes)
    env = replace(env, sizes=sizes)
    for tensor in variant.tensors:
        shape = env.tensors[tensor.name].shape
        if len(shape) != len(tensor.extents):
            raise BindingError(f"tensor `{tensor.name}` has {len(shape)} axes, expected {len(tensor.extents)}")
        for axis, (extent, size) in enumerate(zip(tensor.extents, shape, strict=True)):
            if isinstance(extent, ir.Size):
                sizes.setdefault(extent.name, size)
            if (expected := int(evaluate(extent, env))) != size:
                raise BindingError(f"axis {axis} of tensor `{tensor.name}` has {size} elements, expected {expected}")
    return env


def _softmax(score: Tensor, value: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis, times `value`; the sink joins the denominator only."""
    peak = score.detach().amax(dim=-1)
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = torch.where(peak == -torch.inf, 0, peak)
    weight = torch.exp(score - peak.unsqueeze(-1))
    total = weight.sum(dim=-1)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, -torch.inf, peak + torch.log(total))
    return (weight / total.unsqueeze(-1)) @ value, lse


class _Evaluation:
    """Two walks over one expression: values everywhere, then floats again with gradients where they are used.

    The first walk runs without autograd and clamps every index, so that it cannot fail. It yields the conditions, from
    which the set of used elements of every node follows, users before operands. The second walk replaces the operands
    of unused elements by 1, where every function of the language is smooth (the double-where trick).
    """

    def __init__(self, root: Node, env: Environment) -> None:
        self.root = root
        self.env = env
        self.order = list(ir.post_order(root))
        leaves = [*env.indices.values(), *env.variables.values(), *env.parameters.values(), env.score]
        self.rank = max(leaf.dim() if isinstance(leaf, Tensor) else 0 for leaf in leaves)
        self.ranges: dict[str, tuple[int, Tensor]] = {}  # variable of a reduction -> its axis (from the right), values

    def run(self, active: Tensor | None) -> Tensor:
        with torch.no_grad():
            values: dict[Node, Tensor] = {}
            self._lay_out_reductions()
            for node in self.order:
                values[node] = self._apply(node, values)
        used = self._used(values, active)
        for node in self.order:
            self._check(node, values, used)
        if torch.is_grad_enabled():
            for node in self.order:
                if node.type is Type.FLOAT:
                    values[node] = self._apply(node, values, used.get(node))
        result = values[self.root]
        return result.reshape(result.shape[max(0, result.dim() - self.rank) :])

    def _lay_out_reductions(self) -> None:
        """Give the variable of each reduction an axis of its own, to the left of all others."""
        for node in self.order:
            if isinstance(node, ir.Reduce):
                low, high = (int(evaluate(bound, self.env)) for bound in (node.low, node.high))
                axis = self.rank + 1 + len(self.ranges)
                span = torch.arange(low, high, device=self.env.device)
                self.ranges.setdefault(node.var.name, (axis, span.view(-1, *[1] * (axis - 1))))

    def _apply(self, node: Node, values: dict[Node, Tensor], used: Tensor | None = None) -> Tensor:
        env = self.env
        match cast(ir.Expr, node):
            case ir.Const(value):
                return torch.tensor(value, dtype=self._dtype(node.type), device=env.device)
            case ir.Param(name, kind):
                given = env.parameters[name]
                if not isinstance(given, Tensor):  # a Python float has more digits than torch's default dtype
                    return torch.tensor(given, dtype=self._dtype(kind), device=env.device)
                return given.to(env.device, self._dtype(kind))
            case ir.Index(name):
                return env.indices[name]
            case ir.Size(name):
                return torch.tensor(env.sizes[name], device=env.device)
            case ir.Var(name):
                return self.ranges[name][1] if name in self.ranges else env.variables[name]
            case ir.Score():
                assert env.score is not None, "the environment has no score"
                return env.score.to(env.dtype)
            case ir.Load(tensor, indices, kind):
                data = env.tensors[tensor]
                at = [values[i].clamp(0, max(size - 1, 0)) for i, size in zip(indices, data.shape, strict=True)]
                return data.to(self._dtype(kind))[tuple(at)]  # gradients of half-precision tables add up in full
            case ir.Unary(op, x):
                if op in (UnaryOp.FLOOR, UnaryOp.CEIL):
                    return _UNARY[op](values[x]).to(torch.int64)
                return _UNARY[op](values[x] if op is UnaryOp.NEG else _guard(values[x], used))
            case ir.Binary(op, x, y):
                if op in (BinaryOp.ADD, BinaryOp.SUB, BinaryOp.AND, BinaryOp.OR):
                    return _BINARY[op](values[x], values[y])
                divisor = _guard(values[y], used)
                if op in (BinaryOp.FLOORDIV, BinaryOp.MOD) and node.type is Type.INT:
                    divisor = torch.where(divisor == 0, 1, divisor)
                return _BINARY[op](_guard(values[x], used), divisor)
            case ir.Compare(op, x, y):
                return _COMPARE[op](values[x], values[y])
            case ir.Select(condition, x, y):
                return torch.where(values[condition], values[x], values[y])
            case ir.Cast(x, kind):
                return values[x].to(self._dtype(kind))
            case ir.Reduce(op, var, _, _, body):
                axis, span = self.ranges[var.name]
                return _reduce(op, self._along(_guard(values[body], used), axis, span.shape[0]), -axis)
            case unreachable:
                assert_never(unreachable)

    def _along(self, body: Tensor, axis: int, length: int) -> Tensor:
        """The body with an axis for the variable of its reduction, even where it does not depend on the variable."""
        shape = [1] * (axis - body.dim()) + list(body.shape)
        body = body.reshape(shape)
        shape[-axis] = length
        return body.expand(shape)

    def _used(self, values: dict[Node, Tensor], active: Tensor | None) -> dict[Node, Tensor]:
        """For each node that anything uses, where its value is used, in the shape of its value."""
        everywhere = torch.ones((), dtype=torch.bool, device=self.env.device)
        used = {self.root: _fit(everywhere if active is None else active, values[self.root].shape)}

        def use(child: Node, where: Tensor) -> None:
            where = _fit(where, values[child].shape)
            used[child] = used[child] | where if child in used else where

        for node in reversed(self.order):
            here = used[node]
            match node:
                case ir.Select(condition, x, y):
                    use(condition, here)
                    use(x, here & values[condition])
                    use(y, here & ~values[condition])
                case ir.Binary(BinaryOp.AND, x, y):
                    use(x, here)
                    use(y, here & values[x])
                case ir.Binary(BinaryOp.OR, x, y):
                    use(x, here)
                    use(y, here & ~values[x])
                case _:
                    for child in node.children:
                        use(child, here)
        return used

    def _check(self, node: Node, values: dict[Node, Tensor], used: dict[Node, Tensor]) -> None:
        match node:
            case ir.Load(tensor, indices):
                for axis, (index, size) in enumerate(zip(indices, self.env.tensors[tensor].shape, strict=True)):
                    wrong = ((values[index] < 0) | (values[index] >= size)) & used[node]
                    if wrong.any():
                        found = int(values[index].expand(wrong.shape)[wrong][0])
                        where = self._place(node, wrong)
                        raise IndexError(
                            f"index {found} is out of range for axis {axis} of `{tensor}` (size {size}){where}"
                        )
            case ir.Binary(BinaryOp.FLOORDIV | BinaryOp.MOD, _, y) if node.type is Type.INT:
                wrong = (values[y] == 0) & used[node]
                if wrong.any():
                    raise ZeroDivisionError(f"`//` or `%` divides by `{infix(y)}`, which is 0{self._place(y, wrong)}")

    def _place(self, node: Node, wrong: Tensor) -> str:
        """The first pair of those that are wrong, by the indices that the node depends on."""
        place = ", ".join(
            f"{name}={int(at.expand(wrong.shape)[wrong][0])}"
            for name, at in self.env.indices.items()
            if name in node.depends
        )
        return f" at {place}" if place else ""

    def _dtype(self, kind: Type) -> torch.dtype:
        match kind:
            case Type.BOOL:
                return torch.bool
            case Type.INT:
                return torch.int64
            case Type.FLOAT:
                return self.env.dtype


def _guard(x: Tensor, used: Tensor | None) -> Tensor:
    """`x` where it is used, 1 elsewhere."""
    return x if used is None else torch.where(used, x, 1)


def _fit(where: Tensor, shape: torch.Size) -> Tensor:
    """A condition in the shape of an operand: true where any element that the operand broadcasts to is."""
    rank = max(where.dim(), len(shape))
    where = where.reshape((1,) * (rank - where.dim()) + tuple(where.shape))
    target = (1,) * (rank - len(shape)) + tuple(shape)
    shrink = tuple(axis for axis in range(rank) if target[axis] == 1 and where.shape[axis] != 1)
    if shrink:
        where = where.any(dim=shrink, keepdim=True)
    return where.expand(target).reshape(shape)


def _reduce(op: ReduceOp, body: Tensor, axis: int) -> Tensor:
    match op:
        case ReduceOp.SUM:
            return body.sum(dim=axis, keepdim=True, dtype=body.dtype)
        case ReduceOp.ANY:
            return body.any(dim=axis, keepdim=True)
        case ReduceOp.ALL:
            return body.all(dim=axis, keepdim=True)
        case ReduceOp.MIN:
            return body.amin(dim=axis, keepdim=True)
        case ReduceOp.MAX:
            return body.amax(dim=axis, keepdim=True)


def _floor_divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


_UNARY: dict[UnaryOp, Callable[[Tensor], Tensor]] = {
    UnaryOp.NEG: torch.neg,
    UnaryOp.NOT: torch.logical_not,
    UnaryOp.ABS: torch.abs,
    UnaryOp.SIGN: torch.sign,
    UnaryOp.FLOOR: torch.floor,
    UnaryOp.CEIL: torch.ceil,
    UnaryOp.SQRT: torch.sqrt,
    UnaryOp.RSQRT: torch.rsqrt,
    UnaryOp.EXP: torch.exp,
    UnaryOp.EXP2: torch.exp2,
    UnaryOp.LOG: torch.log,
    UnaryOp.LOG2: torch.log2,
    UnaryOp.LOG1P: torch.log1p,
    UnaryOp.SIN: torch.sin,
    UnaryOp.COS: torch.cos,
    UnaryOp.TAN: torch.tan,
    UnaryOp.TANH: torch.tanh,
    UnaryOp.ERF: torch.erf,
    UnaryOp.SIGMOID: torch.sigmoid,
    UnaryOp.SILU: torch.nn.functional.silu,
    UnaryOp.RELU: torch.relu,
    UnaryOp.GELU: torch.nn.functional.gelu,
}
_BINARY: dict[BinaryOp, Callable[[Tensor, Tensor], Tensor]] = {
    BinaryOp.ADD: torch.add,
    BinaryOp.SUB: torch.sub,
    BinaryOp.MUL: torch.mul,
    BinaryOp.DIV: torch.div,
    BinaryOp.FLOORDIV: _floor_divide,
    BinaryOp.MOD: torch.remainder,
    BinaryOp.POW: torch.pow,
    BinaryOp.MIN: torch.minimum,
    BinaryOp.MAX: torch.maximum,
    BinaryOp.AND: torch.logical_and,
    BinaryOp.OR: torch.logical_or,
}
_COMPARE: dict[CompareOp, Callable[[Tensor, Tensor], Tensor]] = {
    CompareOp.EQ: torch.eq,
    CompareOp.NE: torch.ne,
    CompareOp.LT: torch.lt,
    CompareOp.LE: torch.le,
    CompareOp.GT: torch.gt,
    CompareOp.GE: torch.ge,
}
