"""Attention under the transforms of `torch.func`: grad, vjp, jacrev, vmap, and what is nested of them.

PyTorch's transforms do not differentiate an operator of a library, but do a `Function` like these, around the same two
operators. `vmap` runs its entries one after the other: the kernels have an axis of batches, and what a variant captures
need not. There is no forward mode, and no second derivative: both raise, since PyTorch itself would drop them silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

Outputs = tuple[Tensor, Tensor, Tensor]
NO_FORWARD_MODE = (
    "attention has no forward-mode derivative (jvp, jacfwd, hessian, dual tensors); use backward, grad, vjp or jacrev"
)
NO_BATCHES = (
    "attention has no batched backward pass for `is_grads_batched` and `vectorize`; use jacrev or vmap of torch.func"
)
NO_SECOND = "attention is differentiable once; a second derivative was asked for"


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def watched() -> bool:
    """Whether a mode or a transform wants to see operators."""
    return bool(torch._C._len_torch_dispatch_stack() or transformed())


def refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """Raises NotImplementedError where one of them is a dual tensor."""
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in tensors):
        raise NotImplementedError(NO_FORWARD_MODE)


def _has_tangent(x: Tensor) -> bool:
    return x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def refuse_batches(*grads: Tensor | None) -> None:
    """Raises NotImplementedError where gradients are batched by other means than `torch.func`."""
    if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in grads):
        raise NotImplementedError(NO_BATCHES)


def attention(*arguments: Any) -> Outputs:
    """`attn_dsl::attention`, its arguments in order."""
    leaves, structure = tree_flatten(arguments)
    found: Outputs = _Attention.apply(structure, *leaves)  # type: ignore[no-untyped-call]
    return found


def attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`attn_dsl::attention_backward`, its arguments in order; what it gives has no derivative, and says so."""
    leaves, structure = tree_flatten(arguments)
    query, key, value, *captured = _Backward.apply(structure, *leaves)  # type: ignore[no-untyped-call]
    return query, key, value, captured


class _Looped(torch.autograd.Function):
    """`vmap` as a loop."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[tuple[Tensor, ...], int]:
        entries = [
            cls.apply(*(x if axis is None else x.select(axis, i) for x, axis in zip(inputs, in_dims, strict=True)))  # type: ignore[no-untyped-call]
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(found) for found in zip(*entries, strict=True)), 0

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(NO_FORWARD_MODE)


class _Attention(_Looped):
    @staticmethod
    def forward(structure: Any, *leaves: Any) -> Outputs:
        found: Outputs = torch.ops.attn_dsl.attention(*tree_unflatten(leaves, structure))
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        structure, *leaves = inputs
        ctx.structure, ctx.leaves = structure, [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        ctx.save_for_backward(*output, *(leaves[i] for i in ctx.places))
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Any, ...]:
        out, lse, shifted, *saved = ctx.saved_tensors
        leaves = list(ctx.leaves)
        for place, tensor in zip(ctx.places, saved, strict=True):
            leaves[place] = tensor
        arguments = tree_unflatten(leaves, ctx.structure)
        captured = range(3, 3 + len(arguments[3]) + len(arguments[4]))  # behind query, key and value
        wanted = [bool(ctx.needs_input_grad[1 + i] and leaves[i].is_floating_point()) for i in captured]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        *inputs, found = attention_backward(grad_out, grad_lse, out, lse, shifted, wanted, *arguments)
        given = iter(found)
        others = [next(given) if needed else None for needed in wanted]
        return (None, *inputs, *others, *[None] * (len(leaves) - len(inputs) - len(others)))


class _Backward(_Looped):
    @staticmethod
    def forward(structure: Any, *leaves: Any) -> tuple[Tensor, ...]:
        *inputs, captured = torch.ops.attn_dsl.attention_backward(*tree_unflatten(leaves, structure))
        return (*inputs, *captured)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(NO_SECOND)
