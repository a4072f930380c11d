"""The portable backend as autograd sees it: one differentiable function of query, key, value, captures and parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_dsl.backend.portable.launch import Call, Kernels, Scalar, backward, forward
from attn_dsl.ir.evaluate import Environment, evaluate


def attention(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    q_offset: int | Tensor,
    sizes: Mapping[str, int],
    parameters: Mapping[str, Scalar | Tensor],
    tensors: Mapping[str, Tensor],
    deterministic: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`(out [B, H, Q, DV], lse [B, H, Q] float32)` of a checked call.

    `parameters` are numbers or tensors of one element, `sizes` holds the extents that captured tensors bind, `options` are
    further fields of `Call`. Differentiable once with respect to query, key, value, float tensors and float parameters
    that are tensors. A batch of keys and values of size 1 is broadcast.
    """
    if key.shape[0] != query.shape[0]:
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    variant = kernels.variant
    call = Call(
        query.detach(),
        key.detach(),
        value.detach(),
        tuple(_detached(parameters[p.name]) for p in variant.parameters),
        tuple(tensors[t.name].detach() for t in variant.tensors),
        tuple(sizes[extent.name] for extent in kernels.extents),
        scale,
        q_offset,
        **options,
    )
    captures = {**tensors, **{name: value for name, value in parameters.items() if isinstance(value, Tensor)}}
    floats = {name: tensor for name, tensor in captures.items() if tensor.is_floating_point()}
    settings = (kernels, call, tuple(floats), deterministic)
    return _Attention.apply(settings, query, key, value, *floats.values())  # type: ignore[no-untyped-call, no-any-return]


def _detached(value: Scalar | Tensor) -> Scalar | Tensor:
    return value.detach() if isinstance(value, Tensor) else value


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Kernels, Call, tuple[str, ...], bool], query: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        kernels, call, _, _ = settings
        out, lse, shifted = forward(kernels, call)
        ctx.settings = (kernels, dataclasses.replace(call, query=None, key=None, value=None), *settings[2:])
        ctx.save_for_backward(call.query, call.key, call.value, out, lse, shifted)
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        kernels, call, names, deterministic = ctx.settings
        query, key, value, out, lse, shifted = ctx.saved_tensors
        call = dataclasses.replace(call, query=query, key=key, value=value)
        wanted = frozenset(name for name, needed in zip(names, ctx.needs_input_grad[4:], strict=True) if needed)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = backward(kernels, call, out, shifted, grad_out, grad_lse, wanted, deterministic=deterministic)
        captured = dict(found.captured)
        if kernels.variant.sink is not None and wanted:
            for name, grad in _sink_gradients(kernels, call, lse, found.delta, wanted).items():
                captured[name] = captured[name] + grad if name in captured else grad
        given = {tensor.name: x for tensor, x in zip(kernels.variant.tensors, call.tensors, strict=True)}
        given.update({p.name: x for p, x in zip(kernels.variant.parameters, call.parameters, strict=True)})
        grads = (_fitted(captured.get(name), given[name]) if name in wanted else None for name in names)
        return None, found.query, found.key, found.value, *grads


def _fitted(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype).reshape(like.shape)


def _sink_gradients(
    kernels: Kernels, call: Call, lse: Tensor, delta: Tensor, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """A sink with probability p takes -p * delta of each row; autograd carries that through the sink's expression."""
    variant = kernels.variant
    assert variant.sink is not None
    batch, heads, kv_heads = call.sizes[:3]
    device = call.query.device
    leaves = {t.name: x for t, x in zip(variant.tensors, call.tensors, strict=True)}
    leaves.update({p.name: x for p, x in zip(variant.parameters, call.parameters, strict=True)})
    inputs = {name: leaves[name].detach().requires_grad_() for name in sorted(wanted)}
    leaves.update(inputs)
    head = torch.arange(heads, device=device).view(1, -1)
    environment = Environment(
        indices={"b": torch.arange(batch, device=device).view(-1, 1), "h": head, "hk": head // (heads // kv_heads)},
        parameters={p.name: leaves[p.name] for p in variant.parameters},
        sizes=dict(zip(("B", "H", "HK", "Q", "KV", "D", *(e.name for e in kernels.extents)), call.sizes, strict=True)),
        tensors={t.name: leaves[t.name] for t in variant.tensors},
        dtype=torch.float32,
        device=device,
    )
    with torch.enable_grad():
        sink = evaluate(variant.sink, environment).expand(batch, heads)
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(sink.detach().unsqueeze(-1) - lse))
        if not sink.requires_grad:
            return {}
        grads = torch.autograd.grad(sink, list(inputs.values()), -(share * delta).sum(-1), allow_unused=True)
    return {name: grad.float() for name, grad in zip(inputs, grads, strict=True) if grad is not None}
